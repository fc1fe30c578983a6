"""ResNet-18: a training step and inference, plain and fused, in both layouts, and plain under torch.compile.

The ratios of all rows are to plain PyTorch in the first layout.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

import resnet_fused
from resnet_fused import FusedResidual, Residual

from . import harness

IMAGES_PER_SECOND = {"images/s": lambda row: f"{row['shape'][0] / row['median_ms'] * 1e3:.1f}"}  # a table's column


class Network:
    """A model built from seed 0, with its optimizer. ``compile``: torch.compile's mode."""

    def __init__(self, make_model, device, dtype, memory_format, compile=None):
        torch.manual_seed(0)
        self.model = make_model()
        self.model.to(device, harness.parameter_dtype(dtype), memory_format=harness.MEMORY_FORMATS[memory_format])
        forward = harness.autocast(self.model, device, dtype)
        self.forward = harness.compiled(forward, compile) if compile else forward
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02)

    def loss(self, images, labels):
        return F.cross_entropy(self.forward(images), labels)

    def train_step(self, images, labels):
        """One step of stochastic gradient descent; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def infer(self, images):
        return self.forward(images)


def resnet18_of(block):
    """Function that makes the model of these blocks."""
    return functools.partial(resnet_fused.resnet18, in_channels=1, block=block)


def setup(models, device, memory_formats, shape, dtype, phase):
    """Providers of the phase. ``models``: name -> function that makes the model, the plain one as eager."""
    images = torch.randn(shape, device=device, dtype=harness.parameter_dtype(dtype))
    labels = torch.randint(10, shape[:1], device=device)

    def provider(name, make_model, memory_format, backend):
        compile = "default" if name == "torch.compile" else None
        network = Network(make_model, device, dtype, memory_format, compile)
        network.model.train(phase == "train_step")
        calls = {
            "train_step": functools.partial(network.train_step, images, labels),
            "frozen_step": functools.partial(network.train_step, images, labels),  # statistics are constant
            "inference": functools.partial(network.infer, images),
        }
        return harness.Provider(name, calls[phase], memory_format, backend)

    backends = dict.fromkeys(models, harness.fused_backend(device)) | {"eager": "eager"}
    by_name = {
        name: [provider(name, make_model, memory_format, backends[name]) for memory_format in memory_formats]
        for name, make_model in models.items()
    }
    compiled = provider("torch.compile", models["eager"], memory_formats[0], "inductor")
    return [*by_name.pop("eager"), compiled, *itertools.chain(*by_name.values())]


def cases(args):
    shape = (args.batch_size, 1, args.image_size, args.image_size)
    models = {"eager": resnet18_of(Residual), "fused": resnet18_of(FusedResidual)}
    return [
        harness.Case(
            "resnet18",
            shape,
            dtype,
            phase,
            functools.partial(setup, models, args.device, args.memory_format, shape, dtype, phase),
        )
        for dtype in args.dtype
        for phase in ("train_step", "inference")
    ]


def main(argv=None):
    parser = harness.make_parser("resnet18", __doc__, 32, ("fused", "torch.compile"))
    harness.add_image_size(parser)
    args = parser.parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    harness.report(args, machine, rows, further_columns=IMAGES_PER_SECOND)


if __name__ == "__main__":
    main()
