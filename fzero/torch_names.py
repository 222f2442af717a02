"""What users of `nn.Module`, DDP, FSDP and DeepSpeed ask of a wrapped model that it does not have, and the way out."""

from __future__ import annotations

from fzero.calls.nearest import nearest

_LOADED = "module.load_state_dict(fz.named(fz.gather(model.state.params), module))"
_READ = (
    "Full tensors: fz.gather(model.state.params), some of them: only='pattern'. Their names and shapes: "
    "model.state.params.paths, model.state.params.shapes. What this rank holds: fz.tree.leaves(model.state.params)."
)
_DTYPE = "The policy decides dtypes: wrap(module, optimizer, policy='bf16'); they stand in model.state.policy."
_DEVICE = "The mesh decides the device: wrap(module, optimizer, mesh=fz.make_mesh('cuda')); it is model.device."
_MODULE = "The model is a function of its parameters and holds no module: ask the one that you wrapped."
_BEFORE = "Do it to the module before it is wrapped: the model is a copy."
_REMAT = "Wrap the function that calls a block in fz.remat, or pass traced=True: no full leaf is held then."
_FROZEN = "Leaves are frozen by fz.partition_by(fz.labels_of(module), {'trained': optimizer, 'frozen': None})."
_NO_HOOKS = "There are no hooks: change the module, or the function, that is wrapped."
_SYNC = "Each backward reduces its gradient, and only pieces are kept."
_ONE_STEP = "model.step() updates the state, and returns what there is to log."

_WAYS_OUT = {
    _READ: "parameters named_parameters get_parameter unshard reshard full_tensor summon_full_params",
    _DTYPE: "half bfloat16 float double type dtype",
    _DEVICE: "to cuda cpu to_empty",
    _MODULE: "module modules named_modules children named_children get_submodule get_input_embeddings "
    "get_output_embeddings base_model",
    _BEFORE: "apply resize_token_embeddings tie_weights init_weights post_init add_module register_buffer "
    "register_parameter load_adapter add_adapter",
    _REMAT: "gradient_checkpointing_enable gradient_checkpointing_disable",
    _FROZEN: "requires_grad_",
    _NO_HOOKS: "register_forward_hook register_forward_pre_hook register_full_backward_hook "
    "register_full_backward_pre_hook register_comm_hook",
    _SYNC: "set_requires_gradient_sync require_backward_grad_sync is_gradient_accumulation_boundary",
    _ONE_STEP: "optimizer lr_scheduler",
    "Named so: fz.named(fz.gather(model.state.params), module); buffers stand in model.buffers. Back into a module: "
    f"{_LOADED}.": "state_dict",
    "Load into the module and wrap it, or give the model another state: model.state = fz.init(module, optimizer, "
    "model.state.mesh, model.state.layout, model.state.policy).": "load_state_dict",
    "They stand in model.buffers, each rank's own.": "named_buffers get_buffer",
    f"Bring the parameters back first, on every rank: {_LOADED}; then ask the module.": "save_pretrained push_to_hub "
    "generate",
    "The wrapped module has no config.": "config",
    "Call the model itself: model(x).": "forward",
    "Call loss.backward().": "backward",
    "Pass traced=True to wrap: a call and its backward then run as two programs.": "compile",
    "A clip stands before the optimizer: fz.chain(fz.clip_by_global_norm(limit), optimizer).": "clip_grad_norm_ "
    "gradient_clipping",
}
_BY_NAME = {name: way_out for way_out, names in _WAYS_OUT.items() for name in names.split()}


def missing(name: str, others: list[str]) -> AttributeError:
    """Return the error for a name that a wrapped model does not have.

    Args:
        name: what was asked for.
        others: the names that there are.

    Example:
        >>> missing("backward", [])
        AttributeError("torch_api.Model: there is no 'backward'. Call loss.backward().")
    """
    if name.startswith("_"):  # what Python and notebooks look for
        return AttributeError(f"'Model' object has no attribute {name!r}")
    way_out = _BY_NAME.get(name) or (nearest(name, others).strip() or _MODULE)
    return AttributeError(f"torch_api.Model: there is no {name!r}. {way_out}")
