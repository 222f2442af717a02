#!/usr/bin/env bash
# DeepSpeed cannot build its kernels where TORCH_CUDA_ARCH_LIST names an architecture with a letter, such as 9.0a.
#
# Seen with DeepSpeed 0.19.8 and torch 2.13.0. PyTorch's own builder of extensions reads "9.0a" (Hopper with the
# instructions that later cards need not have) and makes compute_90a of it. DeepSpeed's builder, which hands its sources
# to PyTorch's, first sorts the list by its numbers and takes "0a" for one: a ValueError about int(), which names neither
# the variable nor the architecture. It is the same for "10.0a".
#
# Why it matters: images for Hopper set the variable to 9.0a, since kernels that use wgmma need it. There DeepSpeed's
# FusedAdam, and with it its default optimizer, fails at the first call. Set TORCH_CUDA_ARCH_LIST=9.0 for such a run.
#
# Source: TORCH_CUDA_ARCH_LIST in torch.utils.cpp_extension, https://docs.pytorch.org/docs/stable/cpp_extension.html;
# https://docs.nvidia.com/cuda/hopper-compatibility-guide on architecture-specific targets
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { DS_ACCELERATOR=cpu DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.6 setuptools==81.0.0 wheel==0.45.1
pip --no-build-isolation deepspeed==0.19.8
cat > "$folder/show.py" <<'PY'
import os
import sys

from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from torch.utils.cpp_extension import _get_cuda_arch_flags

raised = {}
for architecture in ("9.0", "9.0a", "10.0a"):
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture
    by_torch = _get_cuda_arch_flags()
    builder = FusedAdamBuilder()
    builder.jit_mode = True  # as where a kernel is built at its first use
    try:
        told = f"flags {builder.compute_capability_args()}"
        raised[architecture] = False
    except ValueError as error:
        told, raised[architecture] = f"ValueError: {error}", True
    print(f"{architecture}: PyTorch gives {by_torch}; DeepSpeed: {told}")
if raised != {"9.0": False, "9.0a": True, "10.0a": True}:
    sys.exit("changed: DeepSpeed reads such an architecture now")
PY
"$folder/venv/bin/python" "$folder/show.py" 2>&1 | grep -v WARNING
