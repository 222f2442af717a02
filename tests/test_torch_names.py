"""What a wrapped model does not have, and says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fzero as fz
from fzero import torch_api


class Config:
    hidden_size = 4


class WithConfig(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.config = Config()


def wrapped(module: object = WithConfig) -> torch_api.Model:
    return torch_api.wrap(module, fz.sgd(0.1), mesh=fz.make_mesh("cpu"), policy="fp32")  # type: ignore[arg-type]


# a name of nn.Module, DDP, FSDP, DeepSpeed or Transformers -> what stands in the way out
NAMES = {
    "state_dict": "fz.named(fz.gather(model.state.params), module)",
    "load_state_dict": "model.state = fz.init(module, optimizer",
    "parameters": "fz.gather(model.state.params)",
    "named_parameters": "model.state.params.paths",
    "named_buffers": "model.buffers",
    "modules": "holds no module",
    "module": "holds no module",
    "to": "mesh=fz.make_mesh('cuda')",
    "cuda": "mesh=fz.make_mesh('cuda')",
    "half": "policy=",
    "bfloat16": "policy=",
    "dtype": "model.state.policy",
    "save_pretrained": "module.load_state_dict(fz.named(fz.gather(model.state.params), module))",
    "generate": "module.load_state_dict(fz.named(fz.gather(model.state.params), module))",
    "requires_grad_": "fz.labels_of(module)",
    "register_forward_hook": "There are no hooks",
    "gradient_checkpointing_enable": "fz.remat",
    "forward": "model(x)",
    "backward": "loss.backward()",
    "optimizer": "model.step()",
    "clip_grad_norm_": "fz.clip_by_global_norm",
    "compile": "traced=True",
    "apply": "before it is wrapped",
    "unshard": "only='pattern'",
    "zero_grads": "Did you mean 'zero_grad'?",
    "something": "ask the one that you wrapped",
}


@pytest.mark.parametrize(("name", "way_out"), NAMES.items())
def test_a_name_that_is_not_there_comes_with_the_way_out(name: str, way_out: str) -> None:
    model = wrapped()
    assert not hasattr(model, name)
    with pytest.raises(AttributeError) as error:
        getattr(model, name)
    text = str(error.value)
    assert text.startswith(f"torch_api.Model: there is no {name!r}. ") and way_out in text


def test_every_method_of_a_module_is_there_or_named() -> None:
    model = wrapped()
    for name in (name for name in dir(nn.Module) if not name.startswith("_")):
        if not hasattr(model, name):
            with pytest.raises(AttributeError, match=f"torch_api.Model: there is no '{name}'. [A-Z]"):
                getattr(model, name)


@pytest.mark.parametrize("module", [WithConfig, WithConfig()], ids=["factory", "module"])
def test_config_and_device_are_those_of_the_module_and_the_mesh(module: object) -> None:
    model = wrapped(module)
    assert model.config.hidden_size == 4
    assert model.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no config"):
        _ = wrapped(lambda: nn.Linear(4, 2)).config


def test_the_ways_out_work() -> None:
    module = WithConfig()
    model = wrapped(module)
    model(torch.ones(3, 4)).sum().backward()
    model.step()
    named = fz.named(fz.gather(model.state.params), module)
    module.load_state_dict(named)
    torch.testing.assert_close(module(torch.ones(3, 4)), model(torch.ones(3, 4)), rtol=0, atol=0)
    state = model.state
    model.state = fz.init(WithConfig, fz.sgd(0.1), state.mesh, state.layout, state.policy)
    assert not torch.equal(fz.gather(model.state.params, only="weight")["weight"], named["weight"])
    labels = fz.labels_of(module)
    assert fz.partition_by(labels, {"trained": fz.sgd(0.1), "frozen": None}).frozen(["weight"]) == frozenset()
    assert [x.numel() for x in fz.tree.leaves(model.state.params)] == [2, 8]


def test_python_and_notebooks_find_nothing_where_there_is_nothing() -> None:
    model = wrapped(nn.Linear(4, 2))
    for name in ("_repr_html_", "__deepcopy__", "_ipython_display_"):
        assert not hasattr(model, name)
    assert torch.equal(fz.gather(copy.copy(model).state.params)["bias"], fz.gather(model.state.params)["bias"])
    bare = torch_api.Model.__new__(torch_api.Model)  # as pickle makes one: before it has a state
    with pytest.raises(AttributeError):
        _ = bare.state
