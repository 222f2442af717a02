"""Which classes open as trees, and how: what is in an object, and the same kind of object with something else in it.

`dict`, `list`, `tuple`, named tuples and their like are optree's own. Here is what users hand over beside these:

    mappings       of any class: Transformers' BatchEncoding, UserDict, MappingProxyType, subclasses of dict
    attributes     dataclasses, classes of attrs, SimpleNamespace, the key-value caches of Transformers
    torch's        classes that a library has made known to torch, such as Transformers' outputs
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fzero._torch import torch_nodes
from fzero.errors import TreeError


class Node(NamedTuple):
    """How a class opens.

    Attributes:
        flatten: `instance -> (children, static data, names of the children)`.
        unflatten: `(static data, children) -> instance`.
    """

    flatten: Callable[[Any], tuple[Sequence[Any], Any, Sequence[str]]]
    unflatten: Callable[[Any, Sequence[Any]], Any]


def node_of(cls: type) -> Node | None:
    """Return how a class opens; `None` where it does not."""
    if cls in torch_nodes():
        return _as_torch_opens(torch_nodes()[cls])
    return next((make(cls) for opens, make in _OPENERS if opens(cls)), None)


def held_tensors(value: Any, depth: int = 3) -> list[Tensor]:
    """Return tensors in an object that is no tree: in its attributes, or in its items where it is a collection."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType | str | bytes):
        return []
    parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    slots = [name for cls in type(value).__mro__ for name in _listed(vars(cls).get("__slots__", ()))]
    parts += [getattr(value, name) for name in slots if hasattr(value, name)]
    if isinstance(value, Mapping):
        parts += list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        parts += list(value)
    return [tensor for part in parts for tensor in held_tensors(part, depth - 1)]


def _listed(slots: Any) -> Sequence[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _as_torch_opens(node: Any) -> Node:
    def flatten(instance: Any) -> tuple[Sequence[Any], Any, Sequence[str]]:
        children, context = node.flatten_fn(instance)
        names = list(instance) if isinstance(instance, Mapping) else [str(i) for i in range(len(children))]
        return children, _Context(context), names

    return Node(flatten, lambda static, children: node.unflatten_fn(list(children), static.value))


def _as_mapping(cls: type) -> Node:
    """A mapping opens into its items. A dict with attributes keeps those that hold tensors, numbers or strings."""

    def flatten(mapping: Any) -> tuple[Sequence[Any], Any, Sequence[str]]:
        keys, extra, plain = tuple(mapping), {}, {}
        for name, value in _beside(mapping).items():
            if isinstance(value, Tensor | dict | list | tuple) and held_tensors(value):
                extra[name] = value
            elif isinstance(value, _PLAIN):
                plain[name] = value
        names = [str(name) for name in (*keys, *extra)]
        return [mapping[key] for key in keys] + list(extra.values()), (keys, tuple(extra), tuple(plain.items())), names

    def unflatten(static: Any, children: Sequence[Any]) -> Any:
        keys, extra, plain = static
        values = list(children)
        instance = _mapping(cls, dict(zip(keys, values, strict=False)))
        for name, value in (*plain, *zip(extra, values[len(keys) :], strict=True)):
            object.__setattr__(instance, name, value)
        return instance

    return Node(flatten, unflatten)


def _beside(mapping: Any) -> dict[str, Any]:
    """Return the attributes of a mapping that are no place for its items."""
    if not isinstance(mapping, dict | collections.UserDict):
        return {}  # any of its attributes may be that place
    own = {"data"} if isinstance(mapping, collections.UserDict) else set()
    return {name: x for name, x in getattr(mapping, "__dict__", {}).items() if name not in own and name not in mapping}


def _mapping(cls: type, items: dict[Any, Any]) -> Any:
    """Return a mapping of a class with these items, by its constructor where that takes them."""
    try:
        instance: Any = cls(dict(items))
        if list(instance) == list(items) and all(instance[key] is value for key, value in items.items()):
            return instance
    except Exception:
        pass
    if issubclass(cls, dict | collections.UserDict):
        instance = _empty(cls)
        if isinstance(instance, dict):
            dict.update(instance, items)
        else:
            instance.data = dict(items)
        return instance
    raise TreeError(
        f"fz.tree: {cls.__name__} is a mapping whose constructor does not take a dict of its items, so it cannot be "
        f"made again. Pass a dict: dict(mapping)."
    )


def _as_attributes(cls: type) -> Node:
    """An object opens into its attributes: the fields of a dataclass or of attrs, and what else was set on it."""
    if dataclasses.is_dataclass(cls):
        fields = tuple(field.name for field in dataclasses.fields(cls))
    else:
        fields = tuple(field.name for field in getattr(cls, "__attrs_attrs__", ()))

    def flatten(instance: Any) -> tuple[Sequence[Any], Any, Sequence[str]]:
        names = [n for n in dict.fromkeys((*fields, *getattr(instance, "__dict__", ()))) if hasattr(instance, n)]
        return [getattr(instance, n) for n in names], tuple(names), names

    return Node(flatten, lambda names, values: _instance(cls, names, values))


def _instance(cls: type, names: Sequence[str], values: Iterable[Any]) -> Any:
    """Return an object with these attributes; its `__init__`, which may check or count, is not run again."""
    instance = _empty(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance


def _empty(cls: Any) -> Any:
    return cls.__new__(cls)


def _is_cache(cls: type) -> bool:
    """Return whether a class is one of those in which a language model of Transformers hands out keys and values.

    They are plain objects to torch. As leaves they would carry tensors past a pullback and out of a trace.
    """
    return any(base.__module__ == "transformers.cache_utils" for base in cls.__mro__)


class _Context:
    """What torch's registry calls the context of a node: made hashable, so that it can be static data."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.value == other.value

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, type(None))

# Which classes open, and how; the first that fits.
_OPENERS: tuple[tuple[Callable[[type], bool], Callable[[type], Node]], ...] = (
    (lambda cls: issubclass(cls, Mapping), _as_mapping),
    (dataclasses.is_dataclass, _as_attributes),
    (lambda cls: hasattr(cls, "__attrs_attrs__"), _as_attributes),
    (lambda cls: issubclass(cls, types.SimpleNamespace), _as_attributes),
    (_is_cache, _as_attributes),
)
