"""Every private name of torch that fzero uses, in one place.

When an upgrade of torch moves one of them, this file breaks and no other. What torch itself does not load at once
(sympy, Triton, Inductor: seconds) is imported by the function that needs it.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.nn.functional  # now: imported later, its default arguments keep a process group alive for ever
import torch.utils._pytree
from torch._guards import SLoc, TracingContext, tracing
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch._subclasses.fake_tensor import (
    FakeTensor as FakeTensor,
)
from torch._subclasses.fake_tensor import (
    FakeTensorMode as FakeTensorMode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing as disable_proxy_modes_tracing,
)
from torch.fx.experimental.proxy_tensor import (
    get_proxy_mode as get_proxy_mode,
)
from torch.fx.experimental.proxy_tensor import (
    get_proxy_slot as get_proxy_slot,
)
from torch.fx.experimental.proxy_tensor import (
    make_fx as make_fx,
)
from torch.fx.experimental.proxy_tensor import (
    track_tensor_tree as track_tensor_tree,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode as TorchDispatchMode,
)
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

# torch's own trees.
torch_pytree = torch.utils._pytree

# What `torch.func` knows of the wrappers that its transforms put around tensors.
functorch = torch._C._functorch

# True for a tensor that a torch.func transform (vjp, jvp, vmap) has wrapped.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# The tensor below the wrapper of a torch.func transform that has ended, once; any other tensor as it is.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead

# Inside this context operators go past autograd and its book-keeping of views, straight to dispatch modes and kernels.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

# Inside this context operators made of others in C++ are made of them by torch's Python forms, where it has such.
composites_in_python = torch._C._EnablePythonDispatcher

# Inside this context no dispatch mode is active: operators run for real, neither faked nor traced.
modes_off = _disable_current_modes

# The key of the dispatcher under which an operator arrives first while a transform of torch.func runs.
TRANSFORMS = "FuncTorchDynamicLayerFrontMode"

# Inside this context no transform of torch.func is active.
transforms_off = torch._C._DisableFuncTorch

# Inside this context no torch-function mode is active.
function_modes_off = torch._C.DisableTorchFunction

# Functional collectives: dispatcher ops that return a tensor to wait for, and so can be traced.
c10d = torch.ops._c10d_functional


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """Return what a fake tensor raises where a value is asked for, or a shape that depends on values."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


@functools.cache
def sizes_env() -> Any:
    """Return the class of what holds the symbols of sizes in a trace. It is given what tells where one is asked of."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class SizesEnv(ShapeEnv):
        def __init__(self, place: Callable[[], str]) -> None:
            super().__init__(duck_shape=False)  # dimensions of one size by chance stay two symbols
            self.place = place
            self.parts: dict[Any, Any] = {}  # symbols of sizes that are an n-th of another, and the expressions of that

        def _get_sloc(self, framework_loc: str | None = None) -> SLoc:
            return SLoc(self.place(), None)

    return SizesEnv


def size_source(name: str) -> Any:
    """Return where a symbol of a size comes from."""
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def floor_div(whole: Any, n: int) -> Any:
    """Return an expression of sizes over a number, rounded down."""
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(whole, n)


def python_of(expression: Any) -> str:
    """Return an expression of symbols as Python code, in which each symbol stands by its name."""
    from torch.utils._sympy.printers import PythonPrinter

    code: str = PythonPrinter().doprint(expression)
    return code


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for products of a dtype of 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):  # on ARM, where oneDNN has kernels for it
        name = "bf16" if dtype == torch.bfloat16 else "fp16"
        supported: bool = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
        return supported
    # oneDNN says yes to bfloat16 on every CPU with AVX-512, where it may have to convert number by number.
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    flags: Any = torch._C._cpu._get_cpu_capability() if hasattr(torch._C._cpu, "_get_cpu_capability") else {}
    return flags.get("avx512_fp16", False) or torch.cpu._is_amx_fp16_supported()


def finished_work() -> Any:
    """Return a collective that has ended, to be waited for."""
    return torch._C._distributed_c10d.FakeWork().boxed()


def default_store() -> Any:
    """Return the store through which the processes of the default group found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


def own_connection(prefix: str) -> Any:
    """Return another connection to that store, under a prefix: one in which somebody waits serves nobody else."""
    return torch.distributed.distributed_c10d.PrefixStore(prefix, default_store().clone())


def group_deadline() -> float:
    """Return how many seconds a collective of the default group may wait."""
    group = torch.distributed.group.WORLD
    assert group is not None, "a process group has been started"
    return group._get_backend(
        torch.device("cuda" if "nccl" in torch.distributed.get_backend() else "cpu")
    ).options._timeout.total_seconds()


