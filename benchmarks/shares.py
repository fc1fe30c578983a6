"""Where a training step of plain ResNet-18 spends its time on a CPU: what fusing the tails could save at most.

A tail is batch norm, ReLU and the addition of the residual, and the gradients of these.
"""

import itertools

import torch
from torch.profiler import ProfilerActivity, profile

from resnet_fused import Residual

from . import harness
from .resnet18 import Network, resnet18_of

STEPS = 5
GROUPS = {  # by what the operators' names hold
    "convolutions": ("conv",),
    "tails": ("batch_norm", "relu", "clamp_min", "threshold_backward", "aten::add_"),
}


def group_of(operator):
    return next((group for group, parts in GROUPS.items() if any(part in operator for part in parts)), "the rest")


def milliseconds(args, dtype, memory_format):
    """Of one step, by group: the operators' own time."""
    network = Network(resnet18_of(Residual), args.device, dtype, memory_format)
    batch = torch.randn(args.batch_size, 1, args.image_size, args.image_size), torch.randint(10, (args.batch_size,))
    network.train_step(*batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            network.train_step(*batch)
    result = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for event in profiler.key_averages():
        result[group_of(event.key)] += event.self_cpu_time_total / 1e3 / STEPS
    return result


def main(argv=None):
    parser = harness.make_parser("shares", __doc__, 32, plots=False)
    harness.add_image_size(parser)
    parser.set_defaults(device=torch.device("cpu"))
    args = parser.parse_args(argv)
    steps = []
    with harness.session(args) as machine:
        for dtype, memory_format in itertools.product(args.dtype, args.memory_format):
            of_group = milliseconds(args, dtype, memory_format)
            steps.append({"dtype": dtype, "memory_format": memory_format, "milliseconds": of_group})
            total = sum(of_group.values())
            shares = ", ".join(f"{group} {time:.1f} ms ({time / total:.0%})" for group, time in of_group.items())
            print(f"{dtype}, {memory_format}: {shares}")
    harness.write_json(args, machine, [], steps=steps)


if __name__ == "__main__":
    main()
