"""From a trace to a program: the passes, in an order of collectives that ranks share, and then a way to run.

What this needs is loaded for the first program, and not by `import fzero`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from fzero.program.agree.order import in_first_order
from fzero.program.graph.trace import Trace, collector_paused
from fzero.program.lower.choose import lowered
from fzero.program.options import Options
from fzero.program.pipeline import run_passes
from fzero.program.program import Program


def made(
    name: str, trace: Trace, options: Options, cause: str, *, runs: bool = True, told: Mapping[str, str] | None = None
) -> Program:
    """Return the program of a trace.

    Args:
        name: of the function.
        trace: as it was made, before all passes.
        options: what the user chose.
        cause: what made it necessary.
        told: what else ranks have to have in common, as text by its name.
        runs: whether it is going to run, and so keeps to the order of collectives of the first program of its name.
    """
    passes = functools.partial(run_passes, trace, options)
    with collector_paused():
        done, stages = in_first_order(name, passes) if runs else passes()
    return Program(name, done, lowered(done, options), cause, stages, told or {})
