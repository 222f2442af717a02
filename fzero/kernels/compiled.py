"""How a kernel's torch reference runs on a CPU: compiled by Inductor's C++ backend, or op by op in chunks.

Compiled, an update is one loop that reads and writes every operand once, several times faster than op by op and equal
to it bit for bit. A reference is compiled once for its dtypes and flags, whatever the length; Inductor keeps the
result on disk, so a later process only loads it. Without a working C++ compiler, and for short operands, the reference
runs op by op on chunks that keep its temporaries small.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fzero import _torch
from fzero.random import signed

logger = logging.getLogger(__name__)

# Below this many elements a compiled call saves less than it is worth to compile.
MIN_COMPILED = 16384
# Elements that op-by-op evaluation holds temporaries of: some 100 MB for AdamW, not 100 bytes for each of a leaf's.
CHUNK = 1 << 20

# The length a reference is traced with. It stands for every other, so it has no factor that a guard could settle on.
EXAMPLE_LENGTH = CHUNK + 7
# Threads are those of the caller when it calls; the compiler runs in this process and leaves no workers behind.
INDUCTOR_SETTINGS = {"cpp.dynamic_threads": True, "compile_threads": 1}

Update = Callable[..., None]
Spec = tuple[torch.dtype, tuple[int, ...]]


def run_in_place(
    update: Update, operands: Sequence[Tensor], constants: Sequence[Tensor], offset: Tensor, **static: Any
) -> None:
    """Call `update(*operands, *constants, offset, **static)` for CPU tensors, the fastest way there is.

    Args:
        update: acts on each element by itself and overwrites some of its operands; plain torch ops, a module-level
            function.
        operands: 1-D, contiguous, of one length.
        constants: small tensors that every element sees.
        offset: int32, 0-d: the index of element 0. A chunk that starts at `i` sees `offset + i`.
        static: hashable; part of the compiled program.
    """
    length = operands[0].numel()
    if length >= MIN_COMPILED:
        dtypes = tuple(operand.dtype for operand in operands)
        specs = tuple((constant.dtype, tuple(constant.shape)) for constant in (*constants, offset))
        program = compiled(update, dtypes, specs, tuple(static.items()))
        if program is not None:
            program(*operands, *constants, offset)
            return
    for start in range(0, length, CHUNK):
        chunk = [operand[start : start + CHUNK] for operand in operands]
        update(*chunk, *constants, offset + signed(start), **static)


@functools.cache
def compiled(
    update: Update, dtypes: tuple[torch.dtype, ...], specs: tuple[Spec, ...], static: tuple[tuple[str, Any], ...]
) -> Update | None:
    """Return `update` compiled for operands of `dtypes`, whatever their length, or None where it cannot be compiled.

    Args:
        update: as in `run_in_place`.
        dtypes: of the operands.
        specs: dtype and shape of each of the other tensors.
        static: names and values of the flags.
    """
    if not _compiler.works:
        return None
    try:
        # Compilation traces. A thread of its own has none of the caller's modes (fake tensors, tracing, autograd).
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_trace_and_compile, update, dtypes, specs, static).result()
    except Exception as error:  # Inductor and the tools under it raise anything
        _compiler.works = False
        logger.warning(
            "fzero.kernels: Inductor could not compile %s for the CPU; kernels run op by op, several times slower. "
            "A C++ compiler with its headers (CXX names it) is what is usually missing. %s: %s",
            update.__name__,
            type(error).__name__,
            error,
        )
        return None


class _Compiler:
    """Whether compiling is worth another try: the first failure is the last, and the only one that is logged."""

    works = True


_compiler = _Compiler()


def _trace_and_compile(
    update: Update, dtypes: tuple[torch.dtype, ...], specs: tuple[Spec, ...], static: tuple[tuple[str, Any], ...]
) -> Update:
    examples = [torch.empty(EXAMPLE_LENGTH, dtype=dtype) for dtype in dtypes]
    examples += [torch.zeros(shape, dtype=dtype) for dtype, shape in specs]

    def flat(*tensors: Tensor) -> tuple[()]:
        update(*tensors, **dict(static))
        return ()

    with torch.no_grad(), warnings.catch_warnings():
        # What torch deprecates in itself is not the user's, and under `-W error` it would end the compilation.
        warnings.simplefilter("ignore")
        graph = _torch.make_fx(flat, tracing_mode="symbolic")(*examples)
        return _torch.standalone_compile(graph, examples, INDUCTOR_SETTINGS)
