"""A training step of the GPT of `examples/gpt.py` in JAX with optax: the peer that compiles a step as one program, too.

    python benchmarks/jax_step.py                                            # one CUDA GPU; needs jax and optax
    python benchmarks/jax_step.py --model tiny --batch 2x32 --repeats 3      # does it run?

The same shapes, bfloat16 throughout, the same AdamW constants, no clipping, the loss in float32. Attention is cuDNN's
on CUDA. The step is one `jax.jit` that donates parameters and moments, with its blocks written out. It has a process of
its own, since JAX takes the device's memory as it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or its own figure of memory would be the pool's
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import optax
from gpt import PRESETS, Config
from step import RESULTS, batch
from step_report import spread

RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
WARM_UP = 3
Params = dict[str, Any]


def initial(config: Config, key: Any) -> Params:
    hidden = 32 * round(config.width / 12)
    keys = iter(jax.random.split(key, 1 + 4 * config.depth))

    def normal(rows: int, columns: int, std: float) -> Any:
        return (std * jax.random.normal(next(keys), (rows, columns))).astype(jnp.bfloat16)

    def block() -> Params:
        d, branches = config.width, 2 * config.depth
        return {
            "attention_norm": jnp.ones(d, jnp.bfloat16),
            "qkv": normal(d, 3 * d, d**-0.5),
            "out": normal(d, d, (d * branches) ** -0.5),
            "mlp_norm": jnp.ones(d, jnp.bfloat16),
            "up": normal(d, 2 * hidden, d**-0.5),
            "down": normal(hidden, d, (hidden * branches) ** -0.5),
        }

    embed = normal(config.vocabulary, config.width, 0.02)
    return {
        "embed": embed,
        "blocks": [block() for _ in range(config.depth)],
        "norm": jnp.ones(config.width, jnp.bfloat16),
    }


def rms_norm(x: Any, weight: Any) -> Any:
    wide = x.astype(jnp.float32)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)).astype(x.dtype) * weight


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def forward(params: Params, tokens: Any, heads: int, attention: str | None) -> Any:
    rows, length = tokens.shape
    x = params["embed"][tokens]
    width = x.shape[-1] // heads
    frequency = 10000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * frequency
    cos, sin = (f(angle).astype(x.dtype)[:, None] for f in (jnp.cos, jnp.sin))  # over heads
    for block in params["blocks"]:
        qkv = (rms_norm(x, block["attention_norm"]) @ block["qkv"]).reshape(rows, length, 3, heads, width)
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, implementation=attention
        )
        x = x + mixed.reshape(rows, length, -1) @ block["out"]
        gate, value = jnp.split(rms_norm(x, block["mlp_norm"]) @ block["up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * value) @ block["down"]
    return rms_norm(x, params["norm"]) @ params["embed"].T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="base")
    parser.add_argument("--batch", type=batch, default=(8, 1024), help="rows x tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    config, (rows, tokens) = PRESETS[args.model], args.batch
    device = jax.devices()[0]
    attention = "cudnn" if device.platform == "gpu" else None
    optimizer = optax.adamw(RATE, *BETAS, EPSILON, weight_decay=DECAY)
    params = initial(config, jax.random.key(0))
    moments = optimizer.init(params)

    def loss_of(params: Params, data: Any) -> Any:
        logits = forward(params, data[:, :-1], config.heads, attention).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[:, 1:]).mean()

    def step(params: Params, moments: Any, data: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, data)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    data = jax.random.randint(jax.random.key(1), (rows, tokens + 1), 0, config.vocabulary)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, data).compile()
    compiling = time.perf_counter() - start
    seconds, losses = [], []
    for i in range(WARM_UP + args.repeats):
        start = time.perf_counter()
        params, moments, loss = jax.block_until_ready(compiled(params, moments, data))
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"benchmarks/jax_step.py: it does not train: {losses}")
    stats = device.memory_stats() or {}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device.device_kind,
        "versions": {name: metadata.version(name) for name in ("jax", "optax")},
        "setting": {"model": args.model, "rows": rows, "tokens_a_row": tokens, "repeats": args.repeats},
        "seconds": spread(seconds),
        "compile_seconds": round(compiling, 1),
        "bytes_peak": stats.get("peak_bytes_in_use"),
        "loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
    }
    print(json.dumps(record))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"jax-{device.platform}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
