"""Full trees under the names of a state_dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fzero as fz


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_a_state_leaves_for_the_module_it_came_from():
    torch.manual_seed(0)
    module, other = Tied(), Tied()
    state = fz.init(module, fz.sgd(0.1), policy="fp32")
    _, params, buffers = fz.functional(module, buffers=True)
    names = fz.named(fz.gather(state.params), module)
    assert list(names) == [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert names["head.weight"] is names["embed.weight"], "tied"
    other.load_state_dict({**names, **fz.named(buffers, module)})
    for name, x in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name
    assert fz.named(params).keys() == {name for name, _ in module.named_parameters()}, "each once, without the module"


def test_what_does_not_fit_is_refused():
    module = Tied()
    state = fz.init(module, fz.sgd(0.1), policy="fp32")
    for cut in (state, state.params):
        with pytest.raises(TypeError, match=r"which is cut\. Gather its parameters first"):
            fz.named(cut)
    with pytest.raises(fz.TreeError, match=r"norm\.weight: expected by the module, not in the tree"):
        fz.named({"embed": {"weight": torch.ones(8, 4)}}, module)
    with pytest.raises(fz.TreeError, match=r"more\.weight: in the tree, not in the module"):
        fz.named({**fz.gather(state.params), "more": {"weight": torch.ones(1)}}, module)
    with pytest.raises(TypeError, match="expected a nested dict of tensors, got"):
        fz.named(torch.ones(2))
    with pytest.raises(TypeError, match=r"another leaf at 'a\.b'"):
        fz.named({"a": {"b": None}})
