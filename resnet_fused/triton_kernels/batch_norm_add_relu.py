"""relu(batch_norm(input) [+ residual, or + batch_norm(residual)]): tensors in, kernels launched, tensors out."""

import contextlib
import itertools
from functools import lru_cache

import torch
import triton.language as tl

from ..checks import check_arguments, check_batch_norms, check_device, check_like_input, check_of_forward
from ..ops import mask_shape, matrix_shape, memory_format_of, new_gradients, new_like_input, new_mask, new_statistics
from . import kernels
from .kernels import Gradients, Matrix, Norm, Tail
from .plan import ceil_div, make_plan

# The largest value that is stored as 0.
_VANISHING = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 0.0, torch.float64: 0.0}


def launch(kernel, grid, options, *arguments):
    kernel[grid](*arguments, **options)


def _options(warps, takes_both=False):
    """For the compiler. ``takes_both``: a backward pass that takes two batch norms at once."""
    return {
        "num_warps": warps,
        # Left to itself ptxas aims at 80 or 96 registers and then spills one or two. With 128, four programs of four
        # warps are on a multiprocessor at a time, with 168 three, and have some 64 KiB of loads under way.
        "maxnreg": 168 if takes_both else 128,
        # No contraction but where a kernel says so: the mask's bits and a recomputed mask are to be the same.
        "enable_fp_fusion": False,
    }


def _on(device):
    """Triton launches on the current device, not on its tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@lru_cache(1024)
def _plan(rows, columns, channels, dtype):
    """The plan, and what the kernels get of it."""
    plan = make_plan(rows, channels, columns // channels, dtype.itemsize)
    largest = max(plan.tiles * plan.block_x, 4 * plan.channels * plan.partials)
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


def _norm(x, statistics, *vectors):
    return Norm(x, statistics, *(None if vector is None else vector.contiguous() for vector in vectors))


def _both(of_norms, *absent):
    """The kernels' arguments for either batch norm; ``absent`` where there is no second one."""
    return itertools.chain.from_iterable([*of_norms, absent][:2])


def _forward(input, residual, norms, training):
    """(output, statistics of each norm, mask). ``norms``: of the input, and, maybe, of the residual, each
    (weight, bias, input_bias, running_mean, running_var, num_batches_tracked, momentum, eps)."""
    output, mask = new_like_input(input), None
    statistics = [new_statistics(input) for _ in norms]
    if residual is not None:
        mask = new_mask(input, training)
    if input.numel() == 0:  # nothing to normalise: the statistics that come back are never used
        for *_, num_batches_tracked, _, _ in norms:
            if training and num_batches_tracked is not None:
                num_batches_tracked.add_(1)
        return output, *(of_norm.zero_() for of_norm in statistics), mask

    x, r = _dense(input, input, residual)
    plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
    dense = [_norm(*tensors, *norm[:6]) for *tensors, norm in zip((x, r), statistics, norms, strict=False)]
    r = r if len(norms) == 1 else None
    options = _options(plan.warps)
    with _on(input.device):
        if training:
            partials = _scratch(input, 2 * len(norms), plan.channels, plan.partials)
            arguments = *_both([[norm] for norm in dense], None), partials, matrix
            launch(kernels.statistics, (plan.programs, len(norms)), options, *arguments)
            of_norms = [
                (norm, momentum or 0.0, eps, momentum is None)
                for norm, (*_, momentum, eps) in zip(dense, norms, strict=True)
            ]
            arguments = *_both(of_norms, None, 0.0, 0.0, False), partials, matrix
            launch(kernels.finish_statistics, (plan.channels, len(norms)), _options(warps=4), *arguments)
        of_norms = [(norm, eps) for norm, (*_, eps) in zip(dense, norms, strict=True)]
        arguments = *_both(of_norms, None, 0.0), r, output, mask if training else None, matrix, training
        launch(kernels.normalize, (plan.programs,), options, *arguments)
    if training:
        for norm, (*_, running_mean, running_var, _, _, _) in zip(dense, norms, strict=True):
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


