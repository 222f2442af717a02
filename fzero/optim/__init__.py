"""Optimizers as pure `(init, update)` pairs."""

from fzero.optim.adafactor import adafactor as adafactor
from fzero.optim.adamw import adam as adam
from fzero.optim.adamw import adamw as adamw
from fzero.optim.base import Optimizer as Optimizer
from fzero.optim.clip import clip_by_global_norm as clip_by_global_norm
from fzero.optim.clip import clip_by_last_norm as clip_by_last_norm
from fzero.optim.clip import clip_by_leaf_norm as clip_by_leaf_norm
from fzero.optim.lion import lion as lion
from fzero.optim.muon import muon as muon
from fzero.optim.sgd import sgd as sgd
from fzero.optim.transforms import GradientTransform as GradientTransform
from fzero.optim.transforms import chain as chain
from fzero.optim.transforms import partition_by as partition_by
