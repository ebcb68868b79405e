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

from lightning_mpt.kernels.tiling import SCAN_BLOCK
from lightning_mpt.kernels.triton.cross_entropy import BLOCK, OPTIONS
from lightning_mpt.kernels.triton.launch import COMPILE_OPTIONS, TYPES, specialization
from lightning_mpt.kernels.triton.row_losses import gradient_kernel, row_losses_kernel
from lightning_mpt.kernels.triton.scan import scan_kernel
from lightning_mpt.kernels.triton.update import adamw_kernel
from lightning_mpt.storage import MASTER_STORAGES, MOMENT_STORAGES

CAPABILITIES = (80, 90)
POINTERS = {
    "table": "*i64", "gradients": "*i64", "sizes": "*i64", "owners": "*i32", "numbers": "*i32",
    "found_inf": "*fp32", "multiplier_tensor": "*fp32", "squares": "*fp32", "flags": "*fp32",
    "target": "*i64", "losses": "*fp32", "log_sums": "*fp32", "gradient": "*fp32",
    "classes": "i32", "stride": "i32", "ignore_index": "i32", "found_stride": "i32",
}  # fmt: skip
POINTER_TO = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(
    kernel: Any,
    capability: int,
    constants: dict[str, Any],
    others: dict[str, str] | None = None,
    options: dict[str, Any] = COMPILE_OPTIONS,
) -> dict[str, Any]:
    """Registers per thread, bytes of stack (where spilled registers go) and how memory is moved.

    `others` are the types of arguments that are not always the same.
    """
    names, types = kernel.arg_names, {**POINTERS, **(others or {})}
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
            half = {"logits": POINTER_TO[dtype], "result": POINTER_TO[dtype]}
            for kernel in (row_losses_kernel, gradient_kernel):
                constants = {"DTYPE": TYPES[dtype], "BLOCK": BLOCK}
                result = compiled(kernel, capability, constants, half, OPTIONS)
                found.append([capability, str(dtype), kernel.__name__, result])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
