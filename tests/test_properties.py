"""Properties over random shapes, strides and layouts, bit-equality of runs and thread counts, each instruction set."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resnet_fused.triton_kernels import IS_INTERPRETED

from .conftest import WITH_RESIDUAL
from .problem import Problem, in_layout
from .tolerances import assert_close

RELAXED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def shapes(draw):
    """(N, C, *) of 2 to 5 dimensions and at most some 20,000 elements, with more than one value per channel."""
    batch, channels = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    inner = draw(st.lists(st.integers(1, 12), max_size=3))
    while batch * channels * torch.Size(inner).numel() > 20000:
        inner = [max(1, size // 2) for size in inner]
        batch = max(1, batch // 2)
    if batch * torch.Size(inner).numel() == 1:
        batch = 2
    return (batch, channels, *inner)


@st.composite
def strided(draw, shape, dtype=torch.float64):
    """A tensor of that shape whose memory is permuted, or a part of a larger one."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.tuples(*[st.integers(1, 2) for _ in shape]))
    starts = draw(st.tuples(*[st.integers(0, 2) for _ in shape]))
    whole = torch.randn(
        [start + size * step for start, size, step in zip(starts, shape, steps, strict=True)], dtype=dtype
    )
    part = whole[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    inverse = [order.index(d) for d in range(len(shape))]
    permuted = torch.empty_like(part.permute(order), memory_format=torch.contiguous_format).copy_(part.permute(order))
    return draw(st.sampled_from([part, permuted.permute(inverse)]))


def _values_per_channel(shape):
    return shape[0] * torch.Size(shape[2:]).numel()


@RELAXED
@given(
    data=st.data(),
    training=st.booleans(),
    with_residual=st.sampled_from(list(WITH_RESIDUAL)),
    channels_last=st.booleans(),
)
def test_any_shape_and_strides_equal_the_reference(backend, device, data, training, with_residual, channels_last):
    shape = data.draw(shapes())
    layout = "channels_last" if channels_last else "contiguous"
    problem = Problem.random(shape, torch.float64, layout, device, with_residual, training=training)
    changes = {}
    for name in ("input", "grad_output") + (("residual",) if with_residual else ()):
        if data.draw(st.booleans(), label=f"strided {name}"):
            changes[name] = data.draw(strided(shape)).to(device)
    assume(_values_per_channel(shape) >= 4)  # the variance of two or three may be rounding noise
    problem.with_(**changes).check(scale=100, clipped=None)


@RELAXED
@given(shape=shapes(), momentum=st.floats(-2, 2), eps=st.floats(1e-8, 10))
def test_momentum_and_eps_equal_the_reference(backend, device, shape, momentum, eps):
    problem = Problem.random(shape, torch.float64, device=device, momentum=momentum, eps=eps)
    assume(_values_per_channel(shape) >= 4)
    problem.check(scale=100, clipped=None)


def _equal(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Large enough for several threads; the third has one channel only, so that threads share a channel's chunks.
# The last is large enough to go channel by channel.
BIT_EQUAL_SHAPES = [(9, 70, 24, 25), (33, 520, 3, 3), (6, 1, 130, 130), (40, 12, 57, 3), (3, 2100, 7, 7)]
BIT_EQUAL_SHAPES += [(5, 11, 310, 311)]


@pytest.mark.parametrize("shape", BIT_EQUAL_SHAPES, ids=str)
def test_results_are_bit_equal_from_run_to_run_and_for_any_number_of_threads(
    backend, device, dtype, layout, with_residual, shape
):
    problem = Problem.random(shape, dtype, layout, device, with_residual)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = problem.run()
        _equal(problem.run(), expected)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            _equal(problem.run(), expected)
    finally:
        torch.set_num_threads(threads)


_CHECK = """
import torch
from tests.problem import Problem
from resnet_fused import _C
torch.manual_seed(0)
for shape in ((4, 5, 7, 9), (33, 63, 3, 3), (3, 10, 33, 33), (2, 1100, 2, 2)):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in ("contiguous", "channels_last"):
            for residual in (True, False, "normalized"):
                Problem.random(shape, dtype, layout, residual=residual).check(clipped=None)
print(_C.cpu_capability())
"""


def _cpu_has(capability):
    return (
        torch.backends.cpu.get_cpu_capability()
        in {
            "baseline": ("DEFAULT", "AVX2", "AVX512"),
            "avx2": ("AVX2", "AVX512"),
            "avx512": ("AVX512",),
        }[capability]
    )


def _run_with_capability(capability, *args):
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, "RESNET_FUSED_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_each_instruction_set_equals_the_reference(capability):
    if not _cpu_has(capability):
        pytest.skip(f"this CPU lacks {capability}")
    done = _run_with_capability(capability, "-c", _CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability
    options = "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not expensive", "-k", "not cuda"
    done = _run_with_capability(capability, "-m", "pytest", *options, str(Path(__file__).with_name("test_edges.py")))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "sse9"])
def test_an_instruction_set_that_is_not_there_is_refused(capability):
    if capability != "sse9" and _cpu_has(capability):
        pytest.skip(f"this CPU has {capability}")
    done = _run_with_capability(capability, "-c", "from resnet_fused import _C; _C.cpu_capability()")
    assert done.returncode != 0
    assert "RESNET_FUSED_CPU_CAPABILITY: expected one that this CPU and build have (baseline" in done.stderr
    assert f"got '{capability}'" in done.stderr


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter patches the language while one thread uses it")
def test_a_thread_of_its_own_gives_the_same_bits(backend, device):
    """Not only torch's own pool: a caller's thread, in which torch.get_num_threads() may differ."""
    problem = Problem.random((9, 70, 24, 25), device=device)
    expected = problem.run()
    with ThreadPoolExecutor(2) as pool:
        # Each in a context of its own, with the backend that the fixture has chosen in this one.
        for future in [pool.submit(copy_context().run, problem.run) for _ in range(4)]:
            _equal(future.result(), expected)


def test_layouts_agree(backend, device, dtype):
    problem = Problem.random((5, 7, 6, 6), dtype, device=device, residual="normalized")
    last = problem.with_(
        **{n: in_layout(getattr(problem, n), "channels_last") for n in ("input", "residual", "grad_output")}
    )
    expected = last.run()
    for name, value in problem.run().items():
        assert_close(value, expected[name], dtype, name=name)
