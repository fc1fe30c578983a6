"""The tail of a residual block, relu(batch_norm(x) + residual), in training: forward, backward and both.

In a loop over one call its tensors stay in the caches; with --cold, and on a GPU, many sets of tensors take turns, and
come from memory as in a network. --random adds relu(batch_norm(x)), and shapes that nobody has tuned for.

Providers: eager's three operators in the reference block's in-place form; torch.compile of them (with --providers, as
it compiles for minutes); the fused operator; and the time to copy x once, the unit in which the limit is known. On a
GPU also eager's without cuDNN, and eager's and the fused one replayed as a CUDA graph.
"""

import dataclasses
import functools
import itertools
import math
import os
import random
import statistics

import torch
import torch.nn.functional as F

from resnet_fused.functional import batch_norm_add_relu, batch_norm_relu

from . import harness

PHASES = ("forward", "backward", "forward+backward")
STAGES = ((64, 24), (128, 12), (256, 6), (512, 3), (64, 56))  # channels and side; the last as in a 224x224 network
SWEEP = [2**k for k in range(10, 31, 2)]  # bytes per tensor, 1 KiB to 1 GiB

# The least a training step can move, in copies of x (a copy reads and writes: 2 passes). Forward: x and residual read,
# y written. Backward: grad_output, x and y read, both gradients written.
LIMIT_IN_COPIES = {
    "batch_norm_add_relu": {"forward": 3 / 2, "backward": 5 / 2, "forward+backward": 8 / 2},
    "batch_norm_relu": {"forward": 2 / 2, "backward": 3 / 2, "forward+backward": 5 / 2},
}

ROTATING_BYTES = 2**28  # of tensors that take turns, at least: more than a GPU's L2 cache, which would serve them
MOST_SETS = {"cuda": 16, "cpu": 128}


def eager(input, residual, running_mean, running_var, weight, bias):
    """The reference block's form."""
    normalized = F.batch_norm(input, running_mean, running_var, weight, bias, training=True)
    return F.relu(normalized if residual is None else normalized.add_(residual))


def fused(input, residual, *tensors):
    if residual is None:
        return batch_norm_relu(input, *tensors, training=True)
    return batch_norm_add_relu(input, residual, *tensors, training=True)


