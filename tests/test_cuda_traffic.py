"""What the CUDA kernels launch and move, counted by the emulation; and that no order of blocks and threads shows."""

import os
import subprocess
import sys

import pytest
import torch

from resnet_fused import use_backend

from . import cuda_on_cpu
from .problem import Problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulation():
    module = cuda_on_cpu.load()
    with use_backend(cuda_on_cpu.BACKEND):
        yield module
    module.set_seed(0)
    module.set_multiprocessors(cuda_on_cpu.MULTIPROCESSORS)


def _passes(emulation, problem):
    """(launches, reads and writes of the whole tensor) of a forward, then of a backward."""
    ops = cuda_on_cpu.ops()
    vectors = (problem.weight, problem.bias, None)
    running = (problem.running_mean, problem.running_var, torch.tensor(3))
    norm = (*vectors, *running, 0.1, 1e-5)
    training = problem.options["training"]
    x, r, g = problem.input, problem.residual, problem.grad_output
    passes = []

    def count(call):
        emulation.reset_counters()
        results = call()
        counters = emulation.counters()
        passes.append((counters.launches, (counters.bytes_read + counters.bytes_written) / x.nbytes))
        return results

    if r is None:
        output, statistics = count(lambda: ops.batch_norm_relu(x, *vectors, *running, training, 0.1, 1e-5))
        needed = (True, True, True, False)
        count(lambda: ops.batch_norm_relu_backward(g, x, *vectors, statistics, training, *needed))
    elif problem.normalizes_residual:
        other = (*vectors, *(tensor.clone() for tensor in running), 0.1, 1e-5)
        output, *statistics, mask = count(lambda: ops.batch_norm_add_batch_norm_relu(x, *norm, r, *other, training))
        mask, needed = output if mask is None else mask, 2 * (True, True, True, False)
        tensors = (x, *vectors, statistics[0], r, *vectors, statistics[1])
        count(lambda: ops.batch_norm_add_batch_norm_relu_backward(g, mask, *tensors, training, *needed))
    else:
        output, statistics, mask = count(lambda: ops.batch_norm_add_relu(x, r, *vectors, *running, training, 0.1, 1e-5))
        mask, needed = output if mask is None else mask, (True, True, True, True, False)
        count(lambda: ops.batch_norm_add_relu_backward(g, x, mask, *vectors, statistics, training, *needed))
    return passes


# Reads and writes of the whole tensor, and a part of one for the mask's bits: a 32nd in float32, a 16th in half types.
# The mask of a frozen batch norm is read off the output. Of two batch norms neighbouring blocks read gradient and mask
# for either: counted twice here, 8 reads and 2 writes, of which memory sees 6 reads where L2 has the second ones.
LIMITS = {  # (residual, training): forward, backward
    (True, True): (4.1, 6.2),
    (False, True): (3.1, 5.1),
    ("normalized", True): (5.1, 10.3),
    (True, False): (3.0, 7.0),
    (False, False): (2.0, 5.1),
    ("normalized", False): (3.0, 12.1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_and_traffic_are_those_of_the_design(emulation, dtype, layout, training, with_residual):
    problem = Problem.random((16, 32, 24, 24), dtype, layout, "cpu", with_residual, training=training)
    forward, backward = _passes(emulation, problem)
    most_forward, most_backward = LIMITS[with_residual, training]
    assert forward[0] == (2 if training else 1)
    assert backward[0] == 2
    of_vectors = 0.04  # statistics, partial sums, coefficients: little beside 9216 values a channel
    assert most_forward - 0.2 < forward[1] <= most_forward + of_vectors
    assert most_backward - 0.2 < backward[1] <= most_backward + of_vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recomputing_is_one_launch_that_reads_and_writes_once(emulation, dtype, layout):
    x = Problem.random((16, 32, 24, 24), dtype, layout, "cpu", False).input
    statistics = torch.ones(2, 32, dtype=torch.float64)
    emulation.reset_counters()
    cuda_on_cpu.ops().batch_norm_relu_recompute(x, None, None, statistics)
    counters = emulation.counters()
    assert counters.launches == 1
    assert 2 * x.nbytes <= counters.bytes_read + counters.bytes_written <= 2.04 * x.nbytes


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


def test_unaligned_tensors_are_taken_element_by_element(emulation, layout, with_residual):
    problem = Problem.random((4, 8, 6, 6), torch.float32, layout, "cpu", with_residual)
    values = torch.empty(problem.input.numel() + 1)[1:]
    values.copy_(torch.as_strided(problem.input, (problem.input.numel(),), (1,)))
    for name in ("input", "residual") if with_residual == "normalized" else ("input",):
        problem.with_(**{name: values.as_strided(problem.input.shape, problem.input.stride())}).check(clipped=None)


SANITISED = "cuda-emulated and (test_values_and_gradients or test_nan or test_each_gradient) and not float64"


@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitiser")
def test_the_kernels_pass_under_address_and_undefined_behaviour_sanitisers():
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {
        **os.environ,
        "RESNET_FUSED_EMULATION": "sanitised",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", SANITISED]
    done = subprocess.run(
        [*command, "tests/test_ops.py", "tests/test_edges.py"],
        cwd=cuda_on_cpu.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
