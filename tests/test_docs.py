"""What README.md, CONTRIBUTING.md and docs/ name exists: files, anchors, make's targets, modules. Code compiles."""

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import docs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _read(page):
    return page.read_text(encoding="utf-8")


def _anchors(page):
    """What GitHub makes of the headings: a second one of a name gets ``-1``."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", _read(page)), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(slug if slug not in anchors else f"{slug}-1")
    return anchors


@of_each_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", _read(page))):
        if not link.startswith(("https://", "http://")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


@of_each_page
def test_python_blocks_compile(page):
    for language, code in FENCE.findall(_read(page)):
        if language == "python":
            compile(code, page.name, "exec")


@of_each_page
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", _read(ROOT / "Makefile"), re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    commands = "\n".join([code for _, code in FENCE.findall(_read(page))] + re.findall(r"`([^`\n]+)`", _read(page)))
    for target in re.findall(r"^make ([\w-]+)", commands, re.MULTILINE):
        assert target in targets, f"make {target}"
    for module in re.findall(r"python -m (benchmarks\.\w+|tests\.\w+)", commands):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_readme_has_at_most_150_lines():
    assert len(_read(ROOT / "README.md").splitlines()) <= 150


PROVIDERS = {  # by file, those that the generated pages' tables have columns for
    "tail": ("eager", "fused", "copy"),
    "sizes": ("eager", "fused", "copy"),
    "models": ("eager", "torch.compile", "fused", "fused, memory_efficient"),
    "resnet18": ("eager", "torch.compile", "fused"),
    "inference": ("eager", "torch.compile, freezing", "fused, inference"),
    "inference-bfloat16": ("eager", "torch.compile, freezing", "fused, inference"),
}
CASES = {  # by file: cases, shapes, phases
    "tail": (["batch_norm_add_relu"], [[32, 64, 24, 24]], ["forward", "backward", "forward+backward"]),
    "sizes": (["batch_norm_add_relu"], [[2, 64, 2, 1], [8, 64, 32, 32]], ["forward+backward"]),
    "overhead": (["block"], [[1, 2, 2, 2]], ["host_overhead"]),
    "block": (["stage 1"], [[32, 64, 24, 24]], ["train_step", "inference"]),
    "resnet18": (["resnet18"], [[32, 1, 96, 96]], ["train_step", "inference"]),
    "resnet18-no-mallopt": (["resnet18"], [[32, 1, 96, 96]], ["train_step", "inference"]),
    "resnet18-bfloat16": (["resnet18"], [[32, 1, 96, 96]], ["train_step", "inference"]),
    "models": (["resnet18", "resnet50"], [[32, 3, 96, 96]], ["train_step", "inference"]),
    "inference": (["resnet18", "resnet50"], [[8, 3, 96, 96], [8, 3, 224, 224]], ["inference"]),
    "inference-bfloat16": (["resnet18"], [[8, 3, 96, 96]], ["inference"]),
    "train": (["digits"], [[32, 1, 96, 96]], ["train_step"]),
    "sync": (["resnet18"], [[32, 3, 96, 96]], ["train_step"]),
}
DTYPES = {"tail": ["float32", "bfloat16"], "inference-bfloat16": ["bfloat16"]}
MILLISECONDS = {"eager": 300.0, "fused": 200.0, "fused, inference": 150.0}


def _results(file):
    """As a benchmark writes them: eager takes 300 ms, others 200 or 150, in channels_last one more."""
    layouts = ["contiguous"] if file == "train" else ["contiguous", "channels_last"]
    providers = PROVIDERS.get(file, ("eager", "fused"))
    rows = []
    if file in CASES:
        for case, shape, phase, provider, layout, dtype, threads in itertools.product(
            *CASES[file], providers, layouts, DTYPES.get(file, ["float32"]), [1, 2]
        ):
            of = {"case": case, "shape": shape, "phase": phase, "provider": provider, "memory_format": layout}
            ms = MILLISECONDS.get(provider, 250.0) + (layout == "channels_last")
            times = {"median_ms": ms, "p20_ms": ms - 9, "p80_ms": ms + 9, "ratio_to_eager": 300 / ms}
            rows += [of | times | {"dtype": dtype, "threads": threads, "first_two_calls_ms": 1234.5}]
    rows = rows if file in ("tail", "sizes") else [row for row in rows if row["threads"] == 2]
    if file.startswith("inference"):
        rows = [row for row in rows if row["provider"] == "eager" or row["memory_format"] == "channels_last"]
    kinds = [{"memory_format": layout, "provider": p} for layout in layouts for p in providers]
    return {
        "machine": {
            "cpu": "A CPU",
            "cpu_capability": "AVX2",
            "l2": "4 MiB",
            "gpu": None,
            "threads": [1, 2],
            "torch": "2.14.1",
        },
        "rows": rows,
        "saved": [kind | {"case": "resnet18", "step": "train_step", "bytes": 2**27} for kind in kinds],
        "peaks": [kind | {"peak_mebibytes": 1020.4} for kind in kinds],
        "curves": [{"test_accuracy": [0.5, 0.9944]} for _ in rows],
        "steps": [
            kind
            | {"model": "resnet18", "milliseconds": {"tails": 12.0, "stem": 8.0, "convolutions": 80.0}}
            | {"tails_ratio_to_eager": 1.0, "stem_ratio_to_eager": 2.0}
            for kind in kinds
        ],
        "sent": {"resnet18": {phase: {"collectives": 17, "bytes": 77208} for phase in ("forward", "backward")}},
    }


@pytest.fixture
def written(tmp_path):
    """The pages, their blocks written from such results."""
    (tmp_path / "results").mkdir()
    for file in (*CASES, "shares", "memory"):
        (tmp_path / "results" / f"{file}.json").write_text(json.dumps(_results(file)))
    pages = [tmp_path / page.name for page in docs.PAGES]
    for copy, page in zip(pages, docs.PAGES, strict=True):
        copy.write_text(_read(page), encoding="utf-8")
    for machine in {machine for page in pages for _, machine, _ in docs.BLOCK.findall(_read(page))}:
        docs.main([str(tmp_path / "results"), "--machine", machine], pages)
        first = [_read(page) for page in pages]
        docs.main([str(tmp_path / "results"), "--machine", machine], pages)
        assert first == [_read(page) for page in pages]
    return {name: body for text in first for name, _, body in docs.BLOCK.findall(text)}


def test_every_table_is_written_from_results(written):
    assert written.keys() == docs.BLOCKS.keys()
    networks = written["networks"]
    assert "| `resnet50`, training step, 32 of 96x96 | 300 | 301 | **200** | 201 |  |" in networks
    assert "| `resnet18`, inference, 8 of 96x96 | 300 | 301 | not timed | **151** | 251 |" in networks
    assert "2 threads of A CPU (AVX2, l2 4 MiB), torch 2.14.1." in networks
    assert "| `resnet18`, train step, 32 of 96x96 | contiguous | 250 | 300 / 200 = 1.50 |" in written["resnet18"]
    assert "| 1 KiB | 300 / 200 = 1.50 | 301 / 201 = 1.50 | 250 |" in written["sizes"]
    assert "| 12.0 / 12.0 = 1.00 | 8.00 / 8.00 = 2.00 | 12% | 8% | 80% |" in written["shares"]
    assert "| `resnet18` | 17 | 17 | 77,208 | 77,208 |" in written["sync"]


def test_the_pages_tables_are_as_the_script_writes_them(written):
    def titles(body):
        return {title.strip() for title in body[body.index("|") :].splitlines()[0].split("|")}

    blocks = [block for page in docs.PAGES for block in docs.BLOCK.findall(_read(page))]
    assert sorted(name for name, machine, _ in blocks if not machine) == sorted(docs.BLOCKS)
    assert len({(name, machine) for name, machine, _ in blocks}) == len(blocks)
    for name, _, body in blocks:
        if "|" in body:
            assert titles(written[name]) <= titles(body), name  # more where rivals were installed


def test_another_machines_tables_are_left(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps(_results("sizes")))
    page, old = tmp_path / "page.md", "<!-- sizes -->\n| 1 |\n<!-- end -->\n"
    page.write_text(old + "<!-- sizes: Zen 4 -->\n| 2 |\n<!-- end -->\n")
    docs.main([str(tmp_path), "--machine", "Zen 4"], [page])
    assert page.read_text().startswith(old)
    assert "<!-- sizes: Zen 4 -->\n| bytes per tensor |" in page.read_text()


def test_a_table_whose_results_are_not_there_stays(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- sizes -->\n| 1 |\n<!-- end -->\n")
    docs.main([str(tmp_path)], [page])
    assert page.read_text() == "<!-- sizes -->\n| 1 |\n<!-- end -->\n"
    assert "sizes: there is no" in capsys.readouterr().out
