from __future__ import annotations

import published
import torch
from published import GOALS, Encoder, Shape, copying_loss, foretold, goals, markdown
from torch import nn

SHAPE = Shape(width=32, layers=1, heads=2, vocabulary=4096, positions=16)


def test_the_model_is_as_large_as_the_published_one():
    with torch.device("meta"):
        count = sum(x.numel() for x in Encoder(Shape()).parameters())
    assert round(count / 1e9, 2) == 6.86


def test_a_block_is_a_post_norm_encoder_layer():
    torch.manual_seed(0)
    block = published.Block(SHAPE)
    layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=False)
    names = {"attention.": "self_attn.", "up.": "linear1.", "down.": "linear2.", "attention_norm.": "norm1."}
    names["norm."] = "norm2."
    state = block.state_dict()
    layer.load_state_dict({names[k[: k.index(".") + 1]] + k[k.index(".") + 1 :]: x for k, x in state.items()})
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block(x), layer(x))


def test_labels_are_the_tokens():
    tokens = torch.tensor([[3, 1]])
    logits = torch.full((1, 2, 4), -1e4)
    logits[0, 0, 3] = logits[0, 1, 1] = 0.0
    assert copying_loss(logits, tokens).item() == 0.0


def test_a_rank_holds_its_share_and_a_clip_all_gradients_too():
    row = foretold(SHAPE, "bf16")
    share = row["parameters"] * 6 / published.RANKS
    assert share <= row["at_rest"] <= 1.05 * share  # small leaves are whole on each rank
    assert row["peak_clipped"] >= row["peak"] > row["at_rest"]
    assert sum(row["peak_by_kind"].values()) == row["peak"]
    assert "| `bf16` |" in markdown({"rows": [row]})


def test_goals_are_told_met_and_missed():
    row = {"policy": "bf16", "at_rest": 9.5 * 2**30, "peak": 11 * 2**30, "peak_clipped": 14 * 2**30}
    assert [line.split(":")[0] for line in goals([row]).splitlines()] == ["met", "MISSED", "met"]
    assert len(GOALS) == 4
