"""Host time per call at 8 elements: the operator against eager's three, block against block, and a BasicBlock of
torchvision's after fuse against the plain one."""

import copy
import functools
import itertools

import torch
from torchvision.models.resnet import BasicBlock

from resnet_fused import fuse

from . import block, harness, tail


def _setup_fuse(device, shape, memory_format, phase):
    plain = BasicBlock(shape[1], shape[1]).to(device)
    x = torch.randn(shape, device=device).contiguous(memory_format=harness.MEMORY_FORMATS[memory_format])
    fused = copy.deepcopy(plain)
    fuse(fused, example_inputs=x)
    providers = []
    for name, model in (("eager", plain), ("fused", fused)):
        model.train(phase == "train_step")
        run = (
            functools.partial(_train_step, model, x)
            if phase == "train_step"
            else torch.no_grad()(functools.partial(model, x))
        )
        kind = "eager" if name == "eager" else harness.fused_backend(device)
        providers.append(harness.Provider(name, run, memory_format, kind))
    return providers


def _train_step(model, x):
    output = model(x)
    output.backward(output.detach())


def cases(args):
    shape = (args.batch_size, 2, 2, 2)
    result = []
    for dtype, memory_format in itertools.product(args.dtype, args.memory_format):
        of_tail = functools.partial(tail.setup, args.device, shape, dtype, memory_format, "forward+backward")
        of_block = functools.partial(block.setup, args.device, shape, 2, 1, dtype, memory_format, "train_step")
        result.append(harness.Case("batch_norm_add_relu", shape, dtype, "host_overhead", of_tail))
        result.append(harness.Case("block", shape, dtype, "host_overhead", of_block))
    for memory_format, phase in itertools.product(args.memory_format, ("train_step", "inference")):
        make = functools.partial(_setup_fuse, args.device, shape, memory_format, phase)
        result.append(harness.Case(f"BasicBlock, {phase}", shape, "float32", "host_overhead", make))
    return result


def main(argv=None):
    args = harness.make_parser("overhead", __doc__, 1, ("fused",)).parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    harness.report(args, machine, rows)


if __name__ == "__main__":
    main()
