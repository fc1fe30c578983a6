"""Gradients: one ``autograd.Function`` per op, saying what is saved and which backward pairs with it.

``torch.library.register_autograd`` refuses ops that mutate their arguments, and these update the running statistics;
hence Functions around the raw ops. The backward is a Function too, whose own backward differentiates the plain
formula: a raw op called there would give wrong second gradients with no more than a warning.
"""

import torch
from torch.autograd import Function


def _grad_input_bias(input_bias, grad_bias, weight, invstd, training):
    """The gradient of a bias that was left out of input: batch statistics cancel it, running ones let it through."""
    if training:
        return torch.zeros_like(input_bias)  # zeros, not None: weight decay and DDP need a tensor
    scale = invstd if weight is None else invstd * weight
    return (grad_bias * scale).to(input_bias.dtype)


def _grads_of_arguments(ctx, grads, need_bias, need_input_bias, input_bias, weight, invstd):
    """Gradients of both forwards' arguments, from the raw backward's: ``(grad_input, ..., grad_weight, grad_bias)``."""
    *others, grad_bias = grads
    grad_input_bias = None
    if need_input_bias:
        grad_input_bias = _grad_input_bias(input_bias, grad_bias, weight, invstd, ctx.training)
    return *others, grad_bias if need_bias else None, None, None, None, grad_input_bias, None, None, None, None


class _Forward(Function):
    """A Function with ``setup_context``, which torch.func needs, and a twin without, which costs less host time."""

    def __init_subclass__(cls):
        def forward(ctx, *args):
            outputs = cls.forward(*args)
            cls.setup_context(ctx, args, outputs)
            return outputs[0]

        # PyTorch inspects the signature of a forward that has a setup_context on every call, 70 us of 120, and wraps
        # the statistics, which setup_context must find among the outputs: 5 us each.
        members = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls._with_ctx = type(cls.__name__, (Function,), members)

    @classmethod
    def call(cls, *args):
        """The output, without the statistics that the op returns beside it."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)[0]
        return cls._with_ctx.apply(*args)


def _call_backward(function, *args):
    """``function.apply``, or just its forward where nobody asked for the backward's graph (create_graph=True)."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(*args)


def _view_per_channel(tensor, input):
    return tensor.view(-1, *[1] * (input.dim() - 2))


def _differentiable_backward(mask, training, eps, mean, invstd, grad_output, input, weight):
    """Both ops' backward as a composition: (grad_input, grad_residual, grad_weight, grad_bias), in float64.

    With g = grad_output where mask, x^ = (input - mean) * invstd and n values per channel:
    grad_bias = sum g, grad_weight = sum g x^, grad_residual = g, and grad_input = weight * invstd * g, less, where the
    statistics are the batch's, weight * invstd * (grad_bias + x^ grad_weight) / n.
    """
    dims = [0, *range(2, input.dim())]
    x = input.to(mean.dtype)
    g = torch.where(mask, grad_output.to(mean.dtype), 0.0)
    if training:
        variance, mean = torch.var_mean(x, dims, correction=0)
        invstd = torch.rsqrt(variance + eps)
    normalized = (x - _view_per_channel(mean, x)) * _view_per_channel(invstd, x)
    grad_bias = g.sum(dims)
    grad_weight = (g * normalized).sum(dims)
    grad_input = g
    if training:
        n = x.numel() // x.shape[1]
        grad_input = g - (_view_per_channel(grad_bias, x) + normalized * _view_per_channel(grad_weight, x)) / n
    scale = invstd if weight is None else invstd * weight
    return grad_input * _view_per_channel(scale, x), g, grad_weight, grad_bias


def _double_backward(mask, training, eps, mean, invstd, primals, cotangents):
    """Vector-Jacobian product of :func:`_differentiable_backward` with respect to (grad_output, input, weight), and,
    last, to a bias left out of input, which acts as input does, where the statistics are constants."""
    has_weight = primals[2] is not None
    primals = primals if has_weight else primals[:2]

    def backward(grad_output, input, weight=None):
        return _differentiable_backward(mask, training, eps, mean, invstd, grad_output, input, weight)

    outputs, vjp = torch.func.vjp(backward, *primals)
    cotangents = tuple(
        torch.zeros_like(output) if cotangent is None else cotangent.to(output.dtype)
        for output, cotangent in zip(outputs, cotangents, strict=True)
    )
    grad_grad_output, grad_input, *grad_weight = vjp(cotangents)
    grad_input_bias = None if training else grad_input.sum([0, *range(2, grad_input.dim())])
    return grad_grad_output, grad_input, grad_weight[0] if has_weight else None, grad_input_bias


