"""Benchmarks, a file per question, each ``python -m benchmarks.NAME``; ``harness`` is what they share,
``saved`` counts what autograd saves.

tail        the fused operator against PyTorch's three, at the shapes of ResNet-18, random ones or a sweep of sizes
overhead    host time per call, where there is next to nothing to compute
block       Residual against FusedResidual, per stage of ResNet-18
resnet18    the whole network: a training step and inference
models      models of torchvision and timm: a training step, inference, and the bytes saved for backward
inference   models in inference on a CPU: plain, compiled, fused, and other runtimes
shares      where a network's training step spends its time, plain and fused
memory      peak resident memory of training steps, plain and fused
sync        training steps of several processes, whose batch norms are synchronised
reach       which batch norms fuse reaches, counted
gpu         all that a GPU has to show, in ten minutes
compare     two runs of one of these
docs        the tables of README.md and docs/, written from the JSON of the others
train       the whole network really trained on handwritten digits, plain and fused side by side
"""

import logging
import os

# torch says at import that there is no GPU, and its profiler when it starts and stops: not what was asked for.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
