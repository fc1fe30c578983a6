"""Residual against FusedResidual at every stage of ResNet-18: a training step (forward and backward) and inference."""

import functools
import itertools

import torch

from resnet_fused import FusedResidual, Residual

from . import harness

# Input channels, output channels, stride, and how many times smaller the block's input is than the image.
BLOCKS = {
    "stage 1": (64, 64, 1, 4),
    "stage 2, first": (64, 128, 2, 4),
    "stage 2": (128, 128, 1, 8),
    "stage 3, first": (128, 256, 2, 8),
    "stage 3": (256, 256, 1, 16),
    "stage 4, first": (256, 512, 2, 16),
    "stage 4": (512, 512, 1, 32),
}


def setup(device, shape, num_channels, strides, dtype, memory_format, phase):
    """The plain and the fused block, on one input of ``shape`` and from one seed."""
    layout = harness.MEMORY_FORMATS[memory_format]

    def provider(name, block_class, backend):
        torch.manual_seed(0)
        block = block_class(shape[1], num_channels, use_1x1conv=strides != 1, strides=strides)
        block.to(device, harness.parameter_dtype(dtype), memory_format=layout).train(phase != "inference")
        forward = harness.autocast(block, device, dtype)
        input = torch.randn(shape, dtype=harness.DTYPES[dtype], device=device).to(memory_format=layout)
        if phase == "inference":
            return harness.Provider(name, torch.no_grad()(functools.partial(forward, input)), memory_format, backend)
        needs_grad = (input.requires_grad_(), *block.parameters())
        grad_output = torch.randn_like(forward(input))

        def step():
            return torch.autograd.grad(forward(input), needs_grad, grad_output)

        return harness.Provider(name, step, memory_format, backend)

    return [provider("eager", Residual, "eager"), provider("fused", FusedResidual, harness.fused_backend(device))]


def cases(args):
    result = []
    for dtype, memory_format, name in itertools.product(args.dtype, args.memory_format, BLOCKS):
        channels, num_channels, strides, reduction = BLOCKS[name]
        side = args.image_size // reduction
        shape = (args.batch_size, channels, side, side)
        for phase in ("train_step", "inference"):
            make = functools.partial(setup, args.device, shape, num_channels, strides, dtype, memory_format, phase)
            result.append(harness.Case(name, shape, dtype, phase, make))
    return result


def main(argv=None):
    parser = harness.make_parser("block", __doc__, 32, ("fused",))
    harness.add_image_size(parser)
    args = parser.parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    harness.report(args, machine, rows)


if __name__ == "__main__":
    main()
