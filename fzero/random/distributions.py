"""The random operators of torch as functions of key words: the same bits on every device, eager and traced.

Each is named as torch names the operator that returns a new tensor. What has a distribution function with a closed
inverse draws one or two words an element; the others take a fixed number of steps, so that a trace can hold them:

    poisson            bisects its distribution function
    _standard_gamma    ten rounds of Marsaglia and Tsang's rejection, of which each accepts at least 95 of 100
    multinomial        the distribution function searched, or the largest of p / Exp(1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fzero._torch import FakeTensor
from fzero.errors import RandomOpError
from fzero.random.bits import bits, fold, mix, normal, uniform

Named = Mapping[str, Any]

# Of a draw from the gamma distribution. All are rejected with a probability of at most 0.05 ** 10 = 1e-13.
_GAMMA_ROUNDS = 10
# Halvings of what the distribution function of Poisson is searched in: enough for rates up to 1e11.
_POISSON_STEPS = 24


def fine(keys: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `n` draws, uniform in (0, 1), of two words each: in steps of 2^-48, where those of `uniform` are 2^-24."""
    word = bits(keys, 0, n)
    units = [((w >> 8) & 0xFFFFFF).to(dtype) * 2.0**-24 for w in (word, mix(word, keys[1], keys[0]))]
    result = units[0] + (units[1] + 2.0**-25) * 2.0**-24
    return result if dtype == torch.float64 else result.clamp(max=1.0 - 2.0**-24)


def _shaped(named: Named, draw: Callable[[int], Tensor]) -> Tensor:
    """Return a new tensor of a size, of the dtype and on the device asked for."""
    size = named["size"]
    dtype = named.get("dtype") or torch.get_default_dtype()
    return draw(math.prod(size)).to(device=named.get("device"), dtype=dtype).reshape(size)


