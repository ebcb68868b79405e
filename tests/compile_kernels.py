"""Compile the Triton kernels for GPUs that are not here, and print what came of it as JSON.

Started by test_compile.py in a process of its own, since in the tests' process Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_mpt.kernels.triton.launch import COMPILE_OPTIONS, SCAN_BLOCK, TYPES, specialization
from lightning_mpt.kernels.triton.scan import scan_kernel
from lightning_mpt.kernels.triton.update import adamw_kernel
from lightning_mpt.storage import MASTER_STORAGES, MOMENT_STORAGES

CAPABILITIES = (80, 90)
POINTERS = {
    "table": "*i64", "gradients": "*i64", "sizes": "*i64", "owners": "*i32", "numbers": "*i32",
    "found_inf": "*fp32", "multiplier_tensor": "*fp32", "squares": "*fp32", "flags": "*fp32",
}  # fmt: skip
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel: Any, capability: int, constants: dict[str, Any]) -> dict[str, Any]:
    """Registers per thread, bytes of stack (where spilled registers go) and how memory is moved."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=COMPILE_OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", usage.stdout)[1])  # type: ignore[index]
        for field in ("REG", "STACK", "LOCAL")
    )
    moves = Counter(re.findall(r"\b((?:ld|st)\.global(?:\.\w+)+)", result.asm["ptx"]))
    return {"registers": registers, "stack_bytes": stack + local, "moves": dict(moves)}


def main() -> None:
    found = []
    for capability in CAPABILITIES:
        for dtype in (torch.float16, torch.bfloat16):
            for masters in MASTER_STORAGES:
                for moments in MOMENT_STORAGES:
                    constants = {**specialization(dtype, dtype, masters, moments), "lr_tensor": None}
                    result = compiled(adamw_kernel, capability, constants)
                    found.append([capability, str(dtype), f"{masters}, {moments}", result])
            result = compiled(scan_kernel, capability, {"GRADIENT": TYPES[dtype], "BLOCK": SCAN_BLOCK})
            found.append([capability, str(dtype), "scan", result])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
