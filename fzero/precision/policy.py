"""Precision policies: in which dtype state is stored, computed with, reduced and rounded.

A policy is data. What it means is applied where the thing happens: `vjp` casts to the compute dtype, scales
cotangents and reduces in the reduce dtype, the optimizers store and round, `apply_gradients` moves the loss scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

import torch

from fzero.calls import shown
from fzero.calls.nearest import nearest
from fzero.errors import PolicyError
from fzero.precision import products
from fzero.precision.consistent import check
from fzero.precision.loss_scale import LossScale


@dataclass(frozen=True)
class Policy:
    """Dtypes of storage, compute, reduction and moments, and the rounding of what is written back.

    Attributes:
        param: dtype of the stored parameters; `None` where only the master is stored and the parameters
            are cast from it for each step.
        master: dtype of the master that is stored instead of the parameters; or `"split"`: the 16 bits that,
            beside a bfloat16 parameter, make an exact fp32 master; or `None`.
        moment: dtype of the optimizer's moments; `torch.int8` for 8 bits an element, quantized in blocks of
            128 that share an fp32 scale. Leaves under 1,024 elements then keep bfloat16 moments.
        compute: dtype in which the user's function sees parameters.
        wire: dtype in which leaves are gathered, before they are cast to `compute`, and of gradients; `None` for that
            of `compute`.
        reduce: dtype in which gradients are summed over ranks and micro-batches. On gloo and over
            several ranks what is sent has the gradient's own dtype, and only the sum is this wide.
        rounding: how a low-precision write-back rounds: `"nearest"` or `"stochastic"`.
        loss_scale: what cotangents are multiplied by, so that fp16 gradients do not underflow: `None`, a number,
            or a `LossScale` that adapts.
        autocast: run the user's function under `torch.autocast` of this dtype; `None` for not.
        exempt: patterns of leaf paths (`*` matches anything): such leaves are stored, computed with, reduced and
            updated in fp32.

    Raises:
        PolicyError: the fields contradict each other; the message says how.

    Example:
        >>> own = Policy(param=torch.bfloat16, compute=torch.bfloat16, rounding="stochastic", exempt=("*norm*",))
        >>> own.of("blocks.0.norm.weight").param, own.of("blocks.0.linear.weight").param
        (torch.float32, torch.bfloat16)
    """

    param: torch.dtype | None = torch.float32
    master: torch.dtype | Literal["split"] | None = None
    moment: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    loss_scale: float | LossScale | None = None
    autocast: torch.dtype | None = None
    exempt: tuple[str, ...] = ()
    wire: torch.dtype | None = None

    def __repr__(self) -> str:
        calls = [_by_name(self, name, base) for name, base in POLICIES.items()]
        return min((found for found in calls if found is not None), key=len, default=shown.made("Policy", self))

    def __post_init__(self) -> None:
        if isinstance(self.exempt, str) or not all(isinstance(pattern, str) for pattern in self.exempt):
            raise PolicyError(f"fz.Policy: exempt={self.exempt!r}; expected a tuple of patterns, such as ('*norm*',).")
        object.__setattr__(self, "exempt", tuple(self.exempt))
        check(self)

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the parameters at rest."""
        dtype = self.master if self.param is None else self.param
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def sent(self) -> torch.dtype:
        """The dtype in which leaves are gathered, and of gradients."""
        return self.compute if self.wire is None else self.wire

    @property
    def has_master(self) -> bool:
        """Whether updates act on an fp32 master, which then is all that is stored."""
        return self.master is not None

    @property
    def scaling(self) -> LossScale | None:
        """How the loss scale behaves: a number is one that never moves."""
        if self.loss_scale is None or isinstance(self.loss_scale, LossScale):
            return self.loss_scale
        return LossScale(self.loss_scale, growth=1.0, backoff=1.0, smallest=self.loss_scale)

    def of(self, path: str) -> Policy:
        """Return the policy of one leaf: this one, or its fp32 form where the leaf's path is exempt."""
        return _fp32_form(self) if any(fnmatchcase(path, pattern) for pattern in self.exempt) else self


def _by_name(policy: Policy, name: str, base: Policy) -> str | None:
    """Return the call of `fz.policy` that makes a policy of a named one; `None` where its keywords cannot."""
    keywords = ("compute", "wire", "autocast", "exempt")
    if any(
        getattr(policy, f.name) != getattr(base, f.name) for f in dataclasses.fields(Policy) if f.name not in keywords
    ):
        return None
    if policy.wire != base.wire and policy.wire != (None if policy.compute == base.sent else base.sent):
        return None
    if policy.compute != base.compute and policy.sent != base.sent:
        return None
    differ = {key: getattr(policy, key) for key in keywords if key != "wire"}
    return shown.call("policy", name, **{key: x for key, x in differ.items() if x != getattr(base, key)})


