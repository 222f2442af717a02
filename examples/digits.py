"""Pictures of one to three handwritten digits, each with a caption that reads and adds them.

    1,797 digits ──┬─▶ four of five to train on ──compose──▶ (12, 36) pictures, "7=7", "3+5=8", "9+9+1=19"
                   └─▶ every fifth held out ──────compose──▶ pictures of digits that no training picture shows

The digits are those that come with scikit-learn, 8 × 8 pixels each (Alpaydin and Kaynak 1998, UCI repository).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

HEIGHT, WIDTH, SIDE = 12, 36, 8  # of a picture and of a digit, in pixels
PITCH = 12  # from one place of a digit to the next
ALPHABET = " 0123456789+="
LENGTH = 10  # tokens of a caption: a blank, at most 8 characters, and blanks to the end


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images (count, 8, 8) between 0 and 1, and what each says."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def load(cls) -> tuple[Digits, Digits]:
        """Return the digits to train on, and those that are held out: every fifth."""
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, SIDE, SIDE)
        is_held_out = np.arange(len(labels)) % 5 == 4
        return cls(images[~is_held_out], labels[~is_held_out]), cls(images[is_held_out], labels[is_held_out])


@dataclass(frozen=True)
class Pictures:
    """Composed pictures: images (count, 12, 36), and their captions as tokens (count, 10)."""

    images: Tensor
    tokens: Tensor

    @classmethod
    def compose(cls, digits: Digits, count: int, *, seed: int | Sequence[int]) -> Pictures:
        """Return `count` pictures: a function of the seed and nothing else.

        One to three digits stand in three places, each up to a pixel off, some darker than others.
        """
        random = np.random.default_rng(seed)
        images, captions = np.zeros((count, HEIGHT, WIDTH), np.float32), []
        for image in images:
            chosen = random.integers(len(digits.labels), size=random.integers(1, 4))
            places = np.sort(random.permutation(3)[: len(chosen)])
            for which, place in zip(chosen, places, strict=True):
                top, left = random.integers(1, 4), PITCH * place + random.integers(1, 4)
                image[top : top + SIDE, left : left + SIDE] = digits.images[which] * random.uniform(0.6, 1.0)
            captions.append(caption(digits.labels[chosen].tolist()))
        return cls(torch.from_numpy(images), encode(captions))

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.images.to(device), self.tokens.to(device))

    def __getitem__(self, rows: slice) -> Pictures:
        return Pictures(self.images[rows], self.tokens[rows])

    def chance(self) -> float:
        """Return the share of pictures that one same caption, the commonest, would fit."""
        return max(Counter(decode(self.tokens)).values()) / len(self.tokens)


def caption(digits: Sequence[int]) -> str:
    """Say which digits there are, and their sum: `caption([3, 5])` is "3+5=8"."""
    return f"{'+'.join(map(str, digits))}={sum(digits)}"


def encode(captions: Sequence[str]) -> Tensor:
    """Return tokens (count, 10): a blank begins a caption, and blanks end it."""
    return torch.tensor([[ALPHABET.index(c) for c in f" {text}".ljust(LENGTH)] for text in captions])


def decode(tokens: Tensor) -> list[str]:
    """Return the captions that tokens stand for."""
    return ["".join(ALPHABET[token] for token in row).strip() for row in tokens.tolist()]
