"""Peak resident memory of a process that trains ResNet-18 for some steps, plain and fused, a process each."""

import contextlib
import itertools
import multiprocessing
import resource

import torch

from resnet_fused import FusedResidual, Residual

from . import harness
from .resnet18 import Network, resnet18_of

STEPS = 3
BLOCKS = {"eager": Residual, "fused": FusedResidual}


def peak_mebibytes(args, dtype, memory_format, name):
    with contextlib.redirect_stdout(None), harness.session(args):
        network = Network(resnet18_of(BLOCKS[name]), args.device, dtype, memory_format)
        images = torch.randn(args.batch_size, 1, args.image_size, args.image_size)
        for _ in range(STEPS):
            network.train_step(images, torch.zeros(args.batch_size, dtype=torch.int64))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv=None):
    parser = harness.make_parser("memory", __doc__, 32, plots=False)
    harness.add_image_size(parser)
    parser.set_defaults(device=torch.device("cpu"))
    args = parser.parse_args(argv)
    peaks = []
    with harness.session(args) as machine:
        for dtype, memory_format, name in itertools.product(args.dtype, args.memory_format, BLOCKS):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                peak = process.apply(peak_mebibytes, (args, dtype, memory_format, name))
            peaks.append({"dtype": dtype, "memory_format": memory_format, "provider": name, "peak_mebibytes": peak})
            print(f"{dtype}, {memory_format}, {name}: {peak:.0f} MiB")
    harness.write_json(args, machine, [], peaks=peaks)


if __name__ == "__main__":
    main()
