"""How sharply the loss of a small GPT curves while it learns: the largest eigenvalues of its Hessian.

    python examples/curvature.py
    torchrun --nproc-per-node 2 examples/curvature.py --zero 3

The Hessian is never formed. What is needed is its product with a direction, which is forward mode over a gradient: two
gradients' work. Parameters, directions and products stay in pieces on their ranks, and inner products of them are
sums over ranks, so the numbers are those of the loss over all ranks' batches, on any number of ranks.

Source: Hessian eigenvalues by Hessian-vector products, Pearlmutter 1994; by Lanczos' method, Ghorbani, Krishnan and
Xiao 2019, arXiv 1901.10159.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, PRESETS
from text import Text, standard_library
from torch import Tensor

import fzero as fz

Product = Callable[[fz.Sharded], fz.Sharded]


def hessian_product(loss: Callable[..., Tensor]) -> Callable[..., fz.Sharded]:
    """Return `product(params, direction, *batch)`: the Hessian of the mean loss over ranks, times a direction.

    Args:
        loss: `loss(params, *batch) -> scalar`, of full parameters and one rank's batch, twice differentiable.
    """

    @fz.jit
    def product(params: fz.Sharded, direction: fz.Sharded, *batch: Any) -> fz.Sharded:
        _, curved, *_ = torch.func.jvp(lambda p: fz.grad(loss)(p, *batch), (params,), (direction,))
        return fz.like(curved, params)

    return product


def power_iteration(product: Product, start: fz.Sharded, steps: int) -> tuple[fz.Sharded, list[float]]:
    """Return the direction of the eigenvalue of largest size, and each step's estimate of the eigenvalue.

    Args:
        product: the matrix, as a function of a direction.
        start: any direction, such as a random one.
        steps: how many products to take. The error falls by the ratio of the two largest eigenvalues in each.
    """
    direction, estimates = fz.scale(start, 1 / fz.norm(start)), []
    for _ in range(steps):
        curved = product(direction)
        estimates.append(fz.dot(direction, curved).item())
        direction = fz.scale(curved, 1 / fz.norm(curved))
    return direction, estimates


def lanczos(product: Product, start: fz.Sharded, steps: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of a symmetric matrix as a random direction sees them, the extreme ones first to be exact.

    Args:
        product: the matrix, as a function of a direction.
        start: a random direction.
        steps: how many products to take, and how many directions to keep: 1/N of the parameters each.

    Returns:
        `(values, weights)`, each (steps,): eigenvalues in ascending order, and how much of the matrix's spectrum stands
        for each; the weights sum to 1.
    """
    basis = [fz.scale(start, 1 / fz.norm(start))]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        rest = product(basis[-1])
        alphas.append(fz.dot(basis[-1], rest))
        for direction in basis + basis[::-1]:  # twice: rounding would let in again what was taken out
            rest = fz.add(rest, direction, -fz.dot(direction, rest))
        betas.append(fz.norm(rest))
        basis.append(fz.scale(rest, 1 / betas[-1]))
    off = torch.stack(betas[:-1]) if steps > 1 else torch.zeros(0, device=alphas[0].device)
    matrix = torch.diag(torch.stack(alphas)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix.double().cpu())
    return values, vectors[0].square()


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and measure on the way; return the largest eigenvalue each time."""
    args = arguments(argv)
    mesh = fz.make_mesh()
    rank = mesh.index("data")
    say = print if rank == 0 else lambda *_: None

    config = PRESETS["tiny"]
    apply, _ = fz.functional(lambda: GPT(config))
    state = fz.init(lambda: GPT(config), fz.adamw(args.lr), mesh, fz.zero(args.zero), policy="fp32")
    text = Text.read(standard_library())

    def loss(params: Any, rows: Tensor) -> Tensor:
        logits = apply(params, rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    step, product = fz.train_step(loss), hessian_product(loss)

    def at(params: fz.Sharded, rows: Tensor) -> Product:
        return lambda direction: product(params, direction, rows)

    # The curvature is that of one fixed batch, so that it changes with the parameters alone.
    fixed = text.batch(args.batch, args.sequence + 1, seed=1, step=0, rank=rank).to(mesh.device)
    found = []
    for number in range(args.steps + 1):
        if number % max(1, args.steps // args.times) == 0:
            hessian, start = at(state.params, fixed), fz.random_like(state.params, key=number)
            _, estimates = power_iteration(hessian, start, args.iterations)
            values, _ = lanczos(hessian, start, args.iterations)
            top = ", ".join(f"{x:.1f}" for x in values.flip(0)[:3])
            say(f"step {number:4}: power iteration {estimates[-1]:8.2f}; Lanczos {top}, …, {values[0]:.1f}")
            found.append(values[-1].item())
        rows = text.batch(args.batch, args.sequence + 1, seed=0, step=number, rank=rank).to(mesh.device)
        state, _ = step(state, rows)
    if dist.is_initialized() and argv is None:
        dist.destroy_process_group()
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT and watch the curvature of its loss.")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--times", type=int, default=3, help="how often to measure, beside the start")
    parser.add_argument("--iterations", type=int, default=12, help="Hessian-vector products of each measurement")
    parser.add_argument("--batch", type=int, default=8, help="rows of each rank")
    parser.add_argument("--sequence", type=int, default=64, help="bytes of a row")
    parser.add_argument("--zero", type=int, default=3, choices=(0, 1, 2, 3), help="the ZeRO stage")
    parser.add_argument("--lr", type=float, default=3e-3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
