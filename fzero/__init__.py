"""fzero: ZeRO as a pure function."""

from fzero import tree as tree
from fzero.autodiff.accumulate import accumulate as accumulate
from fzero.autodiff.remat import remat as remat
from fzero.autodiff.residuals import Residuals as Residuals
from fzero.autodiff.residuals import SavedResiduals as SavedResiduals
from fzero.autodiff.split_vjp import residuals as residuals
from fzero.autodiff.split_vjp import split_vjp as split_vjp
from fzero.autodiff.value_and_grad import grad as grad
from fzero.autodiff.value_and_grad import value_and_grad as value_and_grad
from fzero.autodiff.vjp import call as call
from fzero.autodiff.vjp import vjp as vjp
from fzero.errors import BatchError as BatchError
from fzero.errors import BufferWriteError as BufferWriteError
from fzero.errors import CotangentError as CotangentError
from fzero.errors import DonatedError as DonatedError
from fzero.errors import FzeroError as FzeroError
from fzero.errors import GradientError as GradientError
from fzero.errors import LayoutError as LayoutError
from fzero.errors import MeshError as MeshError
from fzero.errors import ModuleError as ModuleError
from fzero.errors import ParameterWriteError as ParameterWriteError
from fzero.errors import PeerError as PeerError
from fzero.errors import PolicyError as PolicyError
from fzero.errors import ProgramMismatchError as ProgramMismatchError
from fzero.errors import RandomOpError as RandomOpError
from fzero.errors import ResidualsError as ResidualsError
from fzero.errors import ShapeError as ShapeError
from fzero.errors import TraceError as TraceError
from fzero.errors import TreeError as TreeError
from fzero.kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
from fzero.modules.attention import AttentionKernel as AttentionKernel
from fzero.modules.attention import attention as attention
from fzero.modules.functional import functional as functional
from fzero.modules.labels import labels_of as labels_of
from fzero.optim import schedules as schedules
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
from fzero.optim.transforms import chain as chain
from fzero.optim.transforms import partition_by as partition_by
from fzero.precision.loss_scale import LossScale as LossScale
from fzero.precision.policy import Policy as Policy
from fzero.precision.policy import policy as policy
from fzero.program.jit import jit as jit
from fzero.program.jit import trace as trace
from fzero.program.program import Program as Program
from fzero.random.keyed import keyed as keyed
from fzero.ranks.average import average as average
from fzero.ranks.axis import Axis as Axis
from fzero.ranks.mesh import Mesh as Mesh
from fzero.ranks.mesh import make_mesh as make_mesh
from fzero.sharding.algebra import add as add
from fzero.sharding.algebra import dot as dot
from fzero.sharding.algebra import norm as norm
from fzero.sharding.algebra import scale as scale
from fzero.sharding.directions import like as like
from fzero.sharding.directions import random_like as random_like
from fzero.sharding.directions import zeros_like as zeros_like
from fzero.sharding.layout import Layout as Layout
from fzero.sharding.layout import zero as zero
from fzero.sharding.leaf import P as P
from fzero.sharding.named import named as named
from fzero.sharding.picture import visualize as visualize
from fzero.sharding.sharded import Sharded as Sharded
from fzero.sharding.sharded import gather as gather
from fzero.sharding.sharded import shard as shard
from fzero.train.ema import ema as ema
from fzero.train.padding import pad_to as pad_to
from fzero.train.state import State as State
from fzero.train.state import init as init
from fzero.train.step import apply_gradients as apply_gradients
from fzero.train.step import train_step as train_step

__version__ = "0.1.0"

__all__ = [
    "AttentionKernel",
    "Axis",
    "BatchError",
    "BufferWriteError",
    "CotangentError",
    "DonatedError",
    "FzeroError",
    "GradientError",
    "Layout",
    "LayoutError",
    "LossScale",
    "Mesh",
    "MeshError",
    "ModuleError",
    "Optimizer",
    "P",
    "ParameterWriteError",
    "PeerError",
    "Policy",
    "PolicyError",
    "Program",
    "ProgramMismatchError",
    "RandomOpError",
    "Residuals",
    "ResidualsError",
    "SavedResiduals",
    "ShapeError",
    "Sharded",
    "State",
    "TraceError",
    "TreeError",
    "__version__",
    "accumulate",
    "adafactor",
    "adam",
    "adamw",
    "add",
    "apply_gradients",
    "attention",
    "average",
    "call",
    "chain",
    "clip_by_global_norm",
    "clip_by_last_norm",
    "clip_by_leaf_norm",
    "dot",
    "ema",
    "functional",
    "gather",
    "grad",
    "init",
    "jit",
    "keyed",
    "labels_of",
    "like",
    "linear_cross_entropy",
    "lion",
    "make_mesh",
    "muon",
    "named",
    "norm",
    "pad_to",
    "partition_by",
    "policy",
    "random_like",
    "remat",
    "residuals",
    "scale",
    "schedules",
    "sgd",
    "shard",
    "split_vjp",
    "trace",
    "train_step",
    "tree",
    "value_and_grad",
    "visualize",
    "vjp",
    "zero",
    "zeros_like",
]

__dir__ = __all__.copy  # what a user may call, and not the files
