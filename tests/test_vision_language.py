from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_language as example
import vit
from captioner import Captioner
from digits import ALPHABET, LENGTH, SIDE, WIDTH, Digits, Pictures, caption, decode, encode
from torch import Tensor

import fzero as fz
from tests import small, world

SMALL_VISION = vit.Config(width=16, depth=1, heads=2)
WEIGHTS = {"caption": 1.0, "contrast": 0.3}


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's models with one block each and no leaf so large that its update is compiled."""
    vision, text = replace(example.VISION, width=32, depth=1), replace(example.TEXT, width=32, depth=1)
    monkeypatch.setattr(example, "VISION", vision)
    monkeypatch.setattr(example, "TEXT", text)
    monkeypatch.setattr(example, "look", fz.functional(lambda: vit.ViT(vision))[0])
    monkeypatch.setattr(example, "speak", fz.functional(lambda: Captioner(text, vision.width))[0])


def states(mesh: fz.Mesh | None = None) -> tuple[fz.State, fz.State]:
    """The two states of the example in fp32, with layouts of their own."""
    factories = (lambda: vit.ViT(example.VISION), lambda: Captioner(example.TEXT, example.VISION.width))
    vision, text = (
        fz.init(factory, example.optimizer_of(name, 1e-3, 10), mesh, fz.zero(stage), "fp32")
        for factory, name, stage in zip(factories, ("lion", "adamw"), (3, 1), strict=True)
    )
    return vision, text


def batch(rank: int) -> Pictures:
    return Pictures.compose(Digits.load()[0], 6, seed=(5, rank))


def weights() -> dict[str, Tensor]:
    return {name: torch.tensor(weight) for name, weight in WEIGHTS.items()}


# ---------------------------------------------------------------------------------------------------------
# The step


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def gradients_on_this_rank(jit: bool) -> Found:
    """Losses of this rank's batch, and both gradients, whole."""
    return found_by(fz.jit(example.gradients) if jit else example.gradients)


def found_by(take: Any) -> Found:
    mesh = fz.make_mesh("cpu")
    own = batch(mesh.index("data"))
    losses, g_vision, g_text = take(*states(mesh), weights(), own.images, own.tokens)
    return losses, small.flat(fz.gather(g_vision)), small.flat(fz.gather(g_text))


def gradients_in_plain_torch(size: int) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """The same of all ranks' batches: two modules in one autograd graph, the losses written out."""
    vision, text = vit.ViT(example.VISION), Captioner(example.TEXT, example.VISION.width)
    for module, state in zip((vision, text), states(), strict=True):
        module.load_state_dict(small.flat(fz.gather(state.params)))
    found = []
    for rank in range(size):
        own = batch(rank)
        logits, pictures, captions = text(vision(own.images), own.tokens)
        said = decode(own.tokens)
        right = torch.tensor([[float(a == b) for b in said] for a in said])
        scores = text.sharpness.exp() * pictures @ captions.T
        told = [(right / right.sum(1) * -table.log_softmax(1)).sum(1).mean() for table in (scores, scores.T)]
        logs = logits[:, :-1].log_softmax(-1).gather(2, own.tokens[:, 1:, None])
        losses = {"caption": -logs.mean(), "contrast": (told[0] + told[1]) / 2}
        (sum(WEIGHTS[name] * loss for name, loss in losses.items()) / size).backward()
        found.append({name: loss.item() for name, loss in losses.items()})
    one, other = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (vision, text))
    return found, one, other


def assert_as_in_plain_torch(by_rank: list[Found]) -> None:
    losses, vision, text = gradients_in_plain_torch(len(by_rank))
    for rank, (own, *gradients) in enumerate(by_rank):
        assert {name: loss.item() for name, loss in own.items()} == pytest.approx(losses[rank], rel=1e-5)
        for got, expected in zip(gradients, (vision, text), strict=True):
            assert got.keys() == expected.keys()
            for path in got:
                scale = expected[path].abs().max().item()  # sums in another order differ by the size of their terms
                torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=1e-5 * scale, msg=path)


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_gradients_are_those_of_one_autograd_graph(jit):
    assert_as_in_plain_torch(world.run(gradients_on_this_rank, jit, size=2, deadline=200))


@pytest.mark.usefixtures("shallow")
def test_in_one_program_weights_are_values_and_each_loss_reaches_what_it_depends_on():
    take = fz.jit(example.gradients)
    assert_as_in_plain_torch([found_by(take)])
    vision, text = states()
    own = batch(0)

    def reached(**chosen: float) -> list[dict[str, bool]]:
        given = {name: torch.tensor(chosen.get(name, 0.0)) for name in WEIGHTS}
        _, *both = take(vision, text, given, own.images, own.tokens)
        return [{path: bool(leaf.any()) for path, leaf in small.flat(fz.gather(g)).items()} for g in both]

    by_caption, by_contrast, by_none = reached(caption=1.0), reached(contrast=2.0), reached()
    heads = {"picture_head.weight", "caption_head.weight", "sharpness"}
    assert {path for path, any_ in by_caption[1].items() if not any_} == heads
    assert {path for path, any_ in by_contrast[1].items() if not any_} == {"prefix.weight"}
    assert all(by_caption[0].values()) and all(by_contrast[0].values()), "both losses teach the whole encoder"
    assert not any(any_ for part in by_none for any_ in part.values())
    assert len(take.programs) == 1


# ---------------------------------------------------------------------------------------------------------
# The run


def run(out: Path, *options: str) -> example.Curve:
    return example.main(["--batch", "16", "--held-out", "64", "--out", str(out), *options])


