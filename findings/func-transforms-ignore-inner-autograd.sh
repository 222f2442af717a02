#!/usr/bin/env bash
# torch.autograd.grad inside a function under torch.func.grad gives a gradient that counts as a constant.
#
# Seen with torch 2.13.0. A gradient penalty copied from an eager loop calls torch.autograd.grad without create_graph.
# In plain autograd the outer backward then raises, since the inner gradient has no graph. Under torch.func.grad nothing
# raises: the penalty's share of the gradient is zero. With create_graph=True, or torch.func.grad inside, it is right.
#
# Why it matters: a model trains without its penalty and nothing tells.
#
# Source: torch.func.grad, https://docs.pytorch.org/docs/stable/generated/torch.func.grad.html
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import sys

import torch

w = torch.tensor([1.0, 2.0, 3.0])


def penalty(w: torch.Tensor, **options: bool) -> torch.Tensor:
    (inner,) = torch.autograd.grad((w**3).sum(), w, **options)
    return inner.square().sum()  # 9·w⁴, whose gradient is 36·w³


right = 36 * w**3
silent = torch.func.grad(penalty)(w)
told = torch.func.grad(lambda w: penalty(w, create_graph=True))(w)
nested = torch.func.grad(lambda w: torch.func.grad(lambda v: (v**3).sum())(w).square().sum())(w)
print("right                       ", right.tolist())
print("torch.autograd.grad inside  ", silent.tolist())
print("with create_graph=True      ", told.tolist())
print("torch.func.grad inside      ", nested.tolist())
assert torch.equal(told, right) and torch.equal(nested, right)
tracked = w.clone().requires_grad_()
try:
    penalty(tracked).backward()
except RuntimeError as error:
    print("plain autograd raises       ", str(error).split(".")[0])
else:
    sys.exit("changed: plain autograd does not raise any more")
if silent.any():
    sys.exit("changed: torch.func.grad sees the inner gradient now, or raises")
PY
"$folder/venv/bin/python" "$folder/show.py"
