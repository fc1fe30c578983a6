"""Fixtures: the backends, dtypes and layouts of every correctness test. A new backend joins by one line of BACKENDS."""

import pytest
import torch

import resnet_fused
from resnet_fused import use_backend

BACKENDS = {"cpu": "cpu"}  # name -> device on which it is tested

LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each fused backend in turn, in use for the whole test."""
    if request.param not in resnet_fused.available_backends():
        pytest.fail(f"backend {request.param} is not available: python -m resnet_fused says why")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return BACKENDS[backend]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["add_relu", "relu"])
def with_residual(request):
    """Which of the two ops."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
