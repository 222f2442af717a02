"""What every test starts from: one thread, fixed seeds, no GPU test without a GPU, no process left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from tests import triton_process, world

hypothesis.settings.register_profile("fzero", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fzero")

torch.set_num_threads(1)  # as in the ranks of tests.world, so that results compare bit for bit


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random state at the start of each test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def processes() -> Iterator[None]:
    """Processes beside this one live from the first case that needs them to the end of the session."""
    yield
    world.close()
    triton_process.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
