"""Steps to look at as programs: a small transformer-like model, in real and in simulated worlds.

Its leaves are awkward: the head is tied to the embedding, sizes need padding, norms and biases are too small to cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fzero as fz
from fzero.marks import marks_of
from fzero.program.graph.collectives import GATHERS
from fzero.program.graph.trace import Trace, trace_flat
from fzero.program.graph.values import Values
from fzero.program.jit import Jitted
from fzero.program.options import Options
from fzero.program.pipeline import PASSES, applied
from fzero.program.signature import examples_of

VOCABULARY, WIDTH, HIDDEN, DEPTH = 19, 10, 23, 2


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class Model(nn.Module):
    """Tokens to logits."""

    def __init__(self, dropout: float = 0.0, *, remat: bool = False, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.remat = remat

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = fz.remat(block)(x) if self.remat else block(x)
        return F.linear(x, self.embed.weight)


def training(
    mesh: fz.Mesh,
    stage: int,
    *,
    policy: str = "fp32",
    dropout: float = 0.0,
    remat_blocks: bool = False,
    clip: bool = False,
    depth: int = DEPTH,
    **step_options: Any,
) -> tuple[fz.State, Jitted]:
    """A state of the model, and its training step."""
    torch.manual_seed(1)
    apply, whole = fz.functional(Model(dropout, remat=remat_blocks, depth=depth))
    # Of a factory nothing is allocated.
    params: Any = (lambda: Model(dropout, depth=depth)) if mesh.simulated else whole
    optimizer: Any = fz.adamw(1e-2)
    if clip:
        optimizer = fz.chain(fz.clip_by_global_norm(0.5), optimizer)
    state = fz.init(params, optimizer, mesh, fz.zero(stage), policy=policy, seed=3)

    def loss(p: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(apply(p, tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    return state, fz.train_step(loss, **step_options)


def tokens(rank: int = 0, number: int = 0, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randint(VOCABULARY, (rows, 6), generator=generator)


def simulated(ranks: int) -> fz.Mesh:
    return fz.make_mesh("cpu", data=ranks, simulate=True)


def raw(step: Jitted, *args: Any) -> Trace:
    """What a step is before any pass."""
    signature, leaves = step._open(args, {})
    examples = examples_of(leaves, _on(args))
    return trace_flat(step.f, examples, signature.hollow, paths=signature.paths, donated=signature.donated)


def _on(args: Any) -> torch.device | None:
    meshes = [x.mesh for x in fz.tree.leaves(args, is_leaf=_has_mesh) if _has_mesh(x)]
    return next((mesh.device for mesh in meshes if mesh.simulated), None)


def _has_mesh(x: Any) -> bool:
    return isinstance(x, fz.State | fz.Sharded)


def after(name: str, trace: Trace, options: Options) -> Trace:
    """A trace after the passes up to the one of this name."""
    for run in PASSES:
        trace = applied(run, trace, options)
        if run.__name__ == name:
            return trace
    raise ValueError(f"there is no pass {name!r}")


def nodes(trace: Trace) -> list[fx.Node]:
    """The operations of a trace and of the loop bodies in it."""
    inner = [node for body in trace.bodies.values() for node in nodes(body)]
    return [node for node in trace.module.graph.nodes if node.op == "call_function"] + inner


def matmuls(trace: Trace) -> int:
    products = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
    return sum(str(node.target) in products for node in nodes(trace))


def gathers(trace: Trace) -> Counter[str]:
    """How often each leaf is gathered for the function to see."""
    found = [marks_of(node) for node in nodes(trace) if node.target in GATHERS]
    return Counter(leaf for marks in found if marks.role == "gather" for leaf in str(marks.leaf).split(", "))


def text(trace: Trace) -> str:
    """A trace as text, its bodies included."""
    return "\n".join([str(trace.module.graph), *(text(body) for body in trace.bodies.values())])


def misplaced(trace: Trace) -> Iterator[str]:
    """Nodes that stand in front of what they need."""
    seen: set[fx.Node] = set()
    for node in trace.module.graph.nodes:
        yield from (f"{node} needs {source}" for source in node.all_input_nodes if source not in seen)
        seen.add(node)
    for body in trace.bodies.values():
        yield from misplaced(body)


def kept_for_backward(trace: Trace) -> int:
    """The bytes that the forward makes and the backward reads; full leaves do not count."""
    values = Values.of(trace)
    total = 0
    for b, owner in enumerate(values.owner):
        marks = marks_of(owner)
        if owner.op == "call_function" and marks.phase != "backward" and marks.role is None:
            readers = [n for n, reads in values.reads.items() if b in reads]
            total += values.size[b] * any(marks_of(reader).phase == "backward" for reader in readers)
    return total
