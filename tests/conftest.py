"""Fixtures: the backends, dtypes and layouts of every correctness test. A new backend joins by one line of BACKENDS.

Under TRITON_INTERPRET=1, in a process of its own, as Triton reads the variable where a kernel is defined, the only
backend is triton, interpreted on the CPU, and the only tests are those that run on it.
"""

import math

import pytest
import torch

import resnet_fused
from resnet_fused import autograd, use_backend
from resnet_fused.triton_kernels import IS_INTERPRETED

from . import cuda_on_cpu

if IS_INTERPRETED:
    from . import triton_on_cpu

    triton_on_cpu.convert_as_gpus_do()
    BACKENDS = {"triton": "cpu"}  # name -> device on which it is tested
    collect_ignore = ["test_triton_static.py", "test_resnet.py"]  # a step of a ResNet-18 takes minutes
    EXPENSIVE_FILES = {
        "test_blocks",
        "test_compile",
        "test_ddp",
        "test_properties",
    }  # others stand for it
else:
    BACKENDS = {"cpu": "cpu", cuda_on_cpu.BACKEND: "cpu"}
    collect_ignore = ["test_triton_traffic.py"]
    EXPENSIVE_FILES = set()
    if torch.cuda.is_available():
        BACKENDS |= {"cuda": "cuda", "triton": "cuda"}
EMULATED = {cuda_on_cpu.BACKEND} | ({"triton"} if IS_INTERPRETED else set())
# Elements: an emulated kernel takes microseconds for each, an interpreted one milliseconds for every 2048.
LARGEST_EMULATED = 12_000 if IS_INTERPRETED else 50_000
MOST_CHANNELS_INTERPRETED = 256  # of which some kernels have a program each

WITH_RESIDUAL = {True: "add_relu", False: "relu", "normalized": "add_batch_norm_relu"}
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def represented(values, by):
    """Parameters, of which ``make test`` runs those in ``by``, and ``make test-all`` the expensive others, too."""
    return [value if value in by else pytest.param(value, marks=pytest.mark.expensive) for value in values]


def represented_where_interpreted(values, by):
    return represented(values, by if IS_INTERPRETED else values)


@pytest.hookimpl(tryfirst=True)  # before hypothesis takes the profile that --hypothesis-profile names
def pytest_configure(config):
    """How many examples a property is tried with: ``make fuzz`` names the second. The GPU's suite has no properties."""
    if not config.pluginmanager.hasplugin("hypothesispytest"):
        return
    from hypothesis import HealthCheck, settings

    fixtures = [HealthCheck.function_scoped_fixture]
    suite = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=fixtures)
    settings.register_profile("suite", suite)
    many = 1_000 if IS_INTERPRETED else 10_000
    settings.register_profile("fuzz", suite, max_examples=many, derandomize=False, print_blob=True)
    settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config, items):
    """Leave large shapes out where the backend is an emulated one, and what the other half of the suite has run."""

    def is_left_out(item):
        if IS_INTERPRETED and "backend" not in item.fixturenames and item.path.stem != "test_triton_traffic":
            return True
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        shape = parameters.get("shape", ())
        is_large = math.prod(shape) > LARGEST_EMULATED or item.get_closest_marker("slow")
        channels = parameters.get("channels", shape[1] if len(shape) > 1 else 0)
        is_wide = IS_INTERPRETED and channels > MOST_CHANNELS_INTERPRETED
        return parameters.get("backend") in EMULATED and (is_large or is_wide)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]
    for item in items:
        if item.path.stem in EXPENSIVE_FILES:
            item.add_marker("expensive")


def _parameter(backend):
    return pytest.param(backend, marks=pytest.mark.gpu) if BACKENDS[backend] == "cuda" else backend


@pytest.fixture(params=map(_parameter, BACKENDS))
def backend(request):
    """Each fused backend in turn, in use for the whole test."""
    cuda_on_cpu.load_if_named(request.param)
    if request.param not in resnet_fused.available_backends():
        pytest.fail(f"backend {request.param} is not available: python -m resnet_fused says why")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return BACKENDS[backend]


@pytest.fixture(
    params=represented_where_interpreted(DTYPES, by=[torch.float32]),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=WITH_RESIDUAL, ids=WITH_RESIDUAL.values())
def with_residual(request):
    """Which of the three ops: whether a residual is added, and whether it is normalised before."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that blocks and swapped layers have called, in order, refusals left out."""
    calls, attempt = [], autograd.attempt

    def spy(ops, input, residual, batch_norm, residual_batch_norm, training, max_pool=None):
        output = attempt(ops, input, residual, batch_norm, residual_batch_norm, training, max_pool)
        if output is not None:
            added = "" if residual is None else "add_" if residual_batch_norm is None else "add_batch_norm_"
            calls.append(f"batch_norm_{added}relu" + ("_max_pool2d" if max_pool else ""))
        return output

    monkeypatch.setattr(autograd, "attempt", spy)
    return calls
