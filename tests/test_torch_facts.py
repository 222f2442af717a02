"""What fzero takes for granted of torch and optree, working or not, so that an upgrade that changes it says so.

A test that fails here asks for a look at the code it names, not for another expected value.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.init import trunc_normal_
from transformers.modeling_outputs import CausalLMOutput

from fzero._torch import (
    FakeTensorMode,
    TorchDispatchMode,
    c10d,
    data_dependent_errors,
    is_functorch_wrapped,
    make_fx,
    storage_id,
    torch_nodes,
    torch_pytree,
    unwrap_if_dead,
)
from fzero.wrapped import functorch_level, unwrapped
from tests import world

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

# ---------------------------------------------------------------------------------------------------------
# Collectives: why fzero/ranks/collectives.py wraps the raw ops


# Without fzero, which refuses both.
COLLECTIVES_IN_A_GRADIENT = """
import warnings
import torch, torch.distributed as dist
from torch.func import vjp
warnings.simplefilter("ignore")
c10d, x, group = torch.ops._c10d_functional, torch.ones(2), "unused"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def gathered(x):
    out = torch.zeros(2)
    dist.all_gather_into_tensor(out, x)
    return out + 0 * x.sum()

print(vjp(gathered, x)[1](x)[0].tolist())
name = dist.group.WORLD.group_name
try:
    print(vjp(lambda x: c10d.wait_tensor(c10d.all_gather_into_tensor(x, 1, name)), x)[1](x)[0].tolist())
except RuntimeError:
    print(None)
dist.destroy_process_group()
"""


def test_collectives_of_torch_have_no_gradient_under_its_transforms():
    command = [sys.executable, "-c", COLLECTIVES_IN_A_GRADIENT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    silent, raw = run.stdout.splitlines()
    assert silent == "[0.0, 0.0]", "it would be 1"
    assert raw in ("None", "[0.0, 0.0]")


def raw_collective_on_a_plain_tensor() -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    return c10d.wait_tensor(c10d.all_gather_into_tensor(torch.ones(1) * dist.get_rank(), 2, group.group_name))


def test_a_raw_functional_collective_takes_a_plain_tensor():
    assert [x.tolist() for x in world.run(raw_collective_on_a_plain_tensor, size=2)] == [[0, 1], [0, 1]]


def test_fake_tensors_go_through_a_collective_whose_group_does_not_exist():
    with FakeTensorMode():
        x = c10d.wait_tensor(c10d.all_gather_into_tensor(torch.ones(2, 3), 5, "nowhere"))
        y = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 5, "nowhere"))
        z = c10d.wait_tensor(c10d.all_to_all_single(x, [2] * 5, [2] * 5, "nowhere"))
    assert [t.shape for t in (x, y, z)] == [(10, 3), (2, 3), (10, 3)]


# ---------------------------------------------------------------------------------------------------------
# torch.func: how collectives and remat may be differentiated


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class CubeWithoutSetup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


class CubeByRecomputing(Cube):
    """Calls vjp in its backward, as `fz.remat` does."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return vjp(lambda x: x**3, unwrap_if_dead(x))[1](cotangent)[0]


@pytest.mark.parametrize("cube", [Cube.apply, CubeByRecomputing.apply], ids=["formula", "recomputed"])
def test_a_function_with_setup_context_has_derivatives_of_every_order(cube):
    x, one = torch.tensor(2.0), torch.tensor(1.0)
    assert vjp(cube, x)[1](one)[0] == 12
    assert vjp(lambda x: vjp(cube, x)[1](one)[0], x)[1](one)[0] == 12
    assert grad(grad(grad(cube)))(x) == 6
    assert jvp(cube, (x,), (one,))[1] == 12
    assert jvp(grad(cube), (x,), (one,))[1] == 12


def test_a_function_without_setup_context_is_refused():
    with pytest.raises(RuntimeError, match="setup_context"):
        vjp(CubeWithoutSetup.apply, torch.tensor(2.0))


