"""Train a small GPT on text, byte by byte, with its state sharded over all processes.

    python examples/train_gpt.py                                   # on Python's own source, in some two minutes
    python examples/train_gpt.py --data a.txt b.txt --model medium --policy mixed --steps 5000
    torchrun --nproc-per-node 2 examples/train_gpt.py --zero 1     # any --zero gives the same losses

The model is an ordinary module; the loss is an ordinary function of full parameters and one rank's batch.
Precision and layout are arguments of `fz.init`, and the rest of the script does not know them.
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


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train as the command line says; return the losses."""
    args = arguments(argv)
    share_cores()
    mesh = fz.make_mesh()
    rank, ranks = mesh.index("data"), mesh.size("data")
    say: Callable[..., None] = print if rank == 0 else lambda *_: None

    config = replace(PRESETS[args.model], dropout=args.dropout)
    apply, _ = fz.functional(lambda: GPT(config))
    apply_quietly, _ = fz.functional(lambda: GPT(config).eval())  # without dropout

    def loss(params: Any, rows: Tensor) -> Tensor:
        return nats_per_byte(apply(params, rows[:, :-1]), rows)

    def quiet_loss(params: Any, rows: Tensor) -> Tensor:
        return nats_per_byte(apply_quietly(params, rows[:, :-1]), rows)

    rate = fz.schedules.warmup_cosine(args.lr, warmup=args.steps // 20, total=args.steps)
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(rate, b2=0.95, weight_decay=0.1, mask=decays))
    state = fz.init(lambda: GPT(config), optimizer, mesh, fz.zero(args.zero), args.policy, args.seed)
    step = fz.train_step(loss, microbatches=args.microbatches)
    measure = fz.jit(lambda params, rows: fz.call(quiet_loss, params, rows))

    text = Text.read(args.data or standard_library())
    held_out = text.held_out_rows(4 * args.batch * ranks, args.sequence + 1)[rank::ranks].to(mesh.device)
    say(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out; {ranks} rank(s) on {mesh.device}")
    say(state)

    def held_out_loss() -> float:
        losses = [measure(state.params, rows) for rows in held_out.split(args.batch)]
        return mean_of_ranks(torch.stack(losses).mean(), ranks)

    curve = Curve(held_out=[(0, held_out_loss())])
    say(f"held-out loss before: {curve.held_out[-1][1]:.6f} nats per byte")
    meter = Meter(ranks * args.batch * args.sequence)
    with tqdm(range(1, args.steps + 1), unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        for number in bar:
            rows = text.batch(args.batch, args.sequence + 1, seed=args.seed, step=number, rank=rank)
            state, metrics = step(state, rows.to(mesh.device))
            curve.train.append((number, metrics["loss"].item()))
            bar.set_postfix_str(f"loss {curve.train[-1][1]:.3f}, {meter.tick()}")
            if number % max(1, args.steps // 8) == 0 or number == args.steps:
                curve.held_out.append((number, held_out_loss()))
                bar.write(f"step {number:5}: held-out loss {curve.held_out[-1][1]:.6f}") if rank == 0 else None
    say(f"held-out loss after: {curve.held_out[-1][1]:.6f} nats per byte; {meter}")

    params = fz.gather(state.params)  # a collective: every rank takes part
    if rank == 0:
        curve.plot(args.out / "train_gpt.png")
        print(f"The curve is in {args.out / 'train_gpt.png'}. A sample:\n")
        print(sample(lambda tokens: apply_quietly(params, tokens), args.sample, args.sequence, mesh.device))
    return curve
