"""What README.md, CONTRIBUTING.md and docs/ name exists: files, anchors, make's targets, modules. Code compiles."""

import re
from pathlib import Path

import pytest

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
