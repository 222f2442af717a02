"""How many instructions an update kernel is on a GPU, counted in what Triton compiles for one; it needs no card.

    python benchmarks/instructions.py                     every kernel, written to benchmarks/results/instructions.json
    python benchmarks/instructions.py --before PATH       an older checkout beside it, in the same run

A program of `fzero.kernels.launch` has 128 threads for its block of elements. Triton's own assembler makes the machine
code for compute capability 9.0, and its own disassembler lists it: instructions in all and for each 8 elements of a
thread, memory accesses by their width, and those that a division or a root takes, which run at an eighth of the rate.
Where memory is read and written at 4.8 TB/s, and 132 multiprocessors issue 4 instructions for 32 threads a cycle at
1.7 GHz, AdamW on bf16, 14 bytes an element, is bound by instructions above some 670 for 8 elements. The whole kernel is
counted, with what comes before its elements, and where there is one the slow way of a division, which few ever take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "0")  # Triton is imported, to compile

HERE = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "instructions.json"

THREADS = 128
# How an optimizer's state may be stored.
BFLOAT, SPLIT = ("*bf16",), ("*bf16", "*i16")
SIGNED, UNSIGNED = ("*i8", "*fp32"), ("*u8", "*fp32")
KERNELS: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "AdamW, bf16": ("adamw", (BFLOAT, BFLOAT, BFLOAT)),
    "AdamW, bf16 with its remainder": ("adamw", (SPLIT, BFLOAT, BFLOAT)),
    "AdamW, 8-bit moments": ("adamw", (BFLOAT, SIGNED, UNSIGNED)),
    "Lion, bf16": ("lion", (BFLOAT, BFLOAT)),
    "Lion, 8-bit momentum": ("lion", (BFLOAT, SIGNED)),
    "SGD with momentum, bf16": ("sgd", (BFLOAT, BFLOAT)),
}


def counted() -> dict[str, dict[str, Any]]:
    """Return, for each kernel of the fzero that is imported here, what its machine code holds."""
    return {name: _counted(*what) for name, what in KERNELS.items()}


def _counted(name: str, state: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    import fzero as fz
    from fzero.kernels.launch import BLOCK, update_one

    optimizer = fz.sgd(1e-3, momentum=0.9) if name == "sgd" else getattr(fz, name)(1e-3)
    found = _listed(compiled(update_one, optimizer.kernel, len(optimizer.numbers), state).asm["cubin"])
    return {"for 8 elements": round(found["instructions"] * 8 * THREADS / BLOCK, 1), **found}


def compiled(kernel: Any, update: Any, numbers: int, state: tuple[tuple[str, ...], ...]) -> Any:
    """Compile an update for compute capability 9.0, its operands aligned as those of an allocator are.

    Args:
        kernel: `update_one` or `update_many` of `fzero.kernels.launch`.
        update: the kernel of an optimizer, such as `fzero.optim.adamw.ADAMW`.
        numbers: how many it takes.
        state: for each value of an element's state the types of its tensors, as Triton names them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fzero.kernels.launch import BLOCKS

    types: dict[str, Any] = {
        "out": state, "state": state, "like": state, "g": "*bf16", "g_like": "*bf16", "scalars": "*fp32",
        "keys": "*i32", "offset": "*i32", "offsets": "*i32", "length": "i64", "table": "*i64", "programs": "*i64",
        "numbers": ("fp32",) * numbers,
    }  # fmt: skip
    constants = {
        "FORMULA": update.kernel,
        "STOCHASTIC": True,
        "SCALARS": update.scalars,
        "ALIGNED": True,
        "COLUMNS": 16,
        "BLOCKS": BLOCKS,
    }
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in ("out", "state"):
            places = [(i, k, j) for k, pair in enumerate(state) for j in range(len(pair))]
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
        elif argument in ("g", "length"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    known = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    source = ASTSource(kernel, signature, known, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})


def _listed(cubin: bytes) -> dict[str, Any]:
    """Return what the machine code of one kernel holds."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    # A line of code:  /*0a30*/  @!P0 LDG.E.128 R4, [R2.64] ;   Behind the last one the section is filled with NOPs.
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    names = [name for name in found if name != "NOP"]
    kinds = Counter(name.split(".")[0] for name in names)
    access = Counter(_width(name) for name in names if name.startswith(("LDG", "STG")))
    return {
        "instructions": len(names),
        "special": kinds["MUFU"],  # reciprocals and roots, of which divisions are made
        "called": kinds["CALL"],  # the slow way of a division, for numbers out of its range
        "global memory by bits": dict(sorted(access.items())),
    }


def _width(name: str) -> int:
    """Return the bits that a load or a store moves for a thread."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((sizes[part] for part in name.split(".") if part in sizes), 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, help="an older checkout")
    parser.add_argument("--only-print", action="store_true", help="print the counts as JSON, and write nothing")
    arguments = parser.parse_args()
    if arguments.only_print:
        print(json.dumps(counted()))
        return
    import torch
    import triton

    folders = {"now": HERE} | ({"before": arguments.before.resolve()} if arguments.before else {})
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"target": "compute capability 9.0", "versions": versions}
    for name, folder in folders.items():
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, "--only-print"]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
    for kernel in KERNELS:
        rows = {name: found[name][kernel] for name in folders}
        print(
            f"{kernel:32}",
            *(f"{name}: {row['for 8 elements']:7} ({row['special']} special in all)" for name, row in rows.items()),
        )
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
