"""Train a small GPT on text, byte by byte, with its state sharded over all processes.

    python examples/train_gpt.py                                   # on Python's own source, in some three minutes
    python examples/train_gpt.py --data a.txt b.txt --model medium --policy mixed --steps 5000
    torchrun --nproc-per-node 2 examples/train_gpt.py --zero 1     # every --zero gives the same losses, bit for bit

The model is an ordinary module; the loss is an ordinary function of full parameters and one rank's batch.
Precision and layout are arguments of `fz.init`, and the rest of the script does not know them.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step ten times slower where others use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, PRESETS
from progress import Curve, Meter
from text import Text, standard_library
from torch import Tensor
from tqdm import tqdm

import fzero as fz

PROMPT = "class "


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train as the command line says; return the losses."""
    args = arguments(argv)
    share_cores()
    mesh = fz.make_mesh()
    rank, ranks = mesh.index("data"), mesh.size("data")
    say = tqdm.write if rank == 0 else lambda _: None

    text = Text.read(args.data or standard_library())
    held_out = text.held_out_rows(4 * args.batch * ranks, args.sequence + 1)[rank::ranks].to(mesh.device)
    config = replace(PRESETS[args.model], dropout=args.dropout)
    apply, _ = fz.functional(lambda: GPT(config))
    apply_without_dropout, _ = fz.functional(lambda: GPT(config).eval())

    rate = fz.schedules.warmup_cosine(args.lr, warmup=args.steps // 20, total=args.steps)
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(rate, b2=0.95, weight_decay=0.1, mask=decays))
    policy = fz.policy(args.policy, compute="auto", device=mesh.device)
    state = fz.init(lambda: GPT(config), optimizer, mesh, fz.zero(args.zero), policy, args.seed)
    step = fz.train_step(loss_of(apply), microbatches=args.microbatches)
    measure = fz.jit(lambda params, rows: fz.call(loss_of(apply_without_dropout), params, rows))
    say(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out; {ranks} rank(s) on {mesh.device}")
    say(repr(state))

    def held_out_loss() -> float:
        losses = [measure(state.params, rows) for rows in held_out.split(args.batch)]
        return mean_of_ranks(torch.stack(losses).mean())

    curve = Curve(held_out=[(0, held_out_loss())])
    say(f"step {0:5}: held-out loss {curve.held_out[-1][1]:.6f} nats per byte")
    meter = Meter(ranks * args.batch * args.sequence)
    with tqdm(range(1, args.steps + 1), unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        for number in bar:
            start = time.perf_counter()
            rows = text.batch(args.batch, args.sequence + 1, seed=args.seed, step=number, rank=rank)
            state, metrics = step(state, rows.to(mesh.device))
            curve.train.append((number, metrics["loss"].item()))
            bar.set_postfix_str(f"loss {curve.train[-1][1]:.3f}, {meter.step(time.perf_counter() - start)}")
            if number % -(-args.steps // 8) == 0 or number == args.steps:
                curve.held_out.append((number, held_out_loss()))
                say(f"step {number:5}: held-out loss {curve.held_out[-1][1]:.6f} nats per byte")

    say(f"{meter}")
    params = fz.gather(state.params)  # a collective: every rank takes part
    if rank == 0:
        curve.plot(args.out / "train_gpt.png")
        options = {name: str(value) for name, value in vars(args).items() if name not in ("data", "out")}
        about = {"options": options, "ranks": ranks, "device": mesh.device.type, "python": platform.python_version()}
        today = datetime.now(UTC).date().isoformat()
        curve.write(args.out / "train_gpt.json", {**about, "torch": torch.__version__, "date": today})
        say(f"The losses are drawn in {args.out / 'train_gpt.png'}. The model writes:\n")
        say(written_by(lambda tokens: apply_without_dropout(params, tokens), args.sample, args.sequence, mesh.device))
    return curve


def loss_of(apply: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return `loss(params, rows)`: how badly each byte of the rows is told from those before it, in nats."""

    def loss(params: Any, rows: Tensor) -> Tensor:
        logits = apply(params, rows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return loss


def decays(path: str) -> bool:
    """Say whether weight decay is for this leaf: not for norms and the embedding."""
    return "norm" not in path and "embed" not in path


def mean_of_ranks(x: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x.item()


@torch.no_grad()
def written_by(model: Callable[[Tensor], Tensor], length: int, window: int, device: torch.device) -> str:
    """Let a model continue the prompt byte by byte, each drawn in view of the last `window` ones."""
    tokens, generator = list(PROMPT.encode()), torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(torch.tensor([tokens[-window:]], device=device))[0, -1]
        chances = (logits.float().cpu() / 0.7).softmax(0)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(tokens).decode(errors="replace")


def share_cores() -> None:
    """Divide the cores between the ranks of this machine: torchrun would leave each with one thread."""
    if ranks := os.environ.get("LOCAL_WORLD_SIZE"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(ranks)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT on text, byte by byte.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; without it, Python's own source")
    parser.add_argument("--model", choices=PRESETS, default="small")
    parser.add_argument("--policy", default="bf16", help="dtypes of the state: a name that fz.policy knows")
    parser.add_argument("--zero", type=int, choices=range(4), default=3, help="what is sharded over the ranks")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=12, help="rows of a step and rank")
    parser.add_argument("--sequence", type=int, default=128, help="bytes of a row")
    parser.add_argument("--microbatches", type=int, default=1, help="parts of a batch, one after another")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=400, metavar="BYTES", help="length of what the model writes")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the loss curve")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
