"""Meshes: axes and ranks, worlds of one, worlds that do not exist, and worlds that a launcher starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fzero as fz
from tests import world

PACKAGE = Path(__file__).parent.parent


def test_without_a_launcher_the_world_has_one_process_and_no_group():
    mesh = fz.make_mesh("cpu")
    assert mesh.axes == (("data", 1),)
    assert mesh.device == torch.device("cpu")
    assert not mesh.simulated
    assert mesh.processes is None
    assert not dist.is_initialized()
    assert mesh.size("data") == 1
    assert mesh.index("data") == 0


def test_a_world_of_one_may_have_many_axes():
    mesh = fz.make_mesh("cpu", node=1, data=1, model=1)
    assert mesh.names == ("node", "data", "model")
    assert mesh.size(mesh.names) == 1
    assert mesh.index(mesh.names) == 0


def test_meshes_of_the_same_axes_are_equal():
    assert fz.make_mesh("cpu") == fz.make_mesh("cpu", data=1)
    assert hash(fz.make_mesh("cpu")) == hash(fz.make_mesh("cpu", data=1))
    assert fz.make_mesh("cpu", model=1) != fz.make_mesh("cpu", data=1)
    assert fz.make_mesh("cpu", a=1, b=1) != fz.make_mesh("cpu", b=1, a=1)
    assert fz.make_mesh("cpu", simulate=True) != fz.make_mesh("cpu")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 2}, "data=2 need 2 processes, and there is 1"),
        ({"node": 2, "data": 3}, "node=2, data=3 need 6 processes, and there is 1"),
        ({"data": 0}, "'data' needs a size of at least 1, got 0"),
        ({"data": -1}, "'data' needs a size of at least 1, got -1"),
        ({"data": 1.0}, "'data' needs a size of at least 1, got 1.0"),
    ],
)
def test_axes_that_cannot_be_are_refused(axes, message):
    with pytest.raises(fz.MeshError, match=message):
        fz.make_mesh("cpu", **axes)


def test_an_unknown_axis_is_named():
    mesh = fz.make_mesh("cpu", node=1, data=1)
    for ask in (mesh.size, mesh.index):
        with pytest.raises(fz.MeshError, match="no axis 'modle'; the mesh has node=1 × data=1"):
            ask("modle")
    with pytest.raises(fz.MeshError, match="no axis 'modle'"):
        mesh.size(("data", "modle"))


def test_a_simulated_world_has_any_size():
    mesh = fz.make_mesh("cpu", data=16384, simulate=True)
    assert mesh.simulated
    assert mesh.size("data") == 16384
    assert mesh.index("data") == 0
    assert fz.make_mesh("cpu", node=2048, data=8, simulate=True).size(("node", "data")) == 16384
    assert not dist.is_initialized()


def test_on_a_simulated_world_pieces_are_abstract_and_nothing_runs():
    mesh = fz.make_mesh("cpu", data=16384, simulate=True)
    sharded = fz.shard({"w": torch.ones(1024, 1024), "b": torch.ones(1024)}, mesh, fz.zero(3))
    assert [(x.device.type, x.shape) for x in fz.tree.leaves(sharded)] == [("meta", (1024,)), ("meta", (64,))]
    with pytest.raises(fz.MeshError, match="simulated"):
        fz.gather(sharded)


# ---------------------------------------------------------------------------------------------------------
# Several ranks


def coordinates(axes, asked):
    mesh = fz.make_mesh("cpu", **axes)
    tensor = mesh.index_tensor(asked)
    assert (tensor.dtype, tensor.shape) == (torch.int32, ())
    assert tensor.item() == mesh.index(asked)
    return mesh.size(asked), mesh.index(asked)


@pytest.mark.parametrize(
    ("axes", "asked", "size", "indices"),
    [
        ({}, "data", 4, [0, 1, 2, 3]),
        ({"node": 2, "data": 2}, "node", 2, [0, 0, 1, 1]),
        ({"node": 2, "data": 2}, "data", 2, [0, 1, 0, 1]),
        ({"node": 2, "data": 2}, ("node", "data"), 4, [0, 1, 2, 3]),
        ({"node": 2, "data": 2}, ("data", "node"), 4, [0, 2, 1, 3]),
        ({"node": 2, "data": 2}, (), 1, [0, 0, 0, 0]),
        ({"node": 1, "data": 4}, ("node", "data"), 4, [0, 1, 2, 3]),
    ],
)
def test_the_last_axis_varies_fastest(axes, asked, size, indices):
    assert world.run(coordinates, axes, asked, size=4) == [(size, index) for index in indices]


def groups():
    mesh = fz.make_mesh("cpu", node=2, data=2)
    assert mesh.processes is not None
    for axis in mesh.names:
        assert mesh.group(axis) == mesh.processes.get_group(axis).group_name
    return [dist.get_process_group_ranks(mesh.processes.get_group(axis)) for axis in mesh.names]


def test_a_group_holds_the_ranks_along_its_axis():
    assert world.run(groups, size=4) == [
        [[0, 2], [0, 1]],
        [[1, 3], [0, 1]],
        [[0, 2], [2, 3]],
        [[1, 3], [2, 3]],
    ]


def made_twice(axes):
    first, second = fz.make_mesh("cpu", **axes), fz.make_mesh("cpu", **axes)
    return first == second, [first.group(a) for a in first.names] == [second.group(a) for a in first.names]


@pytest.mark.parametrize("axes", [{}, {"node": 2, "data": 2}], ids=["one axis", "two axes"])
def test_a_second_mesh_starts_no_second_groups(axes):
    assert world.run(made_twice, axes, size=4) == [(True, True)] * 4


def refused(axes):
    fz.make_mesh("cpu", **axes)


def test_axes_have_to_multiply_to_the_number_of_processes():
    world.raises(fz.MeshError, refused, {"data": 3}, size=2, match="data=3 need 3 processes, and there are 2")
    world.raises(fz.MeshError, refused, {"node": 2, "data": 2}, size=2, match="node=2, data=2 need 4 .* there are 2")


def only_rank_0_gathers(axes, gave_up):
    """The other ranks come back only after rank 0 has given up on them."""
    mesh = fz.make_mesh("cpu", deadline=1, **axes)
    sharded = fz.shard({"w": torch.ones(256)}, mesh, fz.zero(3))
    fz.gather(sharded)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):
            fz.gather(sharded)
        gave_up.touch()
    while not gave_up.exists():
        time.sleep(0.1)
    raise InterruptedError("the process group is broken: a case that raises gets the next one a new group")


@pytest.mark.parametrize(("axes", "size"), [({}, 2), ({"node": 2, "data": 2}, 4)], ids=["one axis", "two axes"])
def test_nobody_waits_longer_than_the_deadline(axes, size, tmp_path):
    world.raises(InterruptedError, only_rank_0_gathers, axes, tmp_path / "gave up", size=size)


LAUNCHED = """
import atexit, os, sys, weakref
import torch, torch.distributed as dist, fzero as fz

