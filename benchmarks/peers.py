"""The candidates of `step.py`: how fzero, DDP, FSDP2 and DeepSpeed ZeRO-3 train the same GPT.

Every candidate starts from the same weights, stores parameters, gradients and moments in one dtype, clips nothing and
has AdamW with the same constants. A peer's options are the fastest of those tried on two gloo ranks with a core each;
fzero's are its defaults.

    candidates(config, mesh, dtype)["FSDP2"]()  →  Candidate  →  .step(rows)  →  the loss before the update
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, Block, Config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fzero as fz

RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01

# DeepSpeed's mode without fp32 masters.
LOW = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
        "check_grad_overflow": False,
    },
    "communication_data_type": "bf16",
}

# Name of each system that fzero is compared with, and of its candidates.
PEERS = {
    "DDP": ("DDP", "DDP, recorded"),
    "FSDP2": ("FSDP2", "FSDP2, kept"),
    "DeepSpeed": ("DeepSpeed ZeRO-3", "DeepSpeed ZeRO-3, kept"),
}


@dataclass
class Candidate:
    """One way to train: `step(rows)` does a step and returns its loss, of this rank or of all."""

    step: Callable[[Tensor], Tensor]
    close: Callable[[], None] = lambda: None


def candidates(config: Config, mesh: fz.Mesh, dtype: torch.dtype) -> dict[str, Callable[[], Candidate]]:
    """Return what makes each candidate; "kept" are those that keep gathered parameters from forward to backward."""
    every: dict[str, Callable[[], Candidate]] = {"DDP": partial(ddp, config, mesh, dtype)}
    if mesh.size("data") == 1:
        on_cuda = mesh.device.type == "cuda"
        if on_cuda:
            every["DDP, recorded"] = partial(ddp, config, mesh, dtype, mode="reduce-overhead")
        every["FSDP2"] = partial(fsdp2, config, mesh, dtype, keep=False)
        lowerings = ("graph", "cudagraph", "inductor") if on_cuda else ("graph",)
        return every | {f"fzero, {lower}": partial(fzero, config, mesh, dtype, 0, lower=lower) for lower in lowerings}
    every["FSDP2"] = partial(fsdp2, config, mesh, dtype, keep=False)
    every["FSDP2, kept"] = partial(fsdp2, config, mesh, dtype, keep=True)
    if not missing_deepspeed(mesh):
        every["DeepSpeed ZeRO-3"] = partial(deepspeed_zero3, config, mesh, dtype, keep=False)
        every["DeepSpeed ZeRO-3, kept"] = partial(deepspeed_zero3, config, mesh, dtype, keep=True)
    for stage in (0, 1, 3):
        every[f"fzero ZeRO-{stage}"] = partial(fzero, config, mesh, dtype, stage)
    every["fzero ZeRO-3, kept"] = partial(fzero, config, mesh, dtype, 3, keep_gathered=math.inf)
    return every


def missing_deepspeed(mesh: fz.Mesh) -> str:
    """Return why DeepSpeed is left out, or nothing."""
    if mesh.device.type != "cpu":
        return "its settings here are for a CPU"
    if mesh.size("data") == 1:
        return "one rank has nothing to shard"
    if importlib.util.find_spec("deepspeed") is None:
        return "it is not installed; pip install -e '.[bench]' installs it"
    return ""


def fzero(config: Config, mesh: fz.Mesh, dtype: torch.dtype, stage: int, **options: Any) -> Candidate:
    apply, params = fz.functional(fresh(config, mesh, dtype))
    optimizer = fz.adamw(RATE, *BETAS, EPSILON, DECAY)
    state = fz.init(params, optimizer, mesh, fz.zero(stage), policy="bf16" if dtype == torch.bfloat16 else "fp32")
    train = fz.train_step(lambda params, rows: cross_entropy(apply(params, rows[:, :-1]), rows), **options)
    del params

    def step(rows: Tensor) -> Tensor:
        nonlocal state
        state, metrics = train(state, rows)
        return metrics["loss"]

    return Candidate(step)


def ddp(config: Config, mesh: fz.Mesh, dtype: torch.dtype, mode: str | None = None) -> Candidate:
    """Train as PyTorch does, on one rank without DDP. On CUDA it is compiled; `mode` is for `torch.compile`."""
    model = fresh(config, mesh, dtype)
    several, on_cpu = mesh.size("data") > 1, mesh.device.type == "cpu"
    wrapped: Any = model
    if several:
        # torch.compile splits the graph at DDP's buckets, and does so only for a graph that is not called static.
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=on_cpu)
    forward = wrapped if on_cpu else torch.compile(wrapped, mode=mode)
    optimizer = adamw(model)
    loss_of = loss_function(mesh)

    def step(rows: Tensor) -> Tensor:
        loss = loss_of(forward(rows[:, :-1]), rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not several)  # DDP's gradients are views of buckets that stay
        return loss.detach()

    return Candidate(step)


def fsdp2(config: Config, mesh: fz.Mesh, dtype: torch.dtype, *, keep: bool) -> Candidate:
    """Shard each block and the root. The fused AdamW takes DTensors on a CPU too."""
    model = fresh(config, mesh, dtype)
    processes = mesh.processes or alone(mesh.device)
    for block in model.blocks:
        if mesh.device.type == "cuda":
            block.compile()
        fully_shard(block, mesh=processes, reshard_after_forward=not keep)
    # None lets FSDP2 choose: it keeps the root's own parameters, which the backward needs first.
    fully_shard(model, mesh=processes, reshard_after_forward=False if keep else None)
    optimizer = adamw(model)
    loss_of = loss_function(mesh)

    def step(rows: Tensor) -> Tensor:
        loss = loss_of(model(rows[:, :-1]), rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: no gradients between steps
        return loss.detach()

    return Candidate(step)


def alone(device: torch.device) -> DeviceMesh:
    """Return a mesh of this process alone, which FSDP2 wants even where it has nothing to shard."""
    if not dist.is_initialized():
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    return init_device_mesh(device.type, (1,))


def deepspeed_zero3(config: Config, mesh: fz.Mesh, dtype: torch.dtype, *, keep: bool) -> Candidate:
    """Train with DeepSpeed's ZeRO-3, in bfloat16 by its mode without fp32 masters, on its CPU accelerator and gloo.

    What was chosen, by core-seconds of a step of `medium` at 2 × 128, where two equal settings came out 1 % apart:

    - Its own AdamW for CPUs, compiled at first use: with the buckets below 3 % faster than torch's fused one, which
      DeepSpeed also takes and with which its losses are DDP's to four digits.
    - Each block is a leaf module: its parameters are gathered together, by one hook instead of one for each layer.
      Without, 8 % slower.
    - Buckets for gathers ahead and for gradients have the size of four blocks, or of one where memory is to be saved
      by gathering again. A third of a block for gradients was 5 % slower; no gathers ahead made no difference.
    - Keeping gathered parameters for the backward is its default at this size (`stage3_max_reuse_distance` and
      `stage3_max_live_parameters` of 10⁹ elements). At the least of both, each is gathered again.
    - The check for overflowing gradients is off: the other candidates have none. ZeRO-3 always computes the norm.
    - `memory_efficient_linear` is off, since it replaces `torch.nn.functional.linear` for every candidate of the
      process. Where gathered parameters are not kept, the same linear function is put into the model by hand:
      autograd would hold on to the gathered weights without it. Where they are kept, there is nothing to save.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is first imported
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that newer versions of torch deprecate, thousands of times.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    model = fresh(config, mesh, dtype)
    set_z3_leaf_modules(model, [Block])
    if not keep:
        save_no_weights(model)
    bucket = (4 if keep else 1) * sum(x.numel() for x in model.blocks[0].parameters())
    zero: dict[str, Any] = {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": False,  # a CPU has no streams
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 10_000,  # norms stay whole
        "stage3_max_reuse_distance": 10**9 if keep else 1,
        "stage3_max_live_parameters": 10**9 if keep else 1,
        "memory_efficient_linear": False,
    }
    linear = F.linear
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,  # rows; not used outside the log
            "gradient_clipping": 0.0,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": RATE, "betas": list(BETAS), "eps": EPSILON, "weight_decay": DECAY},
            },
            **(LOW if dtype == torch.bfloat16 else {}),
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        },
    )
    if F.linear is not linear:
        raise RuntimeError(
            "benchmarks/peers.py: deepspeed.initialize replaced torch.nn.functional.linear, which every candidate "
            "calls; expected memory_efficient_linear=False to prevent it. Leave DeepSpeed out with --candidates."
        )

    def step(rows: Tensor) -> Tensor:
        loss = cross_entropy(engine(rows[:, :-1]), rows)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Candidate(step, engine.destroy)


def save_no_weights(model: nn.Module) -> None:
    """Give the linear layers of a model DeepSpeed's linear function, which finds its weight again in the backward."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return zero3_linear_wrap(x, self.weight, self.bias)

    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear


def fresh(config: Config, mesh: fz.Mesh, dtype: torch.dtype) -> GPT:
    """Return the model that every candidate starts from, equal on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT(config).to(mesh.device, dtype)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), RATE, BETAS, EPSILON, DECAY, fused=True)


def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def loss_function(mesh: fz.Mesh) -> Callable[[Tensor, Tensor], Tensor]:
    return cross_entropy if mesh.device.type == "cpu" else torch.compile(cross_entropy)
