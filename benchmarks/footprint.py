"""Bytes of tensors that training holds: between steps, and at most within one."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import Candidate
from torch import Tensor, nn

# What a candidate sets up, it has set up after these: DDP its buckets, DeepSpeed its order of gathers.
STEPS_BEFORE = 3
STEPS = 5
MARK = "measured step"


def footprint(make: Callable[[], Candidate], rows: Tensor) -> tuple[int, int]:
    """Return the bytes that a candidate holds between steps, and the most that live at once in a step.

    All that was allocated since before the candidate was made counts: parameters, moments, buckets, constants of
    programs. On CUDA its allocator tells: between steps what it holds when it has given back all it can, which is also
    what recordings of a step hold on to; within one the most that was allocated at once, while it was recorded
    included. On a CPU the first is the memory of all tensors there are in Python, and the second adds what torch's
    profiler records within a step.
    """
    gc.collect()
    return on_cuda(make, rows) if rows.is_cuda else on_cpu(make, rows)


def on_cuda(make: Callable[[], Candidate], rows: Tensor) -> tuple[int, int]:
    torch.cuda.empty_cache()
    reserved, before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    candidate = make()
    candidate.step(rows)  # compiles, and tries out what it compiles
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS_BEFORE):
        candidate.step(rows)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gc.collect()
    torch.cuda.empty_cache()
    at_rest = torch.cuda.memory_reserved() - reserved
    candidate.close()
    return at_rest, peak


def on_cpu(make: Callable[[], Candidate], rows: Tensor) -> tuple[int, int]:
    before = held()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        candidate = make()
        for _ in range(STEPS_BEFORE):
            candidate.step(rows)
        for _ in range(STEPS):
            with torch.profiler.record_function(MARK):
                candidate.step(rows)
    gc.collect()
    at_rest = held() - before
    candidate.close()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    record = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == MARK and "dur" in e]
    # The least of several steps: gloo's threads now and then free a tensor in the main thread's stead, which goes
    # unrecorded and makes the peak seem higher, never lower.
    return at_rest, at_rest + min(rise([e for e in record if start <= e["ts"] <= end]) for start, end in spans)


def held() -> int:
    """Return the bytes behind all tensors that Python knows, each memory once."""
    memory: dict[int, int] = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.layout == torch.strided:
            for tensor in (x, x.grad if x.is_leaf else None):
                if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
                    storage = tensor.untyped_storage()
                    memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


def rise(events: list[dict[str, Any]]) -> int:
    """Return how far the recorded allocations and releases of a step rise above where it began."""
    own: dict[int, int] = {}  # size of what the step allocated and still has, by address
    live = most = 0
    for event in events:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            live += size - own.get(address, 0)  # an address given out again was released unseen
            own[address] = size
        else:
            live += size
            own.pop(address, None)
        most = max(most, live)
    return most
