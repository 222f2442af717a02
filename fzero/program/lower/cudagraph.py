"""Lowering to a CUDA graph: the whole step recorded once, and launched as one.

    call 1     runs as it is: libraries start, kernels compile
    call 2     is recorded, which runs nothing; then replayed
    call 3 …   copy the batch in ──▶ replay ──▶ copy the metrics out

A recording reads and writes fixed addresses. Donated memory stays where it is: a state that was updated in place
comes back at the address at which the recording expects it, so nothing of it is copied. A state that is only read is
read where it is. Whatever else comes in is copied into memory of the recording, and whatever else goes out is copied,
so that no call overwrites what another handed out.

A donated state at other addresses, such as one just restored, is copied in if nobody holds the last state that was
handed out from there; otherwise it gets a recording of its own, up to `MOST`, and beyond that runs as it is.

What a program makes on its way is worth nothing once its results are copied out. So all recordings that are replayed
on one stream have that memory in common: a function with a program for each of ten sizes takes what the largest takes.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fzero._torch import holders_of, storage_id
from fzero.program.graph.collectives import is_collective
from fzero.program.graph.trace import Trace, attribute
from fzero.program.graph.walk import calls
from fzero.program.lower.python import Lowered, lower_graph

logger = logging.getLogger(__name__)

# Recordings of one program, each for a state at other addresses.
MOST = 4
# Bytes of results that are copied out at each call, of a program that nobody asked to record. A step that donates its
# state copies its metrics; one that does not would copy a state.
MOST_COPIED = 64 << 20


def lower_cudagraph(trace: Trace) -> Lowered:
    """Return the graph, recorded at its second call, as a function of a list of inputs, which it empties.

    Raises:
        ValueError: an input is not on CUDA, or the function closes over a tensor that is not.
    """
    if (found := not_on_cuda(trace)) is not None:
        raise ValueError(
            f'fz.jit: lower="cudagraph" replays work on CUDA, and {found[0]} is on {found[1]}. Move it to CUDA, or '
            f'use lower="graph" or "inductor".'
        )
    return Replayed(lower_graph(trace.module, trace.bodies), trace.donated, read_in_place(trace))


def replayed_if_possible(run: Lowered, trace: Trace) -> Lowered:
    """Return a lowered trace, recorded at its second call where it can be.

    Programs with collectives are not: nobody has seen yet what a replay does when another rank is lost.
    """
    if not trace.inputs or not_on_cuda(trace) or any(is_collective(node) for node, _ in calls(trace)):
        return run
    return Replayed(run, trace.donated, read_in_place(trace), must=False)


def not_on_cuda(trace: Trace) -> tuple[str, torch.device] | None:
    """Return an input of a trace, or a tensor that it closes over, that is not on CUDA, and where it is."""
    graph = trace.module.graph
    used = {repr(p): n.meta["val"] for p, n in zip(trace.inputs, graph.find_nodes(op="placeholder"), strict=True)}
    for node in graph.find_nodes(op="get_attr"):
        # A number written as a tensor is copied where it is used, and never changes.
        if any(user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users):
            used["a tensor that the function closes over"] = attribute(trace.module, str(node.target))
    elsewhere = ((what, x.device) for what, x in used.items() if isinstance(x, Tensor) and x.device.type != "cuda")
    return next(elsewhere, None)


def read_in_place(trace: Trace) -> frozenset[int]:
    """Return the positions of parameters and moments that are not donated: too large to be copied at every call."""
    return frozenset(i for i, kind in enumerate(trace.kinds) if kind in ("params", "moments")) - trace.donated


class Recorder:
    """What runs programs on a stream of its own, and records them there, for calls on one stream.

    Attributes:
        lock: held from when the inputs of a recording are filled until its results are copied out.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()

    def warm_up(self, run: Lowered, inputs: list[Tensor]) -> list[Tensor]:
        """Run a program on the stream of recordings, behind the caller's work, so that kernels are compiled."""
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
        """Record a program. Return how to replay it, and the tensors that each replay writes."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins a batch, may go on meanwhile. The outer context gives the caller its
        # stream back also if the inner one fails.
        inner = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), warnings.catch_warnings(), inner:
                # What breaks off at its first kernel leaves an empty graph behind; the error tells enough.
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                results = run(list(inputs))
        except RuntimeError as error:
            raise RuntimeError(
                f"fz.jit: the program cannot be recorded as a CUDA graph: {error}\nCopies between CPU and CUDA, and "
                f'shapes that depend on values, are what usually stands in the way. Use lower="graph" or "inductor".'
            ) from error
        return graph.replay, results


def recorder_for(device: torch.device) -> Recorder:
    """Return the recorder of calls on a device's current stream."""
    return _recorder_on(torch.cuda.current_stream(device))


