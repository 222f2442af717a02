"""The notebooks run from their first cell to their last on a CPU, and are stored as they ran."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")  # a bare GPU machine has none, and collects every file

from nbclient.exceptions import CellExecutionError  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402
from notebooks.execute import HERE, executed  # noqa: E402

NOTEBOOKS = sorted(HERE.glob("*.ipynb"))

# What trains for a minute trains for some seconds here.
SHORTER = {
    "step": {"160": "64", "(5e-2, 2e-3)": "(5e-2,)", "train(seeded, 0, 100)": "train(seeded, 0, 5)"},
    "vision_language": {"STEPS = 450": "STEPS = 90"},
}

# A notebook is read in a browser, and its history is kept.
MOST_BYTES = 800 * 1024
# Pixels across that a figure needs to be readable on a screen of today.
LEAST_WIDTH = 1200


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> set[str]:
    """The MIME types that a notebook shows."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return {kind for output in outputs for kind in output.get("data", {})}


def widths(notebook: Any) -> list[int]:
    """Pixels across of each picture, which a PNG has in its header."""
    outputs = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
    return [int.from_bytes(picture[16:20], "big") for picture in pictures]


def written(path: Path, *sources: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_there_are_notebooks() -> None:
    topics = {"step", "vision_language", "programs", "precision", "curvature"}
    assert topics <= {path.stem for path in NOTEBOOKS}


# Most take half a minute: the fast tests run one.
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem != "step")) for p in NOTEBOOKS],
)
def test_a_notebook_runs(path: Path) -> None:
    assert "image/png" in kinds(executed(path, shorter=SHORTER.get(path.stem))), "a notebook has plots"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_a_notebook_runs_at_full_length(name: str) -> None:
    assert "image/png" in kinds(executed(HERE / f"{name}.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert min(widths(notebook)) >= LEAST_WIDTH, "figures are too small to read"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_in_ten_minutes(path: Path) -> None:
    words = [len(cell.source.split()) for cell in nbformat.read(path, as_version=4).cells]
    assert sum(words) < 2500


def test_what_a_run_leaves_is_not_stored(tmp_path: Path) -> None:
    notebook = executed(written(tmp_path / "a.ipynb", "import pathlib; print(pathlib.Path().resolve())", "1 + 1"))
    first, second = code_cells(notebook)
    assert Path(first.outputs[0].text.strip()) == tmp_path.resolve(), "it runs where it lies"
    assert second.outputs[0].data["text/plain"] == "2" and not second.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize(
    "source, error",
    [("1 / 0", CellExecutionError), ("import warnings; warnings.warn('careful')", ValueError)],
)
def test_a_notebook_that_fails_or_warns_is_refused(tmp_path: Path, source: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"ZeroDivisionError|careful"):
        executed(written(tmp_path / "a.ipynb", source))
