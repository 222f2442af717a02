"""Every exception class of fzero.

Wrong use is a `ValueError` or `TypeError`, or a class of this file that derives from one. Each message
names the call, the path in the tree, what was expected, what came, and the way out.
"""

from __future__ import annotations


class FzeroError(Exception):
    """Base of every exception that fzero defines."""


class MeshError(FzeroError, ValueError):
    """A mesh that cannot exist, or an axis that the mesh does not have."""


class LayoutError(FzeroError, ValueError):
    """A leaf that cannot be laid out as asked, or two trees whose layouts do not pair."""


class PolicyError(FzeroError, ValueError):
    """A precision policy that contradicts itself, or a name that no policy has."""


class TreeError(FzeroError, ValueError):
    """Two trees that should have the same structure and do not."""


class BatchError(FzeroError, ValueError):
    """A batch that cannot be split as asked."""


class ShapeError(FzeroError, ValueError):
    """A tensor whose shape is not what it has to be."""


class CotangentError(FzeroError, ValueError):
    """A cotangent whose structure, shape or dtype is not that of the output."""


class GradientError(FzeroError, ValueError):
    """A gradient that is lost: nothing depends on what is differentiated, or a collective without one is between."""


class ResidualsError(FzeroError, ValueError):
    """Residuals that are not what their backward was traced for."""


class BufferWriteError(FzeroError, RuntimeError):
    """A module wrote one of its buffers where buffers are read-only."""


class ParameterWriteError(FzeroError, RuntimeError):
    """A module or function wrote one of its parameters, which are there to be read."""


class ModuleError(FzeroError, RuntimeError):
    """A module does what cannot be differentiated as a function."""


class RandomOpError(FzeroError, RuntimeError):
    """A random operation that cannot be drawn from a key."""


class DonatedError(FzeroError, RuntimeError):
    """A tensor was read after its memory had been donated to a jitted call."""


class TraceError(FzeroError, RuntimeError):
    """A function that cannot be traced into one program."""


class ProgramMismatchError(FzeroError, RuntimeError):
    """Ranks that should run the same program hold different ones."""


class PeerError(FzeroError, RuntimeError):
    """Another rank raised while this one waited for it in a collective."""
