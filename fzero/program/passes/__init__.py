"""Passes over a traced program: each a pure function from a trace to a trace, in a file of its own.

They run in this order.
"""

from fzero.program.passes.dead import dead
from fzero.program.passes.donate import donate

PASSES = (dead, donate)