def test_checkpoint_is_refused_under_vjp():
    def f(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        vjp(f, torch.ones(2))


def test_a_cotangent_of_another_dtype_is_taken_without_a_word():
    pullback = vjp(torch.sin, torch.ones(2))[1]
    pullback(torch.ones(2, dtype=torch.float64))


def test_wrappers_of_transforms_can_be_counted_and_taken_off():
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(
            (is_functorch_wrapped(x), functorch_level(x), type(unwrapped(x)), is_functorch_wrapped(unwrapped(x)))
        )
        return x.sum()

    x = torch.ones(2)
    f(x)
    vjp(f, x)
    vjp(grad(f), x)
    assert seen == [(False, 0, Tensor, False), (True, 1, Tensor, False), (True, 2, Tensor, False)]


def test_a_dispatch_mode_entered_inside_a_transform_sees_plain_tensors():
    """`fz.keyed` relies on it: what it draws has no wrappers, and it is asked once for each random operation."""

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((str(func), any(is_functorch_wrapped(x) for x in args if isinstance(x, Tensor))))
            return func(*args, **(kwargs or {}))

    calls: list[tuple[str, bool]] = []

    def f(x: Tensor) -> Tensor:
        with Recording():
            return torch.nn.functional.dropout(x, 0.5).sum()

    grad(f)(torch.ones(4))
    random = [(name, wrapped) for name, wrapped in calls if "bernoulli" in name or "dropout" in name]
    assert len(random) == 1
    assert not any(wrapped for _, wrapped in calls)


# ---------------------------------------------------------------------------------------------------------
# make_fx: what fzero/program/graph/trace.py guards against


def test_one_tensor_passed_twice_becomes_one_input():
    x = torch.ones(2)
    graph = make_fx(lambda a, b: a - b, tracing_mode="fake")(x, x)
    assert graph(torch.tensor([5.0]), torch.tensor([3.0])).tolist() == [0], "it would be 2"
    graph = make_fx(lambda a, b: a - b, tracing_mode="fake")(x, x.clone())
    assert graph(torch.tensor([5.0]), torch.tensor([3.0])).tolist() == [2]


def test_a_python_number_is_a_constant_of_the_trace():
    rate = 2.0
    graph = make_fx(lambda x: x * rate, tracing_mode="fake")(torch.ones(1))
    rate = 3.0
    assert graph(torch.ones(1)).tolist() == [2.0]


def test_a_closed_over_tensor_is_read_when_the_trace_runs():
    w = torch.ones(1)
    graph = make_fx(lambda x: x * w, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(1))
    w.fill_(3.0)
    assert graph(torch.ones(1)).tolist() == [3.0]


@pytest.mark.parametrize("look", [lambda x: x.item(), lambda x: 1 if x.sum() > 0 else 0, lambda x: x[x > 0]])
def test_a_trace_has_no_values_to_look_at(look):
    with FakeTensorMode():
        x = torch.ones(1)
    with pytest.raises(data_dependent_errors()):
        make_fx(lambda x: x * look(x), tracing_mode="fake")(x)


def test_a_trace_does_not_see_that_a_tensor_was_given_other_memory():
    """Why `fzero.modules.recording` follows storages. A trace follows objects: it gives out what `x` held before."""

    def f() -> Tensor:
        x = torch.zeros(2)
        x.data = torch.ones(2)
        return x.add_(1)

    assert f().tolist() == [2, 2]
    assert make_fx(f, tracing_mode="fake")()().tolist() == [1, 1]


@pytest.mark.parametrize(
    "change", [lambda layer: layer.to(torch.bfloat16), copy.deepcopy, lambda layer: trunc_normal_(layer.weight)]
)
def test_a_trace_cannot_hold_what_factories_do_to_layers(change):
    """Why `fzero.modules.recording` records on the meta device, and truncated normals whole."""

    def f() -> list[Tensor]:
        layer = torch.nn.Linear(2, 2)
        change(layer)
        return list(layer.parameters())

    with pytest.raises((RuntimeError, *data_dependent_errors())):
        make_fx(f, tracing_mode="fake")()


def test_a_trace_replays_a_pullback_bit_for_bit():
    def f(w: Tensor, x: Tensor) -> list[Tensor]:
        out, pullback = vjp(lambda w: torch.nn.functional.layer_norm(torch.tanh(x @ w), (3,)), w)[:2]
        return [out, *pullback(torch.cos(out))]

    graph = make_fx(f, tracing_mode="fake")(torch.ones(4, 3), torch.ones(5, 4))
    w, x = torch.randn(4, 3), torch.randn(5, 4)
    assert all(torch.equal(a, b) for a, b in zip(graph(w, x), f(w, x), strict=True))


# ---------------------------------------------------------------------------------------------------------
# Memory: donation


class Grave(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError("gone")


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: torch.ones(2) + x,
        lambda x: x[0],
        lambda x: x.shape,
        lambda x: x.tolist(),
        lambda x: torch.stack([torch.ones(2), x]),
        lambda x: x.add_(1),
        lambda x: bool(x.sum()),
    ],
)
def test_a_tensor_given_another_class_is_a_tombstone_for_every_holder(use):
    x = torch.ones(2)
    holder = {"x": x}
    heir = x.detach()
    x.set_()  # type: ignore[call-overload]
    x.__class__ = Grave
    with pytest.raises(LookupError, match="gone"):
        use(holder["x"])
    assert heir.tolist() == [1, 1]


