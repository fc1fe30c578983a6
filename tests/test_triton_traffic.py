"""What the Triton kernels launch and move, counted by the interpreter; and where their plans begin and end."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

import resnet_fused.backend
from resnet_fused import use_backend
from resnet_fused.ops import MaxPool, matrix_shape
from resnet_fused.triton_kernels import batch_norm_add_relu, kernels, plan

from .conftest import DTYPES, represented
from .problem import Problem
from .traffic import assert_within_limits, passes
from .triton_on_cpu import counters  # noqa: F401  a fixture

WINDOWS = {"kernel_size": 3, "stride": 2, "padding": 1}
OPS = resnet_fused.backend.get("triton").ops


def reset(counted):
    vars(counted).update(dict.fromkeys(vars(counted), 0))


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
    counted = passes(OPS, problem, lambda: counters, partial(reset, counters))
    assert_within_limits(
        counted,
        training,
        with_residual,
        launches=(3, 1, 3),
        of_vectors=0.06,
    )


@pytest.mark.parametrize("dtype", represented(DTYPES, by=DTYPES[:1]), ids=str)
def test_pooling_writes_nothing_in_between(counters, with_programs, dtype, layout, training):  # noqa: F811
    """Of what windows, or the pixels of one, share, the first read counts: the caches are to have the others."""
    with_programs(1)
    problem = Problem.random((16, 32, 12, 12), dtype, layout, "cpu", False, windows=WINDOWS, training=training)

    def loaded():
        return SimpleNamespace(**vars(counters) | {"bytes_read": counters.bytes_loaded})

    counted = passes(OPS, problem, loaded, partial(reset, counters))
    assert_within_limits(counted, training, "pooled", launches=(3, 1, 3), of_vectors=0.06)


def test_pooling_with_positions_of_64_bits(monkeypatch, layout):
    windows_of = batch_norm_add_relu._windows
    max_pool = MaxPool.of(torch.empty(1, 1, 2**14, 2**15, device="meta"), **WINDOWS)
    for width, index in ((2**14, tl.int32), (2**15, tl.int64)):
        assert windows_of(max_pool, (1, 1, 2**14, width), torch.contiguous_format).INDEX.value == index

    def wide(*arguments):
        return windows_of(*arguments)._replace(INDEX=tl.constexpr(tl.int64))

    monkeypatch.setattr(batch_norm_add_relu, "_windows", wide)
    with use_backend("triton"):
        Problem.random((3, 5, 9, 14), layout=layout, residual=False, windows=WINDOWS).check(scale=2, clipped=None)


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


def test_tiles_of_few_rows_give_the_reference(monkeypatch, with_programs, layout, with_residual):
    """As at 3x3, where there are 64 to 255 of more rows: several down a column, and a rest."""
    monkeypatch.setattr(plan, "TOO_FEW_TILES", range(2, 9))
    with_programs(plan.MINIMUM_PROGRAMS)
    problem = Problem.random((11, 30, 3, 3), torch.float32, layout, "cpu", with_residual)
    rows, columns = matrix_shape(problem.input)
    tiles = plan.make_plan(rows, 30, columns // 30, 4)
    assert tiles.block_y in (4, 8) and tiles.splits > 1 and rows % tiles.split_rows
    with use_backend("triton"):
        problem.check(clipped=(0.2, 0.8))


def test_more_partial_sums_than_are_joined_at_a_time(monkeypatch, with_programs, layout, with_residual):
    """As of a large tensor, with 8 at a time in the place of 1024."""
    monkeypatch.setattr(kernels, "LANES", tl.constexpr(8))
    with_programs(10**6)
    problem = Problem.random((2500, 1, 3, 3), torch.float32, layout, "cpu", with_residual)
    rows, columns = matrix_shape(problem.input)
    assert plan.make_plan(rows, 1, columns, 4).partials > 16
    with use_backend("triton"):
        problem.check(clipped=(0.2, 0.8))
