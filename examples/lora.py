"""Adapt a model whose weights are frozen, sharded and in bfloat16: LoRA, and the memory that it takes.

    python examples/lora.py                                    # a small model learns to write in capitals
    torchrun --nproc-per-node 2 examples/lora.py
    python examples/lora.py --foretell --ranks 8               # what a 7 B model would take on 8 ranks; nothing is run

Beside each linear map of a block stand two thin ones, y = W x + B (A x), and only those are trained. Base and adapters
are two arguments of the step, so each has a policy and a layout of its own:

    base       a `Sharded`: pieces in bfloat16, gathered layer by layer, once for the forward and once for the backward.
               It has no gradient, no moments, no reduction, and no cotangent below the first adapter
    adapters   a `State`: fp32 masters and moments of few parameters, 0.3 % of a 7 B model's

Source: LoRA, Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, PRESETS, Config
from text import Text, standard_library
from torch import Tensor, nn

import fzero as fz

SEVEN_BILLION = Config(width=4096, depth=32, heads=32, vocabulary=32000)


class Adapted(nn.Linear):
    """A linear map without bias, and a low-rank one beside it: `weight` is named as in the base."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


def adapted(model: GPT, rank: int) -> GPT:
    """Replace the linear maps in a model's blocks by adapted ones."""
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Adapted(child.in_features, child.out_features, rank))
    return model


