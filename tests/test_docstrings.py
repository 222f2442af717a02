"""Every public name says what it is, what it takes, returns and raises, and shows it in a few lines that run."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from typing import Any

import fzero as fz


def public() -> Iterator[tuple[str, Any]]:
    """What `fzero` exports, the functions of its public namespaces, and the methods and properties of its classes."""
    for name in fz.__all__:
        found = getattr(fz, name)
        if isinstance(found, types.ModuleType):
            yield name, found
            own = [n for n, x in vars(found).items() if getattr(x, "__module__", "") == found.__name__]
            yield from (
                (f"{name}.{n}", getattr(found, n)) for n in own if not n.startswith("_") and callable(vars(found)[n])
            )
        elif not name.startswith("__"):
            yield name, found
            if inspect.isclass(found):
                yield from ((f"{name}.{n}", x) for n, x in methods(found))


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, found in vars(cls).items():
        f = found.__func__ if isinstance(found, staticmethod | classmethod) else found
        if not name.startswith("_") and (inspect.isfunction(f) or isinstance(f, property)):
            yield name, f


def section(doc: str, title: str) -> str | None:
    found = re.search(rf"^ *{title}:\n(.*?)(?=^ *[A-Z][a-z]+:\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return None if found is None else found[1]


def lacks(name: str, x: Any) -> Iterator[str]:
    """Yield what a docstring lacks."""
    doc = inspect.cleandoc(x.__doc__ or "") + "\n"
    summary, _, rest = doc.partition("\n")
    if not summary.endswith((".", ":")) or rest[:1] not in ("", "\n"):
        yield "a first line that is a sentence, with a blank line behind it"
    is_class = inspect.isclass(x)
    needs_none = isinstance(x, types.ModuleType) or (is_class and (issubclass(x, Exception) or inspect.isabstract(x)))
    if ("." not in name or name.startswith("schedules.")) and not needs_none and ">>>" not in doc:
        yield "an example"
    if is_class and dataclasses.is_dataclass(x):
        listed = f"{section(doc, 'Attributes')}{section(doc, 'Args')}"
        yield from (f"attribute {f.name}" for f in dataclasses.fields(x) if not mentions(listed, f.name))
    if is_class or isinstance(x, property | types.ModuleType):
        return
    parameters = [p for p in inspect.signature(x).parameters if p not in ("self", "cls")]
    if len(parameters) >= 3:
        arguments = section(doc, "Args") or ""
        yield from (f"argument {p}" for p in parameters if not mentions(arguments, p))
        if section(doc, "Returns") is None and not summary.startswith("Return "):
            yield "what it returns"
        if section(doc, "Raises") is None and "." not in name:
            yield "what it raises"


def mentions(listing: str, name: str) -> bool:
    return re.search(rf"^ *[\w*, ]*\b{name}\b[\w*, ]*:", listing, re.MULTILINE) is not None


def test_public_names_are_documented() -> None:
    found = [f"{name} lacks {what}" for name, x in public() for what in lacks(name, x)]
    assert not found, "\n".join(found)


def test_what_is_public_is_found() -> None:
    names = dict(public())
    assert {"vjp", "State.replace", "Mesh.names", "schedules.wsd", "tree.leaves", "TraceError"} <= names.keys()


def test_what_lacks_is_found() -> None:
    def documented(a: int, b: int, c: int) -> None:
        pass

    documented.__doc__ = "Do something\n\nArgs:\n    a: a number.\n    c: another.\n"
    assert list(lacks("documented", documented)) == [
        "a first line that is a sentence, with a blank line behind it",
        "an example",
        "argument b",
        "what it returns",
        "what it raises",
    ]


def definitions() -> Iterator[tuple[str, Any]]:
    """The public functions and classes of every file, with their public methods and properties."""
    for module in modules():
        for name, found in vars(module).items():
            is_own = (inspect.isfunction(found) or inspect.isclass(found)) and found.__module__ == module.__name__
            if is_own and found.__name__ == name and not name.startswith("_"):
                yield f"{module.__name__}.{name}", found
                # What a protocol asks for is told by the class that has it.
                if inspect.isclass(found) and not getattr(found, "_is_protocol", False):
                    yield from ((f"{module.__name__}.{name}.{n}", getattr(found, n)) for n, _ in methods(found))


def modules() -> Iterator[types.ModuleType]:
    for found in pkgutil.walk_packages(fz.__path__, "fzero."):
        yield importlib.import_module(found.name)


def test_every_public_definition_says_what_it_is() -> None:
    bare = [name for name, x in definitions() if not inspect.getdoc(x)]  # a method has that of what it overrides
    assert not bare, "\n".join(bare)
