"""Where the training step of a network spends its time on a CPU, plain and fused.

A tail is batch norm, ReLU and the addition of the residual, and the gradients of these; the stem a tail whose output is
pooled, and that pooling; accumulation is autograd's sum of the gradients of a tensor that has two users. What tails and
stem take together, with the caches as the convolutions leave them, is what fusing them can save, and what it did save:
the figure to quote.
"""

import itertools
import math
import resource
import statistics

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from . import harness
from .models import models_of, shape_of
from .resnet18 import Network

GROUPS = {  # by what the operators' names hold
    "convolutions": ("conv",),
    "tails": ("batch_norm", "relu", "clamp_min", "threshold_backward", "aten::add"),
    "pooling": ("pool",),
}
ACCUMULATION = "accumulation"
SLOWEST = 4  # rows by operator and shape


def group_of(event):
    if event.name.startswith("aten::add") and any(parent.name == "backward" for parent in _parents(event)):
        return ACCUMULATION
    return next((group for group, parts in GROUPS.items() if any(part in event.name for part in parts)), "the rest")


def _parents(event):
    while event := event.cpu_parent:
        yield event


def profiled_step(network, images, labels):
    """Milliseconds of one step's forward and backward by group, and of its tails by operator and shape; page faults."""
    network.optimizer.zero_grad()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss = network.loss(images, labels)
        with record_function("backward"):
            loss.backward()
    network.optimizer.step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    groups, tails = dict.fromkeys([*GROUPS, ACCUMULATION, "the rest"], 0.0), {}
    for event in profiler.events():
        group, time = group_of(event), event.self_cpu_time_total / 1e3
        groups[group] += time
        if group in ("tails", "pooling"):
            shape = max(event.input_shapes or [()], key=math.prod)  # of a pooling, what is pooled
            key = f"{event.name} {'x'.join(map(str, shape))}"
            tails[key] = tails.get(key, 0.0) + time
    return groups, tails, faults


def with_stem(step, shapes):
    """The step with what is of one of the shapes as a group of its own."""
    groups, tails, faults = step
    groups = groups | {"stem": 0.0}
    for key, time in tails.items():
        if key.rpartition(" ")[2] in shapes:
            groups["pooling" if "pool" in key.partition(" ")[0] else "tails"] -= time
            groups["stem"] += time
    return groups, tails, faults


def shares(args, name, dtype, memory_format):
    """A row for each provider: medians of steps that take turns."""
    images = torch.randn(shape_of(args), dtype=harness.parameter_dtype(dtype))
    labels = torch.randint(10, images.shape[:1])
    models = models_of(name, args.providers)
    networks = {provider: Network(make, args.device, dtype, memory_format) for provider, make in models.items()}
    steps = {provider: [] for provider in networks}
    for turn in range(args.rounds + 1):
        for provider, network in networks.items():
            step = profiled_step(network, images, labels)
            steps[provider] += [step] if turn else []  # the first is for what is done once

    pooled = {key.rpartition(" ")[2] for key in steps["eager"][0][1] if "max_pool2d" in key}
    steps = {provider: [with_stem(step, pooled) for step in of_provider] for provider, of_provider in steps.items()}

    def median(of_step):
        return statistics.median(map(of_step, of_provider))

    rows = []
    for provider, of_provider in steps.items():
        groups, tails, _ = of_provider[0]
        rows.append(
            {
                "model": name,
                "dtype": dtype,
                "memory_format": memory_format,
                "provider": provider,
                "threads": torch.get_num_threads(),
                "milliseconds": {group: median(lambda step, group=group: step[0][group]) for group in groups},
                "tails": {key: median(lambda step, key=key: step[1].get(key, 0.0)) for key in tails},
                "page_faults": median(lambda step: step[2]),
            }
        )
        for group in ("tails", "stem"):
            times = [row["milliseconds"][group] for row in (rows[0], rows[-1])]
            rows[-1][f"{group}_ratio_to_eager"] = times[0] / times[1] if times[1] else 1.0
    return rows


def print_row(row):
    total = sum(row["milliseconds"].values())
    groups = ", ".join(f"{group} {time:.1f} ms ({time / total:.0%})" for group, time in row["milliseconds"].items())
    case = ", ".join(row[key] for key in ("model", "dtype", "memory_format", "provider"))
    print(
        f"{case}: {groups}; tails {row['tails_ratio_to_eager']:.2f}x and "
        f"stem {row['stem_ratio_to_eager']:.2f}x eager; {row['page_faults']:.0f} page faults"
    )
    for key, time in sorted(row["tails"].items(), key=lambda item: -item[1])[:SLOWEST]:
        print(f"    {time:7.2f} ms {key}")


def main(argv=None):
    parser = harness.make_parser("shares", __doc__, 32, ("fused", "fused, memory_efficient"), ("fused",), plots=False)
    harness.add_image_size(parser)
    harness.add_models(parser, "resnet18,resnet50")
    parser.set_defaults(device=torch.device("cpu"))
    args = parser.parse_args(argv)
    steps = []
    with harness.session(args) as machine:
        for case in tqdm(list(itertools.product(args.models, args.dtype, args.memory_format)), disable=None):
            rows = shares(args, *case)
            for row in rows:
                print_row(row)
            steps += rows
    harness.write_json(args, machine, [], steps=steps)


if __name__ == "__main__":
    main()
