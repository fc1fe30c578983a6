"""The CUDA extension as far as no GPU is needed: it loads, its ops are registered.

Skipped only where it cannot be built: without nvcc, or where torch is built without CUDA.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import resnet_fused
from resnet_fused import backend as backend_module
from resnet_fused import functional, use_backend
from resnet_fused.ops import Ops

PACKAGE = Path(resnet_fused.__file__).parent
BUILT = any(PACKAGE.glob("_CUDA*.so"))  # no import: an editable install would lend a copy of the tree its own

pytestmark = pytest.mark.skipif(
    not BUILT and (torch.version.cuda is None or CUDA_HOME is None or os.environ.get("FORCE_CUDA") == "0"),
    reason="the CUDA extension is not built: no nvcc, or torch is built without CUDA",
)


def _subprocess(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


# ---- The module ----


def test_it_is_built_and_loads_without_a_gpu():
    code = (
        "import torch, resnet_fused; from resnet_fused import _CUDA; print(_CUDA.cuda_version(), _CUDA.arch_list());"
        "assert not torch.cuda.is_initialized()"
    )
    done = _subprocess("-c", code, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d \d+\.\d\S*\n", done.stdout)
    assert done.stdout.split(".")[0] == torch.version.cuda.split(".")[0]


@pytest.mark.parametrize("name", Ops._fields)
def test_every_op_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{name}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{name}", "CPU")


def test_auto_serves_cpu_and_cuda_tensors_each_by_its_own():
    names = resnet_fused.available_backends()
    assert names.index("cpu") < names.index("cuda") < names.index("eager")
    with use_backend("auto"):
        assert [backend_module.select(device).name for device in ("cpu", "cuda")] == ["cpu", "cuda"]


def test_the_cuda_backend_refuses_a_cpu_tensor():
    with use_backend("cuda"), pytest.raises(ValueError, match="'cuda' serves inputs on cuda, got one on cpu"):
        functional.batch_norm_relu(torch.randn(4, 3), None, None, training=True)


def test_the_environment_chooses_it():
    code = "import resnet_fused.backend as b; print(b.select('cuda').name)"
    done = _subprocess("-c", code, env={**os.environ, "RESNET_FUSED_BACKEND": "cuda"})
    assert done.stdout.strip() == "cuda", done.stderr


def test_the_report_names_the_architectures_and_the_cuda_version():
    from resnet_fused import _CUDA

    done = _subprocess("-m", "resnet_fused")
    assert f"compute capability {_CUDA.arch_list()}, built with CUDA {_CUDA.cuda_version()}\n" in done.stdout


# ---- Where it is missing ----


CALL = """
import torch, resnet_fused
from resnet_fused import __main__, functional
assert resnet_fused.available_backends() == ["cpu", "triton", "eager"], resnet_fused.available_backends()
functional.batch_norm_relu(torch.randn(4, 3), None, None, training=True)
print(__main__.report())
"""


def _reason(code="", **options):
    """Why there is no CUDA backend after this code; a call on a CPU tensor is served all the same."""
    done = _subprocess("-c", f"import sys\n{code}\n{CALL}", **options)
    assert done.returncode == 0, done.stderr
    return re.search(r"cuda +not available: (.*)", done.stdout)[1]


def test_where_its_libcudart_is_missing_the_cpu_backend_serves_and_it_says_why(tmp_path):
    package = tmp_path / "resnet_fused"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = package.glob("_CUDA*.so")
    content = library.read_bytes()
    name = re.search(rb"libcudart\.so\.\d+", content)[0]
    missing = name[:-2] + b"zz"
    library.write_bytes(content.replace(name, missing))
    reason = _reason(cwd=tmp_path)
    assert "_CUDA does not load" in reason and f"{missing.decode()}: cannot open shared object file" in reason
    assert f"torch {torch.__version__}, {torch.version.cuda}" in reason and "FORCE_CUDA=1 pip install" in reason


def test_where_it_was_not_built_it_says_how():
    reason = _reason("sys.modules['resnet_fused._CUDA'] = None")
    assert "was not built" in reason and "nvcc" in reason
    assert f"CUDA toolkit {torch.version.cuda}" in reason and "FORCE_CUDA=1 pip install" in reason


def test_where_torch_has_no_cuda_it_says_so():
    reason = _reason("sys.modules['resnet_fused._CUDA'] = None; import torch; torch.version.cuda = None")
    assert f"torch {torch.__version__} is built without CUDA; install a CUDA build" in reason


def test_it_needs_the_ops_that_the_cpu_extension_declares():
    code = (
        "import sys; sys.modules['resnet_fused._C'] = None; import resnet_fused; "
        "print(resnet_fused.available_backends(), resnet_fused.backend.all_backends()[1].unavailable)"
    )
    done = _subprocess("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['triton', 'eager'] its ops are declared by the CPU's extension, and")
