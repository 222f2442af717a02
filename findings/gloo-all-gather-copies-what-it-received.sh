#!/usr/bin/env bash
# gloo's all_gather_into_tensor does not receive into the tensor it is given: it copies every row out of one of its own.
#
# Seen with torch 2.13.0 on the CPU, two processes. The name and NCCL's behaviour suggest that pieces land in the output.
# ProcessGroupGloo gathers into a flat tensor that it allocates, then copies row by row; the coalesced form first copies
# all inputs into one tensor, too. Point-to-point messages into slices of the output copy nothing but the own piece.
#
# Why it matters: sharded training gathers every parameter twice a step. On four processes of one machine 16 MB a rank
# took 111 ms of a core by the all-gather and 39 by messages, and the copy needs the memory of the result once more,
# where no memory statistics of tensors show it. The copies run on the group's own thread, so a profile of the main
# thread does not show them either.
#
# Source: torch.distributed.all_gather_into_tensor, https://docs.pytorch.org/docs/stable/distributed.html
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
from torch.profiler import ProfilerActivity, profile

LENGTH = 1 << 18


def copied(run) -> int:
    """Numbers copied between tensors, on any thread, while something runs."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    found = [event.input_shapes[0] for event in seen.events() if event.name == "aten::copy_"]
    return sum(shape[0] for shape in found if shape)


def run(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    piece, whole = torch.full((LENGTH,), float(rank)), torch.empty(2 * LENGTH)

    def by_messages() -> None:
        rows, other = whole.split(LENGTH), 1 - rank
        messages = [dist.P2POp(dist.irecv, rows[other], other), dist.P2POp(dist.isend, piece, other)]
        works = dist.batch_isend_irecv(messages)
        rows[rank].copy_(piece)
        for work in works:
            work.wait()

    ways = {"all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, piece), "messages": by_messages}
    for way in ways.values():
        way()
    counts = {}
    for name, way in ways.items():
        whole.fill_(-1.0)
        counts[name] = copied(way)
        assert whole[0] == 0.0 and whole[-1] == 1.0
    if rank == 0:
        for name, count in counts.items():
            print(f"{name}: {count / LENGTH:.0f} pieces of {LENGTH} numbers copied, to gather 2")
        assert counts["messages"] == LENGTH
        if counts["all_gather_into_tensor"] <= LENGTH:
            sys.exit("changed: the all-gather receives into its output now")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (f"{sys.argv[1]}/store",), nprocs=2)
PY
KINETO_LOG_LEVEL=99 "$folder/venv/bin/python" "$folder/show.py" "$folder"
