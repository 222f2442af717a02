"""A program: a traced function ready to run, and to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero._torch import readable
from fzero.program.lower import Lowered
from fzero.program.pipeline import Stage
from fzero.program.trace import Trace


@dataclass(frozen=True, eq=False)
class Program:
    """One traced signature of a function.

    Attributes:
        name: the function's name.
        trace: the graph after all passes.
        run: the graph as a function of its flat inputs, which it empties.
        cause: what made this trace necessary: `"first call"`, or how the arguments differ from the last trace's.
        stages: what each pass bought, in order.
    """

    name: str
    trace: Trace
    run: Lowered
    cause: str
    stages: tuple[Stage, ...] = ()

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Run on flat inputs; return the output's tree."""
        with torch.no_grad():
            return self.trace.output.fill(self.run(inputs))

    def text(self) -> str:
        """Return the graph as readable code, with the shape of every value."""
        return readable(self.trace.module)

    def print(self) -> None:
        """Print the graph as readable code, with the shape of every value."""
        print(self.text())

    def __repr__(self) -> str:
        count = sum(node.op == "call_function" for node in self.trace.module.graph.nodes)
        return f"Program({self.name}: {len(self.trace.inputs)} inputs, {count} operations; {self.cause})"