def _taking_turns(calls):
    """A function that calls one of ``calls`` after the other."""
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _as_graph(call):
    """``call``, recorded as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # what it allocates and chooses once is not for the graph
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _without_cudnn(function):
    def call(*args):
        with torch.backends.cudnn.flags(enabled=False):
            return function(*args)

    return call


def rotating_bytes():
    """More than the caches hold."""
    names = [name for name in os.sysconf_names if name.endswith("CACHE_SIZE")]
    return max(ROTATING_BYTES, 4 * max(map(os.sysconf, names), default=0))


def setup(device, shape, dtype, memory_format, phase, case="batch_norm_add_relu", cold=False):
    """The providers at one shape; roughly half of the outputs are clipped."""
    size = math.prod(shape) * harness.DTYPES[dtype].itemsize
    sets = min(MOST_SETS[device.type], -(-rotating_bytes() // (6 * size))) if cold else 1
    arguments = device, shape, dtype, memory_format, phase, case == "batch_norm_add_relu"
    one_each = zip(*(_providers(*arguments) for _ in range(sets)), strict=True)
    return [dataclasses.replace(same[0], call=_taking_turns([p.call for p in same])) for same in one_each]


def _providers(device, shape, dtype, memory_format, phase, has_residual):
    """With tensors of their own."""

    def randn():
        tensor = torch.randn(shape, dtype=harness.DTYPES[dtype], device=device)
        return tensor.to(memory_format=harness.MEMORY_FORMATS[memory_format])

    input, grad_output = randn().requires_grad_(), randn()
    residual = randn().requires_grad_() if has_residual else None
    vector = {"dtype": harness.parameter_dtype(dtype), "device": device}
    weight = torch.rand(shape[1], **vector).requires_grad_()
    bias = torch.randn(shape[1], **vector).requires_grad_()
    needs_grad = tuple(tensor for tensor in (input, residual, weight, bias) if tensor is not None)

    def provider(name, tail, backend, graph=False):
        running = torch.zeros(shape[1], **vector), torch.ones(shape[1], **vector)
        forward = functools.partial(tail, input, residual, *running, weight, bias)
        output = functools.cache(forward)  # one graph, made at the first backward
        calls = {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(output(), needs_grad, grad_output, retain_graph=True),
            "forward+backward": lambda: torch.autograd.grad(forward(), needs_grad, grad_output),
        }
        return harness.Provider(name, _as_graph(calls[phase]) if graph else calls[phase], memory_format, backend)

    copy = functools.partial(torch.empty_like(input, requires_grad=False).copy_, input.detach())
    backend = harness.fused_backend(device)
    providers = [
        provider("eager", eager, "eager"),
        provider("torch.compile", harness.compiled(eager), "inductor"),
        provider("fused", fused, backend),
        harness.Provider("copy", copy, memory_format),
    ]
    if device.type == "cuda":
        providers.append(provider("eager, no cuDNN", _without_cudnn(eager), "eager"))
        if phase != "backward":  # that of a forward outside the graph belongs to another stream
            providers.append(provider("eager, graph", eager, "eager", graph=True))
            providers.append(provider("fused, graph", fused, backend, graph=True))
    return providers


def shape_of_size(size, itemsize):
    """A shape of 64 channels that fills ``size`` bytes: images grow to 32x32, then the batch does."""
    pixels = max(2, size // itemsize // 64)
    side = 2 ** min(5, int(math.log2(pixels)) // 2)
    return (pixels // side**2, 64, side, side)


def random_shapes(count):
    """Of batches, channels and images of a network's, seeded: from 2x24x33x47 to 16x512x28x28."""
    draw = random.Random(0)
    sides = [(draw.randint(7, 64), draw.randint(7, 64)) for _ in range(count)]
    return [
        (draw.randint(2, 16), 8 * draw.randint(3, 64 if height * width <= 28 * 28 else 16), height, width)
        for height, width in sides
    ]


def shape_of(text):
    """Of a tensor, written as 32x64x56x56; for argparse, which tells a ValueError with this function's name."""
    batch, channels, height, width = (int(size) for size in text.split("x"))
    return batch, channels, height, width


def cases(args):
    names = ["batch_norm_add_relu"]
    if args.random:
        shapes, phases, names = random_shapes(args.random), PHASES[-1:], ["batch_norm_add_relu", "batch_norm_relu"]
    elif args.sizes is None:
        shapes = args.shapes or [(args.batch_size, channels, side, side) for channels, side in STAGES]
        phases = PHASES
    else:
        import psutil  # see harness.run

        available = psutil.virtual_memory().available if args.device.type == "cpu" else torch.cuda.mem_get_info()[0]
        sizes = [size for size in args.sizes or SWEEP if 24 * size < available]  # measured: 22 at the peak
        print(f"sizes: {', '.join(map(str, sizes))} bytes per tensor, as far as memory allows")
        phases = PHASES[-1:]
    result = []
    for dtype in args.dtype:
        if args.sizes is not None:
            shapes = [shape_of_size(size, harness.DTYPES[dtype].itemsize) for size in sizes]
        for name, memory_format, shape, phase in itertools.product(names, args.memory_format, shapes, phases):
            cold = args.cold or args.device.type == "cuda"
            make = functools.partial(setup, args.device, shape, dtype, memory_format, phase, name, cold)
            result.append(harness.Case(name, shape, dtype, phase, make))
    return result


