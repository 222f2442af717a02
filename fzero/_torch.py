"""Every private name of torch that fzero uses, in one place.

When an upgrade of torch moves one of them, this file breaks and no other. What torch itself does not load at once
(sympy, Triton, Inductor: seconds) is imported by the function that needs it.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed.nn.functional  # now: imported later, its default arguments keep a process group alive for ever
import torch.utils._pytree as torch_pytree
from torch._guards import SLoc, TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

T = TypeVar("T")

# True for a tensor that a torch.func transform (vjp, jvp, vmap) has wrapped.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# The tensor below the wrapper of a torch.func transform that has ended, once; any other tensor as it is.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead

# Inside this context operators go past autograd and its book-keeping of views, straight to dispatch modes and kernels.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView

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


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return torch's formulas for floating-point operations, of which those of loaded libraries are part."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry


def count_flops_of(formulas: dict[Any, Callable[..., int]]) -> None:
    """Give torch's counter of floating-point operations formulas, by operator, where a program has loaded it.

    A count that runs already, with formulas of its start, gets them too.
    """
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    new = {operator: formula for operator, formula in formulas.items() if operator not in counter.flop_registry}
    for operator, formula in new.items():
        counter.register_flop_formula(operator)(formula)
    if new:
        for running in (getattr(mode, "counter", None) for mode in dispatch_modes()):
            if isinstance(running, counter.FlopCounterMode):
                running.flop_registry.update({operator: counter.flop_registry[operator] for operator in new})


def sizes_env(place: Callable[[], str]) -> Any:
    """Return the symbols of sizes in a trace, and what the function asked of them, with `place()` where it asked."""
    return _sizes_env()(place)


@functools.cache
def _sizes_env() -> Callable[[Callable[[], str]], Any]:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    class SizesEnv(ShapeEnv):
        """The symbols, what was asked of them, and where."""

        def __init__(self, place: Callable[[], str]) -> None:
            super().__init__(duck_shape=False)  # dimensions of one size by chance stay two symbols
            self.place = place
            self.parts: dict[Any, Any] = {}  # symbols of sizes that are an n-th of another, and the expressions of that

        def _get_sloc(self, framework_loc: str | None = None) -> SLoc:
            return SLoc(self.place(), None)

        def new_size(self, hint: int, name: str) -> Any:
            """Return a new symbol for a size that is `hint` here, and at least 2 elsewhere."""
            from torch._dynamo.source import ConstantSource

            source = ConstantSource(name)
            symbol = self.create_symbol(hint, source, DimDynamic.DYNAMIC)
            made: Any = self.create_symintnode(symbol, hint=hint, source=source)
            return made

        def part(self, size: torch.SymInt, n: int) -> Any:
            """Return the n-th part of a size that `n` divides, as a symbol: it is known inside a loop's body."""
            from torch.utils._sympy.functions import FloorDiv

            hint = size.node.hint // n
            if hint < 2:
                return int(size) // n
            whole = FloorDiv(size.node.expr, n)
            for symbol, known in self.parts.items():
                if known == whole:
                    found: Any = self.create_symintnode(symbol, hint=hint)
                    return found
            made = self.new_size(hint, f"part {len(self.parts)}")
            self.parts[made.node.expr] = whole
            return made

        def conditions(self) -> Iterator[tuple[Any, str]]:
            """Iterate over what has to hold of the symbols, as expressions of sympy, and the place that asked."""
            for guard in self.guards:
                yield guard.expr, str(guard.sloc.framework_loc)

    return SizesEnv


def python_of(expression: Any) -> str:
    """Return an expression of symbols as Python code, in which each symbol stands by its name."""
    from torch.utils._sympy.printers import PythonPrinter

    code: str = PythonPrinter().doprint(expression)
    return code


