"""Gradient surgery: where the gradients of two losses conflict, each loses its part against the other.

    python examples/pcgrad.py
    torchrun --nproc-per-node 2 examples/pcgrad.py

Two gradients conflict where their inner product is negative: a step along one undoes some of the other. PCGrad takes
from each its projection on the other, and adds what is left. Here that happens on gradients that ZeRO-3 shards:

    losses ──pullback, once for each──▶ g₁, g₂ ──dot, add──▶ g₁ − min(0, g₁·g₂) / |g₂|² g₂  +  the same of g₂

`fz.dot` is one number that all ranks share; the rest happens on each rank's pieces. What to look for is that no
gradient that is applied goes against a task any more. Whether the tasks end better for it is another question: these
two do not.

Source: PCGrad, Yu et al. 2020, arXiv 2001.06782. There the others come in random order; for two there is one order.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from two_tasks import TwoTasks, batch, gradients_of, load, losses_of, measured

import fzero as fz


def surgery(gradients: Sequence[fz.Sharded]) -> fz.Sharded:
    """Return the sum of the gradients, each without its parts against the others."""
    projected = []
    for i, gradient in enumerate(gradients):
        for j, other in enumerate(gradients):
            if i != j:
                against = fz.dot(gradient, other).clamp(max=0) / fz.dot(other, other).clamp(min=1e-30)
                gradient = fz.add(gradient, other, alpha=-against)
        projected.append(gradient)
    return functools.reduce(fz.add, projected)


def agreement(step: fz.Sharded, gradients: Sequence[fz.Sharded]) -> Tensor:
    """Return the smallest inner product of a step with the gradients: below 0, it goes against one of them."""
    return torch.stack([fz.dot(step, gradient) for gradient in gradients]).min()


def train(mesh: fz.Mesh, steps: int, *, operate: bool, ink_weight: float = 1e-4) -> dict[str, Any]:
    """Train on both tasks; return what `measured` says, and how many gradients conflicted and steps did harm."""
    apply, _ = fz.functional(TwoTasks)
    rate = fz.schedules.warmup_cosine(3e-3, warmup=steps // 20, total=steps)
    state = fz.init(TwoTasks, fz.adamw(rate), mesh, fz.zero(3), policy="fp32")
    losses = losses_of(apply)
    data, held_out = load(mesh)

    @fz.jit(donate=(0,))
    def step(state: fz.State, images: Tensor, labels: Tensor) -> tuple[fz.State, Tensor]:
        _, of_task = gradients_of(losses, state, images, labels)
        digit, ink = of_task["digit"], fz.scale(of_task["ink"], ink_weight)  # of about the same size
        gradient = surgery([digit, ink]) if operate else fz.add(digit, ink)
        state, _ = fz.apply_gradients(state, gradient)
        return state, torch.stack([fz.dot(digit, ink), agreement(gradient, [digit, ink])])

    signs = []
    for number in range(steps):
        state, products = step(state, *batch(data, 64, step=number, mesh=mesh))
        signs.append(products < 0)
    conflicts, harmful = torch.stack(signs).sum(0).tolist()
    return {**measured(apply, state, held_out), "conflicts": conflicts, "harmful": harmful}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train with and without surgery, and say how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    mesh = fz.make_mesh()
    found = {}
    for name, operate in (("sum", False), ("surgery", True)):
        found[name] = result = train(mesh, args.steps, operate=operate)
        if mesh.index("data") == 0:
            print(
                f"{name:7} reads {result['read right']:.1%} right, is off by {result['ink off by']:.1f} per mille of "
                f"ink; of {args.steps} steps {result['conflicts']} have gradients that conflict, and the sum goes "
                f"against one of them in {result['harmful']}"
            )
    return found


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
