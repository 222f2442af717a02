"""Collectives of torch.distributed inside of functions: in a program as they are eagerly, under a gradient refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as nnf
from torch import Tensor

import fzero as fz
from tests import world

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated.*")

RANKS = 2
plain: Any = dist  # with names that torch does not type


def everyone() -> Any:
    return dist.group.WORLD


def given(call: int, rank: int | None = None) -> Tensor:
    """A rank's tensor: of another value in each call and on each rank."""
    rank = dist.get_rank() if rank is None else rank
    return torch.arange(1.0, 9.0).reshape(4, 2) * (10 * call + rank + 1)


def into(*shape: int) -> Tensor:
    return torch.full(shape, -1.0)


def like(x: Tensor) -> list[Tensor]:
    return [torch.full_like(x, -1) for _ in range(dist.get_world_size())]


def filled(collective: Callable[..., Any], output: Any, *args: Any, **options: Any) -> Any:
    """What a collective leaves in a tensor, or in several, that it is given."""
    work = collective(output, *args, **options)
    if work is not None:
        work.wait()
    return torch.cat([x.reshape(-1) for x in output]) if isinstance(output, list) else output * 1


def coalesced(collective: Callable[..., Any], *calls: tuple[Tensor, ...], **options: Any) -> Tensor:
    with plain._coalescing_manager(**options) as manager:
        for call in calls:
            collective(*call)
    if options:
        manager.wait()
    return torch.cat([call[0].reshape(-1) for call in calls])


def on_parts(x: Tensor) -> Tensor:
    """Where what is written is part of a tensor, and what is sent has gaps in memory."""
    y = x.clone()
    dist.all_reduce(y[1])
    dist.all_gather_into_tensor(both := into(8), x[:, 0])
    return torch.cat([y.reshape(-1), both.reshape(-1)])


def overtaken(x: Tensor) -> Tensor:
    """A tensor is sent, and then overwritten."""
    work = dist.all_gather(parts := like(x), y := x * 2, async_op=True)
    work.wait()
    y.zero_()
    return torch.cat([*parts, y])


def of_numbers(x: Tensor) -> Tensor:
    dist.all_gather(parts := like(x[0, 0]), x[1, 1].clone())
    dist.all_reduce(total := x.sum())
    return torch.stack([*parts, total])


def of_constants(x: Tensor) -> Tensor:
    """Of one number, of which a trace knows the value until it is sent."""
    dist.all_reduce(total := torch.tensor(3.0))
    dist.broadcast(first := torch.tensor([dist.get_rank()]), 1)
    return x * total + first + fc.all_reduce(torch.tensor(2.0), "sum", everyone())


MAX, PRODUCT = dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT
TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": lambda x: filled(dist.all_reduce, x.clone()),
    "all_reduce max": lambda x: filled(dist.all_reduce, x.clone(), op=MAX),
    "all_reduce product, asynchronous": lambda x: filled(dist.all_reduce, x.clone(), op=PRODUCT, async_op=True),
    "all_reduce of counts": lambda x: filled(dist.all_reduce, (x > 15).sum()),
    "all_reduce of flags": lambda x: filled(dist.all_reduce, (x > 15).any(1).to(torch.uint8), op=MAX),
    "broadcast": lambda x: filled(dist.broadcast, x.clone(), 1),
    "all_gather": lambda x: filled(dist.all_gather, like(x), x),
    "all_gather, asynchronous": lambda x: filled(dist.all_gather, like(x), x, async_op=True),
    "all_gather_into_tensor": lambda x: filled(dist.all_gather_into_tensor, into(8, 2), x),
    "all_gather_into_tensor, asynchronous": lambda x: filled(dist.all_gather_into_tensor, into(8, 2), x, async_op=True),
    "all_gather of a complex": lambda x: torch.view_as_real(filled(dist.all_gather, like(x * 1j), x * 1j)),
    "reduce_scatter": lambda x: filled(dist.reduce_scatter, into(2, 2), list(x.chunk(2))),
    "reduce_scatter_tensor": lambda x: filled(dist.reduce_scatter_tensor, into(2, 2), x),
    "reduce_scatter_tensor max": lambda x: filled(dist.reduce_scatter_tensor, into(2, 2), x, op=MAX, async_op=True),
    "all_to_all": lambda x: filled(dist.all_to_all, [into(2, 2), into(2, 2)], [x[:2], x[2:]]),
    "all_to_all_single": lambda x: filled(dist.all_to_all_single, into(4, 2), x),
    "coalesced all_reduce": lambda x: coalesced(dist.all_reduce, (x * 2,), (x[0] * 3,)),
    "coalesced all_gather": lambda x: coalesced(dist.all_gather_into_tensor, (into(8, 2), x), (into(4), x[0])),
    "coalesced reduce_scatter": lambda x: coalesced(
        dist.reduce_scatter_tensor, (into(2, 2), x), (into(1, 2), x[:2]), async_ops=True
    ),
    "all_reduce_coalesced": lambda x: filled(dist.all_reduce_coalesced, [x * 2, x[0] * 3]),
    "part of a tensor": on_parts,
    "overwritten behind": overtaken,
    "of numbers": of_numbers,
    "of constants": of_constants,
    "nn.all_reduce": lambda x: nnf.all_reduce(x.clone()),
    "nn.all_gather": lambda x: torch.cat(nnf.all_gather(x)),
    "nn.broadcast": lambda x: nnf.broadcast(x.clone(), 1),
    "nn.reduce_scatter": lambda x: nnf.reduce_scatter(into(2, 2), list(x.chunk(2))),
    "nn.all_to_all_single": lambda x: nnf.all_to_all_single(into(4, 2), x),
    "functional all_reduce": lambda x: fc.all_reduce(x, "sum", everyone()) + 0,
    "functional all_gather": lambda x: fc.all_gather_tensor(x, 1, everyone()) + 0,
    "functional broadcast": lambda x: fc.broadcast(x, 0, everyone()) + 0,
    "functional coalesced": lambda x: torch.cat(fc.all_reduce_coalesced([x, x * 2], "sum", everyone())),
    "functional scatter": lambda x: fc.reduce_scatter_tensor(x, "sum", 0, everyone()) + 0,
}


