"""Host time per call at 8 elements, forward and backward: the operator against eager's three, block against block.

And the guards alone that torchvision's BasicBlock looks at after fuse, against the plain block's forward.
"""

import functools
import itertools

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import fuse

from . import block, harness, tail


def _setup_guards(device, shape, downsamples, memory_format):
    downsample = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)) if downsamples else None
    plain, fused = (BasicBlock(2, 2, downsample=downsample).to(device).eval() for _ in range(2))
    fuse(fused)
    forward = torch.no_grad()(functools.partial(plain, torch.randn(shape, device=device)))
    guards = functools.partial(type(fused)._holds, fused)
    return [
        harness.Provider("eager", forward, memory_format, "eager"),
        harness.Provider("fused", guards, memory_format, harness.fused_backend(device)),
    ]


def cases(args):
    shape = (args.batch_size, 2, 2, 2)
    result = []
    for dtype, memory_format in itertools.product(args.dtype, args.memory_format):
        of_tail = functools.partial(tail.setup, args.device, shape, dtype, memory_format, "forward+backward")
        of_block = functools.partial(block.setup, args.device, shape, 2, 1, dtype, memory_format, "train_step")
        result.append(harness.Case("batch_norm_add_relu", shape, dtype, "host_overhead", of_tail))
        result.append(harness.Case("block", shape, dtype, "host_overhead", of_block))
    for name, downsamples in (("guards", False), ("guards, downsampling", True)):
        make = functools.partial(_setup_guards, args.device, shape, downsamples, args.memory_format[0])
        result.append(harness.Case(name, shape, "float32", "host_overhead", make))
    return result


def main(argv=None):
    args = harness.make_parser("overhead", __doc__, 1, ("fused",)).parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    harness.report(args, machine, rows)


if __name__ == "__main__":
    main()
