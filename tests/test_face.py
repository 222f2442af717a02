"""What a user sees of the package: its public names, and no others."""

from __future__ import annotations

import types

import fzero as fz


def test_the_names_of_the_package_are_the_public_ones() -> None:
    assert dir(fz) == sorted(fz.__all__)
    assert [name for name in fz.__all__ if not hasattr(fz, name)] == []
    shown = {name for name in dir(fz) if isinstance(getattr(fz, name), types.ModuleType)}
    assert shown <= {"tree", "schedules"}, "namespaces, not files"
    assert {"init", "jit", "State", "DonatedError", "__version__"} <= set(dir(fz))
