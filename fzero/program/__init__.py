"""Programs: a traced step as one graph, its passes, and how it runs."""

from fzero.program.jit import Jitted as Jitted
from fzero.program.jit import jit as jit
from fzero.program.jit import trace as trace
from fzero.program.program import Program as Program
