"""Writes the tables of README.md and docs/ from what was measured: ``python -m benchmarks.docs RESULTS``.

RESULTS is the folder of JSON files of ``make bench-all``. A table, with the line that tells its conditions, stands
between ``<!-- NAME -->`` and ``<!-- end -->``; one whose file is not there stays as it is, and is named. What begins
with ``<!-- NAME: MACHINE -->`` is of another machine, and written with ``--machine MACHINE``, which writes no other.
"""

import argparse
import functools
import json
import math
import re
import statistics
from pathlib import Path

from . import harness, tail

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/distributed.md")
BLOCK = re.compile(r"<!-- ([\w-]+)(?:: ([\w ]+))? -->\n(.*?)<!-- end -->\n", re.DOTALL)
LAYOUTS = tuple(harness.MEMORY_FORMATS)


# Cells


def digits(value):
    """Three of them: the next one is noise."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def find(rows, **wanted):
    """The row with these values, or None."""
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def milliseconds(row):
    return digits(row["median_ms"]) if row else "not timed"


def against(eager, row):
    """eager / this = ratio, with a word where it is slower."""
    if row is None:
        return "not timed"
    ratio = eager["median_ms"] / row["median_ms"]
    slower = ", *slower*" if round(ratio, 2) < 1 else ""
    return f"{milliseconds(eager)} / {milliseconds(row)} = {ratio:.2f}{slower}"


def table(titles, lines):
    return ["| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *lines)]


def unique(rows, *keys):
    """The values of these keys that occur together, in order."""
    values = (tuple(tuple(v) if isinstance(v := row[key], list) else v for key in keys) for row in rows)
    return list(dict.fromkeys(values))


def images(shape):
    return f"{shape[0]} of {shape[2]}x{shape[3]}"


# Blocks: functions of the files' content, which is read as it is asked for; lists of lines


def machine(results, file="tail"):
    of = results(file)["machine"]
    threads = " or ".join(map(str, of["threads"]))
    details = [
        of["cpu_capability"],
        *(f"{name} {of[name]}" for name in ("model", "l2", "l3", "hypervisor") if name in of),
    ]
    return [f"{threads} threads of {of['gpu'] or of['cpu']} ({', '.join(details)}), torch {of['torch']}."]


def networks(results):
    """README.md's: training and inference, plain and fused, in either layout; and torch.compile's, frozen."""
    models, inference = results("models")["rows"], results("inference")["rows"]
    kinds = [(models, "fused", *kind, "train_step") for kind in unique(models, "case", "shape") if "/" not in kind[0]]
    kinds += [
        (inference, "fused, inference", name, shape, "inference")
        for name, shape in unique(inference, "case", "shape")
        if shape[2] == (96 if name == "resnet18" else 224) and (shape[0] == 1 or "resnet" in name)
    ]
    lines = []
    for rows, fused, name, shape, phase in kinds:
        wanted = {"case": name, "shape": list(shape), "phase": phase, "dtype": "float32"}
        cells = [
            find(rows, **wanted, provider=provider, memory_format=layout)
            for provider in ("eager", fused)
            for layout in LAYOUTS
        ]
        if phase == "inference":
            cells.append(find(rows, **wanted, provider="torch.compile, freezing"))
        least = min(row["median_ms"] for row in cells if row)
        times = [*map(milliseconds, cells), *[""] * (5 - len(cells))]
        times = [f"**{time}**" if time == digits(least) else time for time in times]
        lines.append([f"`{name}`, {phase.replace('train_step', 'training step')}, {images(shape)}", *times])
    titles = ["torchvision's network, images", "eager", "eager, channels_last", "ours", "ours, channels_last"]
    titles.append("torch.compile, freezing")
    ours = "Milliseconds; ours is `fuse(net)`, in inference `fuse(net, inference=True)`; float32, "
    return [*table(titles, lines), "", ours + machine(results, "models")[0]]


def tails(results, dtype):
    rows = [row for row in results("tail")["rows"] if row["dtype"] == dtype]
    most, least = (choose(row["threads"] for row in rows) for choose in (max, min))
    share = tail.further_columns(rows)["of the limit"]
    lines, means = [], {most: [], least: []}
    for layout, shape in unique(rows, "memory_format", "shape"):
        of = {"shape": list(shape), "memory_format": layout}
        fused = functools.partial(find, rows, **of, provider="fused")
        both = fused(phase=tail.PHASES[-1], threads=most)
        eager = find(rows, **of, provider="eager", phase=tail.PHASES[-1], threads=most)
        for threads in means:
            means[threads].append(fused(phase=tail.PHASES[-1], threads=threads)["ratio_to_eager"])
        ratios = [f"{fused(phase=phase, threads=most)['ratio_to_eager']:.2f}" for phase in tail.PHASES]
        cells = [*ratios, milliseconds(eager), milliseconds(both), share(both), f"{means[least][-1]:.2f}"]
        lines.append(["x".join(map(str, shape)), layout, *cells])
    titles = ["shape", "layout", "forward", "backward", "both", "eager, ms", "fused, ms", "of the limit"]
    titles.append(f"both, {least} thread")
    mean, of_least = (statistics.geometric_mean(means[threads]) for threads in (most, least))
    told = f"{dtype}, {most} threads; geometric mean of both {mean:.2f}, with {least} thread {of_least:.2f}:"
    return [told, "", *table(titles, lines)]


def sizes(results):
    rows = results("sizes")["rows"]
    most = max(row["threads"] for row in rows)
    lines = []
    for (shape,) in unique(rows, "shape"):
        size = math.prod(shape) * harness.DTYPES["float32"].itemsize
        power = int(math.log2(size)) // 10
        of_shape = functools.partial(find, rows, shape=list(shape), threads=most)
        cells = [
            against(*(of_shape(memory_format=layout, provider=provider) for provider in ("eager", "fused")))
            for layout in LAYOUTS
        ]
        copy = milliseconds(of_shape(memory_format="contiguous", provider="copy"))
        lines.append([f"{size / 2 ** (10 * power):.0f} {('B', 'KiB', 'MiB', 'GiB')[power]}", *cells, copy])
    titles = ["bytes per tensor", *(f"{layout}: eager / fused, ms" for layout in LAYOUTS), "a copy"]
    return table(titles, lines)


def by_layout(results, file, phases):
    """A line for each case, a column for each phase and layout: eager / fused."""
    rows = results(file)["rows"]
    lines = []
    for name, shape in unique(rows, "case", "shape"):
        of = {"case": name, "shape": list(shape), "dtype": "float32"}
        cells = [
            against(*(find(rows, **of, phase=phase, memory_format=layout, provider=p) for p in ("eager", "fused")))
            for phase in phases
            for layout in LAYOUTS
        ]
        lines.append([f"{name} ({'x'.join(map(str, shape))})", *cells])
    titles = [f"{phase.replace('_', ' ')}, {layout}" for phase in phases for layout in LAYOUTS]
    return table(["", *titles], lines)


def by_provider(results, file):
    """A line for each network, phase, type and layout, a column for each provider."""
    rows = results(file)["rows"]
    providers = [provider for (provider,) in unique(rows, "provider") if provider != "eager"]
    lines = []
    for name, shape, phase, dtype, layout in unique(rows, "case", "shape", "phase", "dtype", "memory_format"):
        of = {"case": name, "shape": list(shape), "phase": phase, "memory_format": layout, "dtype": dtype}
        eager = find(rows, **of, provider="eager")
        others = [find(rows, **of, provider=provider) for provider in providers]
        cells = [against(eager, row) if row and row["provider"] == "fused" else milliseconds(row) for row in others]
        spread = f"{digits(eager['p20_ms'])} to {digits(eager['p80_ms'])}"
        conditions = [phase.replace("_", " "), images(shape), *([dtype] if dtype != "float32" else [])]
        lines.append([f"`{name}`, {', '.join(conditions)}", layout, *cells, spread])
    fused = ["eager / fused" if provider == "fused" else provider for provider in providers]
    lines = table(["network, images", "layout", *fused, "eager, 20 to 80 %"], lines)
    return [*lines, "", f"Milliseconds; {machine(results, file)[0]}"]


def inference(results, file="inference", dtype="float32"):
    rows = results(file)["rows"]
    providers = [provider for (provider,) in unique(rows, "provider") if provider not in ("eager", "fused")]
    lines = []
    for name, shape in unique(rows, "case", "shape"):
        of = {"case": name, "shape": list(shape), "dtype": dtype, "memory_format": "channels_last"}
        eager, *others = (find(rows, **of, provider=provider) for provider in ("eager", *providers))
        cells = [f"{milliseconds(row)} ({row['first_two_calls_ms']:,.0f})" if row else "not timed" for row in others]
        if (fused := find(rows, **of, provider="fused, inference")) and fused["median_ms"] > eager["median_ms"]:
            cells[providers.index("fused, inference")] += ", *slower*"
        spreads = [f"{digits(row['p20_ms'])} to {digits(row['p80_ms'])}" for row in (eager, fused) if row]
        lines.append([f"`{name}`, {images(shape)}", milliseconds(eager), *cells, ", ".join(spreads)])
    lines = table(["network, images", "eager", *providers, "20 to 80 %: eager, fused"], lines)
    return [*lines, "", f"Milliseconds; {dtype}, channels_last, {machine(results, file)[0]}"]


def saved(results):
    rows = results("models")["saved"]
    providers = [provider for (provider,) in unique(rows, "provider")]
    lines = []
    for name, step, layout in unique(rows, "case", "step", "memory_format"):
        of = functools.partial(find, rows, case=name, step=step, memory_format=layout)
        cells = [of(provider=provider) for provider in providers]
        mebibytes = [f"{row['bytes'] / 2**20:.1f}" if row else "not counted" for row in cells]
        least = of(provider="fused, memory_efficient")
        conditions = f"`{name}`, {step.replace('_', ' ')}", layout
        lines.append([*conditions, *mebibytes, f"{least['bytes'] / cells[0]['bytes']:.0%}"])
    return table(["MiB", "layout", *providers, "memory_efficient, of eager's"], lines)


def shares(results):
    rows = results("shares")["steps"]
    lines = []
    for name, layout in unique(rows, "model", "memory_format"):
        eager, fused = (find(rows, model=name, memory_format=layout, provider=p) for p in ("eager", "fused"))
        times, cells = eager["milliseconds"], []
        for group in ("tails", "stem"):
            of_both = " / ".join(digits(row["milliseconds"][group]) for row in (eager, fused))
            cells.append(f"{of_both} = {fused[f'{group}_ratio_to_eager']:.2f}")
        of_step = [f"{times[group] / sum(times.values()):.0%}" for group in ("tails", "stem", "convolutions")]
        lines.append([f"`{name}`", layout, *cells, *of_step])
    titles = ["a training step", "layout", "tails: eager / fused, ms", "stem: eager / fused, ms"]
    return table([*titles, "tails, of eager's step", "stem", "convolutions"], lines)


def memory(results):
    rows = results("memory")["peaks"]
    lines = [
        [layout, *(f"{row['peak_mebibytes']:,.0f}" for row in rows if row["memory_format"] == layout)]
        for (layout,) in unique(rows, "memory_format")
    ]
    return table(["peak, MiB", "eager", "fused"], lines)


def training(results):
    content = results("train")
    lines = [
        [row["provider"], f"{row['shape'][0] / row['median_ms'] * 1e3:.1f}", f"{curve['test_accuracy'][-1]:.2%}"]
        for row, curve in zip(content["rows"], content["curves"], strict=True)
    ]
    return table(["", "images/s", "test accuracy"], lines)


def malloc(results):
    lines = []
    for told, file in (("kept", "resnet18"), ("as it is (`--no-mallopt`)", "resnet18-no-mallopt")):
        of = {"phase": "train_step", "memory_format": "contiguous"}
        rows = results(file)["rows"]
        lines.append([told, *(milliseconds(find(rows, **of, provider=p)) for p in ("eager", "fused"))])
    return table(["freed memory", "eager, ms", "fused, ms"], lines)


def sync(results):
    lines = [
        [f"`{name}`", *(f"{phases[phase][key]:,}" for key in ("collectives", "bytes") for phase in phases)]
        for name, phases in results("sync")["sent"].items()
    ]
    titles = "a training step of", "collectives forward", "backward", "bytes that a process sends forward", "backward"
    return table(titles, lines)


BLOCKS = {
    "networks": networks,
    "machine": machine,
    "tail-float32": functools.partial(tails, dtype="float32"),
    "tail-bfloat16": functools.partial(tails, dtype="bfloat16"),
    "sizes": sizes,
    "overhead": functools.partial(by_layout, file="overhead", phases=["host_overhead"]),
    "block": functools.partial(by_layout, file="block", phases=["train_step", "inference"]),
    "resnet18": functools.partial(by_provider, file="resnet18"),
    "resnet18-bfloat16": functools.partial(by_provider, file="resnet18-bfloat16"),
    "shares": shares,
    "models": functools.partial(by_provider, file="models"),
    "inference": inference,
    "inference-bfloat16": functools.partial(inference, file="inference-bfloat16", dtype="bfloat16"),
    "saved": saved,
    "memory": memory,
    "train": training,
    "malloc": malloc,
    "sync": sync,
}


def rewritten(text, results, machine=""):
    """The page with the machine's blocks written anew; how many; and the names of those whose files are not there."""
    written, missing = [], []

    def block(match):
        name, of, _ = match.groups(default="")
        if of != machine:
            return match[0]
        try:
            lines = BLOCKS[name](results)
        except FileNotFoundError as error:
            missing.append(f"{name}: there is no {error.filename}")
            return match[0]
        written.append(name)
        return "\n".join([match[0].partition("\n")[0], *lines, "<!-- end -->", ""])

    return BLOCK.sub(block, text), len(written), missing


def reader(folder):
    return functools.cache(lambda file: json.loads((folder / f"{file}.json").read_text()))


def main(argv=None, pages=PAGES):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the folder: benchmarks/results/all")
    parser.add_argument("--machine", default="", help="the name of another machine, whose tables are to be written")
    args = parser.parse_args(argv)
    results = reader(args.results)
    for page in pages:
        text, written, missing = rewritten(page.read_text(encoding="utf-8"), results, args.machine)
        page.write_text(text, encoding="utf-8")
        print(f"{page.name}: {written} tables written", *missing, sep="\n    ")


if __name__ == "__main__":
    main()
