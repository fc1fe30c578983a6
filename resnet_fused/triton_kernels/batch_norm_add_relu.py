"""relu(batch_norm(input) [+ residual]): tensors in, kernels launched, tensors out; both ops share all of it."""

import contextlib
from functools import lru_cache

import torch
import triton.language as tl

from ..checks import check_arguments, check_device, check_like_input
from ..ops import matrix_shape, memory_format_of, new_like_input, new_per_channel, new_statistics
from . import kernels
from .kernels import Matrix, Tail, Vectors
from .plan import ceil_div, make_plan

# The largest value that is stored as 0.
_VANISHING = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 0.0, torch.float64: 0.0}


def launch(kernel, programs, warps, *arguments):
    # No contraction but where a kernel says so: the mask's bits and a recomputed mask are to be the same.
    kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)


def _on(device):
    """Triton launches on the current device, not on its tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@lru_cache(1024)
def _plan(rows, columns, channels, dtype):
    """The plan, and what the kernels get of it."""
    plan = make_plan(rows, channels, columns // channels, dtype.itemsize)
    largest = max(plan.tiles * plan.block_x, 2 * plan.channels * plan.partials)
    matrix = Matrix(
        plan.rows,
        plan.columns // plan.width,
        plan.inner,
        plan.tiles,
        plan.splits,
        plan.split_rows,
        plan.partials,
        ceil_div(plan.columns, 8),
        *map(tl.constexpr, (plan.width, plan.block_x, plan.block_y, plan.tile_channels)),
        tl.constexpr(tl.float64 if dtype == torch.float64 else tl.float32),
        tl.constexpr(tl.int32 if largest < 2**31 else tl.int64),
    )
    return plan, matrix


def _scratch(input, *sizes):
    return input.new_empty(sizes, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _contiguous(*vectors):
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _forward(
    input,
    residual,
    weight,
    bias,
    input_bias,
    running_mean,
    running_var,
    num_batches_tracked,
    training,
    momentum,
    eps,
):
    check_arguments(
        input, weight, bias, input_bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
    )
    if residual is not None:
        check_like_input("residual", residual, input)
    rows, columns = matrix_shape(input)
    output, statistics, mask = new_like_input(input), new_statistics(input), None
    if training and residual is not None:
        mask = input.new_empty((rows, ceil_div(columns, 8)), dtype=torch.uint8)
    if input.numel() == 0:  # nothing to normalise: the statistics that come back are never used
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return output, statistics.zero_(), mask

    memory_format = memory_format_of(input)
    x = input.contiguous(memory_format=memory_format)
    r = None if residual is None else residual.contiguous(memory_format=memory_format)
    plan, matrix = _plan(rows, columns, input.shape[1], input.dtype)
    vectors = Vectors(*_contiguous(weight, bias, input_bias))
    running = _contiguous(running_mean, running_var)
    with _on(input.device):
        if training:
            partials = _scratch(input, 2, plan.channels, plan.partials)
            launch(kernels.statistics, plan.programs, plan.warps, x, partials, matrix)
            launch(
                kernels.finish_statistics,
                plan.channels,
                4,
                x,
                partials,
                statistics,
                vectors.input_bias,
                *running,
                num_batches_tracked,
                0.0 if momentum is None else momentum,
                eps,
                matrix,
                momentum is None,
            )
        launch(
            kernels.normalize,
            plan.programs,
            plan.warps,
            x,
            r,
            output,
            mask,
            statistics,
            vectors,
            *running,
            num_batches_tracked,
            eps,
            matrix,
            training,
        )
    if training:
        for vector, written in zip((running_mean, running_var), running, strict=True):
            if written is not vector:
                vector.copy_(written)
    return output, statistics, mask


def _backward(
    grad_output,
    input,
    mask,
    weight,
    bias,
    input_bias,
    statistics,
    training,
    need_input,
    need_residual,
    need_weight,
    need_bias,
    need_input_bias,
):
    check_like_input("grad_output", grad_output, input)
    check_device("statistics", statistics, input)
    rows, columns = matrix_shape(input)
    output = None
    if mask is not None and mask.dtype == torch.uint8:
        check_device("mask", mask, input)
        if mask.shape != (rows, ceil_div(columns, 8)):
            raise ValueError(f"mask: expected shape {(rows, ceil_div(columns, 8))}, got {tuple(mask.shape)}")
        mask = mask.contiguous()
    elif mask is not None:
        check_like_input("mask", mask, input)
        mask, output = None, mask
    grad_input, grad_residual = new_like_input(input, need_input), new_like_input(input, need_residual)
    grad_weight = new_per_channel(input, weight, need_weight)
    grad_bias = new_per_channel(input, bias, need_bias)
    grad_input_bias = new_per_channel(input, input_bias, need_input_bias)
    gradients = grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias
    if input.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in gradients)

    memory_format = memory_format_of(input)
    dy, x, y = (
        None if tensor is None else tensor.contiguous(memory_format=memory_format)
        for tensor in (grad_output, input, output)
    )
    plan, matrix = _plan(rows, columns, input.shape[1], input.dtype)
    vectors = Vectors(*_contiguous(weight, bias, input_bias))
    is_recomputed = mask is None and output is None
    tail = Tail(dy, x, mask, y, tl.constexpr(is_recomputed), tl.constexpr(_VANISHING[input.dtype]))
    projection = _scratch(input, 2, plan.channels) if training and need_input else None
    with _on(input.device):
        if projection is not None or need_weight or need_bias or need_input_bias:
            partials = _scratch(input, 2, plan.channels, plan.partials)
            launch(kernels.gradient_sums, plan.programs, plan.warps, tail, statistics, vectors, partials, matrix)
            launch(
                kernels.finish_gradients,
                plan.channels,
                4,
                partials,
                statistics,
                vectors,
                grad_weight,
                grad_bias,
                grad_input_bias,
                projection,
                matrix,
                training,
            )
        if need_input or need_residual:
            launch(
                kernels.input_gradient,
                plan.programs,
                plan.warps,
                tail,
                statistics,
                vectors,
                projection,
                grad_input,
                grad_residual,
                matrix,
            )
    return gradients


def batch_norm_add_relu(input, residual, *arguments):
    return _forward(input, residual, *arguments)


def batch_norm_relu(input, *arguments):
    return _forward(input, None, *arguments)[:2]


def batch_norm_add_relu_backward(*arguments):
    return _backward(*arguments)


def batch_norm_relu_backward(
    grad_output, input, weight, bias, input_bias, statistics, training, need_input, *need_vectors
):
    grad_input, _, *grad_vectors = _backward(
        grad_output, input, None, weight, bias, input_bias, statistics, training, need_input, False, *need_vectors
    )
    return grad_input, *grad_vectors
