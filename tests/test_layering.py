"""The layout of the package: who imports whom, where torch's private names stand, what `__init__` files hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fzero"

# A file imports only from entries above its own; a package is one entry. Files on one line are one entry.
ORDER = [
    "nodes",
    "nearest",
    "tree",
    "arguments",
    "chosen",
    "shown",
    "padding",
    "operators",
    "marks",
    "display",
    "rounds",
    "peers",
    "parameters",
    "collectives",
    "axis",
    "mesh",
    "scaling",
    "products",
    "policy",
    "pieces",
    "layout",
    "random",
    "draws",
    "algebra",
    "directions",
    "wide_sums",
    "keyed",
    "replay",
    "recording",
    "deferred",
    "known",
    "looks",
    "surroundings",
    "module_errors",
    "foreign",
    "writes",
    "functional",
    "labels",
    "named",
    "attention",
    "buffers",
    "kernels",
    "program",
    "primal",
    "inner",
    "autodiff",
    "residuals",
    "split",
    "remat",
    "batch",
    "weights",
    "terms",
    "accumulate",
    "optim",
    "cut",
    "fits",
    "state",
    "ema",
    "visualize",
    "torch_names",
    "torch_api",
]
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}
FROM_ANYWHERE = {"errors", "_torch"}

FILES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def entry(file: Path) -> str:
    """The name of a file's entry in `ORDER`: fzero/tree.py -> tree, fzero/optim/adamw.py -> optim."""
    return file.parts[1].removesuffix(".py")


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
    own, wrong = entry(file), []
    for line, name in imports(ast.parse(source), file):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "fzero" or other in FROM_ANYWHERE or (other in LEVEL and other == own):
            continue
        if own in FROM_ANYWHERE or other not in LEVEL or LEVEL[other] > LEVEL.get(own, -1):
            wrong.append(f"{file}:{line} imports {name}")
    return wrong


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
    homeless = [str(file) for file in FILES if entry(file) not in {*LEVEL, *FROM_ANYWHERE, "__init__"}]
    assert not homeless, "add these to ORDER"


def test_imports_come_from_above():
    files = [file for file in FILES if entry(file) != "__init__"]
    assert not [wrong for file in files for wrong in wrong_imports((PACKAGE.parent / file).read_text(), file)]


def test_private_names_of_torch_stand_in_one_file():
    files = [file for file in FILES if file.name != "_torch.py"]
    assert not [name for file in files for name in private_names((PACKAGE.parent / file).read_text(), file)]


def test_init_holds_names_only():
    for file in FILES:
        if file.name == "__init__.py":
            body = ast.parse((PACKAGE.parent / file).read_text()).body
            assert not [f"{file}:{statement.lineno}" for statement in body if not is_name_only(statement)]


@pytest.mark.parametrize(
    "source, file, count",
    [
        ("from fzero.errors import MeshError", "mesh.py", 0),
        ("import fzero.tree", "mesh.py", 0),
        ("from fzero import tree, layout", "mesh.py", 1),
        ("import fzero as fz", "mesh.py", 1),
        ("from fzero.optim.base import chain", "optim/adamw.py", 0),
        ("from .base import chain", "optim/adamw.py", 0),
        ("from ..state import State", "optim/adamw.py", 1),
        ("def f():\n    from fzero.train.state import State", "optim/adamw.py", 1),
        ("from fzero.modules.functional import apply", "deferred.py", 1),
        ("from fzero.tree import map", "errors.py", 1),
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
