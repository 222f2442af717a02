"""Programs for CUDA, traced where there is none: the same work, memory at rest and traffic as on a mesh of CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz

WARM = fz.schedules.warmup_cosine(1e-3, 10, 100)
OPTIMIZERS: dict[str, fz.Optimizer] = {
    "adamw": fz.adamw(WARM),
    "sgd": fz.sgd(0.1, momentum=0.9),
    "lion": fz.lion(1e-4),
    "adafactor": fz.adafactor(1e-3),
    "muon": fz.muon(1e-2),
    "clip": fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3)),
    "frozen": fz.partition_by(lambda path: "a" if path.startswith("0") else "b", {"a": None, "b": fz.adamw(1e-3)}),
}
# Each optimizer, each policy, each stage and each option once; the rest are slow.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "sgd fp32": ("sgd", "fp32", 3, {}),
    "muon mixed": ("muon", "mixed", 3, {}),
    "adafactor bf16": ("adafactor", "bf16", 3, {}),
    "frozen bf16-exact": ("frozen", "bf16-exact", 3, {}),
    "lion fp16": ("lion", "fp16", 3, {"remat": "block"}),
    "clip fp16-mixed": ("clip", "fp16-mixed", 0, {"microbatches": 4}),
    "adamw bf16-8bit": ("adamw", "bf16-8bit", 1, {}),
}
MORE: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    **{f"adamw {policy}": ("adamw", policy, 3, {}) for policy in ("fp32", "mixed", "bf16-exact", "fp16", "fp16-mixed")},
    **{f"{name} bf16": (name, "bf16", 3, {}) for name in OPTIMIZERS if name != "adafactor"},
    "stage 0": ("adamw", "bf16", 0, {}),
    "accumulation": ("clip", "bf16", 3, {"microbatches": 4}),
    "blocks made again": ("adamw", "bf16", 3, {"remat": "block"}),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


apply, _ = fz.functional(model)


def loss(params: Any, batch: Any) -> Tensor:
    x, y = batch
    scale = torch.tensor([1.0, 2.0], device=x.device)[0] * torch.tensor(0.5, device=x.device)
    logits = apply(params, x)[:, :8] * scale.to(x.device)
    return F.cross_entropy(logits.float(), y)


def program_of(device: str, optimizer: str, policy: str, stage: int, options: dict[str, Any]) -> fz.Program:
    mesh = fz.make_mesh(device, data=8, simulate=True)
    state = fz.init(model, OPTIMIZERS[optimizer], mesh, fz.zero(stage), policy=policy)
    x = torch.empty(8, 64, dtype=state.policy.compute, device="meta")
    batch = (x, torch.empty(8, dtype=torch.int64, device="meta"))
    return fz.trace(fz.train_step(loss, **options))(state, batch)


@pytest.mark.parametrize(
    "case",
    [*CASES.values(), *(pytest.param(case, marks=pytest.mark.slow) for case in MORE.values())],
    ids=[*CASES, *MORE],
)
def test_a_plan_for_cuda_needs_no_cuda(case: tuple[str, str, int, dict[str, Any]]) -> None:
    program, beside = (program_of(device, *case) for device in ("cuda", "cpu"))
    assert program.flops() == beside.flops() > 0
    assert program.memory().at_rest == beside.memory().at_rest > 0
    assert program.traffic().total == pytest.approx(beside.traffic().total, rel=0.05)
    assert program.estimate("H100").seconds > 0


def test_autocast_is_that_of_the_function() -> None:
    mesh = fz.make_mesh("cuda", data=8, simulate=True)
    state = fz.init(model, fz.adamw(1e-3), mesh, policy=fz.policy("fp32", autocast=torch.bfloat16))
    program = fz.trace(lambda state, x: fz.call(apply, state, x))(state, torch.empty(8, 64, device="meta"))
    products = [n for n in program.trace.module.graph.nodes if "mm" in str(n.target)]
    assert products and all(node.meta["val"].dtype == torch.bfloat16 for node in products)


def test_what_a_forward_would_save_is_listed() -> None:
    listings = []
    for device in ("cpu", "cuda"):
        state = fz.init(model, fz.adamw(1e-3), fz.make_mesh(device, data=8, simulate=True), policy="bf16")
        batch = (
            torch.empty(8, 64, dtype=torch.bfloat16, device="meta"),
            torch.empty(8, dtype=torch.int64, device="meta"),
        )
        listings.append([(saved.source, saved.nbytes) for saved in fz.residuals(loss)(state, batch)])
        forward, _ = fz.split_vjp(loss)
        with pytest.raises(fz.MeshError, match="got a state of a simulated mesh"):
            forward(state, batch)
    assert listings[0] == listings[1] != []
    program = fz.trace(lambda state, batch: fz.split_vjp(loss)[0](state, batch)[0])(state, batch)
    assert program.flops() > 0


def test_a_llama_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    make = lambda: transformers.LlamaForCausalLM(config)  # noqa: E731
    call, _ = fz.functional(make)
    state = fz.init(make, fz.adamw(1e-3), fz.make_mesh("cuda", data=8, simulate=True), policy="bf16")
    tokens = torch.empty(2, 16, dtype=torch.int64, device="meta")
    program = fz.trace(fz.train_step(lambda p, ids: call(p, input_ids=ids, labels=ids).loss))(state, tokens)
    assert program.estimate("H100").seconds > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_real_call_on_a_device_that_is_not_there_is_no_plan() -> None:
    with pytest.raises(Exception, match=r"(?i)cuda|nvidia"):  # without a driver, or built without CUDA
        fz.jit(lambda x: x + torch.tensor(1.0, device="cuda"))(torch.ones(2))
