"""`program.print()`: readable code, with shapes, the line of each operation, and what it costs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero.program.program import Program
from fzero.program.report.text import shown

HERE = Path(__file__).name


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))  # the layer's line
        return x.relu()  # the last line


def line_with(text: str) -> int:
    """The number of the line of this file that ends with a comment."""
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(f"# {text}"))


@functools.cache
def traced(**options: Any) -> Program:
    mesh = fz.make_mesh("cpu", data=8, simulate=True)
    apply, _ = fz.functional(Net)
    state = fz.init(Net, fz.adamw(1e-3), mesh, policy="bf16")

    def loss(params: Any, x: Tensor) -> Tensor:
        return apply(params, x).float().square().mean()  # the loss

    return fz.trace(fz.train_step(loss, **options))(state, torch.empty(16, 32, dtype=torch.bfloat16))


def lines(pattern: str, **options: Any) -> list[str]:
    """The lines of a program in which a pattern is found."""
    return [line for line in traced(**options).text().splitlines() if re.search(pattern, line)]


def test_forward_operations_tell_shape_line_and_block() -> None:
    layer = f"{HERE}:{line_with('the layer' + chr(39) + 's line')} in Net.forward"
    first, second = lines(r"aten\.tanh\(")
    assert re.fullmatch(rf" {{4}}tanh: bf16\[16, 32\] = aten\.tanh\(\w+\)    # {layer}", first)
    assert re.fullmatch(rf" {{4}}tanh_1: bf16\[16, 32\] = aten\.tanh\(\w+\)    # {layer}", second)
    products = lines(r"aten\.addmm\(")
    assert [re.search(r"layers\.\d", line).group() for line in products] == ["layers.0", "layers.1"]  # type: ignore[union-attr]
    (relu,) = lines(r"aten\.relu\(")
    assert f"{HERE}:{line_with('the last line')} in Net.forward" in relu


def test_backward_operations_tell_what_they_are_the_backward_of() -> None:
    layer = line_with("the layer's line")
    found = lines(r"aten\.tanh_backward")
    assert len(found) == 2
    assert all(line.endswith(f"# backward of {HERE}:{layer} in Net.forward") for line in found)
    products = lines(r"aten\.mm\(")  # of each layer: its weight's gradient; of the second its input's too
    assert len(products) == 3
    assert all(f"backward of {HERE}:{layer} in Net.forward" in line for line in products)
    (relu,) = lines(r"aten\.threshold_backward")
    assert f"backward of {HERE}:{line_with('the last line')}" in relu


def test_collectives_tell_leaves_axis_and_bytes() -> None:
    received = 2 * (32 * 32 + 32) * 7 // 8 / 1024  # a layer's; its bias of 32 elements is whole on each rank
    gathers = lines(r"= c10d\.all_gather\w*\(.*gather ")
    assert any("gather layers.0.weight" in line for line in gathers)
    assert all(re.search(r"[\d.]+ KiB received over data$", line) for line in gathers)
    assert any(float(re.search(r"([\d.]+) KiB", line).group(1)) <= received for line in gathers)  # type: ignore[union-attr]
    assert lines(r"c10d\.reduce_scatter\w*\(.*reduce layers\.\d\.weight")


def test_buckets_tell_their_leaves() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    apply, _ = fz.functional(Deep)
    state = fz.init(Deep, fz.adamw(1e-3), fz.make_mesh("cpu", data=2, simulate=True), policy="bf16")
    step = fz.train_step(lambda params, x: apply(params, x).float().sum())
    text = fz.trace(step)(state, torch.empty(4, 64, dtype=torch.bfloat16)).text()
    assert re.search(
        r"all_gather_into_tensor_coalesced\(.*gather layers\.0: 0\.bias, 0\.weight, 1\.bias, 1\.weight", text
    )


def test_what_is_made_again_says_so() -> None:
    again = lines("again", remat="block")
    assert any("aten.tanh(" not in line and "layers." in line for line in again)
    assert any(", gather layers.1.weight" in line or "gather layers.1" in line for line in again)


def test_updates_name_their_leaf() -> None:
    updates = [re.search(r"update (\S+)$", line) for line in lines(r"^ {4}fzero\.adamw_\(")]
    assert sorted(found.group(1) for found in updates if found) == [
        "layers.0.bias",
        "layers.0.weight",
        "layers.1.bias",
        "layers.1.weight",
    ]


def test_a_body_stands_indented_under_its_loop() -> None:
    text = traced(microbatches=4).text().splitlines()
    (head,) = [i for i, line in enumerate(text) if line == "    for each of 4 micro-batches:"]
    assert "run_loop: (f32[], " in text[head - 1]
    body = text[head + 1 :]
    inside = body[: next(i for i, line in enumerate(body) if not line.startswith(" " * 8))]
    assert inside[0].lstrip().startswith("with sum_0 = ")
    assert "[i]" in " ".join(inside)
    assert sum("aten.tanh(" in line for line in inside) == 2
    assert any(line.lstrip().startswith("return [") for line in inside)
    assert not any("aten.tanh(" in line for line in body[len(inside) :])


def test_inputs_stand_before_and_costs_behind() -> None:
    program = traced()
    text = program.text()
    first = text.splitlines()[: len(program.trace.inputs) + 3]
    assert first[0] == f"train_step(loss): {len(program.trace.inputs)} inputs"
    assert re.fullmatch(
        r" +arg0_params_layers_0_weight +0\.params\.layers\.0\.weight +bf16\[128\] +params, donated", first[3]
    )
    assert re.fullmatch(r" +arg1 +1 +bf16\[16, 32\] +inputs", first[len(program.trace.inputs)])
    assert first[-1].startswith("def train_step_loss")
    assert text.endswith(program.report().partition("\n\n")[0])
    for part in ("memory   peak ", "traffic  ", "flops    ", "pass  "):
        assert part in program.report()


def test_the_report_has_a_line_for_each_pass() -> None:
    program = traced()
    rows = program.report().splitlines()[-len(program.stages) :]
    assert [row.split()[0] for row in rows] == [stage.name for stage in program.stages]
    assert rows[0].startswith("trace") and rows[-1].startswith("donate")


def test_every_operation_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    program = traced()
    program.print()
    printed = capsys.readouterr().out
    table = program.report().partition("\n\n")[2]
    assert printed == f"{program.text()}\n\n{table}\n"
    for node in program.trace.module.graph.nodes:
        if node.op == "call_function" and node.users:
            assert len(re.findall(rf"^ {{4}}{node.name}: ", printed, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.zeros(2, dtype=torch.float16), "f16[2]"),
        (torch.zeros(1, 2, dtype=torch.bool), "bool[1, 2]"),
        (torch.zeros(1, dtype=torch.uint8), "u8[1]"),
        (torch.zeros((), dtype=torch.complex64), "c64[]"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), "float8_e4m3fn[1]"),
        ((torch.zeros(1), None), "(f32[1], None)"),
        (None, "None"),
    ],
)
def test_types_are_short(value: Any, text: str) -> None:
    assert shown(value) == text
