"""Gradients: one ``autograd.Function`` per op, saying what is saved and which backward pairs with it.

``torch.library.register_autograd`` refuses ops that mutate their arguments, and these update the running statistics;
hence Functions around the raw ops. The backward is a Function too, whose own backward differentiates the plain
formula: a raw op called there would give wrong second gradients with no more than a warning.
"""

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import Function

from .checks import check_arguments, check_batch_norms, check_device
from .ops import memory_format_of, saved_for_mask, unpack_mask


class _Forward(Function):
    """The last argument of :meth:`apply` are the ops, of which ``op`` names the one that runs."""

    @classmethod
    def _run(cls, *args):
        # Without gradients apply would take 3 of 12 us.
        return cls.apply(*args) if torch.is_grad_enabled() else getattr(args[-1], cls.op)(*args[:-1])[0]

    @classmethod
    def call(cls, *args):
        """The output, without what the op returns beside it."""
        try:
            return cls._run(*args)
        except RuntimeError:  # the op has refused its arguments: checking them here first would cost 8 us a call
            cls.check(*args)
            raise

    @classmethod
    def attempt(cls, *args):
        """Likewise; None where the op refuses its arguments, which it does before it touches anything."""
        try:
            return cls._run(*args)
        except RuntimeError:
            try:
                cls.check(*args)
            except (TypeError, ValueError):
                return None
            raise

    @classmethod
    def has_made(cls, output):
        """Whether autograd recorded that the output comes from :meth:`call` or :meth:`attempt`."""
        return isinstance(getattr(output, "grad_fn", None), cls._backward_cls)


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


def _view_per_channel(tensor, input):
    return tensor.view(-1, *[1] * (input.dim() - 2))


def _passed(mask, input):
    """Where the ReLU passed, of what a forward saves for it: the mask's bits or the output."""
    return unpack_mask(mask, input) if mask.dtype == torch.uint8 else ~(mask <= 0)


def _differentiable_backward(mask, training, eps, statistics, grad_output, input, weight):
    """A batch norm's backward as a composition: (grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias).

    In float64. With g = grad_output where mask, x^ = (input - mean) * invstd and n values per channel:
    grad_bias = sum g, grad_weight = sum g x^, grad_residual = g, and grad_input = weight * invstd * g, less, where the
    statistics are the batch's, weight * invstd * (grad_bias + x^ grad_weight) / n; grad_input_bias is grad_input's sum.
    """
    dims = [0, *range(2, input.dim())]
    x = input.to(statistics.dtype)
    g = torch.where(mask, grad_output.to(x.dtype), 0.0)
    mean, invstd = statistics
    if training:
        variance, mean = torch.var_mean(x, dims, correction=0)
        invstd = torch.rsqrt(variance + eps)
    normalized = (x - _view_per_channel(mean, x)) * _view_per_channel(invstd, x)
    grad_bias = g.sum(dims)
    grad_weight = (g * normalized).sum(dims)
    scale = invstd if weight is None else invstd * weight
    if training:
        n = x.numel() // x.shape[1]
        projected = g - (_view_per_channel(grad_bias, x) + normalized * _view_per_channel(grad_weight, x)) / n
        return projected * _view_per_channel(scale, x), g, grad_weight, grad_bias, torch.zeros_like(grad_bias)
    return g * _view_per_channel(scale, x), g, grad_weight, grad_bias, grad_bias * scale


