"""Execute notebooks in place, so that they are stored with what they show.

python examples/notebooks/execute.py                 # all of this folder
python examples/notebooks/execute.py step.ipynb

A warning in a notebook is a mistake. What differs from one run to the next for no
reason of ours (execution times, the kernel's version) is not stored.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main(arguments: Sequence[str]) -> None:
    """Execute the named notebooks, or all."""
    for path in [HERE / name for name in arguments] or sorted(HERE.glob("*.ipynb")):
        notebook = executed(path)
        path.write_text(nbformat.writes(notebook) + "\n")
        print(f"{path.name}: {path.stat().st_size / 2**10:.0f} KiB")


def executed(path: Path, *, seconds: int = 300, shorter: Mapping[str, str] | None = None) -> Any:
    """Return a notebook as it is after a run from its first cell to its last in a fresh kernel.

    Args:
        path: of the notebook; it runs in that folder.
        seconds: that a cell may take.
        shorter: pieces of code that make the run long, and what to run in the place of each.

    Raises:
        CellExecutionError: a cell raised.
        ValueError: a cell warned, or none holds a piece of code that is to be shorter.
    """
    notebook = nbformat.read(path, as_version=4)
    for code, instead in (shorter or {}).items():
        _shorten(notebook, code, instead)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    # torch and the kernel deprecate things in themselves while they are imported: only what a cell shows counts.
    environment.pop("PYTHONWARNINGS", None)
    limits: dict[str, Any] = {"timeout": seconds, "startup_timeout": seconds}
    resources = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, kernel_name="python3", record_timing=False, resources=resources, **limits)
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr" and "Warning" in output.text:
                raise ValueError(f"{path.name}: a cell warned:\n{cell.source}\n\n{output.text}")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def _shorten(notebook: Any, code: str, instead: str) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source]
    if not cells:
        raise ValueError(f"no cell holds {code!r}")
    for cell in cells:
        cell.source = cell.source.replace(code, instead)


if __name__ == "__main__":
    main(sys.argv[1:])