def _like(x: Tensor, draw: Callable[[int], Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return a new tensor of the shape of another."""
    return draw(x.numel()).to(x.device).reshape(x.shape).to(dtype or x.dtype)


def _flat(x: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    return draw(x.numel()).to(x.device).reshape(x.shape)


def _integers(keys: Tensor, n: int, low: int, high: int) -> Tensor:
    count = high - low
    if count > 2**63:
        raise RandomOpError(f"fz.keyed: there are no keyed draws of {count} integers; at most of 2 ** 63.")
    word = bits(keys, 0, n)
    wide = word.to(torch.int64) & 0xFFFFFFFF
    if count > 2**32:
        wide = ((wide << 32) | (mix(word, keys[1], keys[0]).to(torch.int64) & 0xFFFFFFFF)) & (2**63 - 1)
    return low + (wide if count == 2**63 else wide % count)


def _randint(keys: Tensor, a: Named) -> Tensor:
    return _shaped({**a, "dtype": _whole(a)}, lambda n: _integers(keys, n, a.get("low", 0), a["high"]))


def _whole(a: Named) -> torch.dtype:
    """Return the dtype asked for, or int64: a schema gives the default as a number, which is no `torch.dtype`."""
    dtype = a["dtype"]
    return dtype if isinstance(dtype, torch.dtype) else torch.int64


def _randint_like(keys: Tensor, a: Named) -> Tensor:
    low, high = a.get("low", 0), a["high"]
    if isinstance(high, Tensor):
        words = bits(keys, 0, a["self"].numel()).to(torch.int64) & 0xFFFFFFFF
        return _like(a["self"], lambda n: words % high.to(words.device), a["dtype"])
    return _like(a["self"], lambda n: _integers(keys, n, low, high), a["dtype"])


def _random(keys: Tensor, a: Named) -> Tensor:
    x = a["self"]
    low, high = a.get("from") or 0, a.get("to")
    if high is None:
        whole = 2 ** round(1 - math.log2(torch.finfo(x.dtype).eps)) if x.is_floating_point() else None
        high = (whole if whole is not None else 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max) + 1
    return _like(x, lambda n: _integers(keys, n, low, high))


def _coin(keys: Tensor, a: Named) -> Tensor:
    x = a["self"]
    p = a.get("p", x)
    return (_flat(x, lambda n: uniform(keys, 0, n)) < p).to(x.dtype)


def _native_dropout(keys: Tensor, a: Named) -> tuple[Tensor, Tensor]:
    x, p = a["input"], a["p"]
    if a["train"] is False or p == 0.0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = _flat(x, lambda n: uniform(keys, 0, n)) >= p
    return x * kept * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), kept


def _fused_dropout(keys: Tensor, a: Named) -> tuple[Tensor, Tensor]:
    x, kept_with = a["self"], a["p"]
    kept = _flat(x, lambda n: uniform(keys, 0, n)) < kept_with
    return x * kept / kept_with, kept.to(torch.uint8)


def _normal(keys: Tensor, a: Named) -> Tensor:
    mean, std = a["mean"], a["std"]
    if "size" in a:
        return mean + std * _shaped(a, lambda n: normal(keys, 0, n))
    if "self" in a:
        return _flat(a["self"], lambda n: normal(keys, 0, n)) * std + mean
    like = mean if isinstance(mean, Tensor) else std
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.shape != std.shape:
        like = torch.empty(torch.broadcast_shapes(mean.shape, std.shape), dtype=mean.dtype, device=mean.device)
    return mean + std * _like(like, lambda n: normal(keys, 0, n))


def _uniform(keys: Tensor, a: Named) -> Tensor:
    return _flat(a["self"], lambda n: uniform(keys, 0, n)) * (a["to"] - a["from"]) + a["from"]


def _exponential(keys: Tensor, a: Named) -> Tensor:
    unit = _flat(a["self"], lambda n: uniform(keys, 0, n)).clamp(min=2.0**-25)  # not 0: Gumbel draws are −log of these
    return -torch.log1p(-unit) / a["lambd"]


def _geometric(keys: Tensor, a: Named) -> Tensor:
    p = a["p"]
    unit = _flat(a["self"], lambda n: fine(keys, n))
    return torch.ones_like(unit) if p == 1.0 else torch.ceil(torch.log(unit) / math.log1p(-p)).clamp(min=1.0)


def _cauchy(keys: Tensor, a: Named) -> Tensor:
    unit = _flat(a["self"], lambda n: fine(keys, n, torch.float64))
    return a["median"] + a["sigma"] * torch.tan(math.pi * (unit - 0.5))


def _log_normal(keys: Tensor, a: Named) -> Tensor:
    return torch.exp(_flat(a["self"], lambda n: normal(keys, 0, n)) * a["std"] + a["mean"])


def _poisson(keys: Tensor, a: Named) -> Tensor:
    """Return the least k whose P(X ≤ k) is above a draw: P(X ≤ k) is the regularised upper gamma function at k + 1."""
    x = a["self"]
    rate = x.to(torch.float64)
    unit = _flat(x, lambda n: fine(keys, n, torch.float64))
    reach = 10.0 * rate.sqrt() + 40.0
    below, above = (rate - reach).floor().clamp(min=-1.0), (rate + reach).ceil()
    for _ in range(_POISSON_STEPS):
        middle = torch.floor((below + above) / 2)
        reached = torch.special.gammaincc(middle + 1.0, rate) > unit
        below, above = torch.where(reached, below, middle), torch.where(reached, middle, above)
    return above.clamp(min=0.0).to(x.dtype)


def _gamma(keys: Tensor, alpha: Tensor) -> Tensor:
    """Return draws from Gamma(alpha, 1). Source: Marsaglia and Tsang, ACM TOMS 26(3), 2000."""
    wide = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    boosted = torch.where(wide < 1.0, wide + 1.0, wide)
    d = boosted - 1.0 / 3.0
    c = 1.0 / torch.sqrt(9.0 * d)
    value, done = d, torch.zeros_like(d, dtype=torch.bool)
    for i in range(_GAMMA_ROUNDS):
        first, second = fold(keys, 2 * i + 1), fold(keys, 2 * i + 2)
        z = _flat(wide, lambda n, key=first: normal(key, 0, n))  # type: ignore[misc]
        unit = _flat(wide, lambda n, key=second: fine(key, n))  # type: ignore[misc]
        v = (1.0 + c * z) ** 3
        bound = 0.5 * z * z + d - d * v + d * torch.log(v.clamp(min=torch.finfo(v.dtype).tiny))
        accepted = ~done & (v > 0.0) & (torch.log(unit) < bound)
        value, done = torch.where(accepted, d * v, value), done | accepted
    unit = _flat(wide, lambda n: fine(fold(keys, 0), n))
    value = torch.where(wide < 1.0, value * unit ** (1.0 / wide), value)
    return value.clamp(min=torch.finfo(value.dtype).tiny)


def _standard_gamma(keys: Tensor, a: Named) -> Tensor:
    return _gamma(keys, a["self"]).to(a["self"].dtype).clamp(min=torch.finfo(a["self"].dtype).tiny)


def _dirichlet(keys: Tensor, a: Named) -> Tensor:
    x = a["self"]
    draws = _gamma(keys, x)
    return (draws / draws.sum(-1, keepdim=True)).to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny, max=1.0)


def _multinomial(keys: Tensor, a: Named) -> Tensor:
    p, count = a["self"], a["num_samples"]
    _check_probabilities(p, count, a["replacement"])
    if a["replacement"] and count > 1:
        cumulative = p.to(torch.float64).cumsum(-1)
        shape = (*p.shape[:-1], count)
        unit = fine(keys, math.prod(shape), torch.float64).to(p.device).reshape(shape)
        found = torch.searchsorted(cumulative, unit * cumulative[..., -1:], right=True)
        return found.clamp(max=p.shape[-1] - 1)
    waits = -torch.log1p(-_flat(p, lambda n: fine(keys, n)))
    score = p.to(torch.promote_types(p.dtype, torch.float32)) / waits
    return score.argmax(-1, keepdim=True) if count == 1 else score.topk(count, -1)[1]


def _check_probabilities(p: Tensor, count: int, replacement: bool) -> None:
    """Raise for what is no distribution, where values can be looked at."""
    if not replacement and count > p.shape[-1]:
        raise RuntimeError(f"torch.multinomial: cannot draw {count} of {p.shape[-1]} categories without replacement.")
    if isinstance(p, FakeTensor) or p.is_meta or not p.numel():
        return
    fits = (p >= 0).all() & p.isfinite().all() & (p.sum(-1) > 0).all()
    if not replacement:
        fits = fits & ((p > 0).sum(-1) >= count).all()
    if not fits:
        raise RuntimeError(
            f"torch.multinomial: expected probabilities that are finite, not negative, and not zero for at least "
            f"{1 if replacement else count} categories of each row."
        )


def _rrelu(keys: Tensor, a: Named) -> Tensor:
    x, noise, lower, upper = a["self"], a["noise"], a["lower"], a["upper"]
    slope = _like(x, lambda n: uniform(keys, 0, n) * (upper - lower) + lower)
    noise.copy_(torch.where(x <= 0, slope, torch.ones_like(x)))
    return x * noise


def _rrelu_functional(keys: Tensor, a: Named) -> tuple[Tensor, Tensor]:
    noise = torch.empty_like(a["noise"])
    return _rrelu(keys, {**a, "noise": noise}), noise


# By the operator's name without a trailing underscore. Each takes the key words (2,), then the arguments by name.
DRAWS: dict[str, Callable[[Tensor, Named], Any]] = {
    "aten::bernoulli": _coin,
    "aten::cauchy": _cauchy,
    "aten::exponential": _exponential,
    "aten::_fused_dropout": _fused_dropout,
    "aten::geometric": _geometric,
    "aten::log_normal": _log_normal,
    "aten::multinomial": _multinomial,
    "aten::native_dropout": _native_dropout,
    "aten::normal": _normal,
    "aten::normal_functional": _normal,
    "aten::poisson": _poisson,
    "aten::rand": lambda k, a: _shaped(a, lambda n: uniform(k, 0, n)),
    "aten::rand_like": lambda k, a: _like(a["self"], lambda n: uniform(k, 0, n), a["dtype"]),
    "aten::randint": _randint,
    "aten::randint_like": _randint_like,
    "aten::randn": lambda k, a: _shaped(a, lambda n: normal(k, 0, n)),
    "aten::randn_like": lambda k, a: _like(a["self"], lambda n: normal(k, 0, n), a["dtype"]),
    "aten::random": _random,
    "aten::randperm": lambda k, a: bits(k, 0, a["n"]).argsort(stable=True).to(device=a["device"], dtype=_whole(a)),
    "aten::rrelu_with_noise": _rrelu,
    "aten::rrelu_with_noise_functional": _rrelu_functional,
    "aten::_sample_dirichlet": _dirichlet,
    "aten::_standard_gamma": _standard_gamma,
    "aten::uniform": _uniform,
}