def all_of_them(x: Tensor) -> dict[str, Tensor]:
    return {name: f(x) for name, f in TAKEN.items()}


def twice() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each function returns eagerly and as part of one program, of two inputs."""
    program = fz.jit(all_of_them)
    found = [(all_of_them(given(call)), program(given(call))) for call in range(2)]
    assert len(program.programs) == 1
    return found


def test_programs_hold_them_and_wait_for_them():
    for calls in world.run(twice, size=RANKS, deadline=120):
        for eager, traced in calls:
            for name in TAKEN:
                assert torch.equal(eager[name], traced[name]), (name, eager[name], traced[name])
        for name in TAKEN:
            assert not torch.equal(calls[0][0][name], calls[1][0][name]), f"{name} does not tell calls apart"


def alone() -> list[tuple[Tensor, Tensor]]:
    """A program in a world of one that has a process group."""
    dist.init_process_group("gloo", store=plain.HashStore(), rank=0, world_size=1)
    try:
        run = TAKEN["all_gather"], TAKEN["all_reduce"]
        return [(f(given(0)), fz.jit(f)(given(0))) for f in run]
    finally:
        dist.destroy_process_group()


def test_a_world_of_one_is_a_world():
    for eager, traced in world.run(alone, size=1)[0]:
        assert torch.equal(eager, traced)


def to_other(x: Tensor) -> list[dist.P2POp]:
    other = 1 - dist.get_rank()
    return [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty_like(x), other)]


def only_first(x: list[Any]) -> list[Any] | None:
    return x if dist.get_rank() == 0 else None


def number_of_ranks(x: Tensor) -> float:
    dist.all_reduce(count := torch.tensor(1.0))
    return count.item()


# What no program holds, and a word of the way out.
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "reduce": (lambda x: dist.reduce(x.clone(), 0), "all_reduce"),
    "gather": (lambda x: dist.gather(x, only_first(like(x))), "all_gather"),
    "scatter": (lambda x: dist.scatter(x.clone(), only_first(like(x))), "broadcast"),
    "send": (lambda x: dist.send(x, 1 - dist.get_rank()), "gather"),
    "recv": (lambda x: dist.recv(x.clone(), 1 - dist.get_rank()), "gather"),
    "recv from any": (lambda x: dist.recv(x.clone()), "gather"),
    "isend": (lambda x: dist.isend(x, 1 - dist.get_rank()), "gather"),
    "batch_isend_irecv": (lambda x: dist.batch_isend_irecv(to_other(x)), "gather"),
    "barrier": (lambda x: dist.barrier(), "leave it out"),
    "monitored_barrier": (lambda x: dist.monitored_barrier(), "leave it out"),
    "all_gather_object": (lambda x: dist.all_gather_object([None, None], 1), "as an argument"),
    "broadcast_object_list": (lambda x: dist.broadcast_object_list([1]), "as an argument"),
    "gather_object": (lambda x: dist.gather_object(1, only_first([None, None])), "as an argument"),
    "scatter_object_list": (lambda x: dist.scatter_object_list([None], [1, 2]), "as an argument"),
}
REFUSED["a number after it was sent"] = (number_of_ranks, "torch.where")
# What writes tensors that do not fit.
UNFIT: dict[str, Callable[[Tensor], Any]] = {
    "too small": lambda x: dist.all_gather_into_tensor(into(4, 2), x),
    "another dtype": lambda x: dist.all_gather([x.to(torch.int32), x.to(torch.int32)], x),
    "another length on one rank": lambda x: dist.all_gather([into(4, 2), into(3, 2)], x),
    "too few": lambda x: dist.all_gather([torch.empty_like(x)], x),
}


def called(f: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    f(x)
    return x * 1


def errors_of(functions: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What each function of a table raises as a program."""
    found = {}
    for name, table in functions.items():
        f = UNFIT[name] if table == "unfit" else REFUSED[name][0]
        try:
            fz.jit(functools.partial(called, f))(given(0))
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


