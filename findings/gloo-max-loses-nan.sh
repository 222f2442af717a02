#!/usr/bin/env bash
# gloo's MAX and MIN lose a NaN, or keep it, depending on which rank holds it and where in the tensor it stands.
#
# Seen with torch 2.13.0 on the CPU, two and three processes. IEEE 754's maximum and torch.maximum return NaN where
# either side is NaN. gloo's reduction compares `a > b` in the order in which pieces meet, and a comparison with NaN is
# false: the NaN wins or loses by its place. The sum keeps it always.
#
# Why it matters: "is any gradient not finite, on any rank?" is often asked by a MAX over ranks, and a step that should
# be skipped is then taken. Carry a count of what is not finite by SUM, or reduce flags that are 0 and 1.
#
# Source: torch.distributed.ReduceOp, https://docs.pytorch.org/docs/stable/distributed.html
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LENGTH = 8


def run(rank: int, size: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    rows = []
    for holder in range(size):
        x = torch.arange(LENGTH, dtype=torch.float32)
        if rank == holder:
            x[:] = torch.nan
        largest, summed = x.clone(), x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(summed, dist.ReduceOp.SUM)
        rows.append((holder, int(largest.isnan().sum()), int(summed.isnan().sum())))
    if rank == 0:
        for holder, by_max, by_sum in rows:
            print(f"{size} ranks, all {LENGTH} numbers of rank {holder} are NaN: {by_max} left by MAX, {by_sum} by SUM")
        torch.save([by_max for _, by_max, _ in rows], f"{path}.max")
        assert all(by_sum == LENGTH for _, _, by_sum in rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    lost = []
    for size in (2, 3):
        path = f"{sys.argv[1]}/store-{size}"
        mp.spawn(run, (size, path), nprocs=size)
        lost += [LENGTH - kept for kept in torch.load(f"{path}.max")]
    if not any(lost):
        sys.exit("changed: MAX keeps every NaN now")
PY
"$folder/venv/bin/python" "$folder/show.py" "$folder"
