"""Lowering to a CUDA graph: the whole step recorded once, and launched as one.

    call 1     runs operation by operation, as the graph lowering does: libraries start, kernels compile
    call 2     is recorded, which runs nothing; then replayed
    call 3 …   copy the batch in ──▶ replay ──▶ copy the metrics out

A recording reads and writes fixed addresses. Donated memory stays where it is: a state that was updated in place
comes back at the address at which the recording expects it, so nothing of it is copied. Whatever else comes in is
copied into memory of the recording, and whatever else goes out is copied, so that no call overwrites what another
handed out.

A state at other addresses, such as one just restored, is copied in if nobody holds the last state that was handed out
from there; otherwise it gets a recording of its own. Recordings keep their memory as long as the jitted function lives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fzero._torch import holders_of, storage_id
from fzero.program.graph.trace import Trace, attribute
from fzero.program.lower.python import Lowered, lower_graph


def lower_cudagraph(trace: Trace) -> Lowered:
    """Return the graph, recorded at its second call, as a function of a list of inputs, which it empties.

    Raises:
        ValueError: an input is not on CUDA, or the function closes over a tensor that is not.
    """
    graph = trace.module.graph
    used = {repr(p): n.meta["val"] for p, n in zip(trace.inputs, graph.find_nodes(op="placeholder"), strict=True)}
    for node in graph.find_nodes(op="get_attr"):
        # A number written as a tensor is copied where it is used, and never changes.
        if any(user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users):
            used["a tensor that the function closes over"] = attribute(trace.module, str(node.target))
    for what, x in used.items():
        if isinstance(x, Tensor) and x.device.type != "cuda":
            raise ValueError(
                f'fz.jit: lower="cudagraph" replays work on CUDA, and {what} is on {x.device}. Move it to CUDA, or '
                f'use lower="graph" or "inductor".'
            )
    return Replayed(lower_graph(trace.module, trace.bodies), trace.donated)


class Recorder:
    """What runs a program on a stream of its own, and records it there."""

    def __init__(self, device: torch.device | None) -> None:
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, run: Lowered, inputs: list[Tensor]) -> list[Tensor]:
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            results = run(inputs)
        caller.wait_stream(self.stream)
        for x in results:
            if x.is_cuda:
                x.record_stream(caller)
        return results

    def record(self, run: Lowered, inputs: list[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins a batch, may go on meanwhile. The outer context gives the caller its
        # stream back also if the inner one fails.
        inner = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), inner:
                results = run(list(inputs))
        except RuntimeError as error:
            raise RuntimeError(
                f"fz.jit: the program cannot be recorded as a CUDA graph: {error}\nCopies between CPU and CUDA, and "
                f'shapes that depend on values, are what usually stands in the way. Use lower="graph" or "inductor".'
            ) from error
        return graph.replay, results


class Replayed:
    """A program and its recordings: one for each set of donated memory that is in use at a time."""

    def __init__(self, run: Lowered, donated: frozenset[int], recorder: type[Recorder] = Recorder) -> None:
        self.run = run
        self.donated = donated
        self.make_recorder = recorder
        self.recorder: Recorder | None = None
        self.recordings: list[_Recording] = []

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.recorder is None:
            recorder = self.make_recorder(next((x.device for x in inputs), None))
            results = recorder.warm_up(self.run, inputs)
            self.recorder = recorder
            return results
        recording = next((r for r in self.recordings if r.is_at(inputs)), None)
        recording = recording or next((r for r in self.recordings if r.is_free()), None)
        if recording is None:
            recording = _Recording(self.run, self.donated, inputs, self.recorder)
            self.recordings.append(recording)
        return recording.replay(inputs)


class _Recording:
    def __init__(self, run: Lowered, donated: frozenset[int], inputs: list[Tensor], recorder: Recorder) -> None:
        self.inputs = [x if i in donated else x.clone() for i, x in enumerate(inputs)]
        self.launch, self.outputs = recorder.record(run, self.inputs)
        lent = {storage_id(self.inputs[i]) for i in donated} & {storage_id(x) for x in self.outputs}
        own = {id(x): storage_id(x) for x in (*self.inputs, *self.outputs)}
        self.holders = Counter(own.values())
        # What every call asks for, found once: a state has hundreds of leaves.
        self.addresses = [x.data_ptr() for x in self.inputs]
        self.lent = {i: address for i, address in enumerate(self.addresses) if own[id(self.inputs[i])] in lent}
        self.handed_out = [own[id(x)] in lent for x in self.outputs]

    def is_at(self, inputs: list[Tensor]) -> bool:
        """Whether the inputs whose memory comes back as outputs are where the recording has them."""
        return all(inputs[i].data_ptr() == address for i, address in self.lent.items())

    def is_free(self) -> bool:
        """Whether nobody else holds memory that comes back as outputs."""
        return all(holders_of(x) == self.holders[storage_id(x)] for x in map(self.inputs.__getitem__, self.lent))

    def replay(self, inputs: list[Tensor]) -> list[Tensor]:
        for x, address, given in zip(self.inputs, self.addresses, inputs, strict=True):
            if address != given.data_ptr():
                x.copy_(given, non_blocking=True)
        inputs.clear()
        self.launch()
        # New objects: a donation makes a tombstone of what is handed out, not of what the recording holds.
        pairs = zip(self.handed_out, self.outputs, strict=True)
        return [x.detach() if is_lent else x.clone() for is_lent, x in pairs]
