"""Train a vision transformer and a language model together: two states, two losses, one step.

    python examples/vision_language.py                             # reads and adds handwritten digits, in some minutes
    python examples/vision_language.py --zero 1 3 --policy fp32 bf16-8bit --optimizer muon lion
    torchrun --nproc-per-node 2 examples/vision_language.py        # each rank its own pictures

Neither model knows of the other. What crosses the border is a tensor of embeddings, and on the way back its
cotangent, which the step passes on by hand:

    pictures ──look──▶ embeddings ──▶ caption loss, contrastive loss ◀── captions
       g_vision ◀──pull_vision── ē ◀──pull_text── weights of the losses

Each model has an optimizer, a precision and a layout of its own. The losses are those of CoCa, Yu et al. 2022,
arXiv 2205.01917: the caption, character by character; and which caption of the batch belongs to which picture.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step ten times slower where others use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import vit
from captioner import Captioner
from digits import ALPHABET, LENGTH, Digits, Pictures, decode
from gpt import Config
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from train_gpt import mean_of_ranks, share_cores

import fzero as fz

VISION = vit.Config(width=64, depth=2, heads=4)
TEXT = Config(width=64, depth=2, heads=4, vocabulary=len(ALPHABET))
GROUP = 64  # held-out pictures among whose captions one is looked for


look, _ = fz.functional(lambda: vit.ViT(VISION))
speak, _ = fz.functional(lambda: Captioner(TEXT, VISION.width))


def losses_of(text: Any, embeddings: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Return how badly captions are told from their pictures, in nats per character, and each from the others'."""
    logits, pictures, captions = speak(text, embeddings, tokens)
    nearness = text["sharpness"].float().exp() * (pictures @ captions.T).float()
    # A caption may come twice in a batch: all that say the same are right.
    same = (tokens[:, None] == tokens).all(-1).float()
    right = same / same.sum(-1, keepdim=True)
    return {
        "caption": F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()),
        "contrast": (F.cross_entropy(nearness, right) + F.cross_entropy(nearness.T, right)) / 2,
    }


def gradients(
    vision: fz.State, text: fz.State, weights: dict[str, Tensor], images: Tensor, tokens: Tensor
) -> tuple[dict[str, Tensor], fz.Sharded, fz.Sharded]:
    """Return the losses, and the gradients of their weighted sum for both states."""
    embeddings, pull_vision = fz.vjp(look, vision, images)
    losses, pull_text = fz.vjp(losses_of, text, embeddings, tokens)
    g_text, embeddings_bar, _ = pull_text(weights)
    g_vision, _ = pull_vision(embeddings_bar)
    return losses, g_vision, g_text


@fz.jit(donate=(0, 1))
def step(
    vision: fz.State, text: fz.State, weights: dict[str, Tensor], images: Tensor, tokens: Tensor
) -> tuple[fz.State, fz.State, dict[str, Tensor]]:
    """Update both states by one batch."""
    losses, g_vision, g_text = gradients(vision, text, weights, images, tokens)
    vision, _ = fz.apply_gradients(vision, g_vision)
    text, _ = fz.apply_gradients(text, g_text)
    return vision, text, losses


@fz.jit
def marks(vision: fz.State, text: fz.State, images: Tensor, tokens: Tensor) -> Tensor:
    """Return (2, batch), ones and zeros: of which pictures the whole caption is right, and of which the nearest one.

    A caption that is written character by character, always the likeliest, is the true one just where each of its
    characters is the likeliest behind the true ones before it. So one pass over the true captions tells.
    """

    def right(vision: Any, text: Any) -> Tensor:
        logits, pictures, captions = speak(text, look(vision, images), tokens)
        exact = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).all(-1)
        matched = (tokens[(pictures @ captions.T).argmax(-1)] == tokens).all(-1)
        return torch.stack([exact, matched]).float()

    found: Tensor = fz.call(right, vision.params, text.params)
    return found


def read(vision: fz.State, text: fz.State, images: Tensor) -> Tensor:
    """Return the captions, as tokens, that the models give to pictures: always the likeliest character next."""

    def written(vision: Any, text: Any) -> Tensor:
        embeddings = look(vision, images)
        tokens = torch.zeros(len(images), 1, dtype=torch.long, device=images.device)
        for _ in range(LENGTH - 1):
            logits, _, _ = speak(text, embeddings, tokens)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return tokens

    captions: Tensor = fz.call(written, vision.params, text.params)
    return captions