@cache
def _fp32_form(policy: Policy) -> Policy:
    return dataclasses.replace(
        policy,
        param=torch.float32,
        master=None,
        moment=torch.float32,
        compute=torch.float32,
        reduce=torch.float32,
        rounding="nearest",
        loss_scale=None,
        exempt=(),
        wire=None,
    )


_BF16 = Policy(
    param=torch.bfloat16,
    moment=torch.bfloat16,
    compute=torch.bfloat16,
    reduce=torch.bfloat16,
    rounding="stochastic",
)
POLICIES = {
    "fp32": Policy(),
    "mixed": Policy(param=None, master=torch.float32, compute=torch.bfloat16),
    "bf16": _BF16,
    "bf16-exact": dataclasses.replace(_BF16, master="split"),
    "bf16-fp32-moments": dataclasses.replace(_BF16, moment=torch.float32),
    "bf16-8bit": dataclasses.replace(_BF16, moment=torch.int8),
    "fp16": Policy(param=torch.float16, compute=torch.float16, rounding="stochastic", loss_scale=LossScale()),
    "fp16-mixed": Policy(param=None, master=torch.float32, compute=torch.float16, loss_scale=LossScale()),
}


def policy(
    name: str | Policy,
    *,
    compute: torch.dtype | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    exempt: Sequence[str] | None = None,
) -> Policy:
    """Return the policy of a name; a `Policy` is returned as it is, but for what the keywords say.

    | name                | weights                             | moments       | gradients                    | bytes |
    |---------------------|-------------------------------------|---------------|------------------------------|-------|
    | `fp32`              | fp32                                | fp32          | fp32                         | 12    |
    | `mixed`             | fp32, cast to bf16 for each step    | fp32          | bf16, summed in fp32         | 12    |
    | `bf16`              | bf16                                | bf16          | bf16                         | 6     |
    | `bf16-exact`        | bf16 and 16 bits: exact fp32        | bf16          | bf16                         | 8     |
    | `bf16-fp32-moments` | bf16                                | fp32          | bf16                         | 10    |
    | `bf16-8bit`         | bf16                                | 8-bit blocks  | bf16                         | 4.06  |
    | `fp16`              | fp16                                | fp32          | fp16, dynamic loss scale     | 10    |
    | `fp16-mixed`        | fp32, cast to fp16 for each step    | fp32          | fp16, dynamic loss scale     | 12    |

    Bytes are those of an element of the weights and two moments, before sharding. What is stored in less than fp32
    is rounded stochastically when it is written back.

    Args:
        name: one of the above, or a `Policy`.
        compute: the dtype in which functions see parameters; leaves are still stored, gathered and reduced, and
            gradients kept, as the policy says. `"auto"`: fp32, without autocast, where the device has no instructions
            for the policy's products and would take many times as long for them; else the policy's own.
        device: the device that `"auto"` asks about. Default: as in `fz.make_mesh`.
        autocast: run functions under `torch.autocast` of this dtype; states stay as the policy says.
        exempt: patterns of paths of leaves to keep in fp32, such as `("*norm*", "embed*")`.

    Raises:
        PolicyError: no policy has this name, or a keyword contradicts it.

    Example:
        >>> policy("bf16").stored
        torch.bfloat16
        >>> policy("bf16", exempt=["*norm*"]).of("norm.weight").stored
        torch.float32
        >>> widened = policy("bf16", compute=torch.float32)
        >>> widened.stored, widened.compute, widened.sent
        (torch.bfloat16, torch.float32, torch.bfloat16)
    """
    if not isinstance(name, Policy) and not (isinstance(name, str) and name in POLICIES):
        raise PolicyError(
            f"fz.policy: no policy is called {name!r}.{nearest(name, POLICIES)} Use one of {list(POLICIES)}, or "
            f"compose one: fz.Policy(...)."
        )
    found = name if isinstance(name, Policy) else POLICIES[name]
    if autocast is not None:
        found = dataclasses.replace(found, autocast=autocast)
    if compute == "auto":
        found = _widened(found, _device(device))
    elif compute is not None:
        found = _computed_in(found, compute)
    return found if exempt is None else dataclasses.replace(found, exempt=tuple(exempt))


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _widened(policy: Policy, device: torch.device) -> Policy:
    """Return the policy with fp32 in the place of what the device multiplies slowly."""
    # A loss scale is part of the state: where only autocast gives it something to protect, autocast stays.
    needed = policy.loss_scale is not None and torch.float16 not in (policy.compute, policy.wire)
    if policy.autocast is not None and not products.are_fast(policy.autocast, device) and not needed:
        policy = dataclasses.replace(policy, autocast=None)
    return policy if products.are_fast(policy.compute, device) else _computed_in(policy, torch.float32)


def _computed_in(policy: Policy, dtype: torch.dtype) -> Policy:
    return dataclasses.replace(policy, compute=dtype, wire=None if dtype == policy.sent else policy.sent)
