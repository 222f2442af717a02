"""The published setting on one GPU: DeepSpeed ZeRO-3 and fzero's policies, pair by pair, taking turns.

    python benchmarks/published_gpu.py                                                          # one CUDA GPU
    python benchmarks/published_gpu.py --device cpu --layers 2 --hidden 64 --vocabulary 500     # does it run?

The model, optimizer and data of `published.py` at half the depth, no clipping on either side. Each candidate lives in
a process of its own, so that an allocator's figures are its own; the two of a pair are there together and do a step in
turn, and the order turns too. DeepSpeed is set up as in its published example: a baseline with fp32 masters, and its
low-precision mode under `torch.autocast`, both with every block checkpointed. Where CUDA's compiler is missing, its
FusedAdam cannot be built: `--adam torch` takes torch's fused AdamW, which DeepSpeed accepts as well.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from programs import table
from published import RATE, TOKENS, Encoder, Shape, copying_loss, training
from step_report import machine, quartiles, spread, versions
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fzero as fz

RESULTS = Path(__file__).parent / "results"
BASELINE, LOW = "DeepSpeed, fp32 master", "DeepSpeed, bf16 mode"
POLICIES = ("mixed", "bf16", "bf16-exact", "bf16-8bit")
WARM_UP, BATCHES = 5, 4
SIZES = ("at_rest", "peak")  # bytes that the allocator has given out before a step, and at most within it

Step = Callable[[Tensor], Tensor]  # tokens -> the loss before the update


class Checkpointed(Encoder):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)


def fzero_step(shape: Shape, device: torch.device, policy: str) -> Step:
    state, train = training(lambda: Encoder(shape), fz.make_mesh(device.type), policy)

    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        state, metrics = train(state, tokens)
        return metrics["loss"]

    return step


def deepspeed_step(shape: Shape, device: torch.device, low: bool, adam: str) -> Step:
    # Read when it is first imported, and when an engine is made.
    os.environ |= {"DS_ACCELERATOR": device.type, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    import deepspeed

    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(0)
    with device:
        model = Checkpointed(shape)
    how: dict[str, Any] = {"fused": {}, "torch": {"torch_adam": True, "fused": True}}[adam]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1.0 where nothing is said
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, **how},
        },
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    if low:
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        config["torch_autocast"] = {"enabled": True, "dtype": "torch.bfloat16"}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = copying_loss(engine(tokens), tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def serve(line: Connection, name: str, shape: Shape, device: torch.device, adam: str) -> None:
    """Be a candidate: answer each message with the seconds and loss of a step, or with bytes.

    A message is `(command, tokens)`; the commands are `"step"` and `"measure"`, which tells the bytes allocated before
    a step and at most within it, or `None` where no allocator counts them.
    """
    on_cuda = device.type == "cuda"
    try:
        if name in (BASELINE, LOW):
            step = deepspeed_step(shape, device, name == LOW, adam)
        else:
            step = fzero_step(shape, device, name)
        line.send("ready")
        while (message := line.recv()) is not None:
            command, tokens = message[0], torch.tensor(message[1], device=device)
            before = None
            if command == "measure" and on_cuda:
                gc.collect()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            loss = step(tokens).item()
            if on_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if command == "step":
                line.send((seconds, loss))
            else:
                line.send(None if before is None else (before, torch.cuda.max_memory_allocated()))
    except Exception as error:
        line.send(error)
        raise


class Candidate:
    """A process that trains one way."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        shape, device = shape_of(args), torch.device(args.device)
        self.process = context.Process(target=serve, args=(theirs, name, shape, device, args.adam), daemon=True)
        self.process.start()
        theirs.close()  # so that a death of the process ends a wait for its answer
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.answer()

    def answer(self) -> Any:
        try:
            answer = self.line.recv()
        except EOFError:
            raise RuntimeError(f"benchmarks/published_gpu.py: the process of {self.name!r} died.") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"benchmarks/published_gpu.py: {self.name!r} failed; see above.") from answer
        return answer

    def step(self, tokens: Tensor, *, timed: bool) -> None:
        self.line.send(("step", tokens.tolist()))
        seconds, loss = self.answer()
        self.losses.append(loss)
        if timed:
            self.seconds.append(seconds)

    def measure(self, tokens: Tensor) -> tuple[int, int] | None:
        self.line.send(("measure", tokens.tolist()))
        return self.answer()

    def close(self) -> None:
        self.line.send(None)
        self.process.join(60)
        if self.process.is_alive():
            self.process.terminate()


def compared(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is found of each of the named candidates, which take turns; ratios are over the first."""
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randint(args.vocabulary, (1, args.tokens), generator=draws) for _ in range(BATCHES)]
    turns = [Candidate(name, args) for name in names]
    for i in range(WARM_UP):
        for candidate in turns:
            candidate.step(batches[i % len(batches)], timed=False)
    for i in range(args.repeats):
        for candidate in turns if i % 2 else reversed(turns):
            candidate.step(batches[i % len(batches)], timed=True)
    rows: list[dict[str, Any]] = []
    for candidate in turns:
        first, last = (statistics.mean(x) for x in (candidate.losses[:BATCHES], candidate.losses[-BATCHES:]))
        if not last < first:
            raise RuntimeError(
                f"benchmarks/published_gpu.py: {candidate.name!r} does not train: its mean loss on {BATCHES} batches "
                f"went from {first:.4f} to {last:.4f} in {len(candidate.losses)} steps."
            )
        sizes = dict(zip(SIZES, candidate.measure(batches[0]) or (), strict=False))
        losses = {"first": round(first, 4), "last": round(last, 4)}
        row: dict[str, Any] = {"name": candidate.name, "seconds": spread(candidate.seconds), **sizes, "loss": losses}
        rows.append(row)
        candidate.close()
    for row in rows:
        ratios = {figure: row[figure] / rows[0][figure] for figure in SIZES if figure in row}
        ratios["seconds"] = row["seconds"]["median"] / rows[0]["seconds"]["median"]
        row["over"] = {figure: round(ratio, 3) for figure, ratio in ratios.items()}
    return rows


def markdown(record: dict[str, Any]) -> str:
    """Return a result as the table of the documentation: × is over the DeepSpeed that took turns with it."""
    rows = []
    for pair in record["pairs"]:
        for row in pair:
            sizes = [f"{row[x] / 2**30:.2f} ({row['over'][x]:.2f})" if x in row else "–" for x in SIZES]
            rows.append([row["name"], *sizes, quartiles(row["seconds"]), f"{row['over']['seconds']:.2f}"])
    return table(["candidate", "GiB allocated (×)", "peak (×)", "s a step (quartiles)", "×"], rows)


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(args.hidden, args.layers, args.heads, args.vocabulary, args.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--adam", choices=["fused", "torch"], default="fused", help="DeepSpeed's FusedAdam, or torch's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if alone := importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is left out: it is not installed; pip install -e '.[bench]' installs it.", flush=True)
    record: dict[str, Any] = {
        "machine": machine(torch.device(args.device)),
        "versions": versions(),
        "setting": {name: value for name, value in vars(args).items() if name != "out"},
        "pairs": [],
    }
    for policy in args.policies:
        peer = BASELINE if fz.policy(policy).stored == torch.float32 else LOW
        record["pairs"].append(compared([policy] if alone else [peer, policy], args))
        print(markdown({"pairs": record["pairs"][-1:]}), flush=True)
    path = args.out / f"published-{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
