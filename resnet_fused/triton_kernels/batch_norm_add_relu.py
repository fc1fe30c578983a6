"""relu(batch_norm(input) [+ residual, or + batch_norm(residual)]): tensors in, kernels launched, tensors out."""

import contextlib
import itertools
import math
from functools import lru_cache

import torch
import triton.language as tl

from ..checks import check, check_device, check_input, check_like_input, check_of_forward, check_statistics
from ..ops import BatchNorm, MaxPool, matrix_shape, memory_format_of, new_gradients, new_like_input, new_statistics
from . import kernels
from .kernels import Axis, Gradients, Matrix, Norm, Tail, Windows
from .plan import ceil_div, make_plan


def launch(kernel, grid, options, *arguments):
    kernel[grid](*arguments, **options)


def _options(warps, holds_more=False):
    """For the compiler. ``holds_more``: a backward pass of two batch norms at once, or of windows in float64."""
    return {
        "num_warps": warps,
        # Left to itself ptxas aims at 80 or 96 registers and then spills one or two. With 128, four programs of four
        # warps are on a multiprocessor at a time, with 168 three, and have some 64 KiB of loads under way.
        "maxnreg": 168 if holds_more else 128,
        # No contraction but where a kernel says so.
        "enable_fp_fusion": False,
    }


def _on(device):
    """Triton launches on the current device, not on its tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@lru_cache(1024)
def _plan(rows, columns, channels, dtype, is_pooled=False):
    """The plan, and what the kernels get of it."""
    plan = make_plan(rows, channels, columns // channels, dtype.itemsize)
    # Neighbours along W read what is apart: 16 bytes at a time would put a warp's elements four times as far apart.
    width = 1 if is_pooled and plan.inner > 1 else plan.width
    largest = max(plan.tiles * plan.block_x, 4 * plan.channels * plan.partials)
    matrix = Matrix(
        plan.rows,
        plan.columns // width,
        plan.inner,
        plan.tiles,
        plan.splits,
        plan.split_rows,
        plan.partials,
        ceil_div(plan.columns, 8),
        *map(tl.constexpr, (width, plan.block_x, plan.block_y, plan.tile_channels)),
        tl.constexpr(tl.float64 if dtype == torch.float64 else tl.float32),
        tl.constexpr(tl.int32 if largest < 2**31 else tl.int64),
    )
    return plan, matrix


@lru_cache(1024)
def _windows(max_pool, shape, memory_format):
    """What the kernels get of a pooling of an input of that shape; None of None."""
    if max_pool is None:
        return None
    axes, largest = [], max(shape[:2])
    for axis, (size, windows) in enumerate(zip(shape[2:], max_pool.output_size, strict=True)):
        kernel, stride, padding, dilation = (option[axis] for option in max_pool[:4])
        stride = stride if windows > 1 else 1  # a single window's is no matter, and may be any number
        reach = (kernel - 1) * dilation
        cover = min(reach // stride + 1, windows)
        axes.append(Axis(size, windows, *map(tl.constexpr, (kernel, stride, padding, dilation, cover))))
        largest *= max(size, windows, reach)  # a position in or beside the input is less than 4 of it
    is_channels_last = memory_format != torch.contiguous_format
    return Windows(*axes, tl.constexpr(is_channels_last), tl.constexpr(tl.int32 if largest < 2**29 else tl.int64))


def _scratch(input, *sizes):
    return input.new_empty(sizes, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _norm(x, statistics, *vectors):
    return Norm(x, statistics, *(None if vector is None else vector.contiguous() for vector in vectors))


def _both(of_norms, *absent):
    """The kernels' arguments for either batch norm; ``absent`` where there is no second one."""
    return itertools.chain.from_iterable([*of_norms, absent][:2])


def _dense(input, *tensors):
    """In the input's memory format."""
    memory_format = memory_format_of(input)
    return [None if tensor is None else tensor.contiguous(memory_format=memory_format) for tensor in tensors]


def _output_shape(input, max_pool):
    return input.shape if max_pool is None else (*input.shape[:2], *max_pool.output_size)


def _mask_shape(input, max_pool):
    """Of bits, or of winners."""
    if max_pool is not None:
        return len(input), math.prod(_output_shape(input, max_pool)[1:])
    rows, columns = matrix_shape(input)
    return rows, ceil_div(columns, 8)


