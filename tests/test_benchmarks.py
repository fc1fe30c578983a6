"""Each benchmark runs at a tiny size and writes what it says it writes. Its times are nobody's business here."""

import importlib
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ONE_ROUND = ["--memory-format", "contiguous", "--rounds", "1", "--seconds", "0", "--providers", "fused"]
ALIKE = ["--device", "cpu", "--threads", "1", "--no-mallopt"]  # malloc would keep its settings for later tests
RUNS = {
    "tail": ["--batch-size", "1", *ONE_ROUND, "copy"],
    "tail-sizes": ["--sizes", "1024", "4096", "--dtype", "float32", *ONE_ROUND, "copy"],
    "tail-random": ["--random", "1", "--cold", "--dtype", "bfloat16", *ONE_ROUND],
    "overhead": ONE_ROUND,
    "overhead-backends": ["--backend", "cpu,eager", *ONE_ROUND],
    "block": ["--image-size", "32", "--batch-size", "2", *ONE_ROUND],
    "resnet18": ["--image-size", "32", "--batch-size", "2", *ONE_ROUND],
    "models": ["--models", "resnet18,timm/resnet18", "--image-size", "32", "--batch-size", "2", *ONE_ROUND]
    + ["fused, memory_efficient"],
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
PHASES = {"forward", "backward", "forward+backward", "train_step", "inference", "host_overhead"}


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
    assert {"cpu", "torch", "threads", "mallopt"} <= written["machine"].keys()
    for row in written["rows"]:
        assert list(row) == list(ROW)
        assert all(isinstance(row[key], kind) for key, kind in ROW.items())
        assert row["bench"] == name
        assert row["phase"] in PHASES
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["provider"] != "eager" or row["ratio_to_eager"] == 1
    fused = {"fused, cpu", "fused, eager"} if "--backend" in RUNS[run] else {"fused"}
    assert {"eager"} | fused <= {row["provider"] for row in written["rows"]}


def test_the_models_benchmark_counts_what_is_saved(tmp_path):
    results = tmp_path / "models.json"
    small = ["--models", "resnet18", "--image-size", "64", "--batch-size", "2", *ONE_ROUND, "fused, memory_efficient"]
    importlib.import_module("benchmarks.models").main([*small, *ALIKE, "--json", str(results)])
    saved = {row["provider"]: row["bytes"] for row in json.loads(results.read_text())["saved"]}
    assert list(saved) == ["eager", "fused", "fused, memory_efficient"]
    assert saved["fused, memory_efficient"] <= 0.8 * saved["eager"]


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
