"""What traced operations are for: marks that the passes over a program read.

While a function is traced, every node of the graph keeps the marks that stood around the operation that made it.
Outside of a trace marks cost a look at one flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from fzero._torch import get_proxy_mode, storage_id
from fzero.wrapped import source_name, unwrapped

# Where the files of fzero and of torch lie.
OWN = __file__.removesuffix("marks.py")
TORCH = torch.__path__[0] + "/"
# Where a trace begins.
_TRACER = OWN + "program/graph/trace.py"
# Where einops lies, which a function may use.
_EINOPS = str(importlib.util.find_spec("einops").origin).rpartition("/")[0] + "/"  # type: ignore[union-attr]
# Decorators that stand between a call and its body: contexts, and names that torch deprecates.
DECORATORS = (contextlib.__file__, warnings.__file__, str(importlib.util.find_spec("typing_extensions").origin))  # type: ignore[union-attr]
# Frames between an operation and the line that the user wrote.
_SKIPPED = (TORCH, OWN, _EINOPS, *DECORATORS, "<")


# File, line and function of the user's code.
Line = tuple[str, int, str]
# How many pieces a tree has, and where the first and the last come from.
TreeId = tuple[int, str | int, str | int]


@dataclass(frozen=True)
class Marks:
    """What a node of a trace is for.

    Attributes:
        leaf: path of the parameter that is gathered, reduced or updated here; of a bucket, its leaves' with commas.
        tree: what tells its tree from others, see `tree_of`: another model may have the same paths and shapes.
        role: `"gather"`: pieces into a leaf the function sees; `"reduce"`: a gradient into its piece; `"update"`.
        again: of a gather, whether it may be repeated for the backward, as ZeRO-3 does.
        kept: of a gather, that its leaf stays until the backward.
        repeated: that it does again for the backward what the forward did.
        axis: mesh axis of a collective.
        block: the module that the forward runs in: an element of the outermost ModuleList or Sequential.
        phase: `"backward"` inside a pullback.
        cotangent: of what stands for the cotangent of an output, which one.
        line: where the user's code called the operation.
    """

    leaf: str | None = None
    tree: TreeId | None = None
    role: Literal["gather", "reduce", "update"] | None = None
    again: bool = False
    kept: bool = False
    repeated: bool = False
    axis: str | None = None
    block: str | None = None
    phase: Literal["backward"] | None = None
    cotangent: int | None = None
    line: Line | None = None

    def replace(self, **changes: Any) -> Marks:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


_UNMARKED = Marks()
# Where torch keeps what others have to say of a node, and our word in it.
_META, _OURS = "custom", "fzero"


def marks_of(node: fx.Node) -> Marks:
    """Return the marks of a node."""
    return _marks_in(node.meta)


def set_marks(node: fx.Node, marks: Marks) -> None:
    """Give a node these marks in the place of its own."""
    node.meta[_META] = {_OURS: marks}


def line_of(node: fx.Node) -> Line | None:
    """Return file, line and function of the user's code that a node came from, where that is known."""
    return marks_of(node).line


def _marks_in(meta: dict[str, Any]) -> Marks:
    found: Marks = meta.get(_META, {}).get(_OURS, _UNMARKED)
    return found


@contextlib.contextmanager
def _marked(changes: dict[str, Any]) -> Iterator[None]:
    with traceback.annotate({_OURS: _marks_in(traceback.current_meta).replace(**changes)}):
        yield


_NOTHING = contextlib.nullcontext()


def mark(**changes: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context: operations traced inside it carry these marks, over those around it."""
    return _NOTHING if get_proxy_mode() is None else _marked(changes)


def tree_of(pieces: Sequence[Tensor | None]) -> TreeId | None:
    """Return what tells the tree that pieces are of from every other tree in a trace, one with equal paths and shapes.

    These are the nodes that the first and the last piece come from, the same on every rank and in every launch; where
    a function closes over pieces, their memory.
    """
    there = [piece for piece in pieces if piece is not None]
    if get_proxy_mode() is None or not there:
        return None
    first, last = (source_name(piece) or storage_id(unwrapped(piece)) for piece in (there[0], there[-1]))
    return len(there), first, last


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Inside, nodes that are traced keep marks, and the lines of the user's code that they come from."""
    with traceback.preserve_node_meta(), _Lines():
        yield


class _Lines(TorchFunctionMode):
    """Marks each operation with the innermost line that is neither torch's nor fzero's."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mark_line()
        return func(*args, **(kwargs or {}))


def mark_line() -> None:
    """Mark what is traced from here on with the line of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        # Further out is who called the traced function, not what it does.
        frame = None if frame.f_code.co_filename == _TRACER else frame.f_back
    line = None if frame is None else (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
    # A new dict: nodes made before share the old one.
    marks = _marks_in(traceback.current_meta).replace(line=line)
    traceback.current_meta[_META] = {**traceback.current_meta.get(_META, {}), _OURS: marks}


def current_line() -> str:
    """Return the line that `mark_line` marked last, as text: ` (train.py:8 in loss)`; empty where none is known."""
    line = _marks_in(traceback.current_meta).line
    return "" if line is None else f" ({PurePath(line[0]).name}:{line[1]} in {line[2].replace('<locals>.', '')})"


@contextlib.contextmanager
def blocks_marked(module: nn.Module) -> Iterator[None]:
    """Inside a trace, mark what each block of `module` does with the block's name."""
    if get_proxy_mode() is None:
        yield
        return
    handles = []
    inside: list[contextlib.ExitStack] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack = contextlib.ExitStack()
            stack.enter_context(_marked({"block": name}))
            inside.append(stack)

        return hook

    def leave(*_: Any) -> None:
        inside.pop().close()

    for name, block in blocks_of(module):
        handles.append(block.register_forward_pre_hook(enter(name)))
        handles.append(block.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a module with their names: what the outermost lists and sequences hold.

    Only elements with parameters count, and each module once.

    Example:
        >>> [name for name, _ in blocks_of(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])}))]
        ['layers.0']
    """
    found: dict[nn.Module, str] = {}

    def visit(name: str, parent: nn.Module) -> None:
        for key, child in parent.named_children():
            path = f"{name}.{key}" if name else key
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                if next(child.parameters(), None) is not None:
                    found.setdefault(child, path)
            else:
                visit(path, child)

    visit("", module)
    return [(name, block) for block, name in found.items()]
