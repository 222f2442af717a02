"""What each process of a world needs, imported once: `tests.world` forks its processes from one that has imported this.

Nothing runs here: a process that has started gloo, or threads of torch's, cannot be forked.
"""

from __future__ import annotations

import gc

import torch._dynamo  # which the first vjp or trace of a process imports
import torch.distributed.tensor
import torch.testing

import fzero.program.jit

del torch, fzero
gc.freeze()  # forked processes share what is here and is never collected
