"""Does low precision train like fp32? The same GPT on the same bytes under every policy, several seeds each.

    python benchmarks/parity.py [--data a.txt b.txt] [--policies bf16 bf16-exact] [--seeds 3] [--steps 1000]
    python benchmarks/parity.py --preset gpu --workers 1

A seed decides the initial values and which bytes come at which step, for every policy alike, so that a policy is
compared with fp32 seed by seed. Contrasts beside the policies: fp32 that starts from values changed by one part in a
million, which shows what chaos alone does to a run; fp16 whose loss scale starts so high that its first steps
overflow; and bf16 rounded to nearest. Then small constant rates, from the weights that fp32 came to: there the update
is far below the last bit of a weight, and what matters beside the loss is whether the weights move at all, and as
fp32's do.

A CPU without units for bf16 and fp16 takes thirty times as long for their matrix products as for fp32's. On a CPU
these products are therefore taken of the same bf16 or fp16 numbers in fp32 and rounded once, as such units do, and
attention's probabilities are not rounded within it; `--native` leaves them to the CPU.

Each finished run is written at once: an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow down the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fzero as fz

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, Config
from programs import about, table
from state_bytes import POLICIES
from text import Text, standard_library
from train_gpt import decays, loss_of

RESULT = Path(__file__).parent / "results" / "parity.json"
PICTURE = Path(__file__).parents[1] / "docs" / "parity.png"
PERTURBED, NEAREST, OVERFLOWING = "fp32, perturbed", "bf16, nearest", "fp16, from 2^24"
ROWS = (POLICIES[0], PERTURBED, *POLICIES[1:], OVERFLOWING, NEAREST)
SMALL_RATES, SMALL_ROWS = (1e-4, 1e-6), ("fp32", "bf16-exact", "bf16", NEAREST)
LAST, EVERY, HELD_OUT_ROWS = 100, 20, 128  # steps of the final loss, steps of a point of a curve, windows held out

Run = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """What is trained, and on how many bytes a step. The rate is the highest; it warms up and falls as a cosine."""

    config: Config
    batch: int
    sequence: int
    rate: float = 3e-3
    device: str = "cpu"


PRESETS = {
    "cpu-small": Preset(Config(width=96, depth=3, heads=4), batch=8, sequence=64),
    "cpu": Preset(Config(width=128, depth=4, heads=4), batch=8, sequence=64),
    "gpu": Preset(Config(width=768, depth=12, heads=12), batch=32, sequence=512, rate=6e-4, device="cuda"),
}


@dataclass(frozen=True)
class Job:
    """One run. Without a rate it is the whole training; with one, a start from fp32's weights at that rate."""

    row: str
    seed: int
    rate: float | None = None


class WideMatrices(TorchFunctionMode):
    """Takes matrix products of low-precision numbers in fp32 and rounds what comes out, once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = func in (F.linear, F.scaled_dot_product_attention) and args[0].dtype in (torch.bfloat16, torch.float16)
        if not low:
            return func(*args, **(kwargs or {}))
        wide = (x.float() if isinstance(x, Tensor) else x for x in args)
        return func(*wide, **(kwargs or {})).to(args[0].dtype)


def policy_of(row: str) -> fz.Policy:
    name, _, variant = row.partition(", ")
    found = fz.policy(name)
    if variant == "nearest":
        return dataclasses.replace(found, rounding="nearest")
    return dataclasses.replace(found, loss_scale=fz.LossScale(initial=2.0**24)) if row == OVERFLOWING else found


def losses(preset: Preset, native: bool) -> Callable[[Any, Tensor], Tensor]:
    apply, _ = fz.functional(lambda: GPT(preset.config))
    loss = loss_of(apply)

    def in_wide_matrices(params: Any, rows: Tensor) -> Tensor:
        with WideMatrices():
            return loss(params, rows)

    return loss if native or preset.device != "cpu" else in_wide_matrices


def run(job: Job, text: Text, args: argparse.Namespace) -> Run:
    """Train as a job says; return its losses."""
    preset = PRESETS[args.preset]
    mesh, policy = fz.make_mesh(preset.device), policy_of(job.row)
    steps = args.steps if job.rate is None else args.small_steps
    if job.rate is None:
        rate: Any = fz.schedules.warmup_cosine(preset.rate, warmup=max(1, steps // 20), total=steps)
        adamw = fz.adamw(rate, b2=0.95, weight_decay=0.1, mask=decays)
        first: Any = lambda: GPT(preset.config)  # noqa: E731
    else:
        adamw = fz.adamw(job.rate, b2=0.95, weight_decay=0.0)
        first = torch.load(weights(args, job))
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), adamw)
    state = fz.init(first, optimizer, mesh, policy=policy, seed=job.seed)
    if job.row == PERTURBED:
        state = fz.init(perturbed(fz.gather(state.params)), optimizer, mesh, policy=policy, seed=job.seed)
    before = flat(fz.gather(state.params))

    loss = losses(preset, args.native)
    step, measure = fz.train_step(loss), fz.jit(lambda params, rows: fz.call(loss, params, rows))
    length = preset.sequence + 1
    train, begin = [], time.perf_counter()
    for number in range(1, steps + 1):
        rows = text.batch(preset.batch, length, seed=job.seed, step=number, rank=0)
        state, metrics = step(state, rows.to(mesh.device))
        train.append(metrics["loss"])
    curve = torch.stack(train).tolist()
    seconds = time.perf_counter() - begin

    held_out = text.held_out_rows(HELD_OUT_ROWS, length).to(mesh.device).split(preset.batch)
    after = fz.gather(state.params)
    found: Run = {
        **dataclasses.asdict(job),
        "steps": steps,
        "final": statistics.fmean(curve[-LAST:]),
        "mean": statistics.fmean(curve),
        "skipped": steps - int(state.step),
        "held_out": statistics.fmean(measure(state.params, rows).item() for rows in held_out),
        "seconds": round(seconds, 1),
        "curve": [round(statistics.fmean(curve[i : i + EVERY]), 5) for i in range(0, steps, EVERY)],
    }
    if job == Job("fp32", job.seed):
        torch.save(after, weights(args, job))
    if job.rate is not None:
        moved = flat(after) - before
        if job.row == "fp32":
            torch.save(moved, displacement(args, job))
        fp32 = torch.load(displacement(args, job))
        # Stochastic rounding adds steps of a last bit in all directions, which make the first large; the second, a
        # projection, tells whether the weights go where fp32's go.
        found["movement"] = (moved.norm() / before.norm()).item()
        found["of_fp32s_way"] = ((moved @ fp32) / (fp32 @ fp32)).item()
    return found


def weights(args: argparse.Namespace, job: Job) -> Path:
    """Return where fp32 leaves the weights that a seed's small rates start from."""
    return args.weights / f"weights-{job.seed}.pt"


