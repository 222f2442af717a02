"""What the first hour costs: parts by name, each a function that returns its figures.

    python benchmarks/first_hour.py            every part
    python benchmarks/first_hour.py sizes      what a new size of the batch costs, as CPU time

Figures go into `benchmarks/results/first-hour.json`, part by part; those of parts that were not run stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fzero as fz

RESULT = Path(__file__).parent / "results" / "first-hour.json"

Batch = Callable[[int], dict[str, Tensor]]


def sizes(repeats: int = 5) -> dict[str, Any]:
    """Return, for two models, the CPU seconds of a retrace, of the second size, and of a third one.

    A step of the same sizes that has run before is taken off, so that what is left is what the size costs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _costs_of_sizes(*make(), repeats) for name, make in (("mlp", _mlp), ("llama", _llama))}
    finally:
        torch.set_num_threads(threads)


def _mlp() -> tuple[Callable[[], nn.Module], Callable[..., Tensor], Batch]:
    def model() -> nn.Module:
        layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(64, 10, bias=False))

    apply, _ = fz.functional(model)

    def loss(params: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(apply(params, batch["x"]), batch["y"])

    return model, loss, lambda i: {"x": torch.randn(8 + 3 * i, 64), "y": torch.randint(0, 10, (8 + 3 * i,))}


def _llama() -> tuple[Callable[[], nn.Module], Callable[..., Tensor], Batch]:
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=256, **widths)
    apply, _ = fz.functional(LlamaForCausalLM(config))

    def loss(params: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = apply(params, **batch).loss
        return found

    def batch(i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 97, (2 + i % 3, 16 + 2 * i))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return lambda: LlamaForCausalLM(config), loss, batch


def _costs_of_sizes(
    model: Callable[[], nn.Module], loss: Callable[..., Tensor], batch: Batch, repeats: int
) -> dict[str, Any]:
    found: dict[str, list[float]] = {"retrace": [], "second": [], "third": [], "steady": []}
    for i in range(repeats + 1):
        fixed, opened = (fz.train_step(loss, sizes=choice) for choice in ("fixed", "any"))
        state = fz.init(model, fz.adamw(1e-3), policy="fp32")
        rows = [batch(4 * i), batch(4 * i + 1), batch(4 * i + 2)]
        state, _ = fixed(state, rows[0])
        state, retrace = _timed(fixed, state, rows[1])
        state, _ = opened(state, rows[0])
        state, second = _timed(opened, state, rows[1])
        state, third = _timed(opened, state, rows[2])
        state, steady = _timed(opened, state, rows[2])
        if i:  # the first round imports and compiles
            row = {"retrace": retrace - steady, "second": second - steady, "third": third - steady, "steady": steady}
            for name, seconds in row.items():
                found[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {f"{name}_over_retrace": middle[name] / middle["retrace"] for name in ("second", "third")}
    return {"cpu_seconds": middle, **ratios, "spread": {name: (min(v), max(v)) for name, v in found.items()}}


def _timed(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, float]:
    start = time.process_time()
    state, _ = step(state, batch)
    return state, time.process_time() - start


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in parser.parse_args().parts:
        known[name] = PARTS[name]()
        print(name, json.dumps(known[name], indent=1))
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
