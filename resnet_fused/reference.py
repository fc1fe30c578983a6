"""The plain-PyTorch oracle: what every backend must compute. It imports nothing of the package.

Run on the tensors' own dtype, it is the ``eager`` backend; on float64 copies, the reference of the tests.
"""

import torch
import torch.nn.functional as F


def add_bias(input, bias):
    """What a convolution of the output ``input`` gives with the bias that was left out of it, if any."""
    return input if bias is None else input + bias.to(input.dtype).view(-1, *[1] * (input.dim() - 2))


def batch_norm(input, bn, training):
    input = add_bias(input, bn.input_bias)
    momentum = bn.momentum
    if training and bn.num_batches_tracked is not None:  # as nn.BatchNorm2d does
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if momentum is None else momentum
    momentum = 0.0 if momentum is None else momentum
    return F.batch_norm(input, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, momentum, bn.eps)


def batch_norm_add_relu(input, residual, norm, residual_norm, training, batch_norm=batch_norm, max_pool=None):
    """``relu(batch_norm(input + input_bias) [+ residual])``; the residual normalised where it has a batch norm, the
    result pooled where there are windows for it."""
    output = batch_norm(input, norm, training)
    if residual_norm is not None:
        residual = batch_norm(residual, residual_norm, training)
    if residual is not None:
        output.add_(residual)  # as the reference block writes `Y += X`: the sum has the input's dtype and shape
    output = torch.relu(output)
    if max_pool is None:
        return output
    return F.max_pool2d(output, *max_pool[:4], ceil_mode=max_pool.ceil_mode)
