"""What `import fzero` loads beside torch: nothing that is needed later, or never."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Seconds of CPU time that a program pays which never compiles, or never looks at sizes as symbols.
LATER = (
    "sympy",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.flop_counter",
    "fzero.program.pipeline",
    "fzero.program.passes.bucket",
    "fzero.program.report.memory",
    "fzero.program.lower.inductor",
    "triton",
    "einops",
    "transformers",
    "matplotlib",
)


def loaded(code: str) -> set[str]:
    """The modules that a fresh process has loaded after some code, and not after torch alone."""
    script = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def by_import() -> set[str]:
    return loaded("import os; os.environ.pop('TRITON_INTERPRET', None); import fzero")


def test_fzero_and_its_trees_are_loaded(by_import: set[str]) -> None:
    assert {"fzero.train.state", "optree"} <= by_import


@pytest.mark.parametrize("name", LATER)
def test_what_is_needed_later_is_loaded_later(name: str, by_import: set[str]) -> None:
    assert name not in by_import
