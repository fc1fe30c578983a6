"""What setup.py builds, and what it refuses and why: with and without nvcc, and with one of another CUDA than torch's.

Nothing is compiled: nvcc is a script that answers what setup.py asks, and setup.py runs for its --version.
"""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import get_cxx_compiler

ROOT = Path(__file__).resolve().parent.parent
TORCH_CUDA = torch.version.cuda or "13.0"
MAJOR = int(TORCH_CUDA.split(".")[0])
CUDA_TORCH = f"import torch; torch.version.cuda = {TORCH_CUDA!r}"
CPU_TORCH = "import torch; torch.version.cuda = None"
ARCHITECTURES = "50 75 80 86 90 100 103 120"

needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")

SETUP = """
import json, os, sys
sys.argv = ["setup.py", "--version"]
{stand_in}
exec(open("setup.py").read())
from torch.utils.cpp_extension import CUDA_HOME
print(json.dumps({{
    "built": {{extension.name: extension.sources for extension in extensions}},
    "arguments": [[extension.extra_compile_args, extension.extra_link_args] for extension in extensions],
    "depends": extensions[0].depends,
    "CUDA_HOME": CUDA_HOME,
    "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST"),
    "MAX_JOBS": os.environ["MAX_JOBS"],
}}))
"""


def _nvcc(path, version=TORCH_CUDA, architectures=ARCHITECTURES, top=None):
    """A script that answers as nvcc does."""
    names = "\\n".join(f"compute_{name}" for name in architectures.split())
    path.parent.mkdir(parents=True)
    path.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf '{names}\\n' ;;
  --dryrun) printf '#$ _SPACE_=\\n#$ TOP={top or path.parent}/..\\n#$ rm x\\n' >&2 ;;
  *) exit 1 ;;