def displacement(args: argparse.Namespace, job: Job) -> Path:
    """Return where fp32 leaves how far it went at a small rate."""
    return args.weights / f"displacement-{job.seed}-{job.rate}.pt"


def flat(params: Any) -> Tensor:
    return torch.cat([leaf.flatten().double().cpu() for leaf in fz.tree.leaves(params)])


def perturbed(params: Any) -> Any:
    generator = torch.Generator().manual_seed(1)

    def nudge(x: Tensor) -> Tensor:
        return x * (1 + 1e-6 * torch.randn(x.shape, generator=generator).to(x.device))

    return fz.tree.map(nudge, params)


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Return a result as the tables of the documentation: differences to fp32 of the same seed."""
    texts = {}
    if rows := by_row(record["runs"], None):
        heads = ["policy", "seeds", "loss of the last 100 steps", "of all steps", "held out"]
        texts["train"] = table(heads, [line(row, rows) for row in rows])
    rates = sorted({run["rate"] for run in record["runs"] if run["rate"]}, reverse=True)
    cells = []
    for rate in rates:
        rows = by_row(record["runs"], rate)
        for row in rows:
            own = rows[row].values()
            moved = [f"{statistics.fmean(run[k] for run in own):.2g}" for k in ("movement", "of_fp32s_way")]
            cells.append([f"{rate:g}", *line(row, rows), *moved])
    if cells:
        heads = ["rate", "policy", "seeds", "loss of the last 100 steps", "of all steps", "held out"]
        texts["small rates"] = table([*heads, "weights moved by", "of fp32's way"], cells)
    return texts


def by_row(runs: Iterable[Run], rate: float | None) -> dict[str, dict[int, Run]]:
    """Return the runs of a rate by row, in the order of the tables, and seed."""
    found: dict[str, dict[int, Run]] = {row: {} for row in ROWS}
    for one in runs:
        if one["rate"] == rate:
            found[one["row"]][one["seed"]] = one
    return {row: seeds for row, seeds in found.items() if seeds}


def line(row: str, rows: dict[str, dict[int, Run]]) -> list[str]:
    """Return the cells of a row: what fp32 comes to, or the mean difference to it and how that varies with the seed."""
    cells = [f"`{row}`" if row in POLICIES else row, str(len(rows[row]))]
    for figure in ("final", "mean", "held_out"):
        if row == "fp32":
            found = [one[figure] for one in rows[row].values()]
            cells.append(f"{statistics.fmean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
        else:
            gaps = differences(row, rows, figure) or [math.nan]
            mean, least, most = (f"{round(f(gaps), 4) + 0.0:+.4f}" for f in (statistics.fmean, min, max))
            cells.append(f"{mean} ({least} to {most})")
    return cells


def differences(row: str, rows: dict[str, dict[int, Run]], figure: str) -> list[float]:
    """Return a row's figure over that of fp32, for each seed that both have."""
    fp32 = rows.get("fp32", {})
    return [one[figure] - fp32[seed][figure] for seed, one in rows[row].items() if seed in fp32]


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the training loss of every row, and its differences to fp32 seed by seed."""
    from matplotlib.figure import Figure

    rows = by_row(record["runs"], None)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = [row for row in rows if row != "fp32"]
    for i, row in enumerate(rows):
        curves = torch.tensor([one["curve"] for one in rows[row].values()])
        color = "black" if row == "fp32" else f"C{others.index(row)}"
        places = (torch.arange(curves.shape[1]) + 1) * EVERY
        left.plot(places, curves.mean(0), color=color, label=row, lw=1.5 if i else 2.5, alpha=1 if i else 0.5)
    left.set(xlabel="step", ylabel="training loss (nats per byte)")
    left.legend(frameon=False, fontsize="small")
    for i, row in enumerate(others):
        for figure_name, mark in (("final", "o"), ("held_out", "x")):
            gaps = differences(row, rows, figure_name)
            right.plot(gaps, [i + (0.15 if mark == "x" else -0.15)] * len(gaps), mark, color=f"C{i}")
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(others)), others)
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=5)
    right.set(xlabel="loss minus fp32's, by seed (o: last training steps, x: held out)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def one_thread() -> None:
    torch.set_num_threads(1)


def work(task: tuple[Job, argparse.Namespace]) -> Run:
    job, args = task
    return run(job, Text.read(args.data or standard_library()), args)


def phases(args: argparse.Namespace, done: set[Job]) -> Iterable[list[Job]]:
    """Yield what can run at the same time: trainings, then fp32 at small rates from them, then the others."""
    training = [Job(row, seed) for seed in range(args.seeds) for row in args.policies]
    rows = [row for row in SMALL_ROWS if row in args.policies] if args.small_steps else []
    small = [Job(row, seed, rate) for seed in range(args.seeds) for rate in SMALL_RATES for row in rows]
    fp32 = [job for job in small if job.row == "fp32"]
    again = {Job("fp32", job.seed) for job in small if not weights(args, job).exists()}
    yield [job for job in training if job not in done or job in again]
    yield [job for job in fp32 if job not in done or not displacement(args, job).exists()]
    yield [job for job in small if job not in done and job not in fp32]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; without it, Python's own source")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--policies", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--small-steps", type=int, default=300, help="steps at each small rate; 0: none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--native", action="store_true", help="leave low-precision matrix products to the CPU")
    parser.add_argument("--weights", type=Path, default=Path("out"), help="folder for what the small rates start from")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    if "fp32" not in args.policies:
        parser.error("--policies: fp32 has to be among them, since all are compared with it")
    record = started(args)
    args.weights /= f"parity-{zlib.crc32(json.dumps(record['setting']).encode()):08x}"  # those of this setting
    args.weights.mkdir(parents=True, exist_ok=True)
    done = {Job(one["row"], one["seed"], one["rate"]) for one in record["runs"]}
    with multiprocessing.get_context("spawn").Pool(args.workers, one_thread) as pool:
        for jobs in phases(args, done):
            for found in pool.imap_unordered(work, [(job, args) for job in jobs]):
                same = [one for one in record["runs"] if all(one[k] == found[k] for k in ("row", "seed", "rate"))]
                record["runs"] = [one for one in record["runs"] if one not in same] + [found]
                args.out.write_text(json.dumps(record, indent=1) + "\n")
                at = "" if found["rate"] is None else f" at {found['rate']:g}"
                say = (
                    f"{found['row']}{at}, seed {found['seed']}: {found['final']:.4f}, held out {found['held_out']:.4f}"
                )
                print(f"{say}, {found['seconds']:.0f} s", flush=True)
    for text in tables(record).values():
        print(f"\n{text}")
    plot(record, args.plot)


def started(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record to go on with, or a new one."""
    text = Text.read(args.data or standard_library())
    setting = {
        "preset": args.preset,
        **dataclasses.asdict(PRESETS[args.preset]),
        "steps": args.steps,
        "small_steps": args.small_steps,
        "native": args.native,
        "bytes": len(text.train),
        "held_out_bytes": len(text.held_out),
        "checksum": zlib.crc32(text.train.numpy().tobytes()),
    }
    if not args.out.exists():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        return {**about(), "setting": setting, "runs": []}
    record: dict[str, Any] = json.loads(args.out.read_text())
    if record["setting"] != setting:
        differ = sorted(key for key in setting if record["setting"].get(key) != setting[key])
        raise SystemExit(
            f"benchmarks/parity.py: {args.out} holds runs of another setting ({', '.join(differ)} differ). Give "
            f"--out another file, or remove that one to start anew."
        )
    return record


if __name__ == "__main__":
    main()
