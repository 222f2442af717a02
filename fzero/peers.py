"""What a rank tells the others when it raises.

A rank that raises never reaches the collective in which the others wait. They end when its process does,
or at the process group's deadline, with an error of the network that says nothing of the cause. So the
rank leaves its error in the store that the processes share, and the others raise that instead:

    rank 1    raises ValueError   ──▶ store ──▶   leaves
    rank 0    waits in a collective … connection closed, or deadline ──▶ PeerError: rank 1 raised ValueError
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fzero._torch import default_store, group_deadline
from fzero.errors import PeerError

# Seconds before a call began within which another rank's error still counts as the cause of this one's.
_WINDOW = 60.0


@contextmanager
def together(call: str) -> Iterator[None]:
    """Inside, this rank does what all ranks do. If it raises, the others are told; if another does, it is.

    Args:
        call: what is being done, for the message.

    Raises:
        PeerError: a collective failed, and another rank had raised.
    """
    if not dist.is_initialized():
        yield
        return
    began = time.time()
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        if not _from_network(error):
            if not getattr(error, "told_peers", False):
                _tell(error, call)
            raise
        told = _told(since=began - _WINDOW)
        told = told or [
            f"  no other rank left an error: one is late by more than the {group_deadline():.0f} s that a collective "
            f"waits, ended outside of fzero, or runs something else.\n  {error}"
        ]
        raise PeerError(f"{call}: rank {dist.get_rank()} waited in a collective.\n" + "\n".join(told)) from error


def _from_network(error: Exception) -> bool:
    """Whether a collective failed, not the code around it. gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _tell(error: Exception, call: str) -> None:
    message = {"time": time.time(), "call": call, "type": type(error).__name__, "text": str(error)}
    error.told_peers = True  # type: ignore[attr-defined]
    try:
        default_store().set(_key(dist.get_rank()), json.dumps(message))
    except RuntimeError:  # the store went with the rank that held it; the error itself is what matters
        return


def _told(since: float) -> list[str]:
    """Return what other ranks left in the store, one line a rank."""
    lines = []
    for rank in range(dist.get_world_size()):
        try:
            if rank == dist.get_rank() or not default_store().check([_key(rank)]):
                continue
            message = json.loads(default_store().get(_key(rank)))
        except RuntimeError:
            continue
        if message["time"] >= since:
            ago = time.time() - message["time"]
            lines.append(
                f"  rank {rank} raised {message['type']} in {message['call']}, {ago:.1f} s ago: {message['text']}"
            )
    return lines


def _key(rank: int) -> str:
    return f"fzero/raised/{rank}"
