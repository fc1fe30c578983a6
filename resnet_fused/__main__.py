"""``python -m resnet_fused``: versions, backends, and for each missing one why, and the fix."""

import platform

import torch

from . import __version__
from .backend import all_backends


def report() -> str:
    lines = [
        f"resnet_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        platform.platform(),
        f"CUDA of torch: {torch.version.cuda or 'none'}; GPUs: {torch.cuda.device_count()}",
        "",
        "backends, in the order in which RESNET_FUSED_BACKEND=auto prefers them:",
    ]
    for backend in all_backends():
        state = backend.detail if backend.unavailable is None else f"not available: {backend.unavailable}"
        lines.append(f"  {backend.name:6} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