def test_tensors_that_share_memory_have_one_storage_id():
    x = torch.ones(4)
    assert storage_id(x) == storage_id(x[1:]) == storage_id(x.detach().view(2, 2))
    assert storage_id(x) != storage_id(x.clone())
    with FakeTensorMode():
        y = torch.ones(4)
        assert storage_id(y) == storage_id(y[1:]) != storage_id(y.clone())


# ---------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 31, 33, 1000])
def test_up_to_four_rows_are_summed_in_their_order(n, rows):
    """`sum_parts` relies on it. Of more rows, the order depends on the column."""
    x = torch.randn(rows, n)
    total = x[0]
    for row in x[1:]:
        total = total + row
    assert torch.equal(x.sum(0, dtype=torch.float32), total)


def test_int32_arithmetic_wraps_around():
    """`fzero.random.bits` relies on it."""
    x = torch.tensor([2**31 - 1, -(2**31), 0x12345678], dtype=torch.int32)
    assert (x + 1).tolist() == [-(2**31), -(2**31) + 1, 0x12345679]
    wide = x.to(torch.int64) * 0x7FEB352D
    assert torch.equal(x * 0x7FEB352D, ((wide + 2**31) % 2**32 - 2**31).to(torch.int32))
    assert (x >> 16).tolist() == [2**15 - 1, -(2**15), 0x1234], "shifts keep the sign"


# ---------------------------------------------------------------------------------------------------------
# Trees


def test_optree_takes_none_for_an_empty_subtree_and_torch_for_a_leaf():
    given: Any = [1, None]
    assert optree.tree_leaves(given) == [1]
    assert torch_pytree.tree_leaves(given) == [1, None]


def test_a_transform_of_torch_takes_no_none():
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        vjp(lambda x: x["a"], {"a": torch.ones(1), "b": None})


def test_plain_optree_takes_a_hugging_face_output_for_a_leaf():
    output: Any = CausalLMOutput(logits=torch.ones(2))
    assert optree.tree_leaves(output) == [output]


def test_torch_tells_how_its_nodes_are_flattened():
    node = torch_nodes()[list]
    children, context = node.flatten_fn([1, 2])
    assert node.unflatten_fn(children, context) == [1, 2]