def further_columns(rows):
    """Least time, by what a copy took in the same case, over the time taken; and the bytes of the least over it."""

    def key(row):
        return tuple(map(str, (row[name] for name in ("case", "shape", "dtype", "memory_format", "phase", "threads"))))

    copies = [(key(row), row["median_ms"]) for row in rows if row["provider"] == "copy"]

    def share(row):
        limit = [LIMIT_IN_COPIES[row["case"]][row["phase"]] * copy_ms for of, copy_ms in copies if of == key(row)]
        return f"{limit[0] / row['median_ms']:.0%}" if limit and row["provider"] != "copy" else ""

    def gigabytes_per_second(row):
        size = math.prod(row["shape"]) * harness.DTYPES[row["dtype"]].itemsize
        copies = 1 if row["provider"] == "copy" else LIMIT_IN_COPIES[row["case"]][row["phase"]]
        return f"{2 * copies * size / row['median_ms'] / 1e6:.0f}"

    return {"of the limit": share, "GB/s": gigabytes_per_second}


def print_means(rows):
    """The figures to quote: geometric means of the speed of a whole training step, over shapes, of each layout and of
    all, and the slowest."""
    ratios = {}
    for row in rows:
        if row["phase"] == "forward+backward" and row["provider"] not in ("eager", "copy"):
            for layout in (row["memory_format"], "both layouts"):
                key = row["provider"], row["dtype"], layout, f"{row['threads']} threads"
                ratios.setdefault(key, []).append(row["ratio_to_eager"])
    for key, values in ratios.items():
        mean, slowest = statistics.geometric_mean(values), min(values)
        print(
            f"{', '.join(key)}: {mean:.2f}x eager, geometric mean of {len(values)} training steps; {slowest:.2f} least"
        )


def plot_ratios(args, machine, rows):
    """Of whole training steps."""
    steps = [row for row in rows if row["provider"] != "copy" and row["phase"] == PHASES[-1]]
    harness.plot_ratios(args, machine, steps)


def plot_sizes(args, machine, rows):
    """How cost grows with work: time over bytes per tensor, a panel per dtype and layout."""
    kinds = list(dict.fromkeys((row["dtype"], row["memory_format"]) for row in rows))
    with harness.figure(args, machine, len(kinds)) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            of_kind = [row for row in rows if (row["dtype"], row["memory_format"]) == kind]
            for name, threads in dict.fromkeys((row["provider"], row["threads"]) for row in of_kind):
                line = [row for row in of_kind if (row["provider"], row["threads"]) == (name, threads)]
                sizes = [math.prod(row["shape"]) * harness.DTYPES[row["dtype"]].itemsize for row in line]
                times = [row["median_ms"] for row in line]
                label = f"{name}, {threads} threads"
                axes.loglog(sizes, times, "--" if name == "copy" else "-", marker=".", label=label)
            axes.set(title=", ".join(kind), xlabel="bytes per tensor", ylabel="forward+backward, ms")
            axes.legend()


def main(argv=None):
    on_gpu = ("eager, no cuDNN", "eager, graph", "fused, graph") if torch.cuda.is_available() else ()
    default = ("fused", "copy", *on_gpu)
    parser = harness.make_parser("tail", __doc__, 32, (*default, "torch.compile"), default)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        metavar="BYTES",
        help="forward+backward over these sizes of a tensor instead; 1 KiB to 1 GiB where none are named",
    )
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="NxCxHxW", help="instead of a ResNet-18's")
    parser.add_argument("--cold", action="store_true", help="rotate over more tensors than the caches hold")
    parser.add_argument("--random", type=int, metavar="N", help="forward+backward of both operators at N random shapes")
    parser.set_defaults(dtype=["float32", "bfloat16"], threads=sorted({1, torch.get_num_threads()}))
    args = parser.parse_args(argv)
    with harness.session(args) as machine:
        rows = harness.run(args, cases(args))
    plot = plot_ratios if args.sizes is None or args.random else plot_sizes
    harness.report(args, machine, rows, plot, further_columns(rows))
    print_means(rows)


if __name__ == "__main__":
    main()
