"""relu(batch_norm(input) [+ residual, or + batch_norm(residual)]): tensors in, kernels launched, tensors out."""

import contextlib
from functools import lru_cache

import torch
import triton.language as tl

from ..checks import check_arguments, check_batch_norms, check_device, check_like_input, check_of_forward
from ..ops import mask_shape, matrix_shape, memory_format_of, new_gradients, new_like_input, new_statistics
from . import kernels
from .kernels import Matrix, Norm, Tail
from .plan import ceil_div, make_plan

# The largest value that is stored as 0.
_VANISHING = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 0.0, torch.float64: 0.0}


OPTIONS = {
    # No contraction but where a kernel says so: the mask's bits and a recomputed mask are to be the same.
    "enable_fp_fusion": False,
    # Left to itself ptxas aims at 80 or 96 registers and then spills one or two. With 128, four programs of four warps
    # are on a multiprocessor at a time, and have some 64 KiB of loads under way.
    "maxnreg": 128,
}


def launch(kernel, programs, warps, *arguments):
    kernel[(programs,)](*arguments, num_warps=warps, **OPTIONS)


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


def _norm(statistics, *vectors):
    return Norm(statistics, *(None if vector is None else vector.contiguous() for vector in vectors))


def _take_statistics(x, norm, momentum, eps, plan, matrix):
    """Of the batch, into ``norm``: its own statistics and the running ones."""
    partials = _scratch(x, 2, plan.channels, plan.partials)
    launch(kernels.statistics, plan.programs, plan.warps, x, partials, matrix)
    is_cumulative = momentum is None
    momentum = 0.0 if is_cumulative else momentum
    launch(kernels.finish_statistics, plan.channels, 4, x, partials, norm, momentum, eps, matrix, is_cumulative)


def _forward(input, residual, norms, training):
    """(output, statistics of each norm, mask). ``norms``: of the input, and, maybe, of the residual, each
    (weight, bias, input_bias, running_mean, running_var, num_batches_tracked, momentum, eps)."""
    output, mask = new_like_input(input), None
    statistics = [new_statistics(input) for _ in norms]
    if training and residual is not None:
        mask = input.new_empty(mask_shape(input), dtype=torch.uint8)
    if input.numel() == 0:  # nothing to normalise: the statistics that come back are never used
        for *_, num_batches_tracked, _, _ in norms:
            if training and num_batches_tracked is not None:
                num_batches_tracked.add_(1)
        return output, *(of_norm.zero_() for of_norm in statistics), mask

    x, r = _dense(input, input, residual)
    plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
    dense_norms = [_norm(of_norm, *norm[:6]) for of_norm, norm in zip(statistics, norms, strict=True)]
    with _on(input.device):
        if training:
            for tensor, norm, (*_, momentum, eps) in zip((x, r), dense_norms, norms, strict=False):
                _take_statistics(tensor, norm, momentum, eps, plan, matrix)
        arguments = [argument for norm, (*_, eps) in zip(dense_norms, norms, strict=True) for argument in (norm, eps)]
        arguments += [None, 0.0] * (2 - len(norms))
        launch(kernels.normalize, plan.programs, plan.warps, x, r, output, mask, *arguments, matrix, training)
    if training:
        for norm, (*_, running_mean, running_var, _, _, _) in zip(dense_norms, norms, strict=True):
            for vector, written in ((running_mean, norm.running_mean), (running_var, norm.running_var)):
                if written is not vector:
                    vector.copy_(written)
    return output, *statistics, mask


def _dense(input, *tensors):
    """In the input's memory format."""
    memory_format = memory_format_of(input)
    return [None if tensor is None else tensor.contiguous(memory_format=memory_format) for tensor in tensors]