def _double_backward(mask, training, eps, statistics, primals, cotangents, needs_bias, needs_input_bias):
    """Vector-Jacobian product of :func:`_differentiable_backward` with respect to (grad_output, input, weight, bias),
    and, last, to a bias left out of input, which acts as input does, where the statistics are constants.

    Of bias zeros, as eager's, not None: it moves no more than the mask.
    """
    has_weight = primals[2] is not None
    primals = primals if has_weight else primals[:2]

    def backward(grad_output, input, weight=None):
        return _differentiable_backward(mask, training, eps, statistics, grad_output, input, weight)

    outputs, vjp = torch.func.vjp(backward, *primals)
    cotangents = tuple(
        torch.zeros_like(output) if cotangent is None else cotangent.to(output.dtype)
        for output, cotangent in zip(outputs, cotangents, strict=True)
    )
    grad_grad_output, grad_input, *grad_weight = vjp(cotangents)
    grad_bias = statistics.new_zeros(statistics.shape[1]) if needs_bias or needs_input_bias else None
    grad_input_bias = grad_bias if training else grad_input.sum([0, *range(2, grad_input.dim())])
    return (
        grad_grad_output,
        grad_input,
        grad_weight[0] if has_weight else None,
        grad_bias if needs_bias else None,
        grad_input_bias if needs_input_bias else None,
    )


class BatchNormAddReLU(_Forward):
    """``relu(batch_norm(input) + residual)``; saves input, mask or else output, and per-channel vectors."""

    @staticmethod
    def check(input, residual, *arguments):
        check_arguments(input, *arguments[:-1])
        check_device("residual", residual, input)

    op = "batch_norm_add_relu"

    @staticmethod
    def forward(ctx, *args):
        input, _, weight, bias, input_bias, _, _, _, ctx.training, _, ctx.eps, ctx.ops = args
        output, statistics, mask = ctx.ops.batch_norm_add_relu(*args[:-1])
        ctx.set_materialize_grads(False)
        _save(ctx, input, saved_for_mask(output, mask), weight, bias, input_bias, statistics)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 12
        function = BatchNormAddReLUBackward
        call = function.apply if torch.is_grad_enabled() else function.forward
        needed = ctx.needs_input_grad[:5]
        return *call(grad_output, *_saved(ctx), ctx.training, *needed, ctx.eps, ctx.ops), *(None,) * 7


class BatchNormAddReLUBackward(Function):
    """The backward of :class:`BatchNormAddReLU`, differentiable in turn.

    Where the output is the mask, its gradient, zeros, reaches the residual and all that is before it, as in eager.
    Through a mask of bits nothing does: there a residual gets None where eager gives it zeros.
    """

    @staticmethod
    def forward(*args):
        return args[-1].batch_norm_add_relu_backward(*args[:-2])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, input, mask, weight, _, _, statistics, ctx.training, *_, ctx.eps, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, mask, weight, statistics)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, input, mask, weight, statistics = ctx.saved_tensors
        grad_grad_output, grad_input, *grad_vectors = _double_backward(
            _passed(mask, input),
            ctx.training,
            ctx.eps,
            statistics,
            (grad_output, input, weight),
            cotangents,
            *ctx.needs_input_grad[4:6],
        )
        grad_mask = torch.zeros_like(mask) if ctx.needs_input_grad[2] else None
        return grad_grad_output, grad_input, grad_mask, *grad_vectors, *(None,) * 9


class BatchNormReLU(_Forward):
    """``relu(batch_norm(input))``; saves input and per-channel vectors, and recomputes the ReLU's mask from them."""

    @staticmethod
    def check(*arguments):
        check_arguments(*arguments[:-1])

    op = "batch_norm_relu"

    @staticmethod
    def forward(ctx, *args):
        input, weight, bias, input_bias, _, _, _, ctx.training, _, ctx.eps, ctx.ops = args
        output, statistics = ctx.ops.batch_norm_relu(*args[:-1])
        ctx.set_materialize_grads(False)
        _save(ctx, input, weight, bias, input_bias, statistics)
        ctx.unpacked = None
        return output

    @staticmethod
    def recompute(ctx):
        """The output, bit by bit, from what was saved, which backward takes from here."""
        # Unpacked once for both: checkpointing refuses a second time, and an offload would copy again.
        ctx.unpacked = input, weight, bias, _, statistics = _saved(ctx)
        return ctx.ops.batch_norm_relu_recompute(input, weight, bias, statistics)

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 11
        saved, ctx.unpacked = ctx.unpacked or _saved(ctx), None
        function = BatchNormReLUBackward
        call = function.apply if torch.is_grad_enabled() else function.forward
        needed = ctx.needs_input_grad[:4]
        return *call(grad_output, *saved, ctx.training, *needed, ctx.eps, ctx.ops), *(None,) * 7


