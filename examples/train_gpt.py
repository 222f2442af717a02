"""Train a small GPT on text, byte by byte, with the state sharded over all processes.

    python examples/train_gpt.py                                         # Python's own source, some two minutes
    python examples/train_gpt.py --data a.txt b.txt --model medium --policy mixed --steps 5000
    torchrun --nproc-per-node 2 examples/train_gpt.py --zero 1           # the same numbers with every --zero

The model is an ordinary module, and the loss an ordinary function of full parameters and one rank's batch.
Precision, layout and optimizer are arguments of `fz.init`; the rest of the script does not know them.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, PRESETS
from matplotlib.figure import Figure
from text import Text, standard_library
from torch import Tensor
from tqdm import tqdm

import fzero as fz

PROMPT = "class "


@dataclass
class Curve:
    """Losses in nats per byte, as pairs (step, loss)."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def plot(self, path: Path) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.train, strict=True), color="0.7", label="training batch")
        axes.plot(*zip(*self.held_out, strict=True), "o-", label="held-out text")
        axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, None))
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> Curve:
    args = arguments(argv)
    share_cores()
    mesh = fz.make_mesh()
    rank, ranks = mesh.index("data"), mesh.size("data")
    say: Callable[..., None] = print if rank == 0 else lambda *_: None

    text = Text.read(args.data or standard_library())
    config = replace(PRESETS[args.model], dropout=args.dropout)
    apply, _ = fz.functional(lambda: GPT(config))
    without_dropout, _ = fz.functional(lambda: GPT(config).eval())
    optimizer = fz.chain(
        fz.clip_by_global_norm(1.0),
        fz.adamw(fz.schedules.warmup_cosine(args.lr, args.steps // 20, args.steps), b2=0.95, weight_decay=0.1, mask=decays),
    )
    state = fz.init(lambda: GPT(config), optimizer, mesh, fz.zero(args.zero), args.policy, args.seed)
    say(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out; {ranks} rank(s) on {mesh.device}")
    say(state)

    step = fz.train_step(lambda params, rows: cross_entropy(apply(params, rows[:, :-1]), rows[:, 1:]), args.microbatches)
    measure = fz.jit(lambda s, rows: fz.call(lambda p: cross_entropy(without_dropout(p, rows[:, :-1]), rows[:, 1:]), s))
    held_out = text.held_out_rows(8 * args.batch * ranks, args.sequence + 1)[rank::ranks].to(mesh.device)

    def held_out_loss(state: fz.State) -> float:
        return mean_of_ranks(torch.stack([measure(state.params, rows) for rows in held_out.split(args.batch)]).mean())

    curve = Curve(held_out=[(0, held_out_loss(state))])
    start, bytes_a_step = time.perf_counter(), ranks * args.batch * args.sequence
    with tqdm(range(1, args.steps + 1), disable=rank > 0, unit="step", dynamic_ncols=True) as bar:
        for number in bar:
            rows = text.batch(args.batch, args.sequence + 1, seed=args.seed, step=number, rank=rank)
            state, metrics = step(state, rows.to(mesh.device))
            ...
    return curve
