"""Code in a process where Triton interprets kernels, or compiles them for a GPU: that is decided when it is imported.

    interpreted("from tests.test_kernels_sgd import check_all; check_all('cpu')")

For each of the two, one process imports torch, Triton and fzero once and forks for each piece of code, which so finds
everything as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_running: dict[bool, subprocess.Popen[str]] = {}


def interpreted(code: str, *, loops: bool = False) -> None:
    """Run code where Triton interprets; what it raises is an `AssertionError` here. Skips where Triton is not.

    Args:
        code: Python.
        loops: whether a kernel in it goes round as often as an argument says. Triton before 3.7 reads that number as
            numpy from 2.4 on does not let it.
    """
    if loops and _version_of("triton") < (3, 7) and _version_of("numpy") >= (2, 4):
        pytest.skip("this version of Triton interprets no such loop with this one of numpy")
    _run(code, interpret=True)


def compiled(code: str) -> None:
    """Run code where Triton compiles, likewise. That needs no GPU: Triton brings its own assembler."""
    _run(code, interpret=False)


def close() -> None:
    """End the processes. The next piece of code starts new ones."""
    while _running:
        _, process = _running.popitem()
        with process:  # closes its pipes, on which it ends, and waits
            pass


def _run(code: str, *, interpret: bool) -> None:
    pytest.importorskip("triton")
    if interpret not in _running:
        _running[interpret] = _started(interpret)
    process = _running[interpret]
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(code) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BaseException:  # an interrupt: the answer would be taken for that of the next question
        process.kill()
        close()
        raise
    if not answer:
        close()
        raise AssertionError("the process of Triton ended")
    error = json.loads(answer)
    assert not error, error


def _version_of(package: str) -> tuple[int, ...]:
    pytest.importorskip(package)
    return tuple(map(int, version(package).split(".")[:2]))


def _started(interpret: bool) -> subprocess.Popen[str]:
    folders = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": folders}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.triton_process"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def _serve() -> None:
    """Answer each line, which is code, with a line: what it raised."""
    import torch
    import torch.distributed.tensor  # which torch.testing looks at

    import fzero as fz
    import tests.test_kernels_update

    del fz, tests
    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            error = ""
            try:
                os.dup2(2, 1)  # what it prints is no answer
                exec(compile(json.loads(line), "<code>", "exec"), {"__name__": "__code__"})
            except BaseException:
                error = traceback.format_exc()
            with open(write, "w") as pipe:
                pipe.write(error)
            os._exit(0)
        os.close(write)
        with open(read) as pipe:
            error = pipe.read()
        _, status = os.waitpid(child, 0)
        error = error or (f"the process ended with status {status}" if status else "")
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    _serve()
