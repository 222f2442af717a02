"""examples/curvature.py: eigenvalues of a matrix that is known, and of a GPT's Hessian in every layout."""

from __future__ import annotations

import pytest
import torch
from curvature import lanczos, main, power_iteration

import fzero as fz
from tests import small, world

TINY = ["--steps", "2", "--times", "2", "--iterations", "2", "--batch", "2", "--sequence", "16"]


def test_the_example_finds_the_eigenvalues_of_a_matrix_that_is_known():
    diagonal = torch.tensor([-3.0, 0.5, 1.0, 2.0, 7.0])
    start = fz.random_like(fz.shard(torch.zeros(5), fz.make_mesh("cpu"), fz.zero(3)), 0)

    def times(v: fz.Sharded) -> fz.Sharded:
        return v.replace(pieces=(small.piece(v, "") * diagonal,))

    values, weights = lanczos(times, start, 5)
    torch.testing.assert_close(values, diagonal.double(), rtol=1e-4, atol=1e-4)
    share = fz.gather(start).double().square()
    torch.testing.assert_close(weights, share / share.sum(), rtol=1e-3, atol=1e-4)
    direction, estimates = power_iteration(times, start, 40)
    assert estimates[-1] == pytest.approx(7, rel=1e-4)
    torch.testing.assert_close(small.piece(direction, "").abs(), torch.eye(5)[4], rtol=0, atol=1e-4)


def example(stage: str) -> list[float]:
    return main([*TINY, "--zero", stage])


@pytest.mark.slow
def test_the_example_finds_the_same_curvature_in_every_layout():
    first, *others = (found for stage in "0123" for found in world.run(example, stage, size=2))
    assert len(first) == 3
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)
