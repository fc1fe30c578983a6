"""Each benchmark runs at a tiny size and writes what it says it writes. Its times are nobody's business here."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, harness

from .test_build import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ONE_ROUND = ["--memory-format", "contiguous", "--rounds", "1", "--seconds", "0", "--providers", "fused"]
ALIKE = ["--device", "cpu", "--threads", "1", "--no-mallopt"]  # malloc would keep its settings for later tests
RUNS = {
    "tail": ["--batch-size", "1", *ONE_ROUND, "copy"],
    "tail-sizes": ["--sizes", "1024", "4096", "--dtype", "float32", *ONE_ROUND, "copy"],
    "tail-shapes": ["--shapes", "1x8x4x4", "2x3x5x7", "--dtype", "float64", *ONE_ROUND],
    "tail-random": ["--random", "1", "--cold", "--dtype", "bfloat16", *ONE_ROUND],
    "overhead": ONE_ROUND,
    "overhead-backends": ["--backend", "cpu,eager", *ONE_ROUND],
    "block": ["--image-size", "32", "--batch-size", "2", *ONE_ROUND],
    "resnet18": ["--image-size", "32", "--batch-size", "2", *ONE_ROUND],
    "models": ["--models", "resnet18,timm/resnet18", "--image-size", "32", "--batch-size", "2", *ONE_ROUND]
    + ["fused, memory_efficient"],
    "inference": ["--models", "resnet18,timm/resnet18", "--sizes", "32", "--batch-sizes", "1,2", "--dtype", "bfloat16"]
    + [*ONE_ROUND, "fused, inference"],
    "train": ["--image-size", "32", "--batch-size", "64", "--steps", "2"],
}
ROW = {
    "bench": str,
    "case": str,
    "shape": list,
    "dtype": str,
    "memory_format": str,
    "device": str,
    "phase": str,
    "provider": str,
    "backend": str,
    "threads": int,
    "median_ms": float,
    "p20_ms": float,
    "p80_ms": float,
    "ratio_to_eager": float,
}
MACHINE = {"cpu", "cpu_count", "cpu_capability", "governor", "busy_percent", "torch", "threads", "mallopt"}
PHASES = {"forward", "backward", "forward+backward", "train_step", "frozen_step", "inference", "host_overhead"}


@pytest.mark.parametrize("run", RUNS)
def test_benchmark_writes_table_json_and_plot(run, tmp_path, capsys):
    name = run.split("-")[0]
    results, plot = tmp_path / "results" / f"{run}.json", tmp_path / "results" / f"{run}.png"
    main = importlib.import_module(f"benchmarks.{name}").main
    main([*RUNS[run], *ALIKE, "--json", str(results), "--plot", str(plot)])

    table = capsys.readouterr().out
    assert "median ms" in table and "ratio to eager" in table
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(results.read_text())
    assert written["machine"].keys() >= MACHINE
    for row in written["rows"]:
        assert name != "inference" or row.pop("first_two_calls_ms") > 0
        assert list(row) == list(ROW)
        assert all(isinstance(row[key], kind) for key, kind in ROW.items())
        assert row["bench"] == name
        assert row["phase"] in PHASES
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["provider"] != "eager" or row["ratio_to_eager"] == 1
    fused = {"fused, cpu", "fused, eager"} if "--backend" in RUNS[run] else {"fused"}
    assert {"eager"} | fused <= {row["provider"] for row in written["rows"]}


def test_shapes_are_those_asked_for_and_others_are_refused(capsys):
    tail = importlib.import_module("benchmarks.tail")
    assert tail.shape_of("1x8x4x4") == (1, 8, 4, 4)
    with pytest.raises(SystemExit):
        tail.main(["--shapes", "8x4x4"])
    assert "invalid shape_of value: '8x4x4'" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("lscpu"), reason="no lscpu")
def test_the_machine_is_told_with_its_caches():
    told = harness._of_lscpu()
    assert told["cpu"] and told["l2"].split()[1] in ("KiB", "MiB")


@pytest.mark.parametrize("percent, warned", [(40.0, True), (2.0, False), (None, False)])
def test_a_machine_that_others_use_is_told(percent, warned, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.harness._busy_percent", lambda: percent)
    with harness.session(harness.make_parser("tail", "", 1).parse_args(ALIKE)) as machine:
        assert machine["busy_percent"] == percent
    assert ("not at rest, others used 40 % of its CPUs" in capsys.readouterr().out) == warned


def _row(ms=2.0, noise=0.1, eager_ms=4.0, **changes):
    row = dict.fromkeys(ROW, "") | {"shape": [32, 64, 24, 24], "phase": "train_step", "provider": "fused"}
    times = {"median_ms": ms, "p20_ms": ms - noise, "p80_ms": ms + noise, "ratio_to_eager": eager_ms / ms}
    return row | {"memory_format": "contiguous", "threads": 2} | times | changes


def test_pictures_have_twenty_bars_at_most_and_none_of_eager():
    shapes = [[32, channels, 8, 8] for channels in range(1, 8)]
    rows = [
        _row(shape=shape, memory_format=layout, threads=threads, provider=provider, ratio_to_eager=ratio, phase=phase)
        for shape in shapes
        for provider, ratio in (("eager", 1.0), ("fused", 2.0))
        for layout in ("contiguous", "channels_last")
        for threads in (1, 2)
        for phase in ("forward", "backward")
    ]
    bars = [[row for of_label in labels.values() for row in of_label] for _, _, labels in harness.pictures(rows)]
    assert [len(of_picture) for of_picture in bars] == [20, 8, 20, 8]
    assert {row["provider"] for of_picture in bars for row in of_picture} == {"fused"}
    assert [len({row["phase"] for row in of_picture}) for of_picture in bars] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "second, options, status, told",
    [
        (_row(2.3), [], 1, "0.87 0.79 to 0.95 SLOWER"),
        (_row(2.15), [], 0, "0.93 0.84 to 1.02"),
        (_row(1.5), [], 0, "1.33 1.19 to 1.50 faster"),
        (_row(4.0, 0.2, eager_ms=8.0), [], 1, "SLOWER"),
        (_row(4.0, 0.2, eager_ms=8.0), ["--to-eager"], 0, "1.00 0.90 to 1.11"),
    ],
    ids=["slower", "within noise", "faster", "a slower machine", "a slower machine, to eager"],
)
def test_two_runs_are_compared_beyond_their_noise(second, options, status, told, tmp_path, capsys):
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for file, row, threads in zip(files, (_row(), second), (1, 2), strict=True):
        machine = {"threads": threads, "busy_percent": 40.0 if threads == 2 else 0.0}
        Path(file).write_text(json.dumps({"machine": machine, "rows": [row, _row(case=file)]}))
    assert compare.main([*files, *options]) == status
    printed = " ".join(capsys.readouterr().out.split())
    assert told in printed and "threads: 1, then 2" in printed and f"{files[1]}: warning" in printed
    assert f"{status} of 1 slower beyond noise; 2 rows are in one file alone" in printed


def test_runs_that_have_nothing_in_common_are_refused(tmp_path, capsys):
    for file, case in (("a.json", "one"), ("b.json", "other")):
        (tmp_path / file).write_text(json.dumps({"machine": {}, "rows": [_row(case=case)]}))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "no row in common" in capsys.readouterr().err


def test_nothing_but_the_benchmarks_own_is_printed():
    command = [sys.executable, "-m", "benchmarks.shares", "--models", "resnet18", "--rounds", "1", "--image-size", "32"]
    done = subprocess.run([*command, "--batch-size", "2"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not re.search(r"it/s|s/it|\?it", line)] == []


def test_the_sync_benchmark_counts_what_is_sent(tmp_path):
    results = tmp_path / "sync.json"
    small = ["--models", "resnet18", "--image-size", "32", "--batch-size", "2", "--memory-format", "contiguous"]
    main = importlib.import_module("benchmarks.sync").main
    main([*small, "--steps", "1", "--threads", "1", "--no-mallopt", "--json", str(results)])
    written = json.loads(results.read_text())
    assert [row["provider"] for row in written["rows"]] == ["eager", "fused", "fused, synchronised"]
    channels = 64 * 5 + (128 + 256 + 512) * 5  # of 20 batch norms; a header of three values in each of 17 collectives
    assert written["sent"]["resnet18"]["forward"] == {"collectives": 17, "bytes": 8 * (2 * channels + 3 * 17)}


def test_the_models_benchmark_counts_what_is_saved(tmp_path):
    results = tmp_path / "models.json"
    small = ["--models", "resnet18", "--image-size", "64", "--batch-size", "2", *ONE_ROUND, "fused, memory_efficient"]
    importlib.import_module("benchmarks.models").main([*small, *ALIKE, "--json", str(results)])
    saved = {(row["step"], row["provider"]): row["bytes"] for row in json.loads(results.read_text())["saved"]}
    for step in ("train_step", "frozen_step"):
        assert [provider for of, provider in saved if of == step] == ["eager", "fused", "fused, memory_efficient"]
        assert saved[step, "fused, memory_efficient"] <= 0.8 * saved[step, "eager"]


@pytest.mark.parametrize("name, key", [("shares", "steps"), ("memory", "peaks")])
def test_benchmark_without_times_writes_its_results(name, key, tmp_path):
    results = tmp_path / f"{name}.json"
    small = ["--image-size", "64", "--batch-size", "2", "--memory-format", "contiguous"]
    small += ["--models", "resnet18", "--rounds", "1"] if name == "shares" else []
    importlib.import_module(f"benchmarks.{name}").main([*small, *ALIKE, "--json", str(results)])
    written = json.loads(results.read_text())
    assert written["machine"]["threads"] == [1]
    for result in written[key]:
        assert result["dtype"] == "float32" and result["memory_format"] == "contiguous"
        figures = result["milliseconds"].values() if name == "shares" else [result["peak_mebibytes"]]
        assert all(figure > 0 for figure in figures)
    assert {"eager", "fused"} == {result["provider"] for result in written[key]}


def test_the_reach_benchmark_counts_what_a_relu_follows_and_what_is_fused(tmp_path):
    results, table = tmp_path / "reach.json", tmp_path / "reach.md"
    models = ["resnet18", "mobilenet_v3_large", "timm/repvgg_a0"]
    importlib.import_module("benchmarks.reach").main(
        ["--models", *models, "--image-size", "64", "--json", str(results), "--markdown", str(table)]
    )
    rows = json.loads(results.read_text())["rows"]
    counts = [(row["batch_norms"], row["followed_by_relu"], row["fused_of_those"]) for row in rows]
    assert counts == [(20, 20, 20), (46, 11, 11), (61, 27, 10)]
    assert rows[2]["reasons"] == {"plain: its output went to add_": 17}
    assert "| resnet18 | 20 | 20 | 20 |" in table.read_text()


class Measures(Exception):
    pass


def test_the_benchmarks_take_the_options_of_the_makefile(monkeypatch):
    def measures(args):
        raise Measures

    monkeypatch.setattr("benchmarks.harness.session", measures)
    printed = subprocess.run(["make", "-n", "bench", "bench-all"], cwd=ROOT, capture_output=True, text=True, check=True)
    runs = re.findall(r"-m benchmarks\.(\w+) (.*)", printed.stdout)
    assert len(runs) == 19
    for name, options in runs:
        with pytest.raises(Measures):
            importlib.import_module(f"benchmarks.{name}").main(shlex.split(options))


NCU = """#!/bin/sh
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","void statistics<float, (int)4>(Forward)","dram__bytes_read.sum","Mbyte","12.5"'
echo '"0","void statistics<float, (int)4>(Forward)","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","inst","0.5"'
echo '"0","void statistics<float, (int)4>(Forward)","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","inst","1,002.5"'
"""  # noqa: E501


def test_the_gpu_benchmark_reports_all_its_sections(tmp_path, monkeypatch):
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    results, report = tmp_path / "gpu.json", tmp_path / "gpu.md"
    small = ["--emulated", "--dtype", "float32", "--memory-format", "contiguous", "--threads", "1", "--no-mallopt"]
    importlib.import_module("benchmarks.gpu").main([*small, "--json", str(results), "--markdown", str(report)])
    written = json.loads(results.read_text())
    for name in ("tests", "tail", "models", "memory", "profile"):
        assert written[name]["rows"] and not written[name]["note"], name
        assert f"\n## {name}\n\n| " in report.read_text()
    assert {row["backend"] for row in written["tail"]["rows"]} == {"eager", "cuda-emulated"}
    assert {row["tensors"] for row in written["tail"]["rows"]} == {"hot", "cold"}
    assert [row["backend"] for row in written["models"]["rows"]] == ["eager", "cuda-emulated"]
    kernel = written["profile"]["rows"][0]
    assert (kernel["kernel"], kernel["read"]) == ("0 statistics", "12.5 Mbyte")
    assert kernel["stalls"] == "wait 1002.5, barrier 0.5"


def test_a_section_that_fails_or_takes_too_long_leaves_the_others(monkeypatch):
    gpu = importlib.import_module("benchmarks.gpu")

    def fails(args, size):
        yield {"row": 1}
        raise RuntimeError("no luck")

    def endless(args, size):
        while True:
            yield {}

    monkeypatch.setattr(gpu, "SECTIONS", {"fails": fails, "endless": endless})
    monkeypatch.setattr(gpu, "SECONDS", {"fails": 0, "endless": 0.1})
    results = gpu.run_sections(None, None)
    assert results["fails"] == ([{"row": 1}], "ended by its time limit")
    monkeypatch.setattr(gpu, "SECONDS", {"fails": 60, "endless": -59.9})
    results = gpu.run_sections(None, None)
    assert results["fails"] == ([{"row": 1}], "RuntimeError: no luck")
    assert results["endless"][1] == "ended by its time limit"


@pytest.mark.parametrize("largest", [0, 8, 24, 1000])
def test_the_largest_batch_is_found(largest):
    assert importlib.import_module("benchmarks.gpu").largest_batch(lambda batch: batch <= largest + 7) == largest