def _forward(input, residual, norms, training, need_mask, given, max_pool):
    """(output, mask, statistics) by ``norms``, each a BatchNorm: of the input, and, maybe, of the residual."""
    memory_format = memory_format_of(input)
    output = torch.empty(
        _output_shape(input, max_pool), dtype=input.dtype, device=input.device, memory_format=memory_format
    )
    mask = input.new_empty(_mask_shape(input, max_pool), dtype=torch.uint8) if need_mask else None
    statistics = new_statistics(input, len(norms)) if given is None else given
    takes_batch = training and given is None
    if input.numel() == 0:  # nothing to normalise: the statistics that come back are never used
        for norm in norms:
            if takes_batch and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        return output, mask, statistics.zero_() if given is None else None

    x, r = _dense(input, input, residual)
    plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
    dense = [
        _norm(
            *tensors,
            norm.weight,
            norm.bias,
            norm.input_bias,
            norm.running_mean,
            norm.running_var,
            norm.num_batches_tracked if takes_batch else None,
        )
        for *tensors, norm in zip((x, r), statistics, norms, strict=False)
    ]
    r = r if len(norms) == 1 else None
    with _on(input.device):
        if takes_batch:
            _take_statistics(input, dense, norms, plan, matrix)
        of_norms = [(of_kernel, norm.eps) for of_kernel, norm in zip(dense, norms, strict=True)]
        windows = _windows(max_pool, input.shape, memory_format)
        plan, matrix = _plan(*matrix_shape(output), input.shape[1], input.dtype, max_pool is not None)
        arguments = *_both(of_norms, None, 0.0), r, output, mask, windows, matrix, training or given is not None
        launch(kernels.normalize, (plan.programs,), _options(plan.warps()), *arguments)
    if takes_batch:
        for of_kernel, norm in zip(dense, norms, strict=True):
            for name in ("running_mean", "running_var"):
                vector, written = getattr(norm, name), getattr(of_kernel, name)
                if written is not vector:
                    vector.copy_(written)
    return output, mask, statistics if given is None else None


def _take_statistics(input, dense, norms, plan, matrix):
    partials = _scratch(input, 2 * len(norms), plan.channels, plan.partials)
    arguments = *_both([[norm.input] for norm in dense], None), partials, matrix
    launch(kernels.statistics, (plan.programs, len(norms)), _options(plan.warps()), *arguments)
    of_norms = [
        (of_kernel, norm.momentum or 0.0, norm.eps, norm.momentum is None)
        for of_kernel, norm in zip(dense, norms, strict=True)
    ]
    arguments = *_both(of_norms, None, 0.0, 0.0, False), partials, matrix
    launch(kernels.finish_statistics, (plan.channels, len(norms)), _options(warps=4), *arguments)


def _projection(input, statistics, grad_means):
    """What the finishing kernel would write by its own sums."""
    (mean, invstd), (grad, dot) = statistics, grad_means
    projection = _scratch(input, 2, input.shape[1])
    slope = dot * invstd
    dropped = mean - mean.to(projection.dtype)
    return projection.copy_(torch.stack((grad - dropped * slope, slope)))