def _check_backward(grad_output, input, mask):
    """(mask, output): the mask's bits, or the output in their place; or neither."""
    check_like_input("grad_output", grad_output, input)
    if mask is None:
        return None, None
    if mask.dtype != torch.uint8:
        check_like_input("mask", mask, input)
        return None, mask
    check_device("mask", mask, input)
    if mask.shape != mask_shape(input):
        raise ValueError(f"mask: expected shape {mask_shape(input)}, got {tuple(mask.shape)}")
    return mask.contiguous(), None


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
    like=None,
):
    """One batch norm's gradients, and the residual's that was added as it is. ``like``: the tensor whose memory format
    decides, ``input`` by default."""
    like = input if like is None else like
    mask, output = _check_backward(grad_output, like, mask)
    check_of_forward(input, weight, bias, input_bias, statistics)
    needs = need_input, need_weight, need_bias, need_input_bias
    grad_input, *grad_vectors = new_gradients(like, weight, bias, input_bias, *needs)
    grad_residual = new_like_input(like, need_residual)
    gradients = grad_input, grad_residual, *grad_vectors
    if input.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in gradients)

    plan, matrix = _plan(*matrix_shape(like), input.shape[1], input.dtype)
    norm = _norm(statistics, weight, bias, input_bias)
    dy, x, y = _dense(like, grad_output, input, output)
    is_recomputed = mask is None and y is None
    tail = Tail(dy, x, mask, y, tl.constexpr(is_recomputed), tl.constexpr(_VANISHING[input.dtype]))
    projection = _scratch(input, 2, plan.channels) if training and need_input else None
    with _on(input.device):
        if projection is not None or need_weight or need_bias or need_input_bias:
            partials = _scratch(input, 2, plan.channels, plan.partials)
            launch(kernels.gradient_sums, plan.programs, plan.warps, tail, norm, partials, matrix)
            arguments = partials, norm, *grad_vectors, projection, matrix, training
            launch(kernels.finish_gradients, plan.channels, 4, *arguments)
        if need_input or need_residual:
            arguments = tail, norm, projection, grad_input, grad_residual, matrix
            launch(kernels.input_gradient, plan.programs, plan.warps, *arguments)
    return gradients


# ---- The ops ----


def batch_norm_relu(input, *arguments):
    check_arguments(input, *arguments)
    *vectors, training, momentum, eps = arguments
    output, statistics, _ = _forward(input, None, [(*vectors, momentum, eps)], training)
    return output, statistics


def batch_norm_relu_backward(
    grad_output, input, weight, bias, input_bias, statistics, training, need_input, *need_vectors
):
    grad_input, _, *grad_vectors = _backward(
        grad_output, input, None, weight, bias, input_bias, statistics, training, need_input, False, *need_vectors
    )
    return grad_input, *grad_vectors


def batch_norm_relu_recompute(input, weight, bias, statistics):
    """The output of batch_norm_relu, once more, bit for bit: by the same kernel."""
    check_of_forward(input, weight, bias, None, statistics)
    output = new_like_input(input)
    if input.numel() > 0:
        (x,) = _dense(input, input)
        plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
        arguments = _norm(statistics, weight, bias, None), 0.0, None, 0.0, matrix, True
        with _on(input.device):
            launch(kernels.normalize, plan.programs, plan.warps, x, None, output, None, *arguments)
    return output


def batch_norm_add_relu(input, residual, *arguments):
    check_arguments(input, *arguments)
    check_like_input("residual", residual, input)
    *vectors, training, momentum, eps = arguments
    return _forward(input, residual, [(*vectors, momentum, eps)], training)


def batch_norm_add_relu_backward(*arguments):
    return _backward(*arguments)


def batch_norm_add_batch_norm_relu(input, *arguments):
    check_batch_norms(input, *arguments)
    residual, training = arguments[8], arguments[-1]
    return _forward(input, residual, [arguments[:8], arguments[9:-1]], training)


def batch_norm_add_batch_norm_relu_backward(grad_output, mask, *arguments):
    norms, training, needed = (arguments[:5], arguments[5:10]), arguments[10], arguments[11:]
    input, residual = (tensor for tensor, *_ in norms)
    check_like_input("residual", residual, input)
    check_of_forward(residual, *norms[1][1:], "residual_")
    gradients = []
    for (tensor, *norm), (need_tensor, *need_vectors) in zip(norms, (needed[:4], needed[4:]), strict=True):
        grad_tensor, _, *grad_vectors = _backward(
            grad_output, tensor, mask, *norm, training, need_tensor, False, *need_vectors, like=input
        )
        gradients += grad_tensor, *grad_vectors
    return tuple(gradients)
