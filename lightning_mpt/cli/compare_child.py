"""What `lightning-mpt compare` starts for each precision: `python -m lightning_mpt.cli.compare_child FOLDER`."""

import sys
from pathlib import Path

from ..precisions import trainer_arguments
from ..profiler.compare.child import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), trainer_arguments)
