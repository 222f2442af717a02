"""How near the update kernels come to a copy: bytes that they move over time, against a copy of as many, and peers.

    python benchmarks/kernels.py                                       # one CUDA GPU, 2²⁷ elements
    python benchmarks/kernels.py --device cpu --elements 2000000       # the torch references, compiled

An update has to move every byte of state twice, in and out, and every byte of gradient once. A call and a copy take
turns. Peers are there where they can be imported: torch's fused AdamW on both, and on CUDA DeepSpeed's FusedAdam,
torchao's AdamW in 8 bits, also with stochastic rounding, and Liger's linear cross-entropy.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT
from programs import GPT_1B, table, training
from step_report import machine, quartiles, spread, versions
from torch import Tensor, nn

import fzero as fz
from fzero.kernels.codes import encode
from fzero.kernels.cross_entropy import linear_cross_entropy
from fzero.kernels.squares import squares
from fzero.kernels.storage import split_master
from fzero.program.graph.walk import calls

RESULTS = Path(__file__).parent / "results"
B1, B2, EPSILON, RATE, DECAY = 0.9, 0.95, 1e-8, 1e-3, 0.1
ADAMW = fz.adamw(RATE, B1, B2, EPSILON, DECAY)
WARM_UP = 3
HIDING = 2_000_000  # clocks, about a millisecond
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Storage:
    """How a policy stores a parameter and its moments, and the dtype of its gradient."""

    param: torch.dtype
    moment: torch.dtype
    grad: torch.dtype
    split: bool = False

    @property
    def stochastic(self) -> bool:
        return self.param != FP32


STORAGES = {
    "fp32": Storage(FP32, FP32, FP32),
    "mixed": Storage(FP32, FP32, BF16),
    "bf16": Storage(BF16, BF16, BF16),
    "bf16-exact": Storage(BF16, BF16, BF16, split=True),
    "bf16-fp32-moments": Storage(BF16, FP32, BF16),
    "bf16-8bit": Storage(BF16, torch.int8, BF16),
    "fp16": Storage(FP16, FP32, FP16),
}


@dataclass(frozen=True)
class Case:
    """A call to time, and the bytes that it has to move."""

    call: Callable[[], Any]
    bytes: int


def update_case(name: str, storage: Storage, elements: int, device: torch.device) -> Case:
    """Return an update in place of one leaf."""
    state, grad = leaf(storage, elements, device, moments={"adamw": 2, "lion": 1, "sgd": 1}[name])
    zero = torch.zeros((), dtype=torch.int32, device=device)
    optimizer: Any = {
        "adamw": ADAMW, "lion": fz.lion(RATE, B1, B2, DECAY), "sgd": fz.sgd(RATE, B1, False, DECAY)
    }[name]  # fmt: skip
    keys, offsets = torch.zeros(1, 2, dtype=torch.int32, device=device), zero[None]
    op = getattr(torch.ops.fzero, f"{name}_")
    scalars = optimizer.scalars_of(zero, 1.0, True)
    call = partial(op, state, [grad], scalars, keys, offsets, optimizer.numbers, storage.stochastic)
    return Case(call, 2 * sum(x.nbytes for x in state) + grad.nbytes)


def leaf(storage: Storage, elements: int, device: torch.device, moments: int) -> tuple[list[Tensor], Tensor]:
    """Return the tensors of a state and a gradient, with values as in training."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, elements, generator=generator, device=device)
    grad, p = 1e-3 * draw(), 0.02 * draw()
    state = list(split_master(p)) if storage.split else [p.to(storage.param)]
    for signed, moment in ((True, grad / 2), (False, grad.square()))[:moments]:
        if storage.moment == torch.int8:
            state += encode(moment, signed=signed)
        else:
            state.append(moment.to(storage.moment))
    return state, grad.to(storage.grad)


def squares_case(dtype: torch.dtype, elements: int, device: torch.device) -> Case:
    piece = torch.randn(elements, device=device).to(dtype)
    return Case(partial(squares, piece), piece.nbytes)


def fused_torch(dtype: torch.dtype, elements: int, device: torch.device) -> Case:
    """Return the step of torch's fused AdamW, which rounds to nearest."""
    (p, m, v), grad = leaf(Storage(dtype, dtype, dtype), elements, device, moments=2)
    steps = torch.ones((), device=device)
    call = partial(
        torch._fused_adamw_, [p], [grad], [m], [v], [], [steps],
        lr=RATE, beta1=B1, beta2=B2, weight_decay=DECAY, eps=EPSILON, amsgrad=False, maximize=False,
    )  # fmt: skip
    return Case(call, 2 * (p.nbytes + m.nbytes + v.nbytes) + grad.nbytes)