@dataclass
class Curve:
    """What a run was like: losses of training batches by step, and shares of held-out pictures."""

    losses: list[tuple[int, float, float]] = field(default_factory=list)  # caption, contrast
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # whole caption right, nearest right
    chance: float = 0.0

    def plot(self, path: Path) -> None:
        """Write the curves as a PNG."""
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps, caption, contrast = zip(*self.losses, strict=True)
        left.plot(steps, caption, label="caption (nats per character)")
        left.plot(steps, contrast, label="contrast (nats per pair)")
        left.set(xlabel="step", ylabel="loss on training pictures", yscale="log")
        steps, exact, matched = zip(*self.held_out, strict=True)
        right.plot(steps, exact, "o-", label="the whole caption is right")
        right.plot(steps, matched, "o-", label="the nearest caption of 64 is right")
        right.axhline(self.chance, color="0.5", ls=":", label="always the commonest caption")
        right.set(xlabel="step", ylabel="share of held-out pictures", ylim=(0, 1))
        for axes in (left, right):
            axes.legend(frameon=False, fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def draw(pictures: Pictures, captions: Sequence[str], columns: int = 4) -> Figure:
    """Return the pictures with the captions that they were given; a wrong one is red, beside the true one."""
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, given, true in zip(grid, pictures.images.cpu(), captions, decode(pictures.tokens), strict=False):
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(given if given == true else f"{given} (is {true})", color="k" if given == true else "C3")
    return figure


def optimizer_of(name: str, lr: float, steps: int) -> fz.Optimizer:
    """Return an optimizer that clips, warms up for a twentieth of the steps, and falls as a cosine.

    Args:
        name: "adamw", "muon" or "lion".
        lr: highest rate, in AdamW's measure.
        steps: of the run.
    """

    def rate(peak: float) -> fz.schedules.warmup_cosine:
        return fz.schedules.warmup_cosine(peak, warmup=max(1, steps // 20), total=steps)

    made = {
        "adamw": lambda: fz.adamw(rate(lr), b2=0.98, weight_decay=0.05, mask=decays),
        "muon": lambda: fz.muon(rate(lr), weight_decay=0.05, mask=decays, matrix=is_hidden),
        "lion": lambda: fz.lion(rate(lr / 10), weight_decay=0.5, mask=decays),
    }
    return fz.chain(fz.clip_by_global_norm(1.0), made[name]())


def decays(path: str) -> bool:
    """Say whether weight decay is for this leaf: not for norms, embeddings, places and the sharpness."""
    return not any(word in path for word in ("norm", "embed", "place", "sharpness"))


def is_hidden(path: str) -> bool:
    """Say whether Muon is for this leaf: for the matrices inside the blocks."""
    return ("layers." in path or "blocks." in path) and "norm" not in path


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train as the command line says; return what the run was like."""
    args = arguments(argv)
    share_cores()
    mesh = fz.make_mesh()
    rank, ranks = mesh.index("data"), mesh.size("data")
    say = tqdm.write if rank == 0 else lambda _: None

    digits, unseen = Digits.load()
    held_out = Pictures.compose(unseen, args.held_out * ranks, seed=args.seed)
    curve = Curve(chance=held_out.chance())
    held_out = held_out[rank * args.held_out : (rank + 1) * args.held_out].to(mesh.device)

    say(f"{len(digits.labels)} digits to train on, {len(unseen.labels)} held out; {ranks} rank(s) on {mesh.device}")
    states = []
    for i, factory in enumerate((lambda: vit.ViT(VISION), lambda: Captioner(TEXT, VISION.width))):
        optimizer = optimizer_of(args.optimizer[i], args.lr, args.steps)
        policy = fz.policy(args.policy[i], compute="auto", device=mesh.device)
        states.append(fz.init(factory, optimizer, mesh, fz.zero(args.zero[i]), policy, args.seed))
        about = repr(states[i]).splitlines()[0]
        say(f"{('vision', 'text')[i]}: {args.optimizer[i]}, {args.policy[i]}, {about}")
    vision, text = states

    def measure(number: int) -> None:
        parts = [held_out[i : i + GROUP] for i in range(0, args.held_out, GROUP)]
        found = torch.cat([marks(vision, text, part.images, part.tokens) for part in parts], 1)
        exact, matched = (mean_of_ranks(share) for share in found.mean(1))
        curve.held_out.append((number, exact, matched))
        say(
            f"step {number:5}: {exact:6.1%} of held-out pictures read and added exactly (chance {curve.chance:.1%}), "
            f"{matched:6.1%} matched with their caption among {GROUP} (chance {1 / GROUP:.1%})"
        )

    weights = {"caption": torch.tensor(1.0), "contrast": torch.tensor(args.contrast)}
    weights = {name: weight.to(mesh.device) for name, weight in weights.items()}
    measure(0)
    start = time.perf_counter()
    with tqdm(range(1, args.steps + 1), unit="step", disable=rank > 0, dynamic_ncols=True) as bar:
        for number in bar:
            batch = Pictures.compose(digits, args.batch, seed=(args.seed, number, rank)).to(mesh.device)
            vision, text, losses = step(vision, text, weights, batch.images, batch.tokens)
            curve.losses.append((number, losses["caption"].item(), losses["contrast"].item()))
            bar.set_postfix_str("caption {1:.3f}, contrast {2:.3f}".format(*curve.losses[-1]))
            if number % -(-args.steps // 10) == 0 or number == args.steps:
                measure(number)
    say(f"{args.steps} steps in {time.perf_counter() - start:.0f} s")

    samples = held_out[:24]
    captions = decode(read(vision, text, samples.images))  # a collective: every rank takes part
    if rank == 0:
        curve.plot(args.out / "vision_language.png")
        draw(samples, captions).savefig(args.out / "vision_language_samples.png", dpi=120)
        say(f"Curves and sample pictures with their captions are in {args.out}/vision_language*.png")
    return curve


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a vision transformer and a language model together.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("VISION", "TEXT")}
    parser.add_argument("--optimizer", choices=["adamw", "lion", "muon"], default=["lion", "adamw"], **pair)
    parser.add_argument("--policy", default=["bf16-exact", "bf16"], help="dtypes of each state", **pair)
    parser.add_argument("--zero", type=int, choices=range(4), default=[3, 1], help="what is sharded", **pair)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step and rank")
    parser.add_argument("--held-out", type=int, default=1024, help="held-out pictures of a rank")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate, in AdamW's measure")
    parser.add_argument("--contrast", type=float, default=0.2, help="weight of the contrastive loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