def set_group_deadline(group: torch.distributed.ProcessGroup, seconds: float) -> None:
    """Set how many seconds a collective of a group may wait."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def gloo_options(timeout: timedelta, devices: list[Any], *, threads: int) -> Any:
    """Return the choices of a process group over gloo. torch was built with it."""
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout, options._threads, options._devices = timeout, threads, devices
    return options


def cpu_backend(group: torch.distributed.ProcessGroup) -> Any:
    """Return what runs the collectives of a group on a CPU."""
    return group._get_backend(torch.device("cpu"))


def group_named(name: str) -> torch.distributed.ProcessGroup:
    """Return the process group of a name, as operators are given it."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def threads_of(backend: Any) -> int:
    """Return how many threads run the collectives of a group over gloo."""
    return int(backend.options._threads)


def groups_held_by(mesh: DeviceMesh) -> dict[str, Any]:
    """Return the process groups that a mesh keeps alive, by name."""
    held: dict[str, Any] = getattr(mesh, "_pg_registry", {})
    return held


def storage_id(x: torch.Tensor) -> int:
    """Return what two tensors have in common if, and only if, they share memory. Fake tensors have one too."""
    return x.untyped_storage()._cdata


def holders_of(x: torch.Tensor) -> int:
    """Return how many tensors lie in the memory of `x`, itself included."""
    mine, alone = (torch._C._storage_Use_Count(storage_id(t)) for t in (x, torch.empty(0)))
    count: int = mine - alone + 1
    return count


def hooks_on_gradients(module: torch.nn.Module) -> list[str]:
    """Return the paths of the parts and parameters of a module that have hooks on gradients."""
    parts = [
        f"{path or type(part).__name__!r} ({type(part).__name__})"
        for path, part in module.named_modules()
        if part._backward_hooks or part._backward_pre_hooks
    ]
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return parts + [name for name, p in module.named_parameters() if any(getattr(p, hook, None) for hook in hooks)]


def under_dynamo() -> bool:
    """Return whether `torch.compile` traces what runs now, or would trace what it calls."""
    return torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def dispatch_modes() -> list[Any]:
    """Return the active dispatch modes, outermost first."""
    return _get_current_dispatch_mode_stack()


def torch_nodes() -> dict[type, Any]:
    """Return torch's own table of tree nodes: class -> (flatten_fn, unflatten_fn, ...)."""
    return torch_pytree.SUPPORTED_NODES


@contextmanager
def distributions_unchecked() -> Iterator[None]:
    """Inside, distributions do not look at the values of their arguments unless they are told to."""
    distribution = torch.distributions.Distribution
    before = distribution._validate_args
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        distribution.set_default_validate_args(before)


@contextmanager
def trunc_normal_replaced(substitute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, `torch.nn.init.trunc_normal_` calls `substitute(original, tensor, mean, std, a, b, ...)`."""
    original = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = functools.partial(substitute, original)
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = original


def standalone_compile(
    graph: torch.fx.GraphModule, examples: list[Any], settings: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a traced graph by Inductor under its `settings`. The first call imports Inductor: that takes seconds."""
    from torch._inductor import config, standalone_compile

    with config.patch(settings):
        compiled: Callable[..., Any] = standalone_compile(graph, examples, dynamic_shapes="from_graph")
    return compiled


@functools.cache
def bindings(operator: OpOverload) -> tuple[Callable[..., Any], ...]:
    """Return functions that may be PyTorch's own quick ways to call an operator: bindings in C++ of its name."""
    namespace, _, name = operator.name().split(".")[0].partition("::")
    homes: list[Any] = [getattr(torch._C, home) for home in ("_VariableFunctions", "TensorBase", "_nn", "_linalg")]
    return tuple(getattr(home, name) for home in homes if namespace == "aten" and hasattr(home, name))


def direct(operator: OpOverload) -> Callable[..., Any]:
    """Return what an operator's own call in Python goes to, for any operator."""
    return operator._op


def standalone_compile_static(
    graph: torch.fx.GraphModule, like: list[torch.Tensor], settings: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a traced graph by Inductor for inputs that look like `like`, fake ones or real. Nothing is allocated."""
    from torch._inductor import config, standalone_compile
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())  # without symbols in it; with none Inductor does not use its cache
    with mode:
        examples: list[Any] = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in like]
    with config.patch(settings), tracing(TracingContext(mode)):
        compiled: Callable[..., Any] = standalone_compile(graph, examples, dynamic_shapes="from_tracing_context")
    return compiled
