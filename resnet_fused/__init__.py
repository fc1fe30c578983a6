"""Fused residual blocks: ``relu(batch_norm(x) + residual)`` as one operator, forward and backward."""

from . import functional
from .backend import available_backends, use_backend
from .blocks import FusedResidual, Residual
from .fusing import fuse, unfuse, unfused
from .resnet import resnet18

__version__ = "0.1.0"

__all__ = [
    "FusedResidual",
    "Residual",
    "available_backends",
    "functional",
    "fuse",
    "resnet18",
    "unfuse",
    "unfused",
    "use_backend",
]
