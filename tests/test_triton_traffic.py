"""What the Triton kernels launch and move, counted by the interpreter; and where their plans begin and end."""

import pytest
import torch
import triton.language as tl

import resnet_fused.backend
from resnet_fused import use_backend
from resnet_fused.ops import matrix_shape
from resnet_fused.triton_kernels import batch_norm_add_relu, kernels, plan

from .conftest import DTYPES, represented
from .problem import Problem
from .traffic import assert_within_limits, passes
from .triton_on_cpu import counters  # noqa: F401  a fixture


@pytest.fixture
def with_programs(monkeypatch):
    """Sets how many programs plans aim at, however short that makes each of them."""

    def clear():
        batch_norm_add_relu._plan.cache_clear()
        plan.make_plan.cache_clear()

    def set_programs(count):
        monkeypatch.setattr(plan, "MINIMUM_PROGRAMS", count)
        clear()

    yield set_programs
    clear()


@pytest.mark.parametrize("dtype", represented(DTYPES, by=DTYPES[:1]), ids=str)
def test_launches_and_traffic_are_those_of_the_design(counters, with_programs, dtype, layout, training, with_residual):  # noqa: F811
    with_programs(1)  # of 32 KiB each, as in a tensor that is large enough for the GPU
    problem = Problem.random((16, 32, 12, 12), dtype, layout, "cpu", with_residual, training=training)
    ops = resnet_fused.backend.get("triton").ops

    def reset():
        counters.launches = counters.bytes_read = counters.bytes_written = 0

    counted = passes(ops, problem, lambda: counters, reset)
    assert_within_limits(
        counted,
        training,
        with_residual,
        launches=(3, 1, 3),
        of_vectors=0.06,
    )


@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 40, 30),  # fewer rows than a tile has: wide tiles
        (70, 5),  # a column is a channel, and the layouts are the same
        (40, 3, 11, 11),  # tiles across channels, splits of several tiles, a rest of rows
        pytest.param((3, 260, 1, 1), marks=pytest.mark.expensive),  # for the interpreter
        (5, 170, 3, 3),  # many channels in a tile
        (1, 3, 64, 65),
    ],
    ids=str,
)
def test_every_kind_of_plan_gives_the_reference(layout, with_residual, shape):
    with use_backend("triton"):
        Problem.random(shape, torch.float32, layout, "cpu", with_residual).check(clipped=(0.2, 0.8))


def test_more_partial_sums_than_are_joined_at_a_time(monkeypatch, with_programs, layout, with_residual):
    """As of a large tensor, with 8 at a time in the place of 1024."""
    monkeypatch.setattr(kernels, "LANES", tl.constexpr(8))
    with_programs(10**6)
    problem = Problem.random((2500, 1, 3, 3), torch.float32, layout, "cpu", with_residual)
    rows, columns = matrix_shape(problem.input)
    assert plan.make_plan(rows, 1, columns, 4).partials > 16
    with use_backend("triton"):
        problem.check(clipped=(0.2, 0.8))