def test_both_losses_fall_and_pictures_are_drawn(tmp_path, capsys, shallow):
    curve = run(tmp_path, "--steps", "30", "--lr", "4e-3")
    (_, *first), (_, *last) = curve.losses[0], curve.losses[-1]
    assert last[0] < 0.7 * first[0], curve.losses
    assert np.mean([c for _, _, c in curve.losses[-10:]]) < np.mean([c for _, _, c in curve.losses[:5]])
    assert [step for step, *_ in curve.held_out] == [0, *range(3, 31, 3)]
    for name in ("vision_language.png", "vision_language_samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "ZeRO-3" in output and "ZeRO-1" in output
    assert f"chance {curve.chance:.1%}" in output


def held_out_of_a_run(out: Path, *options: str) -> list[Any]:
    return run(out, *options).held_out


@pytest.mark.slow
def test_the_whole_models_learn_too(tmp_path):
    (_, *first), *_, (_, *last) = run(tmp_path, "--steps", "30", "--lr", "4e-3").losses
    assert last[0] < 0.7 * first[0] and last[1] < first[1]


@pytest.mark.slow
def test_states_of_unlike_optimizer_precision_and_layout_step_together_alike_on_all_ranks(tmp_path):
    options = ("--steps", "2", "--optimizer", "muon", "lion", "--zero", "2", "0", "--policy", "fp32", "fp16-mixed")
    first, second = world.run(held_out_of_a_run, tmp_path, *options, size=2, deadline=200)
    assert first == second


@pytest.mark.usefixtures("shallow")
def test_a_caption_counts_as_exact_where_it_would_be_written_so():
    images, (vision, text) = batch(0).images, states()
    tokens = example.read(vision, text, images)
    assert len(set(decode(tokens))) > 1, "what is written depends on the picture"
    assert example.marks(vision, text, images, tokens)[0].all()
    tokens[:2, -1] += 1
    assert example.marks(vision, text, images, tokens % len(ALPHABET))[0].tolist() == [0, 0, 1, 1, 1, 1]


def test_pictures_are_drawn_with_wrong_captions_in_red():
    pictures = Pictures.compose(Digits.load()[1], 3, seed=0)
    right = decode(pictures.tokens)
    first, second, third, *empty = example.draw(pictures, [*right[:2], "1+1=3"]).axes
    assert [axes.get_title() for axes in (first, second)] == right[:2]
    assert third.get_title() == f"1+1=3 (is {right[2]})" and third.title.get_color() == "C3"
    assert not any(axes.get_title() or axes.get_images() for axes in empty)


# ---------------------------------------------------------------------------------------------------------
# The models


def test_a_caption_is_written_from_left_to_right_and_compared_without_its_picture():
    torch.manual_seed(0)
    model = Captioner(example.TEXT, SMALL_VISION.width)
    embeddings, tokens = torch.randn(2, 5, SMALL_VISION.width), torch.randint(len(ALPHABET), (2, 6))
    logits, pictures, captions = model(embeddings, tokens)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % len(ALPHABET)
    others = model(embeddings, changed)
    torch.testing.assert_close(others[0][:, :3], logits[:, :3])
    assert (others[0][:, 3:] != logits[:, 3:]).any(-1).all()
    torch.testing.assert_close(others[1], pictures)
    others = model(embeddings + 1, tokens)
    torch.testing.assert_close(others[2], captions)
    assert (others[0] != logits).any(-1).all() and (others[1] != pictures).any(-1).all()


def test_every_patch_sees_every_pixel():
    torch.manual_seed(0)
    model, picture = vit.ViT(SMALL_VISION), torch.rand(1, *SMALL_VISION.picture)
    changed = picture.clone()
    changed[0, -1, -1] += 1
    assert model(picture).shape == (1, SMALL_VISION.patches, SMALL_VISION.width)
    assert (model(picture) != model(changed)).any(-1).all()


# ---------------------------------------------------------------------------------------------------------
# The pictures


def test_digits_held_out_are_in_no_training_picture():
    train, held_out = Digits.load()
    assert len(train.labels) + len(held_out.labels) == 1797
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held_out.images)
    assert set(train.labels) == set(held_out.labels) == set(range(10))


def test_a_picture_shows_what_its_caption_says():
    squares = np.ones((10, SIDE * SIDE), np.float32)
    for label in range(10):
        squares[label, 20 : 20 + label] = 0  # as many holes as the digit says
    pictures = Pictures.compose(Digits(squares.reshape(10, SIDE, SIDE), np.arange(10)), 60, seed=3)
    for image, said in zip(pictures.images, decode(pictures.tokens), strict=True):
        inked = (image > 0).any(0).tolist()
        starts = [x for x in range(WIDTH) if inked[x] and not (x and inked[x - 1])]
        shown = [SIDE * SIDE - int((image[:, x : x + SIDE] > 0).sum()) for x in starts]
        assert said == caption(shown)
    assert {len(said) for said in decode(pictures.tokens)} == {3, 5, 6, 7, 8}, (
        "one digit to three, small sums and large"
    )


def test_pictures_depend_on_the_seed_alone():
    train, _ = Digits.load()
    one, again, other = (Pictures.compose(train, 4, seed=(0, 7, rank)) for rank in (0, 0, 1))
    assert torch.equal(one.images, again.images) and torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.images, other.images)


def test_captions_survive_as_tokens():
    said = [caption([3, 5]), caption([9, 9, 9]), caption([0, 0])]
    assert said == ["3+5=8", "9+9+9=27", "0+0=0"]
    tokens = encode(said)
    assert tokens.shape == (3, LENGTH)
    assert not tokens[:, 0].any() and not tokens[:, -1].any(), "a blank begins and ends each"
    assert decode(tokens) == said


def test_chance_is_the_share_of_the_commonest_caption():
    assert Pictures(torch.zeros(4, 12, 36), encode(["1+1=2", "1+2=3", "1+1=2", "2+2=4"])).chance() == 0.5
