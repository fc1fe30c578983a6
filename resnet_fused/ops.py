"""The raw ops of a backend, whose schemas are in csrc/ops.cpp; the tensors that they take, return and save.

They have no fake implementations: where somebody traces, PyTorch's own operators run.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format


class BatchNorm(NamedTuple):
    """One of the two batch norms of :func:`batch_norm_add_batch_norm_relu`: arguments of :func:`batch_norm_relu`."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    input_bias: Tensor | None = None


def in_order(input, batch_norm):
    """As the raw ops take them."""
    running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked, input_bias = batch_norm
    return input, weight, bias, input_bias, running_mean, running_var, num_batches_tracked, momentum, eps


def new_statistics(input):
    # float64, whatever the input: rounded to float32, a mean of 1e4 is off by 5 % of a standard deviation of 1e-2.
    return input.new_empty((2, input.shape[1]), dtype=torch.float64)


def memory_format_of(input):
    """That of the output: in which the ops see every tensor."""
    # Python's suggest_memory_format, unlike C++'s, takes (4, 1, 9, 9) of strides (81, 1, 9, 1) for channels_last.
    return torch.contiguous_format if input.is_contiguous() else suggest_memory_format(input)


def new_like_input(input, needed=True):
    return torch.empty_like(input, memory_format=memory_format_of(input)) if needed else None


def new_per_channel(input, parameter, needed):
    if not needed:
        return None
    return input.new_empty(input.shape[1], dtype=torch.float64 if parameter is None else parameter.dtype)


def new_gradients(like, weight, bias, input_bias, need_input, need_weight, need_bias, need_input_bias):
    """Of one batch norm: its input's, dense as the output of ``like`` is, and its vectors'; None where not needed."""
    return (
        new_like_input(like, need_input),
        new_per_channel(like, weight, need_weight),
        new_per_channel(like, bias, need_bias),
        new_per_channel(like, input_bias, need_input_bias),
    )


def new_mask(input, needed):
    """In place of one that is not needed, an empty vector."""
    return input.new_empty(mask_shape(input) if needed else 0, dtype=torch.uint8)


def saved_for_mask(output, mask):
    """What tells a backward where the ReLU passed: the mask, or, where a forward wrote none, the output."""
    return output if mask.dim() == 1 else mask


def mask_shape(input):
    """Rows, and bytes of each."""
    rows, columns = matrix_shape(input)
    return rows, -(-columns // 8)


def matrix_shape(input):
    """Rows and columns of the dense input as csrc/ops.cpp takes it for a mask."""
    if memory_format_of(input) == torch.contiguous_format:
        return input.shape[0], input.numel() // input.shape[0] if input.shape[0] else 0
    return input.numel() // input.shape[1], input.shape[1]


def unpack_mask(mask, input):
    """The mask's bits as booleans of the input's shape."""
    rows, columns = matrix_shape(input)
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)) & 1
    values = bits.view(rows, -1)[:, :columns].bool()
    if columns == input.shape[1] and input.dim() > 2:  # channels last
        return values.reshape(input.shape[0], *input.shape[2:], columns).movedim(-1, 1)
    return values.reshape(input.shape)


class Ops(NamedTuple):
    """A backend's ops, resolved once: looking them up on every call costs 2 us of 125 at 8 elements.

    Only here it matters which serve a call: there is no residual, one that is added as it is, or one with a batch norm.
    """

    batch_norm_relu: OpOverload
    batch_norm_relu_backward: OpOverload
    batch_norm_relu_recompute: OpOverload
    batch_norm_add_relu: OpOverload
    batch_norm_add_relu_backward: OpOverload
    batch_norm_add_batch_norm_relu: OpOverload
    batch_norm_add_batch_norm_relu_backward: OpOverload

    @classmethod
    def of(cls, namespace: str) -> "Ops":
        return cls(*(getattr(getattr(torch.ops, namespace), name).default for name in cls._fields))

    def forward(self, input, residual, batch_norm, residual_batch_norm, training):
        """(output, mask, statistics, residual_statistics), None for what there is not."""
        if residual_batch_norm is not None:
            arguments = *in_order(input, batch_norm), *in_order(residual, residual_batch_norm), training
            output, *statistics, mask = self.batch_norm_add_batch_norm_relu(*arguments)
            return output, saved_for_mask(output, mask), *statistics
        mean, var, weight, bias, momentum, eps, num_batches_tracked, input_bias = batch_norm
        vectors = weight, bias, input_bias, mean, var, num_batches_tracked
        if residual is None:
            output, statistics = self.batch_norm_relu(input, *vectors, training, momentum, eps)
            return output, None, statistics, None
        output, statistics, mask = self.batch_norm_add_relu(input, residual, *vectors, training, momentum, eps)
        return output, saved_for_mask(output, mask), statistics, None

    def backward(self, training, needed, grad_output, mask, statistics, residual_statistics, *tensors):
        """The gradients of ``tensors``: input, weight, bias, input_bias, and the same of a residual with a batch norm;
        then that of a residual without. ``needed``: whether each is.
        """
        input, weight, bias, input_bias, *of_residual = tensors
        vectors = weight, bias, input_bias, statistics
        if mask is None:
            return self.batch_norm_relu_backward(grad_output, input, *vectors, training, *needed)
        if residual_statistics is not None:
            norms = input, *vectors, *of_residual, residual_statistics
            return self.batch_norm_add_batch_norm_relu_backward(grad_output, mask, *norms, training, *needed)
        need_input, *need_vectors, need_residual = needed
        needed = need_input, need_residual, *need_vectors
        grads = self.batch_norm_add_relu_backward(grad_output, input, mask, *vectors, training, *needed)
        grad_input, grad_residual, *grad_vectors = grads
        return grad_input, *grad_vectors, grad_residual
