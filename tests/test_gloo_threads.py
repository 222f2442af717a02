"""gloo runs the collectives of a mesh one after the other: with torch's two threads the process dies now and then."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fzero as fz
from fzero.ranks import collectives
from fzero.ranks.groups import gloo_threads, one_gloo_thread
from tests import world


def threads_of(axes: dict[str, int]) -> list[int]:
    make: Any = fz.make_mesh  # its keywords are axes, as well as options
    mesh = make("cpu", **axes)
    assert mesh.processes is not None
    return [gloo_threads(group) for group in mesh.processes.get_all_groups()]


def gathered(axis: str, mesh: fz.Mesh) -> list[float]:
    under_way = [collectives.all_gather(torch.full((1,), float(i + mesh.index(axis))), mesh, axis) for i in range(3)]
    return torch.cat(under_way).tolist()


def in_a_world_started_elsewhere(store: str) -> tuple[int, list[int], list[float]]:
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = fz.make_mesh("cpu")
    return gloo_threads(dist.group.WORLD), threads_of({}), gathered("data", mesh)


@pytest.mark.parametrize(("size", "axes"), [(2, {}), (4, {"node": 2, "data": 2})])
def test_the_groups_of_a_mesh_have_one_thread(size: int, axes: dict[str, int]) -> None:
    assert world.run(threads_of, axes, size=size) == [[1] * max(1, len(axes))] * size


def test_a_world_of_two_threads_is_not_what_a_mesh_runs_on() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for threads, of_mesh, values in world.run(in_a_world_started_elsewhere, str(Path(folder, "store")), size=2):
            assert (threads, of_mesh) == (2, [1])
            assert values == [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    world.fresh()


def test_torch_is_as_it_was_afterwards() -> None:
    before = dist.ProcessGroupGloo
    with pytest.raises(ZeroDivisionError), one_gloo_thread():
        assert dist.distributed_c10d.ProcessGroupGloo is not before
        raise ZeroDivisionError
    assert dist.distributed_c10d.ProcessGroupGloo is before
