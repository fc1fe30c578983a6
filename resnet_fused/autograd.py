"""Gradients: what is saved for backward, and a backward that can be differentiated in turn.

``torch.library.register_autograd`` refuses ops that mutate their arguments, and these update the running statistics;
hence Functions around the raw ops. The backward is a Function too, whose own backward differentiates the plain
formula: a raw op called there would give wrong second gradients with no more than a warning.

What a call takes are (input, residual, batch_norm, residual_batch_norm, training, max_pool), here and below; the
residual and its batch norm may be None, and so may the pooling, where there is no residual.
"""

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import Function

from .checks import check
from .ops import BatchNorm, memory_format_of, unpack_mask


def attempt(ops, input, residual, batch_norm, residual_batch_norm, training, max_pool=None):
    """The output; None where the op refuses its arguments, which it does before it touches anything."""
    try:
        if not torch.is_grad_enabled():  # apply would take 3 of 12 us
            output, _, _ = ops.forward(input, residual, batch_norm, residual_batch_norm, training, max_pool)
            return output
        arguments = input, residual, batch_norm, residual_batch_norm, training, max_pool
        # Beside them, what gets gradients: autograd looks into no tuple.
        vectors = batch_norm.weight, batch_norm.bias, batch_norm.input_bias
        of_residual = None, None, None
        if residual_batch_norm is not None:
            of_residual = residual_batch_norm.weight, residual_batch_norm.bias, residual_batch_norm.input_bias
        return _Forward.apply(ops, arguments, input, *vectors, residual, *of_residual)
    except (RuntimeError, TypeError, ValueError):  # checking the arguments here first would cost 8 us a call
        try:
            check(input, residual, batch_norm, residual_batch_norm, training, not ops.spans_processes)
        except (TypeError, ValueError):
            return None
        raise


def _save(ctx, *tensors):
    """For backward; and, where hooks may return them in other strides or types or on another device, how they are."""
    ctx.save_for_backward(*tensors)
    ctx.saved_as = None
    if _top_saved_tensors_default_hooks(False) is not None:
        ctx.saved_as = [None if t is None else (t.device, t.dtype, memory_format_of(t)) for t in tensors]


def _saved(ctx):
    tensors = ctx.saved_tensors
    if ctx.saved_as is None:
        return tensors
    return tuple(
        tensor if tensor is None else tensor.to(*as_it_was[:2]).contiguous(memory_format=as_it_was[2])
        for tensor, as_it_was in zip(tensors, ctx.saved_as, strict=True)
    )


class _Forward(Function):
    """Saves the mask, the statistics, per-channel vectors, and what is normalised, where a gradient depends on it: with
    constant statistics that of the weight alone does."""

    @staticmethod
    def forward(ctx, ops, arguments, input, weight, bias, input_bias, residual, *of_residual):
        _, _, batch_norm, residual_batch_norm, training, max_pool = arguments
        output, mask, statistics = ops.forward(*arguments, need_mask=any(ctx.needs_input_grad))
        _, _, _, needs_weight, _, _, _, needs_residual_weight, *_ = ctx.needs_input_grad
        ctx.is_recomputable = residual is None and max_pool is None and (training or needs_weight)
        if not training and not needs_weight:
            input = None
        if residual_batch_norm is None or not (training or needs_residual_weight):
            residual = None
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.memory_format = arguments[0].shape, memory_format_of(arguments[0])
        _save(ctx, mask, statistics, input, weight, bias, input_bias, residual, *of_residual)
        ctx.options = ops, training, max_pool, batch_norm.eps, residual_batch_norm and residual_batch_norm.eps
        ctx.unpacked = None
        return output

    @staticmethod
    def backward(ctx, grad_output):
        _, _, *needed = ctx.needs_input_grad
        if grad_output is None:
            return None, None, *(None for _ in needed)
        saved, ctx.unpacked = ctx.unpacked or _saved(ctx), None
        ops, training, max_pool, _, residual_eps = ctx.options
        is_differentiated = torch.is_grad_enabled()
        if not training:  # in the place of what was not saved what has its shape
            grad_output = like = grad_output.contiguous(memory_format=ctx.memory_format)
            mask, statistics, input, *vectors, residual, weight, bias, input_bias = saved
            if max_pool is not None and input is None:  # what is not touched takes no memory
                like = torch.empty(ctx.shape, dtype=like.dtype, device=like.device, memory_format=ctx.memory_format)
            if is_differentiated:
                like = torch.zeros_like(like)
            input = like if input is None else input
            residual = like if residual is None and residual_eps is not None else residual
            saved = mask, statistics, input, *vectors, residual, weight, bias, input_bias
        if is_differentiated:
            return None, None, *_Backward.apply(ctx.options, needed, grad_output, *saved)
        return None, None, *ops.backward(training, max_pool, needed, grad_output, *saved)


