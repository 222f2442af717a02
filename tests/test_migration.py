"""The blocks of docs/migration.md run as they stand, and in fp32 they do what plain PyTorch does."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fzero as fz
from tests import small

DOCUMENT = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
COMMON, *PARTS = re.split(r"^## From ", DOCUMENT, flags=re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: part for part in PARTS}
POLICY = re.compile(r"""("?policy"?[=:] ?)"[\w-]+\"""")


@functools.cache
def run(section: str, policy: str | None = None) -> dict[str, Any]:
    """Run the blocks of a section in one scope, as they stand or with every policy replaced."""
    scope: dict[str, Any] = {"__name__": "migration"}
    for source in re.findall(r"```python\n(.*?)```", COMMON + SECTIONS[section], re.DOTALL):
        if policy is not None:
            source = POLICY.sub(rf'\1"{policy}"', source)
        exec(compile(source, "migration.md", "exec"), scope)
    return scope


def start(scope: dict[str, Any]) -> nn.Module:
    """The module with the values that a state of the same factory starts from."""
    module: nn.Module = scope["make_model"]()
    module.load_state_dict(small.flat(fz.gather(fz.init(scope["make_model"], fz.sgd(0.1), policy="fp32").params)))
    return module


def adamw(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay())


def weight_decay() -> float:
    """What `fz.adamw` decays by where nothing is said."""
    decay: float = inspect.signature(fz.adamw).parameters["weight_decay"].default
    return decay


def clipped_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def one_batch_a_step(scope: dict[str, Any]) -> nn.Module:
    module = start(scope)
    optimizer = adamw(module, 3e-4)
    for x, y in scope["batches"]:
        F.cross_entropy(module(x), y).backward()
        clipped_step(module, optimizer)
    return module


def two_batches_a_step(scope: dict[str, Any]) -> nn.Module:
    module = start(scope)
    optimizer = adamw(module, 3e-4)
    for i, (x, y) in enumerate(scope["batches"]):
        (F.cross_entropy(module(x), y) / 2).backward()
        if i % 2 == 1:
            clipped_step(module, optimizer)
    return module


def assert_equal(state: fz.State, module: nn.Module, **tolerances: Any) -> None:
    torch.testing.assert_close(
        small.flat(fz.gather(state.params)), {n: p.detach() for n, p in module.named_parameters()}, **tolerances
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_the_blocks_run_as_they_stand(section):
    run(section)


LOOPS = {
    "FSDP2's loop": ("FSDP2", "model", two_batches_a_step),
    "FSDP2's loop as one program": ("FSDP2", "state", two_batches_a_step),
    "JAX's step": ("JAX", "state", one_batch_a_step),
    "DeepSpeed's loop": ("DeepSpeed", "model", one_batch_a_step),
}


@pytest.mark.parametrize("section, name, reference", LOOPS.values(), ids=LOOPS)
def test_a_loop_ends_where_that_of_plain_pytorch_ends(section, name, reference):
    scope = run(section, "fp32")
    state = scope["state"] if name == "state" else scope["model"].state
    assert_equal(state, reference(scope), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("policy, atol", [("fp32", 2e-6), ("fp16-mixed", 2e-3)])
def test_the_three_patterns_train_as_in_plain_pytorch(policy, atol):
    scope = run("DeepSpeed", policy)
    vision, text = start(scope), start(scope)
    (images, labels), (tokens, _) = scope["batches"][:2]
    optimizers = [adamw(vision, 1e-3), adamw(text, 3e-4)]
    (1 - F.cosine_similarity(vision(images), text(tokens)).mean()).backward()
    F.cross_entropy(vision(images), labels).backward()
    (vision(images) * text(tokens)).mean().backward()
    norms = [nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None]) for m in (vision, text)]
    for optimizer in optimizers:
        optimizer.step()
    for name, module in (("vision", vision), ("text", text)):
        assert_equal(scope[name].state, module, rtol=1e-4, atol=atol)
    for info, norm in zip(scope["infos"], norms, strict=True):
        assert info["finite"]
        torch.testing.assert_close(info["grad_norm"], norm, rtol=1e-2, atol=0.0)


def test_the_gradients_of_the_pullback_are_those_of_plain_pytorch():
    scope = run("JAX")
    w, x = fz.gather(scope["head"].params)["w"].requires_grad_(), scope["x"].clone().requires_grad_()
    (x @ w).sum().backward()
    torch.testing.assert_close(fz.gather(scope["head_bar"])["w"], w.grad)
    torch.testing.assert_close(scope["x_bar"], x.grad)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bfz\.([a-zA-Z_]+(?:\.[a-z_]+)*)", DOCUMENT))))
def test_every_name_is_there(name):
    found: Any = fz
    for part in name.split("."):
        found = getattr(found, part)