def optimizer_case(
    make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype, bytes_an_element: float
) -> Callable[[int, torch.device], Case]:
    """Return what makes a case of another library's optimizer, with the bytes that its storage has to move."""

    def case(elements: int, device: torch.device) -> Case:
        p = nn.Parameter(torch.randn(elements, device=device).mul(0.02).to(dtype))
        p.grad = torch.randn_like(p) * 1e-3
        optimizer = make([p])
        return Case(optimizer.step, round(bytes_an_element * elements))

    return case


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[int, torch.device], Case]]]:
    """Yield the name of each case and what makes it."""
    for name, policies in (
        ("adamw", tuple(STORAGES)),
        ("lion", ("fp32", "bf16", "bf16-exact", "bf16-8bit")),
        ("sgd", ("fp32", "bf16")),
    ):
        for policy in policies:
            yield f"{name}, {policy}", partial(update_case, name, STORAGES[policy])
    for dtype in (FP32, BF16):
        yield f"squares, {short(dtype)}", partial(squares_case, dtype)
    for dtype in (FP32, BF16):
        yield f"torch fused AdamW, {short(dtype)}", partial(fused_torch, dtype)
    if device.type == "cuda":
        yield from peers_on_cuda()


def peers_on_cuda() -> Iterator[tuple[str, Callable[[int, torch.device], Case]]]:
    how = {"lr": RATE, "betas": (B1, B2), "eps": EPSILON, "weight_decay": DECAY}
    if ops := imported("deepspeed.ops.adam"):
        for dtype in (FP32, BF16):
            size = torch.finfo(dtype).bits // 8
            make = lambda params: ops.FusedAdam(params, **how)  # noqa: E731
            yield f"DeepSpeed FusedAdam, {short(dtype)}", optimizer_case(make, dtype, 7 * size)
    if ao := imported("torchao.optim"):
        make = lambda params: ao.AdamW8bit(params, **how)  # noqa: E731
        # One float32 scale for each of its blocks of 256.
        yield "torchao AdamW8bit, bf16", optimizer_case(make, BF16, 2 * (2 + 2 * (1 + 4 / 256)) + 2)
        make = lambda params: ao.AdamW8bit(params, bf16_stochastic_round=True, **how)  # noqa: E731
        yield "torchao AdamW8bit, bf16, stochastic", optimizer_case(make, BF16, 2 * (2 + 2 * (1 + 4 / 256)) + 2)


