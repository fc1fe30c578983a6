"""What the CUDA kernels launch and move, counted by the emulation; and that no order of blocks and threads shows."""

import sys
from types import SimpleNamespace

import pytest
import torch

from resnet_fused import use_backend

from . import cuda_on_cpu, raw_ops, sanitisers
from .conftest import represented
from .problem import Problem
from .traffic import assert_within_limits, passes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulation():
    module = cuda_on_cpu.load()
    with use_backend(cuda_on_cpu.BACKEND):
        yield module
    module.set_seed(0)
    module.set_multiprocessors(cuda_on_cpu.MULTIPROCESSORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_and_traffic_are_those_of_the_design(emulation, dtype, layout, training, with_residual):
    problem = Problem.random((16, 32, 24, 24), dtype, layout, "cpu", with_residual, training=training)
    counted = passes(cuda_on_cpu.ops(), problem, emulation.counters, emulation.reset_counters)
    # Of two batch norms neighbouring blocks read gradient and mask for one each: L2 is to have the second reads.
    read_again = 2.1 if with_residual == "normalized" else 0
    assert_within_limits(counted, training, with_residual, (2, 1, 2), of_vectors=0.04, read_again=read_again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_writes_nothing_in_between(emulation, dtype, layout, training):
    """Of what windows, or the pixels of one, share, the first read counts: the caches are to have the others."""
    windows = {"kernel_size": 3, "stride": 2, "padding": 1}
    problem = Problem.random((16, 32, 24, 24), dtype, layout, "cpu", False, windows=windows, training=training)

    def counters():
        counted = emulation.counters()
        return SimpleNamespace(
            launches=counted.launches, bytes_read=counted.bytes_loaded, bytes_written=counted.bytes_written
        )

    counted = passes(cuda_on_cpu.ops(), problem, counters, emulation.reset_counters)
    assert_within_limits(counted, training, "pooled", (2, 1, 2), of_vectors=0.04)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_is_one_launch_that_reads_and_writes_once(emulation, dtype, layout):
    problem = Problem.random((16, 32, 24, 24), dtype, layout, "cpu", False).with_(weight=None, bias=None)
    recompute = raw_ops.recompute(cuda_on_cpu.ops(), problem, {"statistics": torch.ones(1, 2, 32, dtype=torch.float64)})
    emulation.reset_counters()
    recompute()
    counters = emulation.counters()
    assert counters.launches == 1
    assert 2 * problem.input.nbytes <= counters.bytes_read + counters.bytes_written <= 2.04 * problem.input.nbytes


@pytest.mark.parametrize("shape", [(9, 7, 5, 3), (6, 64, 3, 3), (4, 24, 8, 8)], ids=str)
def test_no_order_of_blocks_and_threads_changes_a_bit(emulation, layout, with_residual, shape):
    problem = Problem.random(shape, torch.float32, layout, "cpu", with_residual)
    expected = problem.run()
    for seed in range(1, 6):
        emulation.set_seed(seed)
        for name, value in problem.run().items():
            assert value is None or torch.equal(value, expected[name]), name


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("shape", [(9, 7, 5, 3), (6, 64, 3, 3), (2, 8, 40, 30), (70, 5)], ids=str)
def test_any_number_of_multiprocessors_gives_the_reference(emulation, layout, with_residual, shape, multiprocessors):
    emulation.set_multiprocessors(multiprocessors)
    Problem.random(shape, torch.float32, layout, "cpu", with_residual).check(clipped=(0.2, 0.8))


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_pooling_gives_the_reference_in_any_order(emulation, layout, multiprocessors):
    emulation.set_multiprocessors(multiprocessors)
    windows = {"kernel_size": 3, "stride": 2, "padding": 1}
    problem = Problem.random((5, 8, 13, 12), torch.float32, layout, "cpu", False, windows=windows)
    problem.check(scale=2, clipped=None)
    expected = problem.run()
    for seed in range(1, 4):
        emulation.set_seed(seed)
        for name, value in problem.run().items():
            assert torch.equal(value, expected[name]), name


def test_unaligned_tensors_are_taken_element_by_element(emulation, layout, with_residual):
    problem = Problem.random((4, 8, 6, 6), torch.float32, layout, "cpu", with_residual)
    values = torch.empty(problem.input.numel() + 1)[1:]
    values.copy_(torch.as_strided(problem.input, (problem.input.numel(),), (1,)))
    for name in ("input", "residual") if with_residual == "normalized" else ("input",):
        problem.with_(**{name: values.as_strided(problem.input.shape, problem.input.stride())}).check(clipped=None)


def test_unaligned_winners_are_taken_one_by_one(emulation, layout):
    problem = Problem.random((4, 8, 6, 8), torch.float32, layout, "cpu", False, windows={"kernel_size": 2})
    outputs = raw_ops.forward(cuda_on_cpu.ops(), problem)()
    expected = raw_ops.backward(cuda_on_cpu.ops(), problem, outputs)()
    winners = torch.empty(outputs["mask"].numel() + 1, dtype=torch.uint8)[1:].view_as(outputs["mask"])
    outputs["mask"] = winners.copy_(outputs["mask"])
    actual = raw_ops.backward(cuda_on_cpu.ops(), problem, outputs)()
    torch.testing.assert_close(actual["grad_input"], expected["grad_input"])


SANITISED = ("test_each_gradient", "(test_values_and_gradients or test_nan) and not float64")


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitiser")
@pytest.mark.parametrize("tests", represented(SANITISED, by=SANITISED[:1]))
def test_the_kernels_pass_under_address_and_undefined_behaviour_sanitisers(tests):
    sanitisers.run(
        "address",
        f"cuda-emulated and {tests}",
        "tests/test_ops.py",
        "tests/test_edges.py",
        "tests/test_max_pool.py",
        RESNET_FUSED_EMULATION="sanitised",
    )
