"""Near names: what somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, names: Iterable[object]) -> str:
    """Return a question after the name that is nearest to one that there is not; nothing where none is near.

    Example:
        >>> nearest("optimiser", ["optimizer", "params"])
        " Did you mean 'optimizer'?"
        >>> nearest("x", ["optimizer", "params"])
        ''
    """
    found = difflib.get_close_matches(str(name), [str(other) for other in names], n=1)
    return f" Did you mean {found[0]!r}?" if found else ""
