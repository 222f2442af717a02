"""Agreeing with the other ranks on what is run next, through the store that all processes of a group share.

`fzero.ranks.peers` tells the whole story; this is the step from how a round ended to what a rank raises.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fzero._torch import default_store
from fzero.errors import PeerError, ProgramMismatchError
from fzero.ranks.rounds import World
from fzero.ranks.watch import Watch

# One for each default process group.
_worlds: WeakKeyDictionary[Any, World] = WeakKeyDictionary()


def world() -> World:
    """Return what this rank knows of the world that it is in."""
    group = dist.group.WORLD
    here = _worlds.get(group)
    if here is None:
        # A store may serve several process groups of all N ranks, one after another. All N join the first before any
        # joins the second: so those who join as number 0 to N − 1 are of world 0, the next N of world 1.
        joined = default_store().add("fzero/joined", 1) - 1
        here = _worlds[group] = World(group, f"fzero/{joined // dist.get_world_size()}")
        watch = Watch(group, here)
        atexit.register(watch.end)
        watch.start()
    return here


def agree(program: str, call: str, reasons: Callable[[], bytes]) -> dict[int, bytes]:
    """Wait until all ranks are about to run the same, at most as long as a collective may wait.

    Args:
        program: a hash of what this rank is about to run.
        call: the call that it is for.
        reasons: a text from which two can be told apart. It is sent only if they differ.

    Returns:
        Nothing if all run the same, else two ranks that differ and the reasons of each.

    Raises:
        ProgramMismatchError: some rank came to no call, or two differ and their reasons did not come.
        PeerError: some rank raised instead.
    """
    here = world()
    while True:
        number = here.number
        end = here.enter(program, call)
        if end.kind == "agreed":
            return {}
        if end.kind != "raised":
            break
        if here.failed[end.call] < end.count:
            here.failed[end.call] = end.count
            raise PeerError(f"{call}: rank {here.rank} waited for all ranks to come to this call.\n{end.text}")
        # This rank has raised that error too, or been told of it. The others now know: on to the next round.
    found = here.reasons(number, end.ranks, reasons)
    if end.kind == "apart" or len(found) < len(end.ranks):
        raise ProgramMismatchError(f"{call}: {end.text}")
    return found


def first_written(key: str, text: str) -> str:
    """Return the text that the first rank that came wrote under a key, once and for all: this one, or another."""
    found: bytes = world().store.compare_set(key, "", text)
    return found.decode()
