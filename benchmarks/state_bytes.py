"""What the state of a GPT weighs under each policy and layout, counted on worlds that need not exist.

    python benchmarks/state_bytes.py [--model base] [--ranks 8]

Every byte of every tensor that a rank holds between steps counts, padding included. Rows of others stand beside it as
their authors state them: for one process, before it is sharded, gradients included where they stay between steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import fzero as fz

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, PRESETS

RESULT = Path(__file__).parent / "results" / "state-bytes.json"
POLICIES = ("fp32", "mixed", "bf16", "bf16-exact", "bf16-fp32-moments", "bf16-8bit", "fp16", "fp16-mixed")
STATED: list[dict[str, float | str]] = [
    {"policy": "FlashOptim AdamW", "per_parameter": 7, "source": "arXiv 2602.23349"},
    {"policy": "FlashOptim AdamW, gradients released", "per_parameter": 5, "source": "arXiv 2602.23349"},
    {"policy": "DeepSpeed, bf16 mode", "per_parameter": 10, "source": "its example `bf16_master_weight`"},
    {"policy": "DeepSpeed, fp32 master", "per_parameter": 16, "source": "its example `bf16_master_weight`"},
]


def weigh(model: str, ranks: int, policy: str, stage: int) -> dict[str, float | str]:
    """Return the bytes that one of `ranks` ranks holds."""
    mesh = fz.make_mesh("cpu", data=ranks, simulate=True)
    state = fz.init(lambda: GPT(PRESETS[model]), fz.adamw(1e-3), mesh, fz.zero(stage), policy=policy)
    count = sum(map(math.prod, state.params.shapes))
    params, moments = (sum(x.nbytes for x in fz.tree.leaves(t)) for t in (state.params, state.moments))
    return {
        "policy": policy,
        "stage": stage,
        "parameters": count,
        "params": params,
        "moments": moments,
        "per_parameter": round((params + moments) / count, 3),
    }


def table(rows: list[dict[str, float | str]]) -> str:
    """Return the rows as Markdown: bytes a parameter on each rank."""
    counted = [row for row in rows if "stage" in row]
    cells = {(row["policy"], row["stage"]): f"{row['per_parameter']:.2f}" for row in counted}
    lines = ["| bytes a parameter on each rank | ZeRO-0 | ZeRO-1, ZeRO-2 | ZeRO-3 |", "|---|---|---|---|"]
    for policy in dict.fromkeys(row["policy"] for row in counted):
        lines.append(f"| `{policy}` | " + " | ".join(cells[policy, stage] for stage in (0, 1, 3)) + " |")
    for row in rows:
        if "stage" not in row:
            lines.append(f"| {row['policy']} (stated: {row['source']}) | {row['per_parameter']} | – | – |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="base")
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    rows = [weigh(args.model, args.ranks, policy, stage) for policy in POLICIES for stage in range(4)] + STATED
    print(table(rows))
    RESULT.parent.mkdir(exist_ok=True)
    today = datetime.now(UTC).date().isoformat()
    about = {"model": args.model, "ranks": args.ranks, "torch": torch.__version__, "fzero": fz.__version__}
    RESULT.write_text(json.dumps({**about, "date": today, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
