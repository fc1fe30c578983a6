"""All that a GPU has to show, by one command, offline and in ten minutes: ``make bench-gpu``.

In this order, each as far as its time allows: what of the suite a GPU runs; the tail, in a loop over one call (hot) and
over more tensors than L2 holds (cold), and as a CUDA graph; networks' training steps; the largest batch that fits; what
Nsight Compute counts, where it is installed. What fails or is not reached is said in its place. --emulated does all of
it at a tiny size on the tests' emulated device: a test of this script, whose times say nothing.
"""

import csv
import functools
import itertools
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import resnet_fused

from . import harness, resnet18, tail
from .models import OPTIONS, models_of

GPU_SUITE = ("tests/test_gpu.py", "tests/test_ops.py", "tests/test_edges.py", "tests/test_gradients.py")


@dataclass(frozen=True)
class Size:
    stages: tuple = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side, of a ResNet at 224x224
    batches: tuple = (32, 256)
    image_size: int = 224
    models: tuple = ("resnet18", "resnet50")
    modes: tuple = ("default", "reduce-overhead")  # of torch.compile
    tests: tuple = GPU_SUITE


TINY = Size(stages=((8, 4),), batches=(2,), image_size=32, models=("resnet18",), modes=(), tests=GPU_SUITE[:1])
SECONDS = {"tests": 110, "tail": 210, "models": 130, "memory": 45, "profile": 45}  # what building leaves of ten minutes
MEMORY_LIMIT = 16 * 2**30  # in which batches are to fit: a whole card takes minutes
BATCH_STEP = 8
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum,"
METRICS += "regex:smsp__average_warps_issue_stalled_[a-z_]*_per_issue_active.ratio"


# Sections: functions of (args, size), which yield rows


def tests(args, size):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", *size.tests]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS["tests"])
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nkilled after {SECONDS['tests']} s"
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"files": " ".join(size.tests), "exit": process.returncode, "result": lines[-1], "failed": failed}


def tails(args, size):
    # What the time does not reach is the larger batch in the last types.
    kinds = itertools.product(size.batches, args.dtype, size.stages, args.memory_format, (True, False), tail.PHASES)
    for batch, dtype, (channels, side), memory_format, cold, phase in kinds:
        shape = batch, channels, side, side
        setup = functools.partial(tail.setup, args.device, shape, dtype, memory_format, phase, cold=cold)
        rows = harness.run_case(args, harness.Case("batch_norm_add_relu", shape, dtype, phase, setup))
        columns = tail.further_columns(rows)
        for row in rows:
            figures = {title: text(row) for title, text in columns.items()}
            yield {**row, "tensors": "cold" if cold else "hot", "us": f"{row['median_ms'] * 1e3:.1f}", **figures}


def train_times(args, case, make_model, memory_format, backend, mode):
    images = torch.randn(case.shape, device=args.device)
    labels = torch.randint(10, case.shape[:1], device=args.device)
    network = resnet18.Network(make_model, args.device, case.dtype, memory_format, compile=mode)
    provider = harness.Provider("", functools.partial(network.train_step, images, labels), memory_format, backend)
    return harness.measure([provider], args.rounds, args.seconds, harness.timer_of(args, case))[0]


def networks(args, size):
    """First all that compiles nothing; a compiled training step of a ResNet-50 may take a minute to make."""
    memory_format, dtype = "channels_last", "bfloat16"
    eager_times = {}
    compiled = [(mode, model) for model in ("eager", "fused") for mode in size.modes]
    for mode, model in [(None, "eager"), (None, "fused"), *compiled]:
        for name, batch in itertools.product(size.models, size.batches):
            make_model = models_of(name, ["fused"])[model]
            case = harness.Case(name, (batch, 3, size.image_size, size.image_size), dtype, "train_step")
            backend = "eager" if model == "eager" else harness.fused_backend(args.device)
            times = train_times(args, case, make_model, memory_format, backend, mode)
            provider = harness.Provider(f"{model}, {mode}" if mode else model, None, memory_format, backend)
            eager = eager_times.setdefault(case, times)
            yield harness.make_rows(args, case, [provider, provider], [eager, times])[1]


def largest_batch(fits):
    """Of the multiples of BATCH_STEP, that ``fits``."""
    least, most = 0, BATCH_STEP
    while fits(most):
        least, most = most, 2 * most
    while most - least > BATCH_STEP:
        middle = (least + most) // 2 // BATCH_STEP * BATCH_STEP
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def memory(args, size):
    if on_gpu := args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT / total))  # for good: nothing follows

    def fits(make_model, batch):
        try:
            network = resnet18.Network(make_model, args.device, "bfloat16", "channels_last")
            images = torch.randn(batch, 3, size.image_size, size.image_size, device=args.device)
            network.train_step(images, torch.zeros(batch, dtype=torch.int64, device=args.device))
            return on_gpu or batch <= 2 * BATCH_STEP  # a CPU's memory is not to be filled
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    for provider, make_model in models_of(size.models[-1], OPTIONS).items():
        batch = largest_batch(functools.partial(fits, make_model))
        yield {"model": size.models[-1], "provider": provider, "GiB": MEMORY_LIMIT / 2**30, "largest batch": batch}