class BatchNormReLUBackward(Function):
    """The backward of :class:`BatchNormReLU`, differentiable in turn."""

    @staticmethod
    def forward(*args):
        return args[-1].batch_norm_relu_backward(*args[:-2])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, input, weight, bias, _, statistics, ctx.training, *_, ctx.eps, ctx.ops = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, bias, statistics)

    @staticmethod
    def backward(ctx, grad_weighted_input, *grad_weighted_vectors):
        grad_output, input, weight, bias, statistics = ctx.saved_tensors
        with torch.no_grad():  # the op has no derivative, and the mask none but zero
            output = ctx.ops.batch_norm_relu_recompute(input, weight, bias, statistics)
        grads = _double_backward(
            ~(output <= 0),
            ctx.training,
            ctx.eps,
            statistics,
            (grad_output, input, weight),
            (grad_weighted_input, None, *grad_weighted_vectors),
            *ctx.needs_input_grad[3:5],
        )
        return *grads, *(None,) * 8


class BatchNormAddBatchNormReLU(_Forward):
    """``relu(batch_norm(input) + batch_norm(residual))``; saves both, mask or else output, and per-channel vectors."""

    @staticmethod
    def check(*arguments):
        check_batch_norms(*arguments[:-1])

    op = "batch_norm_add_batch_norm_relu"

    @staticmethod
    def forward(ctx, *args):
        *_, ctx.training, ctx.ops = args
        ctx.eps = args[8], args[17]
        output, *statistics, mask = ctx.ops.batch_norm_add_batch_norm_relu(*args[:-1])
        ctx.set_materialize_grads(False)
        _save(ctx, saved_for_mask(output, mask), *args[:4], statistics[0], *args[9:13], statistics[1])
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 20
        function = BatchNormAddBatchNormReLUBackward
        call = function.apply if torch.is_grad_enabled() else function.forward
        needed = *ctx.needs_input_grad[:4], *ctx.needs_input_grad[9:13]
        grads = call(grad_output, *_saved(ctx), ctx.training, *needed, ctx.eps, ctx.ops)
        return *grads[:4], *(None,) * 5, *grads[4:], *(None,) * 7


class BatchNormAddBatchNormReLUBackward(Function):
    """The backward of :class:`BatchNormAddBatchNormReLU`, differentiable in turn."""

    @staticmethod
    def forward(*args):
        return args[-1].batch_norm_add_batch_norm_relu_backward(*args[:-2])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, mask, input, weight, _, _, statistics, *of_residual = inputs[:12]
        residual, residual_weight, _, _, residual_statistics = of_residual
        ctx.training, ctx.eps = inputs[12], inputs[-2]
        ctx.set_materialize_grads(False)
        saved = input, weight, statistics, residual, residual_weight, residual_statistics
        ctx.save_for_backward(grad_output, mask, *saved)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, mask, *saved = ctx.saved_tensors
        mask = _passed(mask, saved[0])
        grad_grad_output, grads = 0, []
        # Each batch norm's gradients are those of its own tensors and of grad_output.
        for i, eps in enumerate(ctx.eps):
            input, weight, statistics = saved[3 * i : 3 * i + 3]
            of_input, *of_vectors = cotangents[4 * i : 4 * i + 4]
            grad, *of_norm = _double_backward(
                mask,
                ctx.training,
                eps,
                statistics,
                (grad_output, input, weight),
                (of_input, None, *of_vectors),
                *ctx.needs_input_grad[4 + 5 * i : 6 + 5 * i],
            )
            grad_grad_output = grad_grad_output + grad
            grads += *of_norm, None
        return grad_grad_output, None, *grads, *(None,) * 11
