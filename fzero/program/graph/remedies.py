"""What to write instead of an operator that looks at values, or whose result has a shape that values decide."""

from __future__ import annotations

from collections.abc import Mapping

_MASK = (
    "Elements that a mask picks have no fixed number. Keep all and leave the others out of the sum: "
    "(x * mask).sum() / mask.sum(), torch.where(mask, x, y) for a choice, x.masked_scatter(mask, y) to write"
)
_EQUAL = "Compare as tensors: (x == y).all(), or torch.isclose(x, y).all(), and choose by torch.where"
_UNIQUE = "Sort, and mark what differs from its neighbour: x.sort().values.diff() != 0"

# By the operator's name.
REMEDIES: Mapping[str, str] = {
    "aten::_local_scalar_dense": (
        "Use torch.where instead of `if`, keep numbers as tensors instead of .item(), look up by "
        "x.index_select(0, i.reshape(1)) instead of x[i], or pass what is known beforehand as a Python value"
    ),
    "aten::nonzero": _MASK,
    "aten::index": _MASK,
    "aten::masked_select": _MASK,
    "aten::equal": _EQUAL,
    "aten::allclose": _EQUAL,
    "aten::unique_dim": _UNIQUE,
    "aten::_unique": _UNIQUE,
    "aten::_unique2": _UNIQUE,
    "aten::unique_consecutive": _UNIQUE,
    "aten::repeat_interleave": "Say how long the result is: torch.repeat_interleave(x, repeats, output_size=n)",
    "aten::bincount": "Count into a tensor of known size: torch.zeros(n).index_add(0, x, torch.ones(x.shape))",
    "aten::_pack_padded_sequence": "Run the padded batch, and take each sequence's last output by torch.gather",
    "aten::linalg_lstsq": "Solve by torch.linalg.pinv(A) @ B, or by the normal equations",
}
_OTHER = "Do it outside of the function, and pass in what comes of it"


def remedy(operator: str | None) -> str:
    """Return what to do instead of an operator, named as `aten::nonzero`; `None` for one that is not known."""
    return REMEDIES["aten::_local_scalar_dense"] if operator is None else REMEDIES.get(operator, _OTHER)