def adapters_of(base: fz.Sharded, rank: int) -> dict[str, Any]:
    """Return adapters that change nothing yet: `a` is random, `b` is zero. Equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for path, shape in zip(base.paths, base.shapes, strict=True):
        if path.startswith("blocks.") and len(shape) == 2:
            outputs, inputs = shape
            name = path.removesuffix(".weight")
            a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            found |= {f"{name}.a": a.to(base.mesh.device), f"{name}.b": torch.zeros(outputs, rank, device=a.device)}
    return fz.tree.nest(found)


def merged(base: Any, adapters: Any) -> Any:
    """Return one nested dict of the leaves of two."""
    if not isinstance(base, dict):
        return base
    return {
        **base,
        **{name: merged(base[name], part) if name in base else part for name, part in adapters.items()},
    }


def next_byte_loss(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def loss_of(config: Config, rank: int) -> Callable[[Any, Any, Tensor], Tensor]:
    """Return `loss(adapters, base, rows)`."""
    apply, _ = fz.functional(lambda: adapted(GPT(config), rank))
    return lambda adapters, base, rows: next_byte_loss(apply(merged(base, adapters), rows[:, :-1]), rows)


def step_of(loss: Callable[[Any, Any, Tensor], Tensor]) -> Callable[..., tuple[fz.State, Tensor]]:
    """Return `step(adapters, base, rows) -> (adapters, loss)`: one update of the adapters."""

    def step(adapters: fz.State, base: fz.Sharded, rows: Tensor) -> tuple[fz.State, Tensor]:
        value, grads = fz.value_and_grad(loss)(adapters, base, rows)
        adapters, _ = fz.apply_gradients(adapters, grads)
        return adapters, value

    return step


def base_state(config: Config, mesh: fz.Mesh) -> fz.State:
    """Return a model to train in full. Its parameters are the base of adapters: `state.params`."""
    return fz.init(
        lambda: GPT(config), fz.adamw(3e-3), mesh, fz.zero(3), fz.policy("bf16", compute="auto", device=mesh.device)
    )


def adapter_state(base: fz.Sharded, rank: int) -> fz.State:
    policy = fz.policy("mixed", compute="auto", device=base.mesh.device)
    return fz.init(adapters_of(base, rank), fz.adamw(1e-2), base.mesh, fz.zero(3), policy)


# ---------------------------------------------------------------------------------------------------------
# What it takes


@dataclass(frozen=True)
class Figures:
    """Bytes that one rank holds."""

    at_rest: int
    peak: int
    by_kind: dict[str, int]
    received: int
    trained: int

    @staticmethod
    def of(program: fz.Program, trained: fz.Sharded) -> Figures:
        memory = program.memory()
        by_kind = {kind: size for kind, size in memory.by_kind.items() if size}
        count = sum(map(math.prod, trained.shapes))
        return Figures(memory.at_rest, memory.peak, by_kind, program.traffic().total, count)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in self.by_kind.items())
        return (
            f"trains {self.trained / 1e6:,.1f} M parameters; at rest {self.at_rest / 2**30:.2f} GiB, at most "
            f"{self.peak / 2**30:.2f} ({kinds}); receives {self.received / 2**30:.1f} GiB a step"
        )


def foretold(config: Config, ranks: int, rank: int, rows: int, tokens: int) -> dict[str, Figures]:
    """Return what one of `ranks` would hold: with adapters, and training all weights. Nothing is run."""
    mesh = fz.make_mesh("cpu", data=ranks, simulate=True)
    batch = torch.empty(rows, tokens + 1, dtype=torch.int64, device="meta")
    full = base_state(config, mesh)
    adapters = adapter_state(full.params, rank)
    options: dict[str, Any] = {"donate": (0,), "remat": "block"}
    lora = fz.trace(step_of(loss_of(config, rank)), **options)(adapters, full.params, batch)
    apply, _ = fz.functional(lambda: GPT(config))
    whole = fz.train_step(lambda params, rows: next_byte_loss(apply(params, rows[:, :-1]), rows), remat="block")
    return {
        "LoRA": Figures.of(lora, adapters.params),
        "all weights": Figures.of(fz.trace(whole)(full, batch), full.params),
    }


# ---------------------------------------------------------------------------------------------------------
# A run


def in_capitals(text: Text) -> Text:
    """Return the text with the letters a to z in upper case."""
    return replace(text, **{k: torch.where((x > 96) & (x < 123), x - 32, x) for k, x in vars(text).items()})


def train(mesh: fz.Mesh, text: Text, config: Config, rank: int, steps: int, base_steps: int) -> dict[str, float]:
    """Train a base on a text, then adapters on the text in capitals; return held-out losses in nats a byte."""
    me, ranks = mesh.index("data"), mesh.size("data")
    apply, _ = fz.functional(lambda: GPT(config))
    state = base_state(config, mesh)
    pretrain = fz.train_step(lambda params, rows: next_byte_loss(apply(params, rows[:, :-1]), rows))
    for number in range(base_steps):
        rows = text.batch(16, 65, seed=0, step=number, rank=me).to(mesh.device)
        state, _ = pretrain(state, rows)

    base, capitals, loss = state.params, in_capitals(text), loss_of(config, rank)
    adapters = adapter_state(base, rank)
    step = fz.jit(step_of(loss), donate=(0,))
    measure = fz.jit(lambda adapters, base, rows: fz.call(loss, adapters, base, rows))

    def held_out(text: Text) -> float:
        rows = text.held_out_rows(32 * ranks, 65)[me::ranks].to(mesh.device)
        return mean_of_ranks(measure(adapters, base, rows))

    before, plain = held_out(capitals), held_out(text)
    for number in range(steps):
        rows = capitals.batch(16, 65, seed=1, step=number, rank=me).to(mesh.device)
        adapters, _ = step(adapters, base, rows)
    return {"plain text, base": plain, "capitals, base": before, "capitals, adapted": held_out(capitals)}


def mean_of_ranks(x: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x.item()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says; return what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; without it, Python's own source")
    parser.add_argument("--model", choices=PRESETS, default="tiny")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--foretell", action="store_true", help="tell the memory of a 7 B model instead")
    parser.add_argument("--ranks", type=int, default=8, help="of the world that --foretell simulates")
    parser.add_argument("--batch", type=int, nargs=2, default=(1, 2048), help="its rows and tokens a rank")
    args = parser.parse_args(argv)
    if args.foretell:
        figures = foretold(SEVEN_BILLION, args.ranks, args.rank, *args.batch)
        for name, found in figures.items():
            print(f"{name:12} {found}")
        return dict(figures)
    mesh = fz.make_mesh()
    text = Text.read(args.data or standard_library())
    losses = train(mesh, text, PRESETS[args.model], args.rank, args.steps, args.base_steps)
    if mesh.index("data") == 0:
        for name, loss in losses.items():
            print(f"{name:18} {loss:.3f} nats a byte")
    return dict(losses)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