def call_once(device, shape, dtype, memory_format):
    """What is profiled."""
    with resnet_fused.use_backend("cuda"):
        providers = tail.setup(torch.device(device), shape, dtype, memory_format, "forward+backward")
        next(provider for provider in providers if provider.name == "fused").call()


def kernels_of(text):
    """{kernel: {metric: value}}, from Nsight Compute's CSV."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    kernels = {}
    for row in csv.DictReader(lines[first:]):
        kernel = row["Kernel Name"].split("<")[0].split("(")[0].split()[-1]
        value = row["Metric Value"].replace(",", "")
        kernels.setdefault(f"{row['ID']} {kernel}", {})[row["Metric Name"]] = f"{value} {row['Metric Unit']}".strip()
    return kernels


def profile(args, size):
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("there is no ncu")
    for dtype, memory_format in itertools.product(("float32", "bfloat16"), args.memory_format):
        channels, side = size.stages[0]
        shape = size.batches[0], channels, side, side
        call = f"from benchmarks import gpu; gpu.call_once({str(args.device)!r}, {shape}, {dtype!r}, {memory_format!r})"
        names = "regex:statistics|normalize|gradient_sums|input_gradient"
        command = [ncu, "--csv", "--metrics", METRICS, "--kernel-name", names, sys.executable, "-c", call]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS["profile"])
        if '"ID"' not in done.stdout:
            raise RuntimeError((done.stdout + done.stderr).strip()[-300:])
        for kernel, metrics in kernels_of(done.stdout).items():
            stalls = {name: float(value.split()[0]) for name, value in metrics.items() if "stalled" in name}
            worst = sorted(stalls, key=stalls.get, reverse=True)[:3]
            yield {
                "shape": list(shape),
                "dtype": dtype,
                "memory_format": memory_format,
                "kernel": kernel,
                "read": metrics.get("dram__bytes_read.sum"),
                "written": metrics.get("dram__bytes_write.sum"),
                "time": metrics.get("gpu__time_duration.sum"),
                "stalls": ", ".join(f"{name.split('stalled_')[1].split('_per_')[0]} {stalls[name]}" for name in worst),
                "metrics": metrics,
            }


SECTIONS = {"tests": tests, "tail": tails, "models": networks, "memory": memory, "profile": profile}
TAIL_COLUMNS = ("shape", "dtype", "memory_format", "tensors", "phase", "provider", "us", "GB/s", "of the limit")
COLUMNS = {
    "tests": ("files", "result"),
    "tail": (*TAIL_COLUMNS, "ratio_to_eager"),
    "models": ("case", "shape", "provider", "median_ms", "ratio_to_eager"),
    "memory": ("model", "provider", "GiB", "largest batch"),
    "profile": ("shape", "dtype", "memory_format", "kernel", "time", "read", "written", "stalls"),
}


def run_sections(args, size):
    """{section: (rows, what kept it from being whole)}. What one leaves of its time the next ones have."""
    results, deadline = {}, time.monotonic()
    for name, section in SECTIONS.items():
        deadline += SECONDS[name]
        rows, note = [], ""
        try:
            for row in section(args, size):
                rows.append(row)
                if time.monotonic() > deadline:
                    note = "ended by its time limit"
                    break
        except Exception as error:  # whatever one section meets, the others are wanted
            note = f"{type(error).__name__}: {error}"
        results[name] = rows, note
        print(f"{name}: {len(rows)} rows. {note}")
    return results


def cell(value):
    if isinstance(value, float):
        return f"{value:.3g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def as_markdown(machine, results):
    lines = [f"# {machine['gpu'] or 'An emulated GPU'}", "", *(f"- {key}: {value}" for key, value in machine.items())]
    for name, (rows, note) in results.items():
        lines += ["", f"## {name}", *(["", note] if note else [])]
        if rows:
            columns = COLUMNS[name]
            lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv=None):
    providers = ("fused", "copy", "eager, graph", "fused, graph")
    parser = harness.make_parser("gpu", __doc__, 32, providers, plots=False)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--emulated", action="store_true", help="at a tiny size, on the tests' emulated device")
    parser.set_defaults(dtype=["float32", "bfloat16", "float16"], backend=["cuda", "triton"], rounds=3, seconds=0.03)
    args = parser.parse_args(argv)
    size = Size()
    if args.emulated:
        from tests import cuda_on_cpu

        cuda_on_cpu.load()
        size, args.device, args.backend = TINY, torch.device("cpu"), [cuda_on_cpu.BACKEND]
        args.rounds, args.seconds = 1, 0
    elif args.device.type != "cuda":
        parser.error("there is no GPU; --emulated tests this script")
    with harness.session(args) as machine:
        if not args.emulated:
            machine["cuda"] = torch.version.cuda
            machine["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability(args.device))
        results = run_sections(args, size)
    sections = {name: {"rows": rows, "note": note} for name, (rows, note) in results.items()}
    harness.write_json(args, machine, [], **sections)
    report = as_markdown(machine, results)
    print(report)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report)


if __name__ == "__main__":
    main()
