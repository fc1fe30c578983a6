"""What a forward and a backward launch and move, by the counters of an emulated backend; and what they may."""

from . import raw_ops

# Reads and writes of the whole tensor, and a part of one for the mask's bits: a 32nd in float32, a 16th in half types.
LIMITS = {  # (residual, training): forward, backward
    (True, True): (4.1, 6.2),
    (False, True): (3.1, 5.2),
    ("normalized", True): (5.1, 8.2),
    (True, False): (3.1, 5.2),
    (False, False): (2.1, 4.2),
    ("normalized", False): (3.1, 6.2),
    # Of a quarter as many windows, each with a byte for its winner: a 16th in float32, an 8th in half types.
    ("pooled", True): (2.4, 3.75),
    ("pooled", False): (1.4, 2.75),
}


def passes(ops, problem, counters, reset):
    """(launches, reads and writes of the whole tensor) of a forward, then of a backward.

    ``counters()`` has launches, bytes_read and bytes_written since ``reset()``.
    """
    counted = []

    def count(call):
        reset()
        outputs = call()
        now = counters()
        counted.append((now.launches, (now.bytes_read + now.bytes_written) / problem.input.nbytes))
        return outputs

    outputs = count(raw_ops.forward(ops, problem))
    count(raw_ops.backward(ops, problem, outputs))
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
