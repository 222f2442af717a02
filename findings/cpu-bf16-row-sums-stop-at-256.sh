#!/usr/bin/env bash
# On a CPU the gradient of an embedding row that many tokens share stops at 256 in bfloat16.
#
# Seen with torch 2.13.0. The backward of nn.Embedding, of w[i], index_add_ and of LayerNorm's bias adds rows one by one
# in the gradient's own dtype. bfloat16 has 8 bits of precision: 256 + 1 rounds to 256, so the sum of a thousand ones is
# 256; LayerNorm's bias has one such sum for each thread. index_select and scatter_add_, which compute the same numbers, do not stop there.
#
# Why it matters: the rows of frequent tokens, the bias of a norm and a class that most targets share are trained with a
# fraction of their gradient, in silence, and a test that compares CPU with GPU blames the GPU.
#
# Source: torch.nn.Embedding, https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import sys

import torch
import torch.nn.functional as F

ROWS = 1000
index = torch.zeros(ROWS, dtype=torch.int64)
weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
ways = {
    "F.embedding(i, w)": (weight, lambda: F.embedding(index, weight)),
    "w[i]": (weight, lambda: weight[index]),
    "w.index_select(0, i)": (weight, lambda: weight.index_select(0, index)),
    "F.layer_norm(x, ..., bias)": (bias, lambda: F.layer_norm(torch.randn(ROWS, 8).bfloat16(), (8,), None, bias)),
}
found = {}
for name, (leaf, rows) in ways.items():
    (gradient,) = torch.autograd.grad(rows().sum(), leaf)
    found[name] = gradient.flatten()[0].item()
    print(f"{name:28} {ROWS} rows add up to {found[name]:g}")
if found["F.embedding(i, w)"] != 256 or found["w[i]"] != 256:
    sys.exit("changed: the sums do not stop at 256 any more")
assert found["w.index_select(0, i)"] == 1000
PY
"$folder/venv/bin/python" "$folder/show.py"
