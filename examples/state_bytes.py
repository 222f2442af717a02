"""What the state of a GPT weighs under each policy and layout, measured on worlds that need not exist.

    python examples/state_bytes.py [--ranks 8]
"""

from __future__ import annotations

import argparse
import math

import fzero as fz
from gpt import GPT, PRESETS


def bytes_here(tree: object) -> int:
    return sum(x.numel() * x.element_size() for x in fz.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="base")
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    mesh = fz.make_mesh("cpu", data=args.ranks, simulate=True)
    print(f"{'policy':8} {'layout':8} {'params':>10} {'moments':>10} {'a rank':>10}  bytes a parameter, all ranks")
    for policy in ("fp32", "mixed", "bf16"):
        for stage in range(4):
            state = fz.init(lambda: GPT(PRESETS[args.model]), fz.adamw(1e-3), mesh, fz.zero(stage), policy=policy)
            params, moments = bytes_here(state.params), bytes_here(state.moments)
            count = sum(map(math.prod, state.params.shapes))
            mib = [f"{x / 2**20:6.1f} MiB" for x in (params, moments, params + moments)]
            print(f"{policy:8} ZeRO-{stage:<3}{mib[0]} {mib[1]} {mib[2]}  {(params + moments) * args.ranks / count:5.1f}")


if __name__ == "__main__":
    main()