esac
""",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


def _run(stand_in="", nvcc=None, **environment):
    """setup.py, with this nvcc first on PATH, and Python code run before it in place of what the machine has."""
    unset = ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    if nvcc is not None:
        inherited["PATH"] = f"{nvcc.parent}{os.pathsep}{inherited['PATH']}"
    code = SETUP.format(stand_in=stand_in)
    environment = {**inherited, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def _report(*arguments, **options):
    done = _run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _refusal(*arguments, **options):
    done = _run(*arguments, **options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@needs_cuda_torch
def test_nvcc_is_enough_to_build_for_cuda_whatever_the_gpu(tmp_path):
    report = _report(nvcc=_nvcc(tmp_path / "bin/nvcc"), CUDA_VISIBLE_DEVICES="")
    assert set(report["built"]) == {"resnet_fused._C", "resnet_fused._CUDA"}
    assert "csrc/ops.cpp" in report["built"]["resnet_fused._C"]  # the schemas, which nothing else may define
    assert all(source.startswith("csrc/cuda/") for source in report["built"]["resnet_fused._CUDA"])


@needs_cuda_torch
def test_an_nvcc_of_another_minor_version_will_do(tmp_path):
    assert "resnet_fused._CUDA" in _report(nvcc=_nvcc(tmp_path / "bin/nvcc", f"{MAJOR}.99"))["built"]


@pytest.mark.parametrize(("force", "other"), [("", MAJOR - 1), ("1", MAJOR * 10 + 1)])
def test_an_nvcc_of_another_major_version_is_refused_with_both_named(tmp_path, force, other):
    nvcc = _nvcc(tmp_path / "bin/nvcc", f"{other}.4")
    message = _refusal(CUDA_TORCH, nvcc, FORCE_CUDA=force)
    assert f"nvcc is of CUDA {other}.4, torch {torch.__version__} of CUDA {TORCH_CUDA}:" in message
    assert str(nvcc) in message and "Set CUDA_HOME" in message and "FORCE_CUDA=0 builds without CUDA" in message


def test_force_cuda_0_leaves_cuda_out_and_asks_no_nvcc(tmp_path):
    nvcc = _nvcc(tmp_path / "bin/nvcc", f"{MAJOR - 1}.4")
    assert list(_report(CUDA_TORCH, nvcc, FORCE_CUDA="0")["built"]) == ["resnet_fused._C"]


def test_without_nvcc_only_force_cuda_1_is_refused(tmp_path):
    assert list(_report(CUDA_TORCH, CUDA_HOME=tmp_path)["built"]) == ["resnet_fused._C"]
    message = _refusal(CUDA_TORCH, CUDA_HOME=tmp_path, FORCE_CUDA="1")
    assert "FORCE_CUDA=1, but there is no nvcc (in CUDA_HOME" in message
    assert f"install the CUDA toolkit {TORCH_CUDA}, or set CUDA_HOME to it" in message


def test_beside_a_torch_without_cuda_only_force_cuda_1_is_refused(tmp_path):
    nvcc = _nvcc(tmp_path / "bin/nvcc")
    assert list(_report(CPU_TORCH, nvcc)["built"]) == ["resnet_fused._C"]
    message = _refusal(CPU_TORCH, nvcc, FORCE_CUDA="1")
    assert f"FORCE_CUDA=1, but torch {torch.__version__} is built without CUDA: install a CUDA build" in message


@needs_cuda_torch
def test_fast_math_in_cflags_is_undone_and_the_builders_path_and_debug_information_left_out(tmp_path):
    """Where it compiles, and where it links, which would flush subnormals; CFLAGS stand before these arguments."""
    for compile_args, link_args in _report(nvcc=_nvcc(tmp_path / "bin/nvcc"), CFLAGS="-ffast-math")["arguments"]:
        cxx = compile_args if isinstance(compile_args, list) else compile_args["cxx"]
        assert {"-fno-fast-math", f"-ffile-prefix-map={ROOT}/="} <= set(cxx)
        assert {"-fno-fast-math", "-Wl,--strip-debug"} <= set(link_args)


def test_another_value_of_force_cuda_is_refused():
    assert "FORCE_CUDA: expected 0, 1 or nothing, got 'yes'" in _refusal(FORCE_CUDA="yes")


@pytest.mark.parametrize("no_extension", ["0", "1"])
def test_an_old_setuptools_is_refused_before_it_finds_the_license_invalid(no_extension):
    old = "import setuptools; setuptools.__version__ = '65.5.0'"
    message = _refusal(old, RESNET_FUSED_NO_EXTENSION=no_extension)
    assert "the build needs setuptools>=77, found 65.5.0. Run `pip install --upgrade setuptools`" in message


def test_every_list_of_the_builds_needs_names_the_setuptools():
    for file in ("pyproject.toml", "Makefile", "README.md", "docs/installation.md"):
        assert '"setuptools>=77"' in (ROOT / file).read_text(encoding="utf-8"), file
    message = _refusal("import sys; sys.modules['torch'] = None")
    assert 'first `pip install torch packaging ninja pybind11 "setuptools>=77"`' in message


@needs_cuda_torch
def test_a_wrapper_script_leads_to_the_toolkit_that_it_calls(tmp_path):
    toolkit = _nvcc(tmp_path / "toolkit/bin/nvcc")
    wrapper = _nvcc(tmp_path / "elsewhere/bin/nvcc", top=toolkit.parent)
    assert _report(nvcc=wrapper)["CUDA_HOME"] == str(tmp_path / "toolkit")


@needs_cuda_torch
@pytest.mark.parametrize("utf8", ["0", "1"])
def test_a_toolkit_may_lie_anywhere_in_any_locale(tmp_path, utf8):
    toolkit = _nvcc(tmp_path / "töölkit of mine/bin/nvcc")
    wrapper = _nvcc(tmp_path / "elsewhere/bin/nvcc", top=toolkit.parent)
    report = _report(nvcc=wrapper, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8=utf8)
    assert os.fsencode(report["CUDA_HOME"]) == os.fsencode(tmp_path / "töölkit of mine")


@needs_cuda_torch
def test_cuda_home_comes_before_path(tmp_path):
    chosen = _nvcc(tmp_path / "chosen/bin/nvcc")
    other = _nvcc(tmp_path / "other/bin/nvcc", f"{MAJOR - 1}.4")
    assert _report(nvcc=other, CUDA_HOME=chosen.parent.parent)["CUDA_HOME"] == str(tmp_path / "chosen")


@needs_cuda_torch
@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (ARCHITECTURES, "7.5;8.0;9.0+PTX;10.0;12.0"),
        ("50 70 75 80 90", "7.5;8.0;9.0+PTX"),
        ("80 90 100 120 130", "8.0;9.0+PTX;10.0;12.0"),
    ],
)
def test_the_default_architectures_are_those_that_nvcc_knows(tmp_path, known, expected):
    nvcc = _nvcc(tmp_path / "bin/nvcc", architectures=known)
    assert _report(nvcc=nvcc, TORCH_CUDA_ARCH_LIST="")["architectures"] == expected


@needs_cuda_torch
def test_the_architectures_asked_for_are_kept(tmp_path):
    assert _report(nvcc=_nvcc(tmp_path / "bin/nvcc"), TORCH_CUDA_ARCH_LIST="8.6")["architectures"] == "8.6"


TORCH_2_10 = {
    "pybind11/pybind11.h": "#ifdef TORCH_TARGET_VERSION\n#error\n#endif\n",
    "pybind11/stl.h": "#ifdef TORCH_TARGET_VERSION\n#error\n#endif\n",
    "torch/csrc/stable/library.h": "#define STABLE_TORCH_LIBRARY(ns, m) library #ns\n",
    "cuda_runtime_api.h": "",
}


@pytest.mark.parametrize("source", ["module.cpp", "cuda/module.cpp", "ops.cpp"])
def test_the_headers_of_the_oldest_torch_take_the_sources(tmp_path, source):
    for name, text in TORCH_2_10.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    preprocess = [*shlex.split(get_cxx_compiler()), "-E", "-P", "-DTORCH_TARGET_VERSION=1", f"-I{tmp_path}", source]
    done = subprocess.run(preprocess, cwd=ROOT / "csrc", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert source != "ops.cpp" or 'library "resnet_fused"' in done.stdout


# ---- MAX_JOBS ----

GIB = 2**30


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """How many compilers setup.py runs at once on many cores, where these are the files about control groups."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4096))
    monkeypatch.setenv("RESNET_FUSED_NO_EXTENSION", "1")
    max_jobs = runpy.run_path(str(ROOT / "setup.py"))["max_jobs"]

    def jobs(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return max_jobs(str(tmp_path))

    return jobs


@pytest.mark.parametrize(("limit", "expected"), [(2 * GIB + 1, 2), (GIB // 2, 1)])
@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/user/build", "user/build/memory.max"),
        ("0::/user/build", "user/memory.max"),
        ("0::/", "memory.max"),  # a container of its own namespace
        ("12:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/", "memory/docker/1f/memory.limit_in_bytes"),
        ("4:memory:/docker/1f", "memory/memory.limit_in_bytes"),  # a container that finds its group mounted as the root
    ],
)
def test_no_more_compilers_run_at_once_than_the_control_groups_memory_holds(jobs, group, file, limit, expected):
    assert jobs({"proc/self/cgroup": group, f"sys/fs/cgroup/{file}": limit}) == expected


def test_control_groups_without_a_limit_leave_the_machines_memory(jobs):
    groups = {"proc/self/cgroup": "4:memory:/a\n0::/b", "sys/fs/cgroup/b/memory.max": "max"}
    unlimited = {**groups, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 2**63 - 4096}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert jobs({}) == jobs(unlimited) == memory // GIB


def test_one_compiler_runs_on_each_core_that_the_process_may_use():
    one_core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert _report(one_core, FORCE_CUDA="0")["MAX_JOBS"] == "1"


def test_the_max_jobs_asked_for_are_kept():
    assert _report(MAX_JOBS="7", FORCE_CUDA="0")["MAX_JOBS"] == "7"


def test_a_source_distribution_made_without_cuda_holds_its_sources():
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert "csrc/cuda/module.cpp" in sources
    assert set(_report(FORCE_CUDA="0")["depends"]) == sources


# ---- RESNET_FUSED_NO_EXTENSION=1 ----

PURE = """
import torch, resnet_fused
from resnet_fused import __main__, functional, use_backend
print(__main__.report())
x = torch.randn(4, 3, 5, 5)
with use_backend("triton"):
    triton = functional.batch_norm_relu(x, None, None, training=True)
with use_backend("eager"):
    torch.testing.assert_close(triton, functional.batch_norm_relu(x, None, None, training=True))
print(resnet_fused.backend.select("cuda").name)
"""
NO_EXTENSION = {**os.environ, "RESNET_FUSED_NO_EXTENSION": "1", "CXX": "no-such-compiler"}


@pytest.fixture
def checkout(tmp_path):
    """A copy, in a folder of the package's name, as git clone makes it."""
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "results")
    return shutil.copytree(ROOT, tmp_path / "resnet_fused", ignore=ignored)


def _output(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_extension_triton_and_eager_work_and_it_says_so(checkout, tmp_path):
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _output(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, checkout, env=NO_EXTENSION)
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    _output(*pip, "install", "--no-deps", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target), "TRITON_INTERPRET": "1"}
    output = _output(sys.executable, "-c", PURE, env=environment, cwd=tmp_path)
    assert "cpu    not available: the C++ extension resnet_fused._C was not built; build it" in output
    assert "triton Triton" in output and output.endswith("\ntriton\n")


def test_an_editable_install_is_found_beside_the_checkout(checkout, tmp_path):
    """Which has no ``__init__.py``, and would be found first, as a namespace, but for an install by a path."""
    build = f"from setuptools.build_meta import build_editable; print(build_editable({str(tmp_path)!r}))"
    *_, wheel = _output(sys.executable, "-c", build, env=NO_EXTENSION, cwd=checkout).split()
    site = tmp_path / "site"
    shutil.unpack_archive(tmp_path / wheel, site, "zip")
    add, find = f"site.addsitedir({str(site)!r})", "importlib.util.find_spec('resnet_fused')"
    code = f"import importlib.util, site; {add}; print({find})"
    assert str(checkout / "resnet_fused/__init__.py") in _output(sys.executable, "-S", "-c", code, cwd=tmp_path)


def test_another_value_of_no_extension_is_refused():
    message = _refusal(RESNET_FUSED_NO_EXTENSION="yes")
    assert "RESNET_FUSED_NO_EXTENSION: expected 0, 1 or nothing, got 'yes'" in message
