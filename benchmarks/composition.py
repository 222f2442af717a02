"""What composition costs: nothing, or nearly.

    python benchmarks/composition.py [--repeats 21] [--ranks 8]

An encoder of images and a decoder that reads their embeddings, two states with two optimizers, are trained in one step
by `vjp` and a cotangent that is handed over. Beside it stands the same computation written as one model with one state.
Both are traced by `jit`, start from the same weights, and have to give the same losses. Then the forward and the
backward of `split_vjp`, two programs with residuals between them, stand beside one program of both.

Who stands beside whom take turns, one step at a time, and the order turns too. Peaks and traffic are those that the
programs foretell, of one rank of a simulated world. Last, what adapters on a frozen base hold: `examples/lora.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Threads that spin while they wait take the core from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import Block, Config, rotation
from lora import SEVEN_BILLION, foretold
from step_report import line, machine, quartiles, spread, versions

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
PIXELS = 48
LIMITS = {"two models": 1.03, "split": 1.05}
NAMES = {
    "two models": ("one model, one `value_and_grad`", "two models, a cotangent handed over"),
    "split": ("forward and backward in one program", "`split_vjp`: a forward and a backward"),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of both models, and of the batch."""

    width: int = 256
    depth: int = 4
    heads: int = 4
    rows: int = 8
    patches: int = 64
    tokens: int = 64
    vocabulary: int = 256
    policy: str = "fp32"

    @property
    def config(self) -> Config:
        return Config(self.width, self.depth, self.heads, self.vocabulary)

    def batch(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Return patches (rows, patches, pixels) and tokens (rows, tokens + 1)."""
        images = torch.randn(self.rows, self.patches, PIXELS, generator=torch.Generator().manual_seed(1))
        tokens = torch.randint(
            self.vocabulary, (self.rows, self.tokens + 1), generator=torch.Generator().manual_seed(2)
        )
        return images.to(device), tokens.to(device)


class Encoder(nn.Module):
    """From patches (batch, patch, pixel) to embeddings (batch, patch, width)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.project = nn.Linear(PIXELS, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_width = config.width // config.heads

    def forward(self, images: Tensor) -> Tensor:
        turn = rotation(images.shape[1], self.head_width, images.device)
        x = self.project(images.to(self.project.weight.dtype))
        for block in self.blocks:
            x = block(x, turn)
        return x


class Decoder(nn.Module):
    """From embeddings and tokens (batch, time + 1) to the loss of each token behind the embeddings and those before."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head_width = config.width // config.heads

    def forward(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([embeddings, self.embed(tokens[:, :-1])], dim=1)
        turn = rotation(x.shape[1], self.head_width, x.device)
        for block in self.blocks:
            x = block(x, turn)
        logits = self.head(x[:, embeddings.shape[1] :])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class Both(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(self.encoder(images), tokens)


@dataclass
class Candidate:
    """Something to time: `step` runs once and returns a loss; `traced` are its programs on another mesh."""

    step: Callable[[], float]
    traced: Callable[[fz.Mesh], list[fz.Program]]


def new_state(module: Any, mesh: fz.Mesh, policy: str) -> fz.State:
    return fz.init(module, fz.adamw(1e-3), mesh, fz.zero(3), policy=policy)


def one_model(setting: Setting) -> Candidate:
    apply, params = fz.functional(whole(setting))

    def step(state: fz.State, images: Tensor, tokens: Tensor) -> Any:
        loss, grads = fz.value_and_grad(apply)(state, images, tokens)
        return fz.apply_gradients(state, grads)[0], loss

    def states(mesh: fz.Mesh) -> tuple[fz.State, ...]:
        return (new_state(params, mesh, setting.policy),)

    return training(step, states, setting)


def two_models(setting: Setting) -> Candidate:
    model = whole(setting)
    (encode, vision), (caption, text) = fz.functional(model.encoder), fz.functional(model.decoder)

    def step(image_state: fz.State, text_state: fz.State, images: Tensor, tokens: Tensor) -> Any:
        embeddings, pull_image = fz.vjp(lambda params: encode(params, images), image_state)
        loss, pull_text = fz.vjp(lambda params, x: caption(params, x, tokens), text_state, embeddings)
        of_text, embeddings_bar = pull_text(torch.ones_like(loss))
        (of_image,) = pull_image(embeddings_bar)
        return fz.apply_gradients(image_state, of_image)[0], fz.apply_gradients(text_state, of_text)[0], loss

    def states(mesh: fz.Mesh) -> tuple[fz.State, ...]:
        return new_state(vision, mesh, setting.policy), new_state(text, mesh, setting.policy)

    return training(step, states, setting)


def training(
    step: Callable[..., Any], states: Callable[[fz.Mesh], tuple[fz.State, ...]], setting: Setting
) -> Candidate:
    """Return a jitted step over states, which it carries on, as a candidate."""
    count = len(states(fz.make_mesh("cpu", data=1, simulate=True)))
    donate = tuple(range(count))
    jitted = fz.jit(step, donate=donate)
    held, batch = list(states(fz.make_mesh("cpu"))), setting.batch()

    def run() -> float:
        *held[:], loss = jitted(*held, *batch)
        return loss.item()

    return Candidate(run, lambda mesh: [fz.trace(step, donate=donate)(*states(mesh), *setting.batch("meta"))])


def fused(setting: Setting) -> Candidate:
    apply, params = fz.functional(whole(setting))
    both = fz.value_and_grad(apply)
    jitted = fz.jit(both)
    state, batch = new_state(params, fz.make_mesh("cpu"), setting.policy), setting.batch()

    def traced(mesh: fz.Mesh) -> list[fz.Program]:
        return [fz.trace(both)(new_state(params, mesh, setting.policy), *setting.batch("meta"))]

    return Candidate(lambda: jitted(state, *batch)[0].item(), traced)


def split(setting: Setting) -> Candidate:
    apply, params = fz.functional(whole(setting))
    images, tokens = setting.batch()
    halves = fz.split_vjp(lambda params: apply(params, images, tokens))
    forward, backward = (fz.jit(half) for half in halves)
    state = new_state(params, fz.make_mesh("cpu"), setting.policy)

    def run() -> float:
        loss, residuals = forward(state)
        backward(residuals, torch.ones_like(loss))
        return loss.item()

    return Candidate(run, lambda mesh: [])  # the two peaks are apart, with residuals that only the caller holds between


def whole(setting: Setting) -> Both:
    torch.manual_seed(0)
    return Both(setting.config)


MAKERS: dict[str, tuple[Callable[[Setting], Candidate], Callable[[Setting], Candidate]]] = {
    "two models": (one_model, two_models),
    "split": (fused, split),
}


def compared(name: str, setting: Setting, repeats: int, mesh: fz.Mesh) -> dict[str, Any]:
    """Return what both candidates of a comparison take, and the ratio of the second to the first."""
    pair = [make(setting) for make in MAKERS[name]]
    losses = [[candidate.step() for _ in range(WARM_UP)] for candidate in pair]
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats):
        for i in (0, 1) if repeat % 2 == 0 else (1, 0):
            start = time.perf_counter()
            losses[i].append(pair[i].step())
            seconds[i].append(time.perf_counter() - start)
    # The same bits in fp32; stochastic rounding draws by path, and the paths of two models and one are not the same.
    tolerance = 0.0 if setting.policy == "fp32" else 0.01
    if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(*losses, strict=True)):
        raise RuntimeError(f"benchmarks/composition.py: {name}: the two compute different losses, {losses}.")
    # Neighbours in time had the same machine: the ratio of each pair, then the median, forgives a slow minute.
    ratios = [after / before for before, after in zip(*seconds, strict=True)]
    programs = [candidate.traced(mesh) for candidate in pair]
    return {
        "seconds": [spread(x) for x in seconds],
        "over": round(statistics.median(seconds[1]) / statistics.median(seconds[0]), 4),
        "over_in_pairs": spread(ratios),
        "limit": LIMITS[name],
        "peak": [max((p.memory().peak for p in found), default=None) for found in programs],
        "received": [sum(p.traffic().total for p in found) if found else None for found in programs],
        "flops": [sum(p.flops() for p in found) if found else None for found in programs],
    }


def measure(setting: Setting, repeats: int, ranks: int, *, large: bool) -> dict[str, Any]:
    """Return the whole measurement."""
    mesh = fz.make_mesh("cpu", data=ranks, simulate=True)
    names = [name for name in MAKERS if name != "split" or hasattr(fz, "split_vjp")]
    rows = {name: compared(name, setting, repeats, mesh) for name in names}
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "setting": {**asdict(setting), "repeats": repeats, "threads": torch.get_num_threads(), "ranks": ranks},
        "rows": rows,
    }
    if large:
        options = {"ranks": ranks, "rank": 8, "rows": 1, "tokens": 2048}
        figures = foretold(SEVEN_BILLION, **options)
        record["lora"] = {"setting": options, "figures": {name: asdict(found) for name, found in figures.items()}}
    return record


def markdown(record: dict[str, Any]) -> str:
    """Return the comparisons as the table of the documentation."""
    lines = [
        line(["step", "s (quartiles)", "×", "× in pairs (quartiles)", "at most", "MiB at the peak"]),
        "|---" * 6 + "|",
    ]
    for name, row in record["rows"].items():
        for i in (0, 1):
            ratio = (f"{row['over']:.3f}", quartiles(row["over_in_pairs"]), f"{row['limit']:.2f}") if i else ("",) * 3
            peak = "–" if row["peak"][i] is None else f"{row['peak'][i] / 2**20:.1f}"
            lines.append(line([NAMES[name][i], quartiles(row["seconds"][i]), *ratio, peak]))
    return "\n".join(lines)


def lora_markdown(record: dict[str, Any]) -> str:
    """Return what adapters and full training hold as the table of the documentation."""
    kinds = ("params", "moments", "gathered", "activations", "gradients", "other")
    heads = ["GiB a rank", "M trained", "at rest", "peak", *kinds, "received a step"]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for name, row in record["lora"]["figures"].items():
        sizes = [row["at_rest"], row["peak"], *(row["by_kind"].get(kind, 0) for kind in kinds), row["received"]]
        lines.append(line([name, f"{row['trained'] / 1e6:,.1f}", *(f"{size / 2**30:.2f}" for size in sizes)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--ranks", type=int, default=8, help="of the simulated world of peaks and traffic")
    parser.add_argument("--width", type=int, default=Setting.width)
    parser.add_argument("--policy", default=Setting.policy)
    parser.add_argument("--small", action="store_true", help="leave out the adapters of a 7 B model")
    parser.add_argument("--out", type=Path, default=RESULTS / "composition-cpu.json")
    args = parser.parse_args()
    setting = Setting(width=args.width, policy=args.policy)
    record = measure(setting, args.repeats, args.ranks, large=not args.small)
    print(markdown(record))
    if "lora" in record:
        print(f"\n{lora_markdown(record)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
