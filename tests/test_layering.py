"""The layout of the package: who imports whom, where torch's private names stand, what `__init__` files hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fzero"

# A file imports only from entries above its own. Files on one line are one entry, a folder is one.
HOUSE = [
    "own_thread wrapped nodes tree",
    "calls",
    "display",
    "operators",
    "marks",
    "precision",
    "random",
    "ranks",
    "modules",
    "kernels",
    "sharding",
    "optim",
    "program",
    "autodiff",
    "train",
    "torch_names torch_crossing",
    "torch_api",
]

# The same inside `program`, which has folders of its own.
PROGRAM = [
    "options",
    "graph",
    "agree",
    "report",
    "passes",
    "lower",
    "signature donation failure pipeline program",
    "make",
    "kept",
    "jit",
]

FROM_ANYWHERE = {"errors", "_torch"}

FILES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))
MODULES = {file.with_suffix("").parts for file in FILES if file.name != "__init__.py"}


def level(module: tuple[str, ...]) -> tuple[int, int] | None:
    """Where a module such as ("fzero", "program", "graph", "trace") stands: in the house, and in its part of it."""
    found = []
    for order, name in zip((HOUSE, PROGRAM if module[1:2] == ("program",) else []), module[1:], strict=False):
        if order:
            found += [i for i, line in enumerate(order) if name in line.split()] or [-1]
    return None if -1 in found or not found else (found[0], found[1] if len(found) > 1 else 0)


def source_of(name: str) -> tuple[str, ...] | None:
    """Return the module of fzero that an imported name stands in, or is; the package itself for what it exports."""
    parts = tuple(name.split("."))
    if parts[0] != "fzero":
        return None
    return next((parts[:n] for n in range(len(parts), 1, -1) if parts[:n] in MODULES), ("fzero",))


def imports(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Every import, wherever it stands, as (line, absolute dotted name): `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.parts[: len(file.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)


def wrong_imports(source: str, file: Path) -> list[str]:
    """The imports of a file that do not come from above it, or that import the package itself."""
    own, wrong = level(file.with_suffix("").parts), []
    for line, name in imports(ast.parse(source), file):
        other = source_of(name)
        if other is None or other[1:] in {(name,) for name in FROM_ANYWHERE}:
            continue
        theirs = level(other)
        if own is None or theirs is None or theirs > own:
            wrong.append(f"{file}:{line} imports {name}")
    return wrong


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """The names from which arrows lead back to themselves."""

    def reached(name: str) -> set[str]:
        found, ahead = set[str](), [name]
        while ahead:
            new = arrows.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    return sorted(name for name in arrows if name in reached(name))


def private_names(source: str, file: Path) -> list[str]:
    """The places where a file imports or reaches into a private name of torch. Operators, `torch.ops`, are public."""
    tree = ast.parse(source)
    bound = {"torch": "torch"}  # local name -> what it stands for
    found = list(imports(tree, file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            bound |= {name.asname: module + name.name for name in node.names if name.asname}
            if isinstance(node, ast.ImportFrom) and not node.level:
                bound |= {name.name: module + name.name for name in node.names if not name.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, *rest = ast.unparse(node).split(".")
            found.append((node.lineno, ".".join([bound.get(head, ""), *rest])))
    private = re.compile(r"torch\.(?!ops\.)(\w+\.)*?_(?!\w*__\b)\w*")  # up to the first private part
    hits = {(line, hit.group()) for line, name in found if (hit := private.match(name))}
    return [f"{file}:{line} uses {name}" for line, name in sorted(hits)]


def is_name_only(statement: ast.stmt) -> bool:
    """A docstring, an import, or an assignment to a dunder such as `__all__`."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())) | ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name.startswith("__") and name.endswith("__")
    return False


def test_every_file_has_a_place():
    known = {("fzero", name) for name in FROM_ANYWHERE}
    homeless = [".".join(module) for module in sorted(MODULES - known) if level(module) is None]
    assert not homeless, "add these to HOUSE"


def test_imports_come_from_above():
    files = [file for file in FILES if file.name != "__init__.py"]
    assert not [wrong for file in files for wrong in wrong_imports((PACKAGE.parent / file).read_text(), file)]


def test_no_imports_go_in_a_circle():
    arrows: dict[str, set[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            found = [source_of(name) for _, name in imports(ast.parse((PACKAGE.parent / file).read_text()), file)]
            arrows[str(file)] = {"/".join(other) + ".py" for other in found if other is not None}
    assert not circles(arrows)


def test_private_names_of_torch_stand_in_one_file():
    files = [file for file in FILES if file.name != "_torch.py"]
    assert not [name for file in files for name in private_names((PACKAGE.parent / file).read_text(), file)]


def test_only_the_package_itself_exports_names():
    for file in FILES:
        if file.name == "__init__.py":
            body = ast.parse((PACKAGE.parent / file).read_text()).body
            assert not [f"{file}:{statement.lineno}" for statement in body if not is_name_only(statement)]
            if len(file.parts) > 2:
                assert len(body) == 1, f"{file} holds more than a docstring"


@pytest.mark.parametrize(
    "source, file, count",
    [
        ("from fzero.errors import MeshError", "ranks/mesh.py", 0),
        ("import fzero.tree", "ranks/mesh.py", 0),
        ("from fzero import tree, train", "ranks/mesh.py", 1),
        ("import fzero as fz", "ranks/mesh.py", 1),
        ("from fzero.optim.base import chain", "optim/adamw.py", 0),
        ("from .base import chain", "optim/adamw.py", 0),
        ("from ..train.state import State", "optim/adamw.py", 1),
        ("def f():\n    from fzero.train.state import State", "optim/adamw.py", 1),
        ("from fzero.optim.base import Optimizer", "modules/deferred.py", 1),
        ("from fzero.tree import map", "errors.py", 1),
        ("from fzero.program.graph.trace import Trace", "program/passes/dead.py", 0),
        ("from fzero.program.passes.dead import dead", "program/graph/trace.py", 1),
    ],
)
def test_the_import_check_sees(source, file, count):
    assert len(wrong_imports(source, Path("fzero", file))) == count


@pytest.mark.parametrize(
    "source, count",
    [
        ("import torch\ntorch.nn.functional.gelu, torch.__version__, torch.ops._c10d_functional.wait_tensor", 0),
        ("x.y._hidden", 0),
        ("import torch._dynamo", 1),
        ("from torch.utils import _pytree", 1),
        ("from torch.utils._pytree import tree_map", 1),
        ("import torch.distributed as dist\ndist._functional_collectives", 1),
        ("from torch import distributed\ndistributed._functional_collectives", 1),
        ("import torch\ntorch._C._functorch.is_batchedtensor(1)", 1),
    ],
)
def test_the_private_name_check_sees(source, count):
    assert len(private_names(source, Path("fzero/ranks/mesh.py"))) == count


def test_the_circle_check_sees():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
