from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpt import GPT, PRESETS, Config, rotate, rotation
from text import Text, standard_library
from train_gpt import decays, main

import fzero as fz
from tests import world

RHYME = b"the quick brown fox jumps over the lazy dog; " * 200
SMALLEST = ["--model", "smallest", "--batch", "4", "--sequence", "32", "--lr", "1e-2", "--sample", "5"]


@pytest.fixture(autouse=True)
def _smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of one block, quick to trace, with no leaf so large that its update is compiled."""
    monkeypatch.setitem(PRESETS, "smallest", Config(width=32, depth=1, heads=2))


@pytest.fixture
def rhyme(tmp_path: Path) -> Path:
    path = tmp_path / "rhyme.txt"
    path.write_bytes(RHYME)
    return path


def losses(data: Path, *options: str) -> list[tuple[int, float]]:
    """Train on this rank; return the held-out losses."""
    return main([*SMALLEST, "--data", str(data), "--out", str(data.parent / "out"), *options]).held_out


def test_the_held_out_loss_falls_and_is_drawn(rhyme, capsys):
    curve = losses(rhyme, "--steps", "24")
    assert [step for step, _ in curve] == [0, *range(3, 25, 3)]
    assert curve[-1][1] < 0.6 * curve[0][1], curve
    assert (rhyme.parent / "out" / "train_gpt.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((rhyme.parent / "out" / "train_gpt.json").read_text())["held_out"] == [list(x) for x in curve]
    output = capsys.readouterr().out
    assert "ZeRO-3 over data=1" in output
    assert "class " in output, "no sample"


@pytest.mark.slow
def test_all_ranks_agree_and_every_layout_gives_the_same_losses(rhyme):
    options = ("--steps", "6", "--microbatches", "2", "--dropout", "0.1")
    first, *others = (run for stage in "0123" for run in world.run(losses, rhyme, *options, "--zero", stage, size=2))
    assert all(other == first for other in others)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(rhyme):
    first, again, other = (losses(rhyme, "--steps", "2", "--seed", seed) for seed in "001")
    assert first == again
    assert first[-1] != other[-1]


def test_batches_depend_on_seed_step_and_rank_and_never_show_what_is_held_out():
    text = Text(train=torch.arange(100), held_out=torch.arange(100, 120))

    def rows(seed: int = 0, step: int = 0, rank: int = 0) -> torch.Tensor:
        return text.batch(16, 9, seed=seed, step=step, rank=rank)

    assert torch.equal(rows(), rows())
    for other in (rows(seed=1), rows(step=1), rows(rank=1)):
        assert not torch.equal(rows(), other)
    assert torch.equal(rows(), rows()[:, :1] + torch.arange(9)), "windows are contiguous"
    assert rows().max() < 100
    held_out = text.held_out_rows(4, 9)
    assert held_out[0, 0] == 100
    assert held_out[-1, -1] == 119


def test_a_text_that_is_too_short_says_so(rhyme):
    with pytest.raises(SystemExit, match="windows of 2001 bytes from a part of 900"):
        losses(rhyme, "--sequence", "2000")


def test_the_default_text_is_python_source():
    paths = standard_library()
    assert paths == sorted(paths)
    assert any(path.name == "argparse.py" for path in paths)
    assert not any("site-packages" in path.parts for path in paths)


def test_a_token_sees_no_later_one():
    torch.manual_seed(0)
    model, tokens = GPT(PRESETS["tiny"]), torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7] += 1
    before, after = model(tokens)[0], model(changed % 256)[0]
    torch.testing.assert_close(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(-1).all()


def test_attention_depends_on_distances_alone():
    turn = rotation(20, 8, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 20, 8)
    scores = (rotate(q, turn) @ rotate(k, turn).mT)[0, 0]
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_weight_decay_spares_norms_and_the_embedding():
    _, params = fz.functional(lambda: GPT(PRESETS["tiny"]))
    spared = {path for path in fz.tree.paths(params) if not decays(path)}
    assert spared == {
        "embed.weight",
        "norm.weight",
        *(f"blocks.{i}.{kind}_norm.weight" for i in range(2) for kind in ("attention", "mlp")),
    }
