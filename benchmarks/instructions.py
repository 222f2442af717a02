"""How many instructions an update kernel is on a GPU, counted in what Triton compiles for one; it needs no card.

    python benchmarks/instructions.py                     every kernel, written to benchmarks/results/instructions.json
    python benchmarks/instructions.py --before PATH       an older checkout beside it, in the same run

A kernel of `fzero.kernels.launch` works on 1,024 elements with 128 threads, so that its instructions are those of 8
elements. Triton's own assembler makes the machine code for compute capability 9.0, and its own disassembler lists it:
instructions in all, memory accesses by their width, and those that a division or a root takes, which run at a quarter
of the rate or less. Where memory is read and written at 4.8 TB/s, and 132 multiprocessors issue 4 instructions for 32
threads a cycle at 1.7 GHz, AdamW on bf16, 14 bytes an element, is bound by instructions above some 660 for 8 elements.
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

# What an optimizer is called with here, and how its state may be stored.
STATICS: dict[str, tuple[float | bool, ...]] = {
    "adamw": (0.9, 0.999, 1e-8),
    "lion": (0.9, 0.99),
    "sgd": (0.9, False),
}
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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    update, kernel = _update(name)
    numbers = ("fp32",) * len(update.numbers(*STATICS[name]))
    types: dict[str, Any] = {
        "out": state, "state": state, "g": "*bf16", "scalars": "*fp32", "keys": "*i32", "offset": "*i32",
        "length": "i64", "numbers": numbers,
    }  # fmt: skip
    constants = {"FORMULA": update.kernel, "STOCHASTIC": True}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in ("out", "state"):
            places = [(i, k, j) for k, pair in enumerate(state) for j in range(len(pair))]
            attributes |= {place: [["tt.divisibility", 16]] for place in places}
        elif argument in ("g", "length"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    return _listed(made.asm["cubin"])


def _update(name: str) -> tuple[Any, Any]:
    """Return an optimizer's kernel and the launch for one leaf, wherever this version of fzero keeps them."""
    import importlib

    from fzero.kernels.launch import update_one

    return getattr(importlib.import_module(f"fzero.kernels.{name}"), name.upper()), update_one


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
    found: dict[str, Any] = {"target": "compute capability 9.0", "elements a thread": 8, "versions": versions}
    for name, folder in folders.items():
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, "--only-print"]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
    for kernel in KERNELS:
        rows = {name: found[name][kernel] for name in folders}
        print(
            f"{kernel:32}",
            *(f"{name}: {row['instructions']:5} ({row['special']} special)" for name, row in rows.items()),
        )
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
