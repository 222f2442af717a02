"""Error classes: one base, public names, and the built-in class that callers without fzero would catch."""

from __future__ import annotations

import inspect

import pytest

import fzero as fz
from fzero import errors

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}

WRONG_ARGUMENT = {
    "MeshError",
    "LayoutError",
    "PolicyError",
    "TreeError",
    "BatchError",
    "CotangentError",
    "GradientError",
    "ResidualsError",
    "ShapeError",
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_public_and_says_what_it_is(name):
    cls = CLASSES[name]
    assert getattr(fz, name) is cls
    assert name.endswith("Error")
    assert cls.__doc__
    assert issubclass(cls, fz.FzeroError)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"FzeroError"}))
def test_a_wrong_argument_is_a_value_error_and_the_rest_happens_at_run_time(name):
    assert issubclass(CLASSES[name], ValueError) == (name in WRONG_ARGUMENT)
    assert issubclass(CLASSES[name], RuntimeError) == (name not in WRONG_ARGUMENT)
