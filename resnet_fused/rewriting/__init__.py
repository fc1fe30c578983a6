"""fuse, unfuse and unfused: other classes for the modules of a model, whose forwards are rewritten with fused calls."""

from .report import fuse, unfuse, unfused

__all__ = ["fuse", "unfuse", "unfused"]