def _backward(grad_output, mask, norms, training, need_residual=False):
    """The gradients of each of ``norms``, and of a residual that was added as it is.

    ``norms``: of the input, and, maybe, of the residual, each (input, vectors, statistics, needed), with the vectors
    (weight, bias, input_bias), and whether the gradients of the input and of each of these are needed."""
    like = norms[0][0]
    for prefix, (x, vectors, statistics, _) in zip(("", "residual_"), norms, strict=False):
        check_of_forward(x, *vectors, statistics, prefix)
    mask, output = _check_backward(grad_output, like, mask)
    gradients = [new_gradients(like, *vectors, *needed) for _, vectors, _, needed in norms]
    grad_residual = new_like_input(like, need_residual)
    if like.numel() == 0:
        for grad in (*itertools.chain(*gradients), grad_residual):
            if grad is not None:
                grad.zero_()
        return gradients, grad_residual

    plan, matrix = _plan(*matrix_shape(like), like.shape[1], like.dtype)
    dy, y = _dense(like, grad_output, output)
    is_recomputed = mask is None and y is None
    tail = Tail(dy, mask, y, tl.constexpr(is_recomputed), tl.constexpr(_VANISHING[like.dtype]))
    of_norms, need_sums = [], False
    for (x, vectors, statistics, needed), grads in zip(norms, gradients, strict=True):
        if any(needed):
            need_input, *need_vectors = needed
            projection = _scratch(like, 2, plan.channels) if training and need_input else None
            need_sums |= projection is not None or any(need_vectors)
            of_norms.append((_norm(*_dense(like, x), statistics, *vectors), Gradients(*grads, projection)))
    of_norms = of_norms or [(None, Gradients(None))]
    norm, grads, residual_norm, residual_grads = arguments = [*_both(of_norms, None, Gradients(grad_residual))]
    options = _options(plan.warps, takes_both=len(of_norms) == 2)
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


def batch_norm_relu(input, *arguments):
    check_arguments(input, *arguments)
    *vectors, training, momentum, eps = arguments
    output, statistics, _ = _forward(input, None, [(*vectors, momentum, eps)], training)
    return output, statistics


def batch_norm_relu_backward(grad_output, input, weight, bias, input_bias, statistics, training, *needed):
    norm = input, (weight, bias, input_bias), statistics, needed
    (gradients,), _ = _backward(grad_output, None, [norm], training)
    return gradients


def batch_norm_relu_recompute(input, weight, bias, statistics):
    """The output of batch_norm_relu, once more, bit for bit: by the same kernel."""
    check_of_forward(input, weight, bias, None, statistics)
    output = new_like_input(input)
    if input.numel() > 0:
        (x,) = _dense(input, input)
        plan, matrix = _plan(*matrix_shape(input), input.shape[1], input.dtype)
        norm = _norm(x, statistics, weight, bias, None)
        arguments = norm, 0.0, None, 0.0, None, output, None, matrix, True
        with _on(input.device):
            launch(kernels.normalize, (plan.programs,), _options(plan.warps), *arguments)
    return output


def batch_norm_add_relu(input, residual, *arguments):
    check_arguments(input, *arguments)
    check_like_input("residual", residual, input)
    *vectors, training, momentum, eps = arguments
    return _forward(input, residual, [(*vectors, momentum, eps)], training)


def batch_norm_add_relu_backward(
    grad_output, input, mask, weight, bias, input_bias, statistics, training, need_input, need_residual, *needed
):
    norm = input, (weight, bias, input_bias), statistics, (need_input, *needed)
    ((grad_input, *grad_vectors),), grad_residual = _backward(grad_output, mask, [norm], training, need_residual)
    return grad_input, grad_residual, *grad_vectors


def batch_norm_add_batch_norm_relu(input, *arguments):
    check_batch_norms(input, *arguments)
    residual, training = arguments[8], arguments[-1]
    return _forward(input, residual, [arguments[:8], arguments[9:-1]], training)


def batch_norm_add_batch_norm_relu_backward(grad_output, mask, *arguments):
    input, *vectors, statistics = arguments[:5]
    residual, *residual_vectors, residual_statistics = arguments[5:10]
    training, needed, residual_needed = arguments[10], arguments[11:15], arguments[15:]
    check_like_input("residual", residual, input)
    norms = (input, vectors, statistics, needed), (residual, residual_vectors, residual_statistics, residual_needed)
    (gradients, residual_gradients), _ = _backward(grad_output, mask, norms, training)
    return *gradients, *residual_gradients