def imported(module: str) -> Any:
    """Return a module, or nothing where it or what it needs is not installed."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a build that fails raises whatever it likes
        print(f"{module} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return None


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HIDING)  # while the stream sleeps, the launches get ahead of it
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured(make: Callable[[int, torch.device], Case], elements: int, device: torch.device, repeats: int) -> Any:
    """Return what is found of a case, beside a copy that moves as many bytes."""
    case = make(elements, device)
    source = torch.ones(case.bytes // 2, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    for _ in range(WARM_UP):
        case.call()
        copy()
    seconds: dict[str, list[float]] = {"call": [], "copy": []}
    for _ in range(repeats):
        for name, call in (("call", case.call), ("copy", copy)):
            seconds[name].append(timed(call, device))
    found = {name: spread([1e3 * x for x in own]) for name, own in seconds.items()}
    rates = {name: case.bytes / own["median"] / 1e6 for name, own in found.items()}
    return {
        "bytes": case.bytes,
        "milliseconds": found["call"],
        "copy_milliseconds": found["copy"],
        "gigabytes_a_second": round(rates["call"], 1),
        "copy_gigabytes_a_second": round(rates["copy"], 1),
        "over_copy": round(found["copy"]["median"] / found["call"]["median"], 3),
    }


def launches(device: torch.device, elements: int) -> dict[str, Any]:
    """Return by how many operations and launches all leaves of a GPT of 1.3 B parameters are updated.

    The operations are those in the program of its step; what is timed, and whose launches are counted, is one call for
    all leaves. On a CPU they have `elements` elements together instead of their own.
    """
    found: dict[str, Any] = {}
    # On CUDA small leaves share an update, on a CPU each has its own.
    state, step = training(lambda: GPT(GPT_1B), fz.make_mesh(device.type, data=8, simulate=True))
    program = fz.trace(step)(state, torch.empty(1, 1025, dtype=torch.int64, device="meta"))
    found["leaves"] = len(state.params.paths)
    names = [str(node.target) for node, _ in calls(program.trace)]
    for op in ("adamw", "squares"):
        found[f"{op}_operations_in_a_step"] = sum(name.startswith(f"fzero.{op}") for name in names)
    sizes = [math.prod(shape) for shape in state.params.shapes]
    if device.type == "cpu":
        scale = elements / sum(sizes)
        sizes = [max(1, round(size * scale)) for size in sizes]
    storage = STORAGES["bf16"]
    parts = [leaf(storage, size, device, moments=2) for size in sizes]
    zero = torch.zeros((), dtype=torch.int32, device=device)
    keys = torch.zeros(len(parts), 2, dtype=torch.int32, device=device)
    ours = partial(
        torch.ops.fzero.adamw_, [x for own, _ in parts for x in own], [g for _, g in parts],
        ADAMW.scalars_of(zero, 1.0, True), keys, keys[:, 0].contiguous(), ADAMW.numbers, True,
    )  # fmt: skip
    columns = [[own[i] for own, _ in parts] for i in range(3)]
    steps = [torch.ones((), device=device) for _ in parts]
    fused = partial(
        torch._fused_adamw_, columns[0], [g for _, g in parts], columns[1], columns[2], [], steps,
        lr=RATE, beta1=B1, beta2=B2, weight_decay=DECAY, eps=EPSILON, amsgrad=False, maximize=False,
    )  # fmt: skip
    for name, call in (("fzero", ours), ("torch fused AdamW", fused)):
        for _ in range(WARM_UP):
            call()
        seconds = [timed(call, device) for _ in range(10)]
        found[name] = {"milliseconds": spread([1e3 * x for x in seconds]), "launches": kernels_of(call, device)}
    return found


def kernels_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return how many kernels and copies a call launches on CUDA."""
    if device.type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def cross_entropies(device: torch.device, repeats: int) -> dict[str, Any]:
    """Return milliseconds, and bytes on CUDA, of the loss of a linear head and its gradients."""
    on_cuda = device.type == "cuda"
    tokens, width, vocabulary = (8192, 2048, 50257) if on_cuda else (256, 128, 2000)
    x = torch.randn(tokens, width, device=device, dtype=BF16 if on_cuda else FP32).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=device, dtype=x.dtype)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=device)
    losses: dict[str, Callable[[], Tensor]] = {
        "fzero": lambda: linear_cross_entropy(x, weight, labels),
        "F.linear, F.cross_entropy": lambda: F.cross_entropy(F.linear(x, weight).float(), labels),
    }
    liger = imported("liger_kernel.transformers.fused_linear_cross_entropy") if on_cuda else None
    if liger:
        losses["Liger"] = lambda: liger.LigerFusedLinearCrossEntropyLoss()(weight, x, labels)
    found: dict[str, Any] = {"tokens": tokens, "width": width, "vocabulary": vocabulary}
    for name, loss in losses.items():

        def gradients(loss: Callable[[], Tensor] = loss) -> Any:
            return torch.autograd.grad(loss(), (x, weight))

        for _ in range(WARM_UP):
            gradients()
        found[name] = {"milliseconds": spread([1e3 * timed(gradients, device) for _ in range(repeats)])}
        if on_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            gradients()
            found[name]["bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def markdown(record: dict[str, Any]) -> str:
    """Return a result as the table of the documentation."""
    rows = [
        [
            f"`{name}`" if is_ours(name) else name,
            f"{row['bytes'] / record['elements']:.2f}",
            quartiles(row["milliseconds"]),
            f"{row['gigabytes_a_second']:,.0f}",
            f"{row['over_copy']:.2f}",
        ]
        for name, row in record["cases"].items()
    ]
    return table(["kernel", "bytes an element", "ms (quartiles)", "GB/s", "of a copy's speed"], rows)


def is_ours(case: str) -> bool:
    return case.split(",")[0] in ("adamw", "lion", "sgd", "squares")


def short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16", FP16: "fp16"}[dtype]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--elements", type=int, default=2**27)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    record: dict[str, Any] = {
        "machine": machine(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "threads": torch.get_num_threads(),
        "elements": args.elements,
        "repeats": args.repeats,
        "cases": {},
    }
    for name, make in cases(device):
        try:
            row = record["cases"][name] = measured(make, args.elements, device, args.repeats)
        except Exception as error:  # a peer that builds its kernel only now raises whatever it likes
            if is_ours(name):
                raise
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"{name:36}{row['gigabytes_a_second']:10,.1f} GB/s, {row['over_copy']:.2f} of a copy", flush=True)
        gc.collect()
    print(f"\n{markdown(record)}")
    record["leaves"] = launches(device, args.elements)
    record["cross_entropy"] = cross_entropies(device, args.repeats)
    print(f"\n{json.dumps({name: record[name] for name in ('leaves', 'cross_entropy')}, indent=1)}")
    path = args.out / f"kernels-{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
