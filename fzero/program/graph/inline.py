"""A trace as part of another one that is being made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import function_modes_off
from fzero.program.graph.loop import record_loop, run_loop
from fzero.program.graph.trace import Trace


def inline(trace: Trace, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a trace, before any pass, on the tensors of an outer trace, which records its operations with their marks."""
    # Each operation keeps the line of the user's code that its node is marked with, and does not get that of this call.
    with function_modes_off():
        results: list[Tensor] = _Inliner(trace.module).run(*inputs)
    return results


class _Inliner(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        if n.target is not run_loop:
            return super().run_node(n)
        # A loop stays one node: its body is a graph of its own.
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        assert not kwargs, "a loop is recorded with positional arguments"
        return record_loop(args, [torch.empty_like(x) for x in n.meta["val"]])
