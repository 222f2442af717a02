"""The programs that a jitted function keeps, and why a call needed another one.

A call is compared with the program kept that is nearest to it, and told apart path by path: tensors by dtype and
shape, other arguments by their values, and what is static in a node of the tree, such as the optimizer of a state, by
its fields:

    batch.x: float32(8, 16) on cpu -> float32(4, 16) on cpu
    scale: 2.0 -> 3.0
    state.optimizer lr: 0.001 -> 0.0003
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fzero import tree
from fzero.program.program import Program
from fzero.program.signature import Signature
from fzero.ranks.peers import portable
from fzero.sharding.statics import fields, text_of

logger = logging.getLogger(__name__)

# How many changes a report lists, and how many characters of a value.
_LISTED, _WIDTH = 8, 80
# The third trace for a new value of one number says how to have one program for all values: pass a tensor.
_PATIENCE = 3


class Kept:
    """The programs of a function by their signatures: at most `bound`, those used last."""

    def __init__(self, name: str, bound: int):
        self.name, self.bound = name, bound
        self._programs: dict[Signature, Program] = {}  # in the order in which they were made
        self._used: dict[Program, int] = {}
        self._ticks = itertools.count()
        self._numbers: Counter[str] = Counter()
        self._is_told = False

    def __len__(self) -> int:
        return len(self._programs)

    def programs(self) -> tuple[Program, ...]:
        """Return the programs, in the order in which they were made."""
        return tuple(self._programs.values())

    def find(self, signature: Signature) -> Program | None:
        """Return the program of a signature, `None` where none is kept."""
        found = self._programs.get(signature)
        if found is not None:
            self._used[found] = next(self._ticks)
        return found

    def put(self, signature: Signature, program: Program) -> None:
        """Keep a program, and let go of the one that was not used for longest where there are too many."""
        self._programs[signature] = program
        self._used[program] = next(self._ticks)
        if len(self._programs) <= self.bound:
            return
        oldest = min(self._programs, key=lambda kept: self._used[self._programs[kept]])
        del self._used[self._programs.pop(oldest)]
        (logger.info if self._is_told else logger.warning)(
            "fz.jit: %s keeps %d programs, as keep_programs= says, and lets go of the one that was not used for "
            "longest; a call like those that it served is traced again.",
            self.name,
            self.bound,
        )
        self._is_told = True

    def cause(self, signature: Signature) -> str:
        """Return why a signature needs a program of its own."""
        if not self._programs:
            return "first call"
        # Among equals the one used last.
        order = sorted(self._programs, key=lambda kept: self._used[self._programs[kept]], reverse=True)
        nearest = min(order, key=lambda kept: _distance(signature, kept))
        changes = list(changed(nearest, signature))
        lines = [f"{change.path}: {change.before} -> {change.after}" for change in changes[:_LISTED]]
        lines += [f"and {len(changes) - _LISTED} more"] if len(changes) > _LISTED else []
        return "; ".join(lines or ["what is static in the arguments"]) + self._advice(changes)

    def _advice(self, changes: Sequence[Change]) -> str:
        """Return what to do about a number that is another one again and again."""
        (change,) = changes if len(changes) == 1 else (None,)
        if change is None or not change.is_number:
            return ""
        self._numbers[change.path] += 1
        if self._numbers[change.path] < _PATIENCE:
            return ""
        name = change.path.rpartition(" ")[2]
        if change.is_static:
            return (
                f". This is trace {self._numbers[change.path]} for a new {name}: pass a tensor that a function reads, "
                f"such as {name}=lambda step: {name}_tensor, and change its value; or a schedule."
            )
        return (
            f". This is trace {self._numbers[change.path]} for a new number {name}, which is a constant of the "
            f"program: pass a tensor, torch.tensor({name}), and one program serves all of its values."
        )


@dataclasses.dataclass(frozen=True)
class Change:
    """A place at which two calls differ.

    Attributes:
        path: of a leaf, or of a node and, after a blank, the field of what is static in it.
        before: what stood there.
        after: what stands there now.
        is_number: whether both are Python numbers.
        is_static: whether it is a field of a node.
    """

    path: str
    before: str
    after: str
    is_number: bool = False
    is_static: bool = False


def names_of(f: Callable[..., Any]) -> Callable[[int], str]:
    """Return a function from the position of an argument to what `f` calls it, its number where that is not known.

    Example:
        >>> name = names_of(lambda state, *batches: None)
        >>> name(0), name(1), name(2)
        ('state', 'batches.0', 'batches.1')
    """
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        return str
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)

    def name(position: int) -> str:
        if position < len(names):
            return names[position]
        return str(position) if more is None else f"{more}.{position - len(names)}"

    return name


def changed(before: Signature, after: Signature) -> Iterator[Change]:
    """Iterate over the places at which two calls differ, what is static first."""
    told: set[tuple[str, str, str]] = set()
    for path, (old, new) in _pairs(static_fields(before), static_fields(after)):
        if type(old) is type(new) and old == new:
            continue
        if _NOTHING in (old, new) and isinstance(old if new is _NOTHING else new, type):
            continue  # of a dataclass that came or went its fields tell
        texts = _told_apart(old, new)
        # The layout of a state is that of its parameters and moments, too.
        if (line := (path.rpartition(" ")[2], *texts)) not in told:
            told.add(line)
            yield Change(path, *texts, is_number=_is_number(old) and _is_number(new), is_static=True)
    for path, (kind, other) in _pairs(_containers(before), _containers(after)):
        if kind is not other and _NOTHING not in (kind, other):
            yield Change(path, kind.__name__, other.__name__)
    for what, old, new in zip(_AMBIENT, before.ambient, after.ambient, strict=True):
        if old != new:
            yield Change(what, str(old), str(new))
    constants = _constants(before), _constants(after)
    for path, texts in _pairs(before.by_path(), after.by_path()):
        old, new = (None if text is _NOTHING else text for text in texts)
        if old != new:
            is_number = all(_is_number(values.get(path)) for values in constants)
            yield Change(path, _short(old or "nothing"), _short(new or "nothing"), is_number=is_number)


def static_fields(signature: Signature) -> dict[str, Any]:
    """Return what is static in the nodes of the arguments: `path field` to value."""
    structure = signature.hollow.treedef
    nodes = structure.walk([None] * structure.num_leaves, lambda *node: node, lambda leaf: leaf)
    found: dict[str, Any] = {}

    def visit(node: Any, spec: tree.TreeDef, path: tuple[str, ...], above: tuple[Any, ...]) -> None:
        if spec.is_leaf() or node is None:
            return
        type_, data, children = node
        entries = [str(entry) for entry in spec.entries()]
        own: dict[str, Any] = {}
        if data is not None and type_ not in _PLAIN and not isinstance(data, type):
            names = [f.name for f in dataclasses.fields(type_)] if dataclasses.is_dataclass(type_) else []
            names = [name for name in names if name not in entries]
            values = (data,) if len(names) == 1 and not _fits(names, data) else data
            own = dict(zip(names, values, strict=True)) if _fits(names, values) else {"": data}
        where = signature.named(".".join(path))
        for name, value in own.items():
            prefix = f"{where}.{name}" if name else where
            found.update((f"{prefix} {field}".strip(), x) for field, x in fields(value, above))
        for entry, child, below in zip(entries, children, spec.children(), strict=True):
            visit(child, below, (*path, entry), (*above, *own.values()))

    visit(nodes, structure, (), ())
    return found


def _containers(signature: Signature) -> dict[str, Any]:
    """Return the type of each tuple, list, dict and other node of the arguments that holds something, by its path."""
    found: dict[str, Any] = {}

    def visit(spec: tree.TreeDef, path: tuple[str, ...]) -> None:
        if spec.num_leaves and not spec.is_leaf():
            found[signature.named(".".join(path))] = spec.type
            for entry, child in zip(spec.entries(), spec.children(), strict=True):
                visit(child, (*path, str(entry)))

    visit(signature.hollow.treedef, ())
    return found


def told_of(signature: Signature) -> dict[str, str]:
    """Return the optimizers, policies and layouts of states in the arguments as text that ranks compare.

    An optimizer shows in no collective, and the others not always.
    """
    nodes = [(name.partition(" "), value) for name, value in static_fields(signature).items()]
    return {
        f"{where}{blank}{field}": portable(text_of(value))
        for (where, blank, field), value in nodes
        if where.rpartition(".")[2] == "optimizer" or field.partition(".")[0] in ("policy", "layout")
    }


_PLAIN = (tuple, list, dict, OrderedDict, defaultdict, deque, type(None))
_NOTHING = object()
_AMBIENT = ("autocast on a CPU", "autocast on CUDA", "grad mode", "the default dtype", "fz.keyed around the call")


def _fits(names: Sequence[str], data: Any) -> bool:
    return isinstance(data, tuple) and len(names) == len(data)


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for path in dict.fromkeys([*before, *after]):
        yield path, (before.get(path, _NOTHING), after.get(path, _NOTHING))


def _constants(signature: Signature) -> dict[str, Any]:
    paths = map(signature.named, tree.structure_paths(signature.hollow.treedef))
    return dict(zip(paths, signature.hollow.slots, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    before, after = ("nothing" if x is _NOTHING else _short(text_of(x)) for x in (old, new))
    return before, after if before != after else f"another {after}"


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _distance(signature: Signature, other: Signature) -> tuple[int, int]:
    """Return how far two calls are apart: in their leaves, then in how many of them differ."""
    mine, theirs = signature.hollow, other.hollow
    if mine.treedef.num_leaves != theirs.treedef.num_leaves or len(signature.key[2]) != len(other.key[2]):
        return abs(mine.treedef.num_leaves - theirs.treedef.num_leaves) + 1, 0
    places = [*zip(signature.key[1], other.key[1], strict=True), *zip(signature.key[2], other.key[2], strict=True)]
    return 0, sum(a != b for a, b in places) + (mine.treedef != theirs.treedef) + (signature.ambient != other.ambient)
