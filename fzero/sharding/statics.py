"""What is static in a value, such as an optimizer or a placement: field by field, and as text that ranks compare.

An optimizer that differs between ranks would train them apart: each updates its own pieces, and no collective shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Sequence
from typing import Any

from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import compare, portable
from fzero.sharding.placement import Placement


def fields(value: Any, above: Sequence[Any] = (), name: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the fields of a static value: those of its fields too, and of each dataclass its type first.

    Args:
        value: a dataclass, a `Placement`, or anything else, which is a field by itself.
        above: values that are left out, since they stand further up already.
        name: of the value.

    Returns:
        Pairs of a dotted name and a value.
    """
    if any(value is other for other in above):
        return
    dot = f"{name}." if name else ""
    if isinstance(value, Placement):
        for field in ("mesh", "layout", "policy"):
            yield from fields(getattr(value, field), above, f"{dot}{field}")
        for path, spec in zip(value.paths, value.specs, strict=True):
            yield from fields(spec, above, f"{dot}{path}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and dataclasses.fields(value):
        yield name, type(value)
        for f in dataclasses.fields(value):
            if f.compare:
                yield from fields(getattr(value, f.name), above, f"{dot}{f.name}")
    elif isinstance(value, tuple) and any(dataclasses.is_dataclass(x) for x in value):
        for i, x in enumerate(value):
            yield from fields(x, above, f"{dot}{i}")
    else:
        yield name, value


def text_of(value: Any) -> str:
    """Return a field's value as text: a function by its name, where it stands and its numbers; a class by name.

    The numbers are those that a function closes over, has as defaults, or is given by `functools.partial`. Other values
    are left out: their text may hold what is a rank's own.

    Example:
        >>> text_of(0.5), text_of(Placement)
        ('0.5', 'Placement')
    """
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, set | frozenset):  # whose order differs between processes
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    if isinstance(value, functools.partial):
        given = dict(enumerate(value.args)) | value.keywords
        return f"partial of {text_of(value.func)}{_numbers(given)}"
    code = getattr(value, "__code__", None)
    if code is None:
        return repr(value)
    cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
    closed: dict[Any, Any] = {name: cell.cell_contents for name, cell in cells if _is_set(cell)}
    closed |= dict(enumerate(value.__defaults__ or ())) | (value.__kwdefaults__ or {})
    return f"{value.__name__} ({code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}){_numbers(closed)}"


def _numbers(values: dict[Any, Any]) -> str:
    found = [f"{name}={x!r}" for name, x in values.items() if isinstance(x, int | float)]
    return f" with {', '.join(found)}" if found else ""


def _is_set(cell: types.CellType) -> bool:
    """Whether a name that a function closes over has a value by now."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def told(**values: Any) -> dict[str, str]:
    """Return the fields of some values as text that is the same on every rank if the values are.

    Example:
        >>> told(seed=1, scale=(2, "x"))
        {'seed': '1', 'scale': "(2, 'x')"}
    """
    return {
        f"{name} {field}".strip(): portable(text_of(x)) for name, value in values.items() for field, x in fields(value)
    }


def check_given_alike(call: str, mesh: Mesh, **values: Any) -> None:
    """Raise on every rank if ranks give a call different values: an optimizer, a policy, a layout, a number.

    Raises:
        ProgramMismatchError: they differ; the message names what, and two ranks.
    """
    if mesh.processes is not None:
        texts = told(**values)
        compare(hashlib.sha256(repr((call, texts)).encode()).hexdigest()[:32], call, lambda: texts, list)
