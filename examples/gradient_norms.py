"""Balance two losses by the norms of their gradients.

    python examples/gradient_norms.py
    torchrun --nproc-per-node 2 examples/gradient_norms.py

One network learns two tasks whose losses differ in size by a factor of ten thousand and more: their sum trains one of
them. Here each gradient is taken by itself, on the parameters that ZeRO-3 shards, and divided by a running average of
its norm. The weights are tensors that each step computes: the step is traced once.

Source: the aim of GradNorm, Chen et al. 2018, arXiv 1711.02257; the weights are set, not learned.
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

Norms = dict[str, Tensor]


def balanced(gradients: dict[str, fz.Sharded], norms: Norms) -> fz.Sharded:
    """Return the sum of the gradients, each divided by its norm."""
    scaled = [fz.scale(gradient, 1 / norms[task].clamp(min=1e-12)) for task, gradient in gradients.items()]
    return functools.reduce(fz.add, scaled)


def averaged(norms: Norms, gradients: dict[str, fz.Sharded], decay: float = 0.9) -> Norms:
    """Return running averages of the norms; those of the first step are taken as they are."""
    now = {task: fz.norm(gradient) for task, gradient in gradients.items()}
    return {task: torch.where(norms[task] == 0, x, decay * norms[task] + (1 - decay) * x) for task, x in now.items()}


def train(mesh: fz.Mesh, steps: int, *, balance: bool) -> dict[str, Any]:
    """Train on both tasks; return what `measured` says of the result, and the last weights."""
    apply, _ = fz.functional(TwoTasks)
    rate = fz.schedules.warmup_cosine(3e-3, warmup=steps // 20, total=steps)
    state = fz.init(TwoTasks, fz.adamw(rate), mesh, fz.zero(3), policy="fp32")
    losses = losses_of(apply)
    data, held_out = load(mesh)

    @fz.jit(donate=(0, 1))
    def step(state: fz.State, norms: Norms, images: Tensor, labels: Tensor) -> tuple[fz.State, Norms]:
        _, gradients = gradients_of(losses, state, images, labels)
        norms = averaged(norms, gradients)
        gradient = balanced(gradients, norms) if balance else functools.reduce(fz.add, gradients.values())
        state, _ = fz.apply_gradients(state, gradient)
        return state, norms

    norms = {task: torch.zeros((), device=mesh.device) for task in ("digit", "ink")}
    for number in range(steps):
        state, norms = step(state, norms, *batch(data, 64, step=number, mesh=mesh))
    return {**measured(apply, state, held_out), "norms": {task: x.item() for task, x in norms.items()}}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train with and without balance, and say how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    mesh = fz.make_mesh()
    found = {}
    for name, balance in (("sum of the losses", False), ("gradients of one norm", True)):
        found[name] = result = train(mesh, args.steps, balance=balance)
        if mesh.index("data") == 0:
            norms = ", ".join(f"{task} {norm:.3g}" for task, norm in result["norms"].items())
            print(
                f"{name:22} reads {result['read right']:.1%} right, is off by {result['ink off by']:.1f} per mille of "
                f"ink; norms of the gradients: {norms}"
            )
    return found


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
