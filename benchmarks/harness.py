"""What every benchmark shares: arguments, interleaved timing, the table, JSON and plots.

A benchmark is a list of :class:`Case`, each a set-up that returns :class:`Provider` objects; the first one is eager
PyTorch, with which the others are compared. :func:`measure` lets the providers of a case take turns.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import resnet_fused

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LSCPU = {"cpu": "Model name", "model": "Model", "l1d": "L1d cache", "l2": "L2 cache", "l3": "L3 cache"}
LSCPU |= {"threads_per_core": "Thread(s) per core", "hypervisor": "Hypervisor vendor"}
MOST_BUSY_PERCENT = 5  # of a machine at rest
COLOURS = {"contiguous": "tab:blue", "channels_last": "tab:orange"}
MOST_BARS = 20  # of a picture


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case; ``call`` does it once."""

    name: str
    call: Callable[[], object]
    memory_format: str
    backend: str = "eager"


@dataclass(frozen=True)
class Case:
    """One piece of work. ``setup`` allocates its tensors and returns its providers, eager first."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    phase: str  # forward, backward, forward+backward, train_step, frozen_step, inference or host_overhead
    setup: Callable[[], list[Provider]] | None = None  # None where the benchmark takes the times itself


# Arguments and environment


def make_parser(bench, description, batch_size, providers=(), default_providers=None, plots=True):
    """The arguments that every benchmark takes. ``providers``: those that may be chosen, beside eager."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{bench}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(bench=bench)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows there")
    if plots:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results there (.png, .svg, .pdf)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--memory-format", nargs="+", choices=MEMORY_FORMATS, default=list(MEMORY_FORMATS))
    parser.add_argument("--batch-size", type=int, default=batch_size, help="default: %(default)s")
    parser.add_argument(
        "--backend",
        type=lambda names: names.split(","),
        default=["auto"],
        metavar="NAME[,NAME...]",
        help="of the fused provider; of several, as providers beside each other (not in all benchmarks); default: auto",
    )
    threads = [torch.get_num_threads()]
    parser.add_argument("--threads", type=int, nargs="+", default=threads, help="in turn; default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device, help="default: %(default)s")
    parser.add_argument("--no-mallopt", action="store_true", help="leave malloc as it is: page faults are timed, too")
    if providers:
        default_providers = list(default_providers or providers)
        parser.add_argument("--providers", nargs="+", choices=providers, default=default_providers, help="beside eager")
        parser.add_argument("--rounds", type=int, default=7, help="least number of turns; default: %(default)s")
        parser.add_argument(
            "--seconds", type=float, default=0.5, help="timed per provider and case, or longer; default: %(default)s"
        )
    return parser


def add_image_size(parser):
    parser.add_argument("--image-size", type=int, default=96, help="of the network; default: %(default)s")


def add_models(parser, default):
    parser.add_argument(
        "--models",
        type=lambda names: names.split(","),
        default=default,
        help="names of torchvision's models, with timm/ before them of timm's; default: %(default)s",
    )


def _keep_freed_memory():
    """Have glibc's malloc keep freed memory, as GPU allocators do; says what was done.

    Otherwise it hands every freed activation back to the kernel, and each fresh output costs page faults: for every
    provider about as much again as its kernels.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return "not there (no glibc)"
    # Older versions of glibc refuse to serve more than 32 MiB from the heap.
    threshold = next((size for size in (2**31 - 1, 2**25) if mallopt(mmap_threshold, size)), "default")
    mallopt(trim_threshold, -1)
    return f"M_MMAP_THRESHOLD={threshold}, M_TRIM_THRESHOLD=-1"


def _busy_percent():
    """How much of the CPUs others use; None where that cannot be told."""
    try:
        import psutil  # see run
    except ImportError:
        return None
    return psutil.cpu_percent(0.3)


def _of_lscpu():
    """{name: what lscpu says}; nothing where it is missing."""
    try:
        printed = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    except OSError:
        return {}
    told = dict(re.findall(r"^([^:\n]+): +(.*)$", printed, re.MULTILINE))
    return {name: told[title] for name, title in LSCPU.items() if title in told}


def _machine(args, malloc):
    """What the figures depend on beside the code."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": platform.processor(),
        **_of_lscpu(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "governor": governor.read_text().strip() if governor.exists() else None,
        "busy_percent": _busy_percent(),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resnet_fused": resnet_fused.__version__,
        "threads": args.threads,
        "mallopt": malloc,
    }


def warn_of_others(machine, where=""):
    if (busy := machine.get("busy_percent") or 0) > MOST_BUSY_PERCENT:
        print(f"{where}warning: the machine was not at rest, others used {busy:.0f} % of its CPUs")


@contextlib.contextmanager
def session(args):
    """Run under the arguments' malloc settings and backend, alike for all providers; yields the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads[-1])
    machine = _machine(args, "left alone" if args.no_mallopt else _keep_freed_memory())
    print(", ".join(f"{key}: {value}" for key, value in machine.items() if value is not None))
    warn_of_others(machine)
    try:
        with resnet_fused.use_backend(args.backend[0]):
            yield machine
    finally:
        torch.set_num_threads(threads)


# Set-ups


def fused_backend(device):
    """Name of the backend that serves fused calls on ``device``."""
    return resnet_fused.backend.select(device.type).name


def is_half(dtype):
    return DTYPES[dtype].itemsize == 2


def parameter_dtype(dtype):
    """Parameters stay in float32 beside half activations, as under autocast."""
    return torch.float32 if is_half(dtype) else DTYPES[dtype]


def autocast(function, device, dtype):
    """``function`` under autocast where ``dtype`` is a half type, else itself."""
    return torch.autocast(device.type, DTYPES[dtype])(function) if is_half(dtype) else function


def compiled(function, mode="default"):
    """``function`` under torch.compile, for one set-up's shapes. Compiled at its first call."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, mode=mode)


# Timing


def _host_timer(call):
    """Function of a number of calls: the host's seconds for each. Timer runs the first calls untimed, pauses garbage
    collection and synchronises with the GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return lambda calls: timer.timeit(calls).mean


def _gpu_timer(call):
    """The same by CUDA events: without what passes on the host before the first and after the last kernel."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(calls):
        call()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return seconds


def timer_of(args, case):
    on_gpu = args.device.type == "cuda" and case.phase != "host_overhead"
    return _gpu_timer if on_gpu else _host_timer


def _on_its_backend(provider, timer):
    if provider.backend not in resnet_fused.available_backends():  # inductor, for one
        return timer

    def seconds(calls):
        with resnet_fused.use_backend(provider.backend):
            return timer(calls)

    return seconds


def measure(providers, rounds, seconds, timer_of=_host_timer):
    """Seconds per call of each provider: a list for each, one mean per block of calls.

    The providers take turns in blocks of several calls, so that drift of the clock meets all alike. Not call by call:
    a provider that streams its output past the caches would leave the next one's inputs cold.
    """
    timers = [_on_its_backend(provider, timer_of(provider.call)) for provider in providers]
    estimates = [timer(2) for timer in timers]
    calls = [max(2, round(0.01 / estimate)) for estimate in estimates]
    block_seconds = statistics.mean(n * estimate for n, estimate in zip(calls, estimates, strict=True))
    rounds = max(rounds, round(seconds / block_seconds))
    times = [[] for _ in providers]
    for _ in range(rounds):
        for timer, n, of_one in zip(timers, calls, times, strict=True):
            of_one.append(timer(n))
    return times


def make_rows(args, case, providers, times):
    """A row of results for each provider, from the seconds its calls took; the first provider is eager."""
    quantiles = [
        torch.tensor(of_one, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        for of_one in times
    ]
    return [
        {
            "bench": args.bench,
            "case": case.name,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "memory_format": provider.memory_format,
            "device": args.device.type,
            "phase": case.phase,
            "provider": provider.name,
            "backend": provider.backend,
            "threads": torch.get_num_threads(),
            "median_ms": median * 1e3,
            "p20_ms": p20 * 1e3,
            "p80_ms": p80 * 1e3,
            "ratio_to_eager": quantiles[0][1] / median,
        }
        for provider, (p20, median, p80) in zip(providers, quantiles, strict=True)
    ]


def _providers_of(case, args):
    """Those of the case that were asked for; where there are several backends, the fused ones for each of them."""
    chosen = []
    for backend in args.backend:
        with resnet_fused.use_backend(backend):
            providers = [p for p in case.setup() if p.name in ("eager", *args.providers)]
        if len(args.backend) > 1:
            names = [f"{p.name}, {p.backend}" if p.name.startswith("fused") else p.name for p in providers]
            providers = [dataclasses.replace(p, name=name) for p, name in zip(providers, names, strict=True)]
        chosen += [p for p in providers if p.name.startswith("fused")] if chosen else providers
    return chosen


def run_case(args, case):
    """Set the case up and measure the providers asked for; returns their rows."""
    torch.manual_seed(0)
    providers = _providers_of(case, args)
    return make_rows(args, case, providers, measure(providers, args.rounds, args.seconds, timer_of(args, case)))


def run(args, cases):
    """Every case, with the threads asked for; returns the rows."""
    from tqdm import tqdm  # here, as benchmarks.gpu is to need nothing but torch

    rows = []
    for threads, case in tqdm(list(itertools.product(args.threads, cases)), desc=args.bench, disable=None):
        torch.set_num_threads(threads)
        rows += run_case(args, case)
    return rows


# Results


def size_of(row):
    """The shape as a reader names it: 32x64x24x24."""
    return "x".join(map(str, row["shape"]))


WHAT = {  # a row is of: title -> function of a row that returns the text
    "case": itemgetter("case"),
    "shape": size_of,
    **{name: itemgetter(name) for name in ("dtype", "memory_format", "device", "phase", "provider", "backend")},
    "threads": lambda row: str(row["threads"]),
}
TIMES = {
    "median ms": lambda row: f"{row['median_ms']:.4f}",
    "20 to 80 %": lambda row: f"{row['p20_ms']:.4f} to {row['p80_ms']:.4f}",
    "ratio to eager": lambda row: f"{row['ratio_to_eager']:.2f}",
}


def print_table(rows, columns):
    lines = [list(columns), *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_json(args, machine, rows, **further_results):
    """Write what was measured, where ``--json`` asks for it."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "rows": rows, **further_results}, indent=1) + "\n")


@contextlib.contextmanager
def figure(args, machine, panels, size=(7, 5), number=1):
    """Yields ``panels`` axes side by side, and saves them where ``--plot`` says, from the second on under a number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
    threads = " and ".join(map(str, machine["threads"]))
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {threads} threads, torch {machine['torch']}", fontsize=9)
    yield figure.subplots(1, panels, squeeze=False)[0]
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot.with_stem(args.plot.stem + (f"-{number}" if number > 1 else "")), dpi=120)


def milliseconds(row):
    return f"{row['median_ms']:.4g} ms"


def pictures(rows):
    """(phase, dtype, {label: rows}) of each picture: at most MOST_BARS rows, without what all are compared with."""
    kinds, result = {}, []
    for row in rows:
        if row["provider"] != "eager" or row["ratio_to_eager"] != 1:
            labels = kinds.setdefault((row["phase"], row["dtype"]), {})
            labels.setdefault(f"{row['case']}\n{size_of(row)}\n{row['provider']}", []).append(row)
    for kind, labels in kinds.items():
        bars = MOST_BARS
        for label, of_label in labels.items():
            if bars + len(of_label) > MOST_BARS:
                result.append((*kind, {}))
                bars = 0
            result[-1][-1][label] = of_label
            bars += len(of_label)
    return result


def plot_ratios(args, machine, rows, label_of=milliseconds):
    """Bars from the line at 1, which is eager: to the right faster. The colour is the layout, the shade the threads."""
    threads = sorted({row["threads"] for row in rows}, reverse=True)
    for number, (phase, dtype, labels) in enumerate(pictures(rows), start=1):
        count = sum(map(len, labels.values()))
        with figure(args, machine, 1, (8, 1.5 + 0.22 * (count + len(labels))), number) as (axes,):
            ticks, place, legend = [], 0, {}
            for of_label in labels.values():
                ticks.append(place + (len(of_label) - 1) / 2)
                for row in of_label:
                    shade = 1 - 0.6 * threads.index(row["threads"]) / len(threads)
                    width = row["ratio_to_eager"] - 1
                    colour = COLOURS[row["memory_format"]]
                    bar = axes.barh(place, width, 0.9, left=1, color=colour, alpha=shade)
                    legend.setdefault(f"{row['memory_format']}, {row['threads']} threads", bar)
                    axes.bar_label(bar, [f"{row['ratio_to_eager']:.2f}, {label_of(row)}"], padding=2, fontsize=7)
                    place += 1
                place += 1
            axes.set_yticks(ticks, labels, fontsize=7)
            axes.invert_yaxis()
            axes.axvline(1, color="black", linewidth=0.8)
            axes.set(title=f"{phase}, {dtype}", xlabel="eager is 1; to the right faster")
            axes.margins(x=0.25)
            axes.legend(legend.values(), legend, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def report(args, machine, rows, plot=plot_ratios, further_columns=None, **further_results):
    """Print the table; write the JSON, ``further_results`` as keys of their own in it, and the plot where asked to."""
    print_table(rows, WHAT | TIMES | (further_columns or {}))
    write_json(args, machine, rows, **further_results)
    if args.plot:
        plot(args, machine, rows)