def _backward(grad_output, mask, statistics, norms, training, need_residual, grad_means, max_pool):
    """The gradients of each of ``norms``, and of a residual that was added as it is.

    ``norms``: of the input, and, maybe, of the residual, each (input, vectors, needed), with the vectors (weight, bias,
    input_bias), and whether the gradients of the input and of each of these are needed."""
    like = norms[0][0]
    check_of_forward(like, statistics, *(vectors for _, vectors, _ in norms))
    max_pool = MaxPool.of_numbers(max_pool, like, len(norms) == 2 or need_residual)
    check_like_input("grad_output", grad_output, like, _output_shape(like, max_pool))
    for x, _, _ in norms[1:]:
        check_like_input("residual", x, like)
    check_device("mask", mask, like)
    shape = _mask_shape(like, max_pool)
    if mask.shape != shape or mask.dtype != torch.uint8:
        raise ValueError(f"mask: expected uint8 of shape {shape}, got {mask.dtype} of {tuple(mask.shape)}")
    if grad_means is not None:
        check_statistics("grad_means", grad_means, len(norms), like)
        if any(any(needed) for _, _, (_, *needed) in norms):
            raise ValueError("grad_means: the gradients of vectors come without")
    gradients = [new_gradients(like, *vectors, *needed) for _, vectors, needed in norms]
    grad_residual = new_like_input(like, need_residual)
    if like.numel() == 0:
        for grad in (*itertools.chain(*gradients), grad_residual):
            if grad is not None:
                grad.zero_()
        return gradients, grad_residual

    plan, matrix = _plan(*matrix_shape(like), like.shape[1], like.dtype, max_pool is not None)
    windows = _windows(max_pool, like.shape, memory_format_of(like))
    tail = Tail(*_dense(like, grad_output), mask.contiguous(), windows)
    of_norms, need_sums = [], False
    means = grad_means if grad_means is not None else [None] * len(norms)
    for (x, vectors, needed), of_norm, grads, given in zip(norms, statistics, gradients, means, strict=True):
        if any(needed):
            need_input, *need_vectors = needed
            projection = None
            if training and need_input:
                projection = _scratch(like, 2, plan.channels) if given is None else _projection(like, of_norm, given)
            need_sums |= (projection is not None and given is None) or any(need_vectors)
            of_norms.append((_norm(*_dense(like, x), of_norm, *vectors), Gradients(*grads, projection)))
    of_norms = of_norms or [(None, Gradients(None))]
    norm, grads, residual_norm, residual_grads = arguments = [*_both(of_norms, None, Gradients(grad_residual))]
    # A thread of 4 warps would hold more of windows than there are registers for, on sm_120; of doubles it has half.
    holds_more = len(of_norms) == 2 or (windows is not None and like.dtype == torch.float64)
    options = _options(plan.warps(8 if windows and like.dtype != torch.float64 else 4), holds_more)
    with _on(like.device):
        if need_sums:
            partials = _scratch(like, 1 + len(of_norms), plan.channels, plan.partials)
            launch(kernels.gradient_sums, (plan.programs,), options, tail, norm, residual_norm, partials, matrix)
            grid = plan.channels, len(of_norms)
            launch(kernels.finish_gradients, grid, _options(warps=4), *arguments, partials, matrix, training)
        if grads.input is not None or residual_grads.input is not None:
            launch(kernels.input_gradient, (plan.programs,), options, tail, *arguments, matrix)
    return gradients, grad_residual


# ---- The ops ----

_FIELDS = len(BatchNorm._fields)


def batch_norm_add_relu(input, *arguments):
    """The arguments up to the last that is not a default."""
    norms, (training, need_mask, *optional) = [BatchNorm(*arguments[:_FIELDS])], arguments[_FIELDS:]
    residual, *optional = optional or [None]
    residual_norm, (statistics, max_pool) = optional[:_FIELDS], [*optional[_FIELDS:], None, None][:2]
    residual_norm = BatchNorm(*residual_norm) if any(value is not None for value in residual_norm) else None
    if residual_norm is not None:
        norms.append(residual_norm)
    if statistics is None:
        check(input, residual, norms[0], residual_norm, training)
    else:
        check_of_forward(input, statistics, *((norm.weight, norm.bias, norm.input_bias) for norm in norms))
    if residual is not None:
        check_like_input("residual", residual, input)
    max_pool = MaxPool.of_numbers(max_pool, input, residual is not None)
    return _forward(input, residual, norms, training, need_mask, statistics, max_pool)


def batch_norm_add_relu_backward(
    grad_output,
    mask,
    statistics,
    training,
    input,
    weight,
    bias,
    input_bias,
    need_input,
    need_weight,
    need_bias,
    need_input_bias,
    need_residual,
    residual=None,
    residual_weight=None,
    residual_bias=None,
    residual_input_bias=None,
    need_residual_weight=False,
    need_residual_bias=False,
    need_residual_input_bias=False,
    grad_means=None,
    max_pool=None,
):
    norms = [(input, (weight, bias, input_bias), (need_input, need_weight, need_bias, need_input_bias))]
    if residual is None:
        (gradients,), grad_residual = _backward(
            grad_output, mask, statistics, norms, training, need_residual, grad_means, max_pool
        )
        return *gradients, grad_residual, None, None, None
    vectors = residual_weight, residual_bias, residual_input_bias
    needed = need_residual, need_residual_weight, need_residual_bias, need_residual_input_bias
    norms.append((residual, vectors, needed))
    (gradients, residual_gradients), _ = _backward(
        grad_output, mask, statistics, norms, training, False, grad_means, max_pool
    )
    return *gradients, *residual_gradients


def batch_norm_statistics(input, eps):
    check_input(input)
    statistics = input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    if input.numel() > 0:
        plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
        with _on(input.device):
            norm = BatchNorm(None, None, momentum=0.0, eps=eps)
            dense = _norm(*_dense(input, input), statistics, norm.weight, norm.bias, norm.input_bias)
            _take_statistics(input, [dense], [norm], plan, matrix)
    return statistics