def record_call(target: Callable[..., Any], args: tuple[Any, ...], results: list[torch.Tensor]) -> list[torch.Tensor]:
    """Put `target(*args)` into the graph that is being traced, as one node whose results look like `results`.

    Graph modules among `args` become attributes of the graph's module.
    """
    mode = get_proxy_mode()
    assert mode is not None, "recording happens inside a trace"
    tracer: Any = mode.tracer

    def proxy(x: Any) -> Any:
        if isinstance(x, torch.fx.GraphModule):
            name = f"body_{len(list(tracer.root.children()))}"
            tracer.root.add_module(name, x)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(x) if isinstance(x, torch.Tensor) else x

    node = tracer.create_proxy("call_function", target, torch_pytree.tree_map(proxy, args), {})
    tracked: list[torch.Tensor] = track_tensor_tree(results, node, constant=None, tracer=tracer)
    return tracked


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


def group_of(process_group: Any) -> tuple[str, int]:
    """Return the name of a process group, as operators are given it, and the number of its ranks."""
    group = torch.distributed.ProcessGroup.unbox(process_group)
    return group.group_name, group.size()


def reduction_of(reduce_op: Any) -> str:
    """Return the name of a reduction, as operators are given it, in the words of functional collectives."""
    name: str = torch.distributed.ReduceOp.RedOpType(int(reduce_op.op())).name
    return name.lower()


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


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """Inside, a gloo group is made with one thread that runs its collectives, in their order, not with torch's two.

    Torch's two write the name of the collective that ended last into one string, without a lock. Where one ends in
    each at once they free that string's memory twice, and the process dies then or later. Names of up to 15 letters
    need no memory; that of a coalesced all-gather does, and so does that of every functional one.
    """
    module: Any = torch.distributed.distributed_c10d
    gloo: Any = getattr(module, "ProcessGroupGloo", None)
    if gloo is None:  # torch was built without it
        yield
        return

    class OneThread(gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._timeout, options._threads = timeout, 1
            names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [gloo.create_device(interface=name) for name in names]
            options._devices = devices or [gloo.create_default_device()]
            super().__init__(store, rank, size, options)

    module.ProcessGroupGloo = OneThread
    try:
        yield
    finally:
        module.ProcessGroupGloo = gloo


def gloo_threads(group: torch.distributed.ProcessGroup | None) -> int:
    """Return how many threads run the collectives of a group over gloo; 0 without gloo."""
    gloo = getattr(torch.distributed.distributed_c10d, "ProcessGroupGloo", ())
    backend = None if group is None else group._get_backend(torch.device("cpu"))
    return int(backend.options._threads) if isinstance(backend, gloo) else 0


def release_groups(mesh: DeviceMesh) -> None:
    """Let go of the process groups that a mesh keeps alive. It finds them by name while they exist."""
    getattr(mesh, "_pg_registry", {}).clear()


def readable(module: torch.fx.GraphModule) -> str:
    """Return a graph as code with dtypes and shapes."""
    return module.print_readable(print_output=False)


def storage_id(x: torch.Tensor) -> int:
    """Return what two tensors have in common if, and only if, they share memory. Fake tensors have one too."""
    return x.untyped_storage()._cdata


def holders_of(x: torch.Tensor) -> int:
    """Return how many tensors lie in the memory of `x`, itself included."""
    mine, alone = (torch._C._storage_Use_Count(storage_id(t)) for t in (x, torch.empty(0)))
    count: int = mine - alone + 1
    return count


def functorch_level(x: torch.Tensor) -> int:
    """Return the nesting level of the transform that wraps a tensor; 0 for a plain one."""
    level = torch._C._functorch.maybe_get_level(x)
    return 0 if level is None else max(level, 0)


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor below the wrappers of transforms. What vmap batches stands in front, the outer first."""
    while is_functorch_wrapped(x):
        is_batched = torch._C._functorch.is_batchedtensor(x)
        dim = torch._C._functorch.maybe_get_bdim(x) if is_batched else 0
        x = torch._C._functorch.get_unwrapped(x)
        if is_batched:
            x = x.movedim(dim, 0)  # where those of inner vmaps stand already
    return x


def transforms_nest() -> bool:
    """Return whether what runs now may be differentiated twice, or forward: by more than one transform, or by jvp."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = [interpreter.key() for interpreter in stack]
    forward = kinds.count(torch._C._functorch.TransformType.Jvp)
    return forward > 0 or kinds.count(torch._C._functorch.TransformType.Grad) > 1


def is_connected(x: torch.Tensor) -> bool:
    """Return whether what the innermost `torch.func` transform differentiates has a path to `x`."""
    functorch = torch._C._functorch
    here = functorch.is_gradtrackingtensor(x) and functorch.maybe_get_level(x) == functorch.maybe_current_level()
    return bool(here and x.requires_grad)


def below_transforms(x: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor below the wrappers of transforms, none of which is vmap."""
    while is_functorch_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def is_batched(x: torch.Tensor) -> bool:
    """Return whether vmap batches a tensor, at any level."""
    while is_functorch_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_differentiated(x: torch.Tensor) -> bool:
    """Return whether a transform that runs differentiates `x`, backward or forward, at any level."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    forward = any(interpreter.key() == functorch.TransformType.Jvp for interpreter in stack)
    x = unwrap_if_dead(x)
    while is_functorch_wrapped(x):
        here = functorch.is_gradtrackingtensor(x)
        if here and (x.requires_grad or (forward and forward_ad.unpack_dual(x, level=0).tangent is not None)):
            return True
        x = unwrap_if_dead(functorch.get_unwrapped(x))
    return False


def is_transformed_now() -> bool:
    """Return whether a `torch.func` transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


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


def traced_node(x: torch.Tensor) -> torch.fx.Node | None:
    """Return the node of the graph that is being traced that stands for `x`, `None` where there is none."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    while is_functorch_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            return None
        x = torch._C._functorch.get_unwrapped(x)
    tracer: Any = mode.tracer
    proxy = tracer.unwrap_proxy(x)
    return proxy.node if isinstance(proxy, torch.fx.Proxy) else None


def is_constant(x: torch.Tensor) -> bool:
    """Return whether a trace takes a plain tensor for a constant, and runs operators of it for real while it traces."""
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return slot is not None and slot.constant is not None


def source_name(x: torch.Tensor) -> str | None:
    """Return the name of the node that `x`, below all transforms, stands for in the graph that is being traced."""
    while is_functorch_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    node = traced_node(x)
    return None if node is None else node.name


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


def in_own_thread(function: Callable[[], T]) -> T:
    """Return what a function returns in a thread of its own, without the caller's modes (fake, traced, autocast).

    Where torch has CUDA and no device, the first thread that makes fake tensors leaves something to stand in for the
    device, in torch 2.11 in its own memory: once that thread has ended, the next fake tensors end the process. So the
    caller's thread comes first.
    """
    with FakeTensorMode():
        pass
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


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


__all__ = [
    "TRANSFORMS",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "below_autograd",
    "below_transforms",
    "bindings",
    "c10d",
    "count_flops_of",
    "cpu_multiplies",
    "data_dependent_errors",
    "default_store",
    "direct",
    "disable_proxy_modes_tracing",
    "dispatch_modes",
    "distributions_unchecked",
    "finished_work",
    "flop_formulas",
    "function_modes_off",
    "functorch_level",
    "get_proxy_mode",
    "gloo_threads",
    "group_deadline",
    "group_of",
    "holders_of",
    "hooks_on_gradients",
    "in_own_thread",
    "is_batched",
    "is_connected",
    "is_constant",
    "is_differentiated",
    "is_functorch_wrapped",
    "is_transformed_now",
    "make_fx",
    "modes_off",
    "one_gloo_thread",
    "own_connection",
    "python_of",
    "readable",
    "record_call",
    "reduction_of",
    "release_groups",
    "set_group_deadline",
    "sizes_env",
    "source_name",
    "standalone_compile",
    "standalone_compile_static",
    "storage_id",
    "torch_nodes",
    "torch_pytree",
    "traced_node",
    "track_tensor_tree",
    "transforms_nest",
    "transforms_off",
    "trunc_normal_replaced",
    "under_dynamo",
    "unwrap_if_dead",
    "unwrapped",
]
