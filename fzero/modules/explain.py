"""Where an error arose, in the user's words: the line and the module; and the way out where torch names none."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from torch import nn

from fzero.errors import FzeroError, ModuleError
from fzero.marks import DECORATORS, OWN, TORCH

_CHECKPOINT = (
    "torch.utils.checkpoint, and other saved-tensor hooks, cannot be part of a function that is differentiated. Turn "
    "it off (in Transformers: model.activation_checkpointing_disable()) and recompute by fz.remat(f), or by "
    'fz.jit(..., remat="block").'
)
_MEMORY = (
    "What is differentiated or traced has no memory to look into. Keep to operators of torch, do this outside of the "
    "function, or make an operator of it by torch.library.custom_op."
)
_DTYPES = (
    "Parameters come in the compute dtype of their policy, inputs as they are: cast the input, x.to(params dtype), or "
    "compute in its dtype: fz.policy(name, compute=torch.float32)."
)
_SPARSE = (
    "Gradients are dense here: leave out sparse=True of the embedding, module.sparse = False before fz.functional."
)
_INDICES = "Labels that are classes, and indices, are integers: labels.long()."
_SHAPES = (
    "What is on the device meta is a shape without values, as fz.functional(factory) gives of parameters: "
    "fz.init makes values, state = fz.init(factory, optimizer). fz.trace takes shapes, where all arguments are such."
)
_COMPILED = "Give fz.functional the module as it is, without torch.compile: fz.jit compiles the whole step."
COLLECTIVES = (
    "Inside of a function that is differentiated use the collectives of a mesh, which have gradients: "
    'mesh["data"].gather(x), .sum(x) and .scatter(x) of mesh = fz.make_mesh(); outside, fz.average and fz.gather'
)
# What torch says where a function does something that it cannot differentiate or trace, and what to do instead.
_WAYS_OUT = {
    "saved tensor hooks": _CHECKPOINT,
    "override the setup_context staticmethod": (
        "A custom operator, or an autograd.Function of the old style, cannot be part of a function that is "
        "differentiated. Give the Function a setup_context and call the operator in it; an attention kernel goes "
        "through fz.attention(q, k, v, kernel=fz.AttentionKernel(forward, backward))."
    ),
    "data pointer of Tensor": _MEMORY,
    "call numpy() on Tensor that requires grad": _MEMORY,
    "is not supported for tensor subclasses": _MEMORY,
    "tensor with unallocated storage": _MEMORY,
    "Cannot access storage of": _MEMORY,
    "no fake impl registered": "A trace needs to know what the operator returns: give it one by register_fake.",
    "TORCHDYNAMO_VERBOSE": _COMPILED,
    "dynamo-optimized function": _COMPILED,
    "call Tensor.requires_grad_()": (
        "What is differentiated is what the transform was given: take a gradient inside by torch.func.grad, of any "
        "tensor. Transformers calls this for its activation "
        "checkpointing: model.activation_checkpointing_disable(), and recompute by fz.remat(f), or by "
        'fz.jit(..., remat="block").'
    ),
    "mutating directly with `.data`": "A function reads parameters, and an update alone changes them.",
    "expected scalar type Long": _INDICES,
    "expected target dtype to be Long": _INDICES,
    "Expected dtype int32/int64 for index": _INDICES,
    "devices, meta and": _SHAPES,
    "and meta!": _SHAPES,
    "on device meta is not on the expected device": _SHAPES,
    "have the same dtype": _DTYPES,
    "expected scalar type": _DTYPES,
    "is not implemented for sparse": _SPARSE,
    "sparse tensors": _SPARSE,
    "backward() called inside": "Take the gradient by fz.grad or fz.vjp, which may stand inside of one another.",
}
_NORM = (
    "The statistics of a batch norm are fp32, and its weights have to be so too: exempt them from the policy, "
    'fz.policy(name, exempt=["*bn*"]) with a pattern that fits their paths.'
)
_DISTRIBUTED = TORCH + "distributed/"
# Where files lie that no line of the user is in.
_NOT_THE_USERS = (TORCH, OWN, *DECORATORS)


@contextlib.contextmanager
def explaining(call: str, root: nn.Module | None = None) -> Iterator[None]:
    """Give errors that pass through what torch leaves out.

    Args:
        call: the name of the call that failed.
        root: an error keeps a note with the name of the innermost module of `root` that was running.

    Raises:
        ModuleError: in the place of an error of torch's that says nothing of the way out.
    """
    try:
        yield
    except Exception as error:
        running = None
        if root is not None:
            running = _innermost(error, root)
            if not module_of(error) and isinstance(error, FzeroError):
                error.args = (f"{error}\n{_note(running, root)}", *error.args[1:])
            elif not module_of(error):
                error.add_note(_note(running, root))
        advice = None if isinstance(error, FzeroError) else _advice(error, running)
        if advice is None:
            raise
        raise ModuleError(f"{call}: {error}\n{line_of_user(error)}\n{module_of(error)}{advice}") from error


def module_of(error: BaseException) -> str:
    """Return the line about the module that `explaining` left on an error; nothing where it left none."""
    lines = [*getattr(error, "__notes__", ()), *str(error).splitlines()]
    return next((f"{line}\n" for line in lines if line.startswith(_NOTE)), "")


def line_of_user(error: BaseException) -> str:
    """Return the innermost line that is neither torch's nor fzero's: of the traceback, or of what runs now."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
    return "".join(traceback.format_list(frames[-1:])).rstrip() if frames else line_here()


def line_here() -> str:
    """Return the innermost line that runs now and is neither torch's nor fzero's."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(_NOT_THE_USERS)]
    return "".join(traceback.format_list(frames[-1:])).rstrip() if frames else "  (no line of yours)"


_NOTE = "in module "


def _advice(error: BaseException, running: nn.Module | None) -> str | None:
    text = str(error)
    if isinstance(running, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and "expected scalar type" in text:
        return _NORM
    found = next((way for words, way in _WAYS_OUT.items() if words in text), None)
    frames = traceback.extract_tb(error.__traceback__)
    if found and any(f.filename.startswith(_DISTRIBUTED) for f in frames):
        return COLLECTIVES + "."
    # A checkpoint of the old kind is an autograd.Function of the old style, and fails as one.
    return _CHECKPOINT if found and any(f.filename.endswith("/utils/checkpoint.py") for f in frames) else found


def _innermost(error: BaseException, root: nn.Module) -> nn.Module:
    """Return the innermost part of `root` that was running."""
    parts = set(root.modules())
    found, step = root, error.__traceback__
    while step is not None:
        running = step.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module) and running in parts:
            found = running
        step = step.tb_next
    return found


def _note(part: nn.Module, root: nn.Module) -> str:
    name = next((name for name, module in root.named_modules() if module is part), "")
    return f"{_NOTE}{name!r} ({type(part).__name__})" if name else f"{_NOTE}{type(part).__name__}"
