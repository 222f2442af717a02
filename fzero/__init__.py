"""fzero: ZeRO as a pure function."""

from fzero import tree as tree
from fzero.accumulate import accumulate as accumulate
from fzero.algebra import add as add
from fzero.algebra import dot as dot
from fzero.algebra import norm as norm
from fzero.algebra import scale as scale
from fzero.attention import AttentionKernel as AttentionKernel
from fzero.attention import attention as attention
from fzero.autodiff import call as call
from fzero.autodiff import grad as grad
from fzero.autodiff import value_and_grad as value_and_grad
from fzero.autodiff import vjp as vjp
from fzero.axis import Axis as Axis
from fzero.buffers import average as average
from fzero.directions import like as like
from fzero.directions import random_like as random_like
from fzero.directions import zeros_like as zeros_like
from fzero.ema import ema as ema
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
from fzero.functional import functional as functional
from fzero.kernels.cross_entropy import linear_cross_entropy as linear_cross_entropy
from fzero.keyed import keyed as keyed
from fzero.labels import labels_of as labels_of
from fzero.layout import Layout as Layout
from fzero.layout import Sharded as Sharded
from fzero.layout import gather as gather
from fzero.layout import shard as shard
from fzero.layout import zero as zero
from fzero.mesh import Mesh as Mesh
from fzero.mesh import make_mesh as make_mesh
from fzero.named import named as named
from fzero.optim import Optimizer as Optimizer
from fzero.optim import adafactor as adafactor
from fzero.optim import adam as adam
from fzero.optim import adamw as adamw
from fzero.optim import chain as chain
from fzero.optim import clip_by_global_norm as clip_by_global_norm
from fzero.optim import clip_by_last_norm as clip_by_last_norm
from fzero.optim import clip_by_leaf_norm as clip_by_leaf_norm
from fzero.optim import lion as lion
from fzero.optim import muon as muon
from fzero.optim import partition_by as partition_by
from fzero.optim import schedules as schedules
from fzero.optim import sgd as sgd
from fzero.padding import pad_to as pad_to
from fzero.pieces import P as P
from fzero.policy import Policy as Policy
from fzero.policy import policy as policy
from fzero.program import Program as Program
from fzero.program import jit as jit
from fzero.program import trace as trace
from fzero.remat import remat as remat
from fzero.residuals import Residuals as Residuals
from fzero.residuals import SavedResiduals as SavedResiduals
from fzero.scaling import LossScale as LossScale
from fzero.split import residuals as residuals
from fzero.split import split_vjp as split_vjp
from fzero.state import State as State
from fzero.state import apply_gradients as apply_gradients
from fzero.state import init as init
from fzero.state import train_step as train_step
from fzero.visualize import visualize as visualize

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
