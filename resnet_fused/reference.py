"""The plain-PyTorch oracle: what every backend must compute. It imports nothing of the package.

The same functions, run on the tensors' own dtype, are the ``eager`` backend; run on float64 copies, they are the
reference of the tests.
"""

import torch
import torch.nn.functional as F


def _momentum(training, momentum, num_batches_tracked):
    """Count the batch and return the factor by which it enters the running statistics, as nn.BatchNorm2d does."""
    if not training or num_batches_tracked is None:
        return 0.0 if momentum is None else momentum
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


def _batch_norm(
    input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, input_bias
):
    if input_bias is not None:
        input = input + input_bias.to(input.dtype).view(-1, *[1] * (input.dim() - 2))
    momentum = _momentum(training, momentum, num_batches_tracked)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_relu(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    num_batches_tracked=None,
    input_bias=None,
):
    """``relu(batch_norm(input + input_bias))`` by three PyTorch operators."""
    return torch.relu(
        _batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, input_bias
        )
    )


def batch_norm_add_relu(
    input,
    residual,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    num_batches_tracked=None,
    input_bias=None,
):
    """``relu(batch_norm(input + input_bias) + residual)`` by four PyTorch operators."""
    normalized = _batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, input_bias
    )
    # In place, as the reference block writes `Y += X`: the sum has the input's dtype and shape.
    return torch.relu(normalized.add_(residual))


def batch_norm_add_batch_norm_relu(input, residual, batch_norm, residual_batch_norm, training=False):
    """``relu(batch_norm(input + input_bias) + batch_norm(residual + input_bias))`` by six PyTorch operators."""

    def normalize(tensor, bn):
        return _batch_norm(
            *(tensor, bn.running_mean, bn.running_var, bn.weight, bn.bias),
            *(training, bn.momentum, bn.eps, bn.num_batches_tracked, bn.input_bias),
        )

    return torch.relu(normalize(input, batch_norm).add_(normalize(residual, residual_batch_norm)))
