"""The CUDA extension as far as no GPU is needed: it loads, its ops are registered, fake CUDA tensors flow through.

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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import CUDA_HOME

import resnet_fused
from resnet_fused import FusedResidual, functional, resnet18, use_backend
from resnet_fused import backend as backend_module

from .problem import in_layout

PACKAGE = Path(resnet_fused.__file__).parent
BUILT = any(PACKAGE.glob("_CUDA*.so"))  # no import: an editable install would lend a copy of the tree its own
OPS = tuple(
    name + suffix
    for name in ("batch_norm_relu", "batch_norm_add_relu", "batch_norm_add_batch_norm_relu")
    for suffix in ("", "_backward")
) + ("batch_norm_relu_recompute",)
SHAPES = [(4, 6, 5, 3), (4, 5, 4, 3, 3), (2, 7, 9), (6, 9)]

pytestmark = pytest.mark.skipif(
    not BUILT and (torch.version.cuda is None or CUDA_HOME is None or os.environ.get("FORCE_CUDA") == "0"),
    reason="the CUDA extension is not built: no nvcc, or torch is built without CUDA",
)


@pytest.fixture
def fake_cuda():
    """Tensors made are fake CUDA ones, and served by the CUDA backend."""
    with FakeTensorMode(), torch.device("cuda"), use_backend("cuda"):
        yield


def _memory_formats(tensor):
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(tensor.dim(), [])
    return [f for f in (torch.contiguous_format, *formats) if tensor.is_contiguous(memory_format=f)]


def _assert_like(actual, expected):
    assert (actual is None) == (expected is None)
    if expected is None:
        return
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    assert _memory_formats(actual) == _memory_formats(expected)


def _mask_shape(tensor):
    """Of the mask's bits, as csrc/ops.cpp has it."""
    batch, channels, *sizes = tensor.shape
    inner = torch.Size(sizes).numel()
    rows, columns = (batch, channels * inner) if tensor.is_contiguous() else (batch * inner, channels)
    return rows, (columns + 7) // 8


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


@pytest.mark.parametrize("name", OPS)
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


# ---- Fake tensors ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forwards_outputs_are_as_eagers(fake_cuda, shape, dtype, layout, training, with_residual):
    x = in_layout(torch.empty(shape, dtype=dtype), layout)
    vector = torch.empty(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = (vector, vector, None, vector, vector, None, training, 0.1, 1e-5)
    if with_residual == "normalized":
        norm = (*arguments[:-3], *arguments[-2:])
        other = (*(v if v is None else torch.empty_like(v) for v in norm[:-2]), *norm[-2:])
        op = torch.ops.resnet_fused.batch_norm_add_batch_norm_relu
        output, statistics, of_residual, mask = op(x, *norm, torch.empty_like(x), *other, training)
        _assert_like(of_residual, statistics)
    elif with_residual:
        output, statistics, mask = torch.ops.resnet_fused.batch_norm_add_relu(x, torch.empty_like(x), *arguments)
    else:
        output, statistics = torch.ops.resnet_fused.batch_norm_relu(x, *arguments)
    _assert_like(output, x)
    _assert_like(statistics, torch.empty(2, shape[1], dtype=torch.float64))
    if with_residual:
        _assert_like(mask, torch.empty(_mask_shape(x) if training else 0, dtype=torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backwards_outputs_are_as_eagers(fake_cuda, shape, dtype, layout, training):
    x = in_layout(torch.empty(shape, dtype=dtype), layout)
    weight = torch.empty(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    statistics = torch.empty(2, shape[1], dtype=torch.float64)
    mask = torch.empty(_mask_shape(x), dtype=torch.uint8)
    tail = (weight, None, None, statistics, training)
    gradients = torch.ops.resnet_fused.batch_norm_add_relu_backward(
        torch.empty_like(x), x, mask, *tail, True, True, True, True, False
    )
    for actual, expected in zip(gradients, (x, x, weight, weight.double(), None), strict=True):
        _assert_like(actual, expected)
    gradients = torch.ops.resnet_fused.batch_norm_relu_backward(torch.empty_like(x), x, *tail, True, False, True, True)
    for actual, expected in zip(gradients, (x, None, weight.double(), weight.double()), strict=True):
        _assert_like(actual, expected)
    norm = (weight, None, None, statistics)
    gradients = torch.ops.resnet_fused.batch_norm_add_batch_norm_relu_backward(
        torch.empty_like(x), mask, x, *norm, torch.empty_like(x), *norm, training, *(True, True, False, False) * 2
    )
    for actual, expected in zip(gradients, (x, weight, None, None) * 2, strict=True):
        _assert_like(actual, expected)


def test_the_same_ops_write_no_mask_on_a_cpu():
    with FakeTensorMode():
        x, vector = torch.empty(4, 3, 5, 5), torch.empty(3)
        arguments = (vector, vector, None, vector, vector, None, True, 0.1, 1e-5)
        assert torch.ops.resnet_fused.batch_norm_add_relu(x, x, *arguments)[2].numel() == 0


def test_a_block_saves_the_mask_in_training(fake_cuda, layout, training):
    block = FusedResidual(3, 6, use_1x1conv=True, strides=2).train(training)
    output = block(in_layout(torch.empty(4, 3, 10, 6), layout))
    _assert_like(output, in_layout(torch.empty(4, 6, 5, 3), layout))
    saved = output.grad_fn.saved_tensors[1]
    _assert_like(saved, torch.empty(_mask_shape(output), dtype=torch.uint8) if training else output)


def test_a_resnet_18_runs(fake_cuda, layout, training):
    net = resnet18(in_channels=3, num_classes=10).train(training)
    X = in_layout(torch.empty(2, 3, 96, 96), layout)
    _assert_like(net[:-3](X), in_layout(torch.empty(2, 512, 3, 3), layout))
    _assert_like(net(X), torch.empty(2, 10))


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