class BatchNormAddReLU(_Forward):
    """``relu(batch_norm(input) + residual)``; saves input, output and per-channel vectors."""

    @staticmethod
    def forward(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        input_bias,
        training,
        momentum,
        eps,
        ops,
    ):
        return ops.batch_norm_add_relu.default(
            input,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            input_bias,
            training,
            momentum,
            eps,
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        input, _, weight, bias, _, _, _, input_bias, ctx.training, _, ctx.eps, ctx.ops = inputs
        output, mean, invstd = outputs
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, output, weight, bias, input_bias, mean, invstd)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 12
        input, output, weight, bias, input_bias, mean, invstd = ctx.saved_tensors
        need_input, need_residual, need_weight, need_bias, _, _, _, need_input_bias, *_ = ctx.needs_input_grad
        needed = (need_input, need_residual, need_weight, need_bias or (need_input_bias and not ctx.training))
        grads = _call_backward(
            BatchNormAddReLUBackward,
            grad_output,
            input,
            output,
            weight,
            bias,
            input_bias,
            mean,
            invstd,
            ctx.training,
            ctx.eps,
            needed,
            ctx.ops,
        )
        return _grads_of_arguments(ctx, grads, need_bias, need_input_bias, input_bias, weight, invstd)


class BatchNormAddReLUBackward(Function):
    """The backward of :class:`BatchNormAddReLU`, differentiable in turn."""

    @staticmethod
    def forward(grad_output, input, output, weight, bias, input_bias, mean, invstd, training, eps, needed, ops):
        return ops.batch_norm_add_relu_backward.default(
            grad_output, input, output, weight, bias, mean, invstd, training, *needed
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, input, output, weight, _, _, mean, invstd, ctx.training, ctx.eps, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, output, weight, mean, invstd)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, input, output, weight, mean, invstd = ctx.saved_tensors
        grad_grad_output, grad_input, grad_weight, grad_input_bias = _double_backward(
            ~(output <= 0), ctx.training, ctx.eps, mean, invstd, (grad_output, input, weight), cotangents
        )
        return grad_grad_output, grad_input, None, grad_weight, None, grad_input_bias, *(None,) * 6


class BatchNormReLU(_Forward):
    """``relu(batch_norm(input))``; saves input and per-channel vectors, and recomputes the ReLU's mask from them."""

    @staticmethod
    def forward(
        input, weight, bias, running_mean, running_var, num_batches_tracked, input_bias, training, momentum, eps, ops
    ):
        return ops.batch_norm_relu.default(
            input, weight, bias, running_mean, running_var, num_batches_tracked, input_bias, training, momentum, eps
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        input, weight, bias, _, _, _, input_bias, ctx.training, _, ctx.eps, ctx.ops = inputs
        _, mean, invstd = outputs
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, input_bias, mean, invstd)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 11
        input, weight, bias, input_bias, mean, invstd = ctx.saved_tensors
        need_input, need_weight, need_bias, _, _, _, need_input_bias, *_ = ctx.needs_input_grad
        needed = (need_input, need_weight, need_bias or (need_input_bias and not ctx.training))
        grads = _call_backward(
            BatchNormReLUBackward,
            grad_output,
            input,
            weight,
            bias,
            input_bias,
            mean,
            invstd,
            ctx.training,
            ctx.eps,
            needed,
            ctx.ops,
        )
        return _grads_of_arguments(ctx, grads, need_bias, need_input_bias, input_bias, weight, invstd)


class BatchNormReLUBackward(Function):
    """The backward of :class:`BatchNormReLU`, differentiable in turn."""

    @staticmethod
    def forward(grad_output, input, weight, bias, input_bias, mean, invstd, training, eps, needed, ops):
        return ops.batch_norm_relu_backward.default(grad_output, input, weight, bias, mean, invstd, training, *needed)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, input, weight, bias, _, mean, invstd, ctx.training, ctx.eps, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, bias, mean, invstd)

    @staticmethod
    def backward(ctx, grad_weighted_input, grad_weighted_weight, grad_weighted_bias):
        grad_output, input, weight, bias, mean, invstd = ctx.saved_tensors
        scale = invstd if weight is None else invstd * weight
        output = (input - _view_per_channel(mean, input)) * _view_per_channel(scale, input)
        if bias is not None:
            output = output + _view_per_channel(bias, input)
        cotangents = (grad_weighted_input, None, grad_weighted_weight, grad_weighted_bias)
        grad_grad_output, grad_input, grad_weight, grad_input_bias = _double_backward(
            ~(output.to(input.dtype) <= 0),
            ctx.training,
            ctx.eps,
            mean,
            invstd,
            (grad_output, input, weight),
            cotangents,
        )
        return grad_grad_output, grad_input, grad_weight, None, grad_input_bias, *(None,) * 6