def test_what_has_no_form_in_a_program_is_refused_with_line_and_way_out():
    asked = {**dict.fromkeys(REFUSED, "refused"), **dict.fromkeys(UNFIT, "unfit")}
    for found in world.run(errors_of, asked, size=RANKS):
        for name, table in asked.items():
            kind, text = found[name]
            if table == "refused":
                assert kind == "TraceError" and REFUSED[name][1] in text, (name, kind, text)
            elif kind != "ValueError":  # torch's own check, which comes first
                assert kind == "ShapeError", (name, kind, text)
            assert kind == "ValueError" or "test_foreign.py" in text, text


def loss_of(collective: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A loss whose result goes through a collective."""

    def loss(params: Any, x: Tensor) -> Tensor:
        y = x @ params["w"]
        return (collective(y).float() * y.mean()).sum() + y.sum()

    return loss


def counted(y: Tensor) -> Tensor:
    dist.all_reduce(count := torch.full((), 3.0))
    return count


def detached(y: Tensor) -> Tensor:
    return filled(dist.all_gather, like(y), y.detach() * 2)


def without_gradient(y: Tensor) -> Tensor:
    with torch.no_grad():
        return filled(dist.all_gather_into_tensor, into(8, 2), y)


# Inside of a loss: those that the gradient does not pass, which are constants, and those that it would.
CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "a count": counted,
    "detached": detached,
    "under no_grad": without_gradient,
    "functional, detached": lambda y: fc.all_reduce(y.detach(), "sum", everyone()),
}


def in_place_under_no_grad(y: Tensor) -> Tensor:
    z = y * 2
    with torch.no_grad():
        dist.all_reduce(z)
    return z


DIFFERENTIATED: dict[str, Callable[[Tensor], Any]] = {
    **{
        name: f
        for name, f in TAKEN.items()
        if name not in ("all_reduce of counts", "all_reduce of flags", "of constants")
    },
    "in place under no_grad": in_place_under_no_grad,
    "send": lambda y: dist.send(y, 1 - dist.get_rank()),
    "reduce": lambda y: dist.reduce(y, 0),
    "functional autograd": lambda y: fc.all_gather_tensor_autograd(y, 0, everyone()),
}


def start() -> Any:
    generator = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(2, 2, generator=generator)}
    return fz.init(params, fz.sgd(0.1), policy="fp32", layout=fz.zero(3))


def gradients(traced: bool) -> dict[str, Tensor]:
    found = {}
    for name, f in CONSTANT.items():
        run = fz.value_and_grad(loss_of(f))
        run = fz.jit(run) if traced else run
        for call in range(2):
            _, gradient = run(start(), given(call))
            found[f"{name} {call}"] = fz.gather(gradient)["w"]
    return found


def by_hand() -> dict[str, Tensor]:
    """The same by autograd, with the ranks one after another."""
    found = {}
    for name in CONSTANT:
        for call in range(2):
            w = fz.gather(start().params)["w"].clone().requires_grad_()
            outputs = [given(call, rank) @ w for rank in range(RANKS)]
            constant = {
                "a count": torch.tensor(3.0 * RANKS),
                "detached": 2 * torch.cat(outputs).detach(),
                "under no_grad": torch.cat(outputs).detach(),
                "functional, detached": torch.stack(outputs).sum(0).detach(),
            }[name]
            total = sum((constant * y.mean()).sum() + y.sum() for y in outputs) / RANKS
            found[f"{name} {call}"] = torch.autograd.grad(total, w)[0]
    return found


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_of_constants_they_run_inside_of_a_loss(traced):
    right = by_hand()
    for found in world.run(gradients, traced, size=RANKS):
        for name, wanted in right.items():
            torch.testing.assert_close(found[name], wanted, msg=name)


def differentiated(traced: bool) -> list[str]:
    """All, and of programs some: what refuses is the same."""
    return list(DIFFERENTIATED)[:: 4 if traced else 1]


def refusals(traced: bool) -> dict[str, tuple[str, str]]:
    found = {}
    for name in differentiated(traced):
        f = DIFFERENTIATED[name]
        run = fz.value_and_grad(loss_of(functools.partial(called, f)))
        try:
            (fz.jit(run) if traced else run)(start(), given(0))
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_of_what_is_differentiated_they_are_refused(traced):
    for found in world.run(refusals, traced, size=RANKS):
        for name in differentiated(traced):
            assert name in found, f"{name} is not refused"
            kind, text = found[name]
            # torch refuses an autograd.Function of the old style before its collective is called.
            assert kind == ("ModuleError" if name.startswith("nn.") else "GradientError"), (name, kind, text)
            assert 'mesh["data"].gather' in text and "test_foreign.py" in text, (name, text)
