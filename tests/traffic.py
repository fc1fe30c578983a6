"""What a forward and a backward launch and move, by the counters of an emulated backend; and what they may."""

import torch

from resnet_fused.ops import saved_for_mask

# Reads and writes of the whole tensor, and a part of one for the mask's bits: a 32nd in float32, a 16th in half types.
# The mask of a frozen batch norm is read off the output.
LIMITS = {  # (residual, training): forward, backward
    (True, True): (4.1, 6.2),
    (False, True): (3.1, 5.1),
    ("normalized", True): (5.1, 8.2),
    (True, False): (3.0, 7.0),
    (False, False): (2.0, 5.1),
    ("normalized", False): (3.0, 8.0),
}


def passes(ops, problem, counters, reset):
    """(launches, reads and writes of the whole tensor) of a forward, then of a backward.

    ``counters()`` has launches, bytes_read and bytes_written since ``reset()``.
    """
    vectors = (problem.weight, problem.bias, None)
    running = (problem.running_mean, problem.running_var, torch.tensor(3))
    norm = (*vectors, *running, 0.1, 1e-5)
    training = problem.options["training"]
    x, r, g = problem.input, problem.residual, problem.grad_output
    counted = []

    def count(call):
        reset()
        results = call()
        now = counters()
        counted.append((now.launches, (now.bytes_read + now.bytes_written) / x.nbytes))
        return results

    if r is None:
        output, statistics = count(lambda: ops.batch_norm_relu(x, *vectors, *running, training, 0.1, 1e-5))
        needed = (True, True, True, False)
        count(lambda: ops.batch_norm_relu_backward(g, x, *vectors, statistics, training, *needed))
    elif problem.normalizes_residual:
        other = (*vectors, *(tensor.clone() for tensor in running), 0.1, 1e-5)
        output, *statistics, mask = count(lambda: ops.batch_norm_add_batch_norm_relu(x, *norm, r, *other, training))
        mask, needed = saved_for_mask(output, mask), 2 * (True, True, True, False)
        tensors = (x, *vectors, statistics[0], r, *vectors, statistics[1])
        count(lambda: ops.batch_norm_add_batch_norm_relu_backward(g, mask, *tensors, training, *needed))
    else:
        output, statistics, mask = count(lambda: ops.batch_norm_add_relu(x, r, *vectors, *running, training, 0.1, 1e-5))
        mask, needed = saved_for_mask(output, mask), (True, True, True, True, False)
        count(lambda: ops.batch_norm_add_relu_backward(g, x, mask, *vectors, statistics, training, *needed))
    return counted


def assert_within_limits(counted, training, with_residual, launches, of_vectors, read_again=0.0):
    """``launches``: of a forward in training, of one in eval, and of a backward.

    ``read_again``: what a backward may read a second time.
    ``of_vectors``: what statistics, partial sums and coefficients may move besides, little beside thousands of values.
    """
    (forward, forward_passes), (backward, backward_passes) = counted
    most_forward, most_backward = LIMITS[with_residual, training]
    most_backward += read_again
    of_vectors *= 2 if with_residual == "normalized" else 1
    assert (forward, backward) == (launches[0] if training else launches[1], launches[2])
    assert most_forward - 0.2 < forward_passes <= most_forward + of_vectors
    assert most_backward - 0.3 < backward_passes <= most_backward + of_vectors