def is_recomputable(output):
    """Whether autograd recorded that the output is that of a call without a residual."""
    node = getattr(output, "grad_fn", None)
    return isinstance(node, _Forward._backward_cls) and node.is_recomputable


def recompute(node):
    """The output, bit by bit, from what was saved, which backward takes from here."""
    # Unpacked once for both: checkpointing refuses a second time, and an offload would copy again.
    ops, training, _, eps, _ = node.options
    node.unpacked = _, statistics, input, weight, bias, _, *_ = _saved(node)
    batch_norm = BatchNorm(None, None, weight, bias, eps=eps)
    with torch.no_grad():  # the op has no derivative
        output, _, _ = ops.forward(input, None, batch_norm, None, training, statistics=statistics)
    return output


class _Backward(Function):
    """The backward of :class:`_Forward`, differentiable in turn."""

    @staticmethod
    def forward(ctx, options, needed, grad_output, *saved):
        ops, training, max_pool, _, _ = ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, *saved)
        return ops.backward(training, max_pool, needed, grad_output, *saved)

    @staticmethod
    def backward(ctx, *cotangents):
        ops, training, max_pool, eps, residual_eps = ctx.options
        if training and ops.spans_processes:
            raise RuntimeError("the second derivative of a batch norm over several processes is not implemented")
        grad_output, mask, statistics, *tensors = ctx.saved_tensors
        if max_pool is None:
            passed = unpack_mask(mask, tensors[0])
        else:
            sources, passed = max_pool.sources(mask, tensors[0])

        def forward(input, weight, bias, input_bias, residual, *of_residual):
            output = _batch_norm(statistics[0], training, eps, input, weight, bias, input_bias)
            if residual_eps is not None:
                residual = _batch_norm(statistics[1], training, residual_eps, residual, *of_residual)
            if max_pool is not None:
                output = output.flatten(2).gather(2, sources.flatten(2)).view(sources.shape)
            return torch.where(passed, output + residual, 0.0)

        def backward(grad_output, *tensors):
            output, vjp = torch.func.vjp(forward, *tensors)
            return vjp(grad_output.to(output.dtype))

        primals = [statistics.new_ones(()) if tensor is None else tensor for tensor in tensors]
        if residual_eps is None:  # no gradient depends on the values of a residual that is added as it is, if at all
            primals[4] = grad_output
        grads, vjp = torch.func.vjp(backward, grad_output, *primals)
        pairs = zip(grads, cotangents, strict=True)
        cotangents = tuple(torch.zeros_like(grad) if g is None else g.to(grad.dtype) for grad, g in pairs)
        grad_grad_output, *grads = vjp(cotangents)
        _, _, _, _, _, *needed = ctx.needs_input_grad
        grads = (grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True))
        return None, None, grad_grad_output, None, None, *grads


def _batch_norm(statistics, training, eps, input, weight, bias, input_bias):
    """As a composition, in float64."""
    x, (mean, invstd), shape = input.to(statistics.dtype), statistics, (-1, *[1] * (input.dim() - 2))
    if training:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        invstd = torch.rsqrt(variance + eps)
    else:
        mean = mean - (input_bias - input_bias.detach())  # whose value is in it already
    return (x - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)
