"""What operators write and give out besides their schemas, against what they do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fzero._torch import OpOverload, TorchDispatchMode, storage_id, torch_pytree
from fzero.operators import _VIEWS, _WRITES, draws, is_pure, viewed, written

aten = torch.ops.aten


def registered() -> list[OpOverload]:
    """Every operator that Python can call."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        try:
            found.append(getattr(getattr(getattr(torch.ops, namespace), base), overload or "default"))
        except (AttributeError, RuntimeError):  # those with names of dimensions
            continue
    return found


def test_the_tables_name_operators_and_arguments_that_exist():
    known: dict[str, set[str]] = {}
    for op in registered():
        known.setdefault(op._schema.name, set()).update(a.name for a in op._schema.arguments)
    for name, (arguments, condition) in _WRITES.items():
        assert {*arguments, *([condition] if condition else [])} <= known[name] | NEWER.get(name, set()), name
    for name, views in _VIEWS.items():
        assert set(views) <= known[name], name


# Named like operators that write, and writing nothing.
HARMLESS = {
    "c10d::monitored_barrier_",
    "aten::to.dtype_layout",
    "aten::_slow_conv2d_backward.output_mask",
    "aten::flatten.named_out_dim",  # of torch 2.11
}
# What older versions of torch do not have: 2.11 finds the gradient at the variable.
NEWER = {"inductor::accumulate_grad_": {"variable_grad"}}


def test_every_operator_named_like_one_that_writes_says_what_or_stands_in_the_table():
    silent = set()
    for op in registered():
        schema = op._schema
        named = schema.name.endswith("_") and not schema.name.endswith("__")
        if (named or "out" in schema.overload_name) and not schema.is_mutable and schema.name not in _WRITES:
            silent.add(op.name())
    assert silent <= HARMLESS


class Compared(TorchDispatchMode):
    """Notes each operator that writes, or gives out, the memory of an argument that the tables leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in torch_pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = [x for x in given if x.layout is torch.strided and not x.is_conj() and not x.is_neg()]
        before = [(x, x.shape, x.clone(), storage_id(x)) for x in given]
        writes = {storage_id(x) for x in written(func, args, kwargs)}
        gives = {storage_id(x) for x in viewed(func, args, kwargs) if x.layout is torch.strided}
        result = func(*args, **kwargs)
        for x, shape, copy, memory in before:
            if memory not in writes and x.shape == shape and not _same(x, copy):
                self.wrong.add((str(func), "writes"))
        not_given = {memory for *_, memory in before} - gives
        results = [x for x in torch_pytree.tree_leaves(result) if isinstance(x, Tensor) and x.layout is torch.strided]
        if any(x.numel() and storage_id(x) in not_given for x in results):
            self.wrong.add((str(func), "views"))
        return result


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) or torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


STATISTICS = (torch.zeros(3), torch.ones(3))


def fresh() -> tuple[Tensor, Tensor]:
    return torch.zeros(3), torch.ones(3)


def batch_norm(op: Any, *rest: Any) -> Callable[[Tensor], Any]:
    return lambda x: op(x, None, None, *fresh(), *rest)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "batch norm": lambda x: F.batch_norm(x, *fresh(), training=True),
    "batch norm in evaluation": lambda x: F.batch_norm(x, *STATISTICS),
    "native batch norm": batch_norm(aten.native_batch_norm.default, True, 0.1, 1e-5),
    "functional batch norm": batch_norm(aten._native_batch_norm_legit.default, True, 0.1, 1e-5),
    "batch norm with update": batch_norm(aten._batch_norm_with_update.default, 0.1, 1e-5),
    "batch norm statistics": lambda x: aten.batch_norm_update_stats(x, *fresh(), 0.1),
    "instance norm": lambda x: F.instance_norm(x.expand(2, 4, 3).mT, *fresh()),
    "unsafe view": lambda x: aten._unsafe_view(x, [12]),
    "lift": lambda x: aten.lift(x),
    "dropout of nothing": lambda x: torch.native_dropout(x, 0.5, False),
    "split": lambda x: x.split(2),
    "fused update": lambda x: torch._fused_sgd_(
        [x.clone()], [x], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False,
    ),
    "observer": lambda x: torch.fused_moving_avg_obs_fake_quant(
        x, torch.tensor([1]), torch.tensor([1]), torch.zeros(1), torch.ones(1), torch.ones(1),
        torch.zeros(1, dtype=torch.int32), 0.1, 0, 255, 0,
    ),
    "renormalised embedding": lambda x: F.embedding(torch.tensor([0, 1]), x.clone(), max_norm=0.1),
    "lstm": lambda x: torch.nn.LSTM(3, 2)(x),
}  # fmt: skip


@pytest.mark.parametrize("f", CALLS.values(), ids=CALLS)
def test_a_call_writes_and_gives_out_what_is_said(f: Callable[[Tensor], Any]):
    x = torch.randn(4, 3)
    with Compared() as compared:
        f(x)
    assert not compared.wrong


@pytest.mark.slow
def test_every_operator_of_torch_writes_and_gives_out_what_is_said():
    from torch.testing._internal.common_methods_invocations import op_db

    with Compared() as compared:
        for info in op_db:
            dtype = torch.float32 if torch.float32 in info.supported_dtypes("cpu") else torch.int64
            for sample in _samples(info, dtype):
                try:
                    info.op(sample.input, *sample.args, **sample.kwargs)
                except (RuntimeError, NotImplementedError):
                    continue  # operators that no mode may look into
    assert not compared.wrong


def _samples(info: Any, dtype: torch.dtype) -> list[Any]:
    if dtype not in info.supported_dtypes("cpu"):
        return []
    return list(itertools.islice(info.sample_inputs("cpu", dtype), 20))


def test_a_statistic_is_written_in_training_alone():
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    call: Any = [x, None, None, mean, var, True, 0.1, 1e-5]
    assert [t is s for t, s in zip(written(aten.native_batch_norm.default, call, {}), (mean, var), strict=True)]
    call[5] = False
    assert not written(aten.native_batch_norm.default, call, {})
    assert not written(aten.cudnn_batch_norm.default, call[:5], {"training": False})


PURE: dict[str, tuple[Any, bool]] = {
    "add": (aten.add.Tensor, True),
    "add_": (aten.add_.Tensor, False),
    "rand": (aten.rand.default, False),
    "batch norm": (aten.native_batch_norm.default, False),
    "no operator": (torch.add, False),
}


@pytest.mark.parametrize("op, pure", PURE.values(), ids=PURE)
def test_what_is_pure(op: Any, pure: bool):
    assert is_pure(op) == pure


def test_attention_and_recurrence_draw_where_they_drop():
    x = torch.zeros(1, 1, 2, 2)
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert (
        not draws(flash, (x, x, x), {})
        and draws(flash, (x, x, x, 0.1), {})
        and draws(flash, (x, x, x), {"dropout_p": 0.1})
    )
    lstm = aten._cudnn_rnn.default
    assert not draws(lstm, (), {"dropout": 0.0}) and draws(lstm, (), {"dropout": 0.1})
    assert not draws(aten.add.Tensor, (x, x), {}) and draws(aten.rand.default, ([2],), {})
