"""Properties over random shapes, strides and layouts, bit-equality of runs and thread counts, each instruction set."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused.triton_kernels import IS_INTERPRETED

from .conftest import DTYPES, LAYOUTS, WITH_RESIDUAL
from .problem import Problem, in_layout
from .tolerances import assert_close

NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
ABSENT = {
    "running": ("running_mean", "running_var"),
    "residual_running": ("residual_running_mean", "residual_running_var"),
}
VECTORS = ("weight", "bias", "residual_weight", "residual_bias", *ABSENT)  # the last in training alone
LEAST_VALUES = 4  # per channel: the variance of two or three may be rounding noise
SCALE = {torch.float64: 100, torch.float32: 100, torch.bfloat16: 4, torch.float16: 4}  # of tolerances: small variances


@st.composite
def shapes(draw):
    """(N, C, *) of 2 to 5 dimensions and at most some 20,000 elements, interpreted 2,000."""
    batch, channels = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    inner = draw(st.lists(st.integers(1, 12), max_size=3))
    while batch * channels * math.prod(inner) > (2000 if IS_INTERPRETED else 20000):
        inner = [max(1, size // 2) for size in inner]
        batch, channels = max(1, batch // 2), max(1, channels * 3 // 4)
    return (max(batch, -(-LEAST_VALUES // math.prod(inner))), channels, *inner)


@st.composite
def memories(draw, dim):
    """How a tensor of so many dimensions lies in memory: permuted, or, with steps, a part of a larger one."""
    steps = st.lists(st.integers(1, 2), min_size=dim, max_size=dim)
    starts = st.lists(st.integers(0, 2), min_size=dim, max_size=dim)
    return draw(st.permutations(range(dim))), draw(st.none() | steps), draw(starts)


def _in_memory(tensor, order, steps, starts):
    if steps is None:
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.dim())])
    sizes = [start + size * step for start, size, step in zip(starts, tensor.shape, steps, strict=True)]
    part = tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))
    return tensor.new_zeros(sizes)[part].copy_(tensor)


@st.composite
def poolings(draw, size):
    """Windows over an image of that size, as max_pool2d has them."""
    pairs = []
    for extent in size:
        kernel = draw(st.integers(1, min(extent, 6)))
        dilation = draw(st.integers(1, 3)) if kernel * 3 <= extent else 1
        pairs.append((kernel, draw(st.integers(1, 7)), draw(st.integers(0, kernel // 2)), dilation))
    return dict(zip(("kernel_size", "stride", "padding", "dilation"), zip(*pairs, strict=True), strict=True)) | {
        "ceil_mode": draw(st.booleans())
    }


@st.composite
def problems(draw):
    """What a problem is made of, as a failure shows it."""
    shape = draw(shapes())
    training = draw(st.booleans())
    names = ("input", "residual", "grad_output")
    momentum = st.floats(-2, 2)
    residual = draw(st.sampled_from(list(WITH_RESIDUAL)))
    windows = draw(st.none() | poolings(shape[2:])) if len(shape) == 4 and not residual else None
    special = st.tuples(st.sampled_from(names[:2]), st.sampled_from(NOT_FINITE), st.integers(0))
    return {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "shape": shape,
        "dtype": draw(st.sampled_from(DTYPES)),
        "is_half_everywhere": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "residual": residual,
        "windows": windows,
        "training": training,
        "momentum": draw(st.none() | momentum if training else momentum),
        "eps": draw(st.floats(1e-5, 10)),
        "absent": draw(st.sets(st.sampled_from(VECTORS[: None if training else 4]))),
        "has_input_bias": draw(st.booleans()),
        "needs_grad": draw(st.sets(st.sampled_from(Problem.DIFFERENTIABLE))),
        "memory": {name: draw(st.none() | memories(len(shape))) for name in names},
        "special": draw(st.none() | special) if windows is None else None,  # test_max_pool has those
    }


def _made(drawn, device):
    torch.manual_seed(drawn["seed"])
    dtype = drawn["dtype"]
    parameter_dtype = dtype if drawn["is_half_everywhere"] and dtype.itemsize == 2 else None
    options = {name: drawn[name] for name in ("windows", "training", "momentum", "eps")}
    problem = Problem.random(
        drawn["shape"], dtype, drawn["layout"], device, drawn["residual"], parameter_dtype, **options
    )
    problem = problem.with_input_bias() if drawn["has_input_bias"] else problem
    memory = {name: m for name, m in drawn["memory"].items() if m and getattr(problem, name) is not None}
    in_memory = {name: _in_memory(getattr(problem, name), *m) for name, m in memory.items()}
    absent = {name for vector in drawn["absent"] for name in (ABSENT.get(vector, (vector,)))}
    return problem.with_(**in_memory, **dict.fromkeys(absent))


@given(drawn=problems())
def test_any_problem_equals_the_reference(backend, device, drawn):
    """100 of them; ``make fuzz`` draws 10,000."""
    problem = _made(drawn, device)
    needs_grad = tuple(drawn["needs_grad"])
    clean = problem.check(SCALE[drawn["dtype"]], clipped=None, needs_grad=needs_grad)
    if drawn["special"] is None or getattr(problem, drawn["special"][0]) is None:
        return
    name, value, place = drawn["special"]
    changed = getattr(problem, name).clone()
    where = np.unravel_index(place % changed.numel(), changed.shape)
    changed[tuple(map(int, where))] = value
    problem = problem.with_(**{name: changed})
    actual, expected = (run(needs_grad=needs_grad) for run in (problem.run, problem.reference))
    for name, tensor in actual.items():
        if tensor is not None and not name.endswith("num_batches_tracked"):
            others = [c for c in range(problem.input.shape[1]) if c != where[1]]
            channels = (slice(None), others) if tensor.dim() > 1 else others
            torch.testing.assert_close(tensor[channels], clean[name][channels], rtol=0, atol=0)
            if not (name.endswith("input_bias") and problem.options["training"]):  # zero, or the reference's noise
                assert torch.equal(tensor.isnan().cpu(), expected[name].isnan()), name
                assert torch.equal(tensor.isinf().cpu(), expected[name].isinf()), name


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
            windows = {"kernel_size": 3, "stride": 2, "padding": 1}
            Problem.random(shape, dtype, layout, residual=False, windows=windows).check(clipped=None)
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