@functools.cache
def _recorder_on(stream: torch.cuda.Stream) -> Recorder:
    return Recorder(stream.device)


class Replayed:
    """A program and its recordings: one for each set of memory that is in use at a time.

    Args:
        run: the program. It may be called while it is recorded.
        donated: positions of inputs whose memory the program may overwrite.
        in_place: positions of inputs that it reads where they are.
        recorder: gives what records it on a device.
        must: whether it is an error that it cannot be recorded; else it runs as it is.
    """

    def __init__(
        self,
        run: Lowered,
        donated: frozenset[int],
        in_place: frozenset[int] = frozenset(),
        recorder: Callable[[torch.device], Recorder] = recorder_for,
        *,
        must: bool = True,
    ) -> None:
        self.run = run
        self.donated, self.in_place = donated, in_place
        self.recorder_for = recorder
        self.must = must
        self.is_recorded = True
        self.warm: set[Recorder] = set()
        self.recordings: list[_Recording] = []

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        if not self.is_recorded:
            return self.run(inputs)
        recorder = self.recorder_for(inputs[0].device if inputs else torch.device("cuda"))
        if recorder not in self.warm:
            results = recorder.warm_up(self.run, inputs)
            self.warm.add(recorder)
            return results
        with recorder.lock:
            usable = [r for r in self.recordings if r.recorder is recorder and r.finds(inputs)]
            recording = next((r for r in usable if r.is_at(inputs)), None)
            recording = recording or next((r for r in usable if r.is_free()), None) or self._recording(inputs, recorder)
            if recording is not None:
                return recording.replay(inputs)
        return self.run(inputs)

    def _recording(self, inputs: list[Tensor], recorder: Recorder) -> _Recording | None:
        """Record the program for these inputs, unless that has shown to be of no use."""
        if len(self.recordings) == MOST:
            return None
        try:
            recording = _Recording(self.run, self.donated, self.in_place, inputs, recorder)
        except RuntimeError as error:
            if self.must:
                raise
            self.is_recorded = False
            logger.warning("fz.jit: a program runs without being recorded, at a cost for each kernel: %s", error)
            return None
        if not self.must and recording.copied > MOST_COPIED:
            self.is_recorded = False
            logger.info(
                "fz.jit: a program is not recorded, since %d bytes of results would be copied", recording.copied
            )
            return None
        self.recordings.append(recording)
        return recording


class _Recording:
    def __init__(
        self,
        run: Lowered,
        donated: frozenset[int],
        in_place: frozenset[int],
        inputs: list[Tensor],
        recorder: Recorder,
    ) -> None:
        self.recorder = recorder
        own = [x if i in donated or i in in_place else x.clone() for i, x in enumerate(inputs)]
        self.launch, self.outputs = recorder.record(run, own)
        lent = {storage_id(own[i]) for i in donated} & {storage_id(x) for x in self.outputs}
        # The recording keeps alone the addresses of what is only read: others may let go of it.
        self.read = {i: own[i].data_ptr() for i in in_place}
        self.inputs = {i: x for i, x in enumerate(own) if i not in in_place}
        self.holders = Counter({id(x): storage_id(x) for x in (*self.inputs.values(), *self.outputs)}.values())
        # What every call asks for, found once: a state has hundreds of leaves.
        self.addresses = {i: x.data_ptr() for i, x in self.inputs.items()}
        self.lent = {i: self.addresses[i] for i, x in self.inputs.items() if storage_id(x) in lent}
        self.handed_out = [storage_id(x) in lent for x in self.outputs]
        self.copied = sum(x.nbytes for x, is_lent in zip(self.outputs, self.handed_out, strict=True) if not is_lent)

    def finds(self, inputs: list[Tensor]) -> bool:
        """Whether the inputs that it reads where they are stand there."""
        return all(inputs[i].data_ptr() == address for i, address in self.read.items())

    def is_at(self, inputs: list[Tensor]) -> bool:
        """Whether the inputs whose memory comes back as outputs are where the recording has them."""
        return all(inputs[i].data_ptr() == address for i, address in self.lent.items())

    def is_free(self) -> bool:
        """Whether nobody else holds memory that comes back as outputs."""
        return all(holders_of(x) == self.holders[storage_id(x)] for x in map(self.inputs.__getitem__, self.lent))

    def replay(self, inputs: list[Tensor]) -> list[Tensor]:
        for i, address in self.addresses.items():
            if address != inputs[i].data_ptr():
                self.inputs[i].copy_(inputs[i], non_blocking=True)
        inputs.clear()
        self.launch()
        # New objects: a donation makes a tombstone of what is handed out, not of what the recording holds.
        pairs = zip(self.handed_out, self.outputs, strict=True)
        return [x.detach() if is_lent else x.clone() for is_lent, x in pairs]
