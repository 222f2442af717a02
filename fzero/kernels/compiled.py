"""How a kernel's torch reference runs on a CPU: compiled by Inductor's C++ backend, or op by op in chunks.

Compiled, an update is one loop that reads and writes every operand once, several times faster than op by op and equal
to it bit for bit. A reference is compiled once for its dtypes and flags, however many rows; Inductor keeps the
result on disk, so a later process only loads it. Without a working C++ compiler the reference runs op by op, on chunks
that keep its temporaries small; so it does for short operands until long ones of the same dtypes have come.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero import _torch
from fzero.own_thread import in_own_thread

logger = logging.getLogger(__name__)

# A call for fewer elements saves less than it is worth to compile: some 0.3 ms. It takes a program that is there.
MIN_COMPILED = 16384
# The symbolic number of rows of a trace stands for this many or more.
MIN_TRACED = 2
# Elements that op-by-op evaluation holds temporaries of: some 100 MB for AdamW, not 100 bytes for each of a leaf's.
CHUNK = 1 << 20

# About how many elements a reference is traced with: 7 rows more than 1,048,576 elements make, so that the number of
# rows, such as 8,199 rows of 128, is no multiple of 2. With 8,192 rows the trace would notice that the number divides
# by 16, and hold for such numbers only.
EXAMPLE_LENGTH = CHUNK
# Threads are those of the caller when it calls; the compiler runs in this process and leaves no workers behind.
INDUCTOR_SETTINGS: dict[str, Any] = {"cpp.dynamic_threads": True, "compile_threads": 1}

Update = Callable[..., None]
Spec = tuple[torch.dtype, tuple[int, ...]]
# What a program is compiled for: the update, its operands but for how many rows they have, its other tensors, names and
# values of its flags.
Key = tuple[Update, tuple[Spec, ...], tuple[Spec, ...], tuple[tuple[str, Any], ...]]


def program_for(
    update: Update, operands: Sequence[Tensor], constants: Sequence[Tensor], **static: Any
) -> Update | None:
    """Return a program that does what `update(*operands, *constants, **static)` does, or None: call it on `chunks`.

    Args:
        update: acts on each row by itself and overwrites some of its operands; plain torch ops, a module-level
            function. It is called with `compiled=True` where it is traced for Inductor, and with `compiled=False`
            op by op: both have to give the same bits.
        operands: CPU tensors, contiguous, equal in their first dimension, that of the rows. Without another dimension
            a row is an element. The first operand has all elements; one with fewer dimensions has something for each
            row.
        constants: small tensors that every element sees, the index of element 0 the last.
        static: hashable; part of the compiled program.
    """
    rows, width = operands[0].shape[0], _width(operands[0].shape[1:])
    varying = tuple((operand.dtype, tuple(operand.shape[1:])) for operand in operands)
    specs = tuple((constant.dtype, tuple(constant.shape)) for constant in constants)
    return _program((update, varying, specs, tuple(static.items())), rows, width)


def chunks(operands: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Cut operands into parts that op-by-op evaluation keeps small; yield the index of a part's first element too."""
    width = _width(operands[0].shape[1:])
    step = -(-CHUNK // width)
    for start in range(0, operands[0].shape[0], step):
        yield start * width, [operand[start : start + step] for operand in operands]


def _width(row: Sequence[int]) -> int:
    """Return how many elements a row of that shape has."""
    return math.prod(row)


# Every program of this process; None where there is none to be had.
_programs: dict[Key, Update | None] = {}


def _program(key: Key, rows: int, width: int) -> Update | None:
    """Return the program for rows of `width`, however many it was compiled for, or None: op by op."""
    if rows < MIN_TRACED:
        return None
    if key not in _programs and rows * width >= MIN_COMPILED:
        _programs[key] = compiled(key)
    return _programs.get(key)


def compiled(key: Key) -> Update | None:
    """Return an update compiled for operands of any length, or None where it cannot be compiled."""
    if not _compiler.works:
        return None
    failure: Exception | None = None
    for settings in _settings():
        try:
            return in_own_thread(functools.partial(_trace_and_compile, key, settings))
        except Exception as error:  # Inductor and the tools under it raise anything
            failure = error
    _compiler.works = False
    logger.warning(
        "fzero.kernels: Inductor could not compile %s for the CPU; kernels run op by op, several times slower. "
        "A C++ compiler with its headers (CXX names it) is what is usually missing. %s: %s",
        key[0].__name__,
        type(failure).__name__,
        failure,
    )
    return None


def _settings() -> list[dict[str, Any]]:
    """Return the settings to try, the fastest program first.

    Inductor reads the bits of a vector of floats element by element, in a loop that it leaves to the C++ compiler, with
    GCC's loop vectorizer switched off. For the 32 elements that AVX-512 takes at once of bfloat16 that loop is most of
    an update. The one setting whose text comes behind that switch on the command line is the architecture; torch
    before 2.13 does not have it, and other compilers may refuse the flag.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or "TORCHINDUCTOR_CPP_MARCH" in os.environ:
        return [INDUCTOR_SETTINGS]
    return [INDUCTOR_SETTINGS | {"cpp.march": "native -ftree-loop-vectorize"}, INDUCTOR_SETTINGS]


class _Compiler:
    """Whether compiling is worth another try: the first failure is the last, and the only one that is logged."""

    works = True


_compiler = _Compiler()


def _trace_and_compile(key: Key, settings: dict[str, Any]) -> Update:
    update, varying, specs, static = key
    rows = EXAMPLE_LENGTH // _width(varying[0][1]) + 7
    examples = [torch.empty(rows, *row, dtype=dtype) for dtype, row in varying]
    examples += [torch.zeros(shape, dtype=dtype) for dtype, shape in specs]

    def flat(*tensors: Tensor) -> tuple[()]:
        for tensor in tensors:
            _ = [int(size) for size in tensor.shape[1:]]  # of all sizes the number of rows alone stays open
        update(*tensors, **dict(static), compiled=True)
        return ()

    with torch.no_grad(), warnings.catch_warnings():
        # What torch deprecates in itself is not the user's, and under `-W error` it would end the compilation.
        warnings.simplefilter("ignore")
        graph = _torch.make_fx(flat, tracing_mode="symbolic")(*examples)
        return _torch.standalone_compile(graph, examples, settings)
