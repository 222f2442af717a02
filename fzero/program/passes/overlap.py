"""overlap"""

from __future__ import annotations

from fzero.program.options import Options
from fzero.program.trace import Trace


def overlap(trace: Trace, options: Options) -> Trace:
    return trace