if sys.argv[1:]:  # no launcher: what one sets, of two processes of which the second is a fork of the first
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": sys.argv[1]}
    fz.grad(torch.sum)(torch.ones(2))  # what it imports is there for both
    forked = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if forked else "1"
    if forked:  # registered before all others, so it runs last
        atexit.register(lambda: os.waitpid(forked, 0)[1] == 0 or os._exit(1))

def ending():  # registered first, so it runs after what fzero registers; a live group's threads may abort the process
    print("left\\n" if world() is None else "a group is alive\\n", end="", flush=True)

assert not dist.is_initialized()
atexit.register(ending)
mesh = fz.make_mesh()
world = weakref.ref(dist.group.WORLD)
assert fz.make_mesh() == mesh and mesh.axes == (("data", 2),)
w = torch.arange(101.0)
pieces = fz.shard({"w": w}, mesh, fz.zero(3))
assert pieces.pieces[0].numel() == 51
assert torch.equal(fz.gather(pieces)["w"], w)
fz.grad(lambda p: p["w"].sum())(pieces)
print(f"rank {mesh.index('data')} {mesh.device.type} {dist.get_backend()}\\n", end="", flush=True)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_under_a_launcher_it_starts_the_process_group_and_leaves_it_at_exit(torchrun, tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launcher, str(script), *([] if torchrun else [free_port()])]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "left", "left", "rank 0 cpu gloo", "rank 1 cpu gloo"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "there is no CUDA here.*pass 'cpu'"),
        ("cuda:1", "there is no CUDA here"),
        ("gpu", "device='gpu' is none"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, message):
    with pytest.raises(fz.MeshError, match=message):
        fz.make_mesh(device)
    if device != "gpu":
        assert fz.make_mesh(device, simulate=True).device.type == "cuda"
