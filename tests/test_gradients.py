"""First and second derivatives against finite differences, opcheck of the raw ops, and what is saved for backward."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from resnet_fused import functional
from resnet_fused.backend import get
from resnet_fused.ops import unpack_mask
from resnet_fused.triton_kernels import IS_INTERPRETED

from . import raw_ops
from .conftest import represented
from .problem import Problem, in_layout

SHAPES = [(4, 3, 3, 2), (12, 3), (3, 3, 2, 2, 2)]
# Of an interpreted kernel in one random direction: in each of them a test takes minutes.
FAST = {"fast_mode": IS_INTERPRETED}


def _call(problem, training=True):
    """(function of the differentiable tensors, those tensors); statistics are copies, so that calls are repeatable."""
    tensors = {name: getattr(problem, name) for name in (*problem.DIFFERENTIABLE, *problem.RUNNING)}
    names = [name for name in problem.DIFFERENTIABLE if tensors[name] is not None]
    leaves = [tensors[name].detach().clone().requires_grad_() for name in names]

    def call(*leaves):
        statistics = {name: tensors[name].clone() for name in problem.RUNNING if tensors[name] is not None}
        leaves = dict(zip(names, leaves, strict=True))
        return problem.call(functional, {**tensors, **leaves, **statistics, "training": training})

    return call, leaves


def _problem(shape, layout, device, with_residual):
    return Problem.random(shape, torch.float64, layout, device, with_residual).with_input_bias()


@pytest.mark.parametrize("shape", represented(SHAPES, by=SHAPES[:1]), ids=str)
def test_gradcheck(backend, device, layout, shape, training, with_residual):
    call, leaves = _call(_problem(shape, layout, device, with_residual), training)
    share = (call(*leaves) == 0).double().mean().item()
    assert 0.3 <= share <= 0.7
    assert gradcheck(call, leaves, **FAST)  # by default against random output gradients


@pytest.mark.parametrize("shape", represented(SHAPES, by=SHAPES[:1]), ids=str)
def test_gradgradcheck(backend, device, layout, shape, training, with_residual):
    call, leaves = _call(_problem(shape, layout, device, with_residual), training)
    assert gradgradcheck(call, leaves, gen_non_contig_grad_outputs=True, **FAST)


def test_gradgradcheck_without_biases_and_weights(backend, device, training, with_residual):
    problem = Problem.random(SHAPES[0], torch.float64, device=device, residual=with_residual)
    for names in ((), ("weight", "bias", "residual_weight", "residual_bias")):
        call, leaves = _call(problem.with_(**dict.fromkeys(names)), training)
        assert gradgradcheck(call, leaves, **FAST)


def test_third_derivatives(training, with_residual):
    """On one backend: no raw op has a part in them."""
    call, leaves = _call(_problem((3, 3, 2), "contiguous", "cpu", with_residual), training)
    grad_output = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def gradients(grad_output, *leaves):
        return torch.autograd.grad(call(*leaves), leaves, grad_output, create_graph=True)

    assert gradgradcheck(gradients, (grad_output, *leaves))


def test_with_constant_statistics_only_the_gradient_of_a_weight_keeps_an_input(backend, device, layout, with_residual):
    problem = Problem.random((4, 3, 6, 6), torch.float32, layout, device, with_residual, training=False)
    needed = [name for name in problem.DIFFERENTIABLE if not name.endswith("weight")]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda x: x):
        problem.run(needs_grad=needed)
    assert 0 < sum(saved) < problem.input.nbytes / 4
    for of_gradient in ("contiguous", "channels_last"):
        problem.with_(grad_output=in_layout(problem.grad_output, of_gradient)).check(needs_grad=needed)


CALLS = [*itertools.product(("forward", "recompute", "backward"), (True, False, "normalized"))]
NEEDED = {True: Problem.DIFFERENTIABLE, False: ("input", "bias")}
NEEDED["normalized"] = ("input", "bias", "residual", "residual_weight", "residual_input_bias")


@pytest.mark.parametrize(("call", "with_residual"), CALLS)
def test_an_op_writes_to_what_its_schema_says(backend, device, dtype, layout, training, call, with_residual):
    """Of tensors that require no gradient: autograd lies above the raw ops."""
    ops, options = get(backend).ops, {"training": training, "residual_momentum": None}
    problem = Problem.random((4, 6, 5, 3), dtype, layout, device, with_residual, **options).with_input_bias()
    op, arguments, _ = forward = raw_ops.forward(ops, problem)
    if call == "recompute":
        op, arguments, _ = raw_ops.recompute(ops, problem, forward())
    if call == "backward":
        op, arguments, _ = raw_ops.backward(ops, problem, forward(), needed=NEEDED[with_residual])
    torch.library.opcheck(op, tuple(arguments.values()), test_utils="test_schema")


def _saved(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = call()
    return output, saved


@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (3, 5, 9, 8), (2, 3, 10, 9), (20, 3, 1, 2), (1, 3, 5)], ids=str)
def test_a_call_saves_what_is_normalised_and_a_bit_an_element(backend, device, layout, training, with_residual, shape):
    problem = Problem.random(shape, layout=layout, device=device, residual=with_residual, training=training)
    call, leaves = _call(problem.with_input_bias())
    output, saved = _saved(lambda: call(*leaves))
    large = {tensor.data_ptr() for tensor in saved if tensor.shape == output.shape}
    assert large == {
        leaf.data_ptr()
        for leaf in (leaves if with_residual == "normalized" else leaves[:1])
        if leaf.shape == output.shape
    }
    (mask,) = (tensor for tensor in saved if tensor.dtype == torch.uint8)
    assert mask.numel() <= output.numel() / 8 + len(mask)
    torch.testing.assert_close(unpack_mask(mask, leaves[0]), output > 0)


def test_a_call_without_gradients_writes_no_mask(backend, device, with_residual):
    problem = Problem.random((4, 6, 5, 5), device=device, residual=with_residual)
    assert raw_ops.forward(get(backend).ops, problem)(need_mask=False)["mask"] is None


def test_an_in_place_edit_of_a_saved_tensor_is_autograds_error(backend, device, with_residual):
    problem = Problem.random((4, 6, 5, 5), device=device, residual=with_residual).with_input_bias()
    call, leaves = _call(problem)
    x = leaves[0] * 1
    output = call(x, *leaves[1:])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("edited", ["input", "weight"])
def test_the_second_derivative_is_not_silently_dropped(backend, device, with_residual, edited):
    problem = _problem((4, 3, 3, 2), "contiguous", device, with_residual)
    call, leaves = _call(problem)
    (first,) = torch.autograd.grad(
        call(*leaves), leaves[0 if edited == "input" else 1], problem.grad_output, create_graph=True
    )
    (second,) = torch.autograd.grad(first.pow(2).sum(), leaves[0])
    assert torch.count_nonzero(second) > 0


def test_the_second_derivative_is_masked_by_the_output_as_stored(backend, device, dtype):
    """Where each channel's bias cancels its values but for rounding, on either side of 0."""
    x, mean, weight = (torch.randn(4, 256, 1, 1, dtype=torch.float64).to(dtype) for _ in range(3))
    x = x[:1].expand(4, 256, 3, 3).contiguous()
    vectors = [vector[0].flatten().to(device) for vector in (mean, torch.ones_like(mean), weight)]
    bias = -((x[0, :, 0, 0].double() - vectors[0].cpu().double()) * vectors[2].cpu().double()).to(dtype)
    x, grad_output = x.to(device).requires_grad_(), torch.ones_like(x, device=device).requires_grad_()
    y = functional.batch_norm_relu(x, *vectors, bias.to(device), eps=1e-5)
    (first,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad_output)
    assert 0.2 < (y > 0).double().mean() < 0.8
    assert torch.equal(second != 0, y > 0)


def test_a_penalty_on_a_gradient_reaches_what_it_reaches_in_eager(backend, device, training, with_residual):
    """With zeros, all but that gradient's own: zeros and None differ to weight decay and DDP."""
    problem = _problem((4, 3, 3, 2), "contiguous", device, with_residual)
    call, leaves = _call(problem, training)
    (first,) = torch.autograd.grad(call(*leaves), leaves[0], problem.grad_output, create_graph=True)
    grads = torch.autograd.grad(first.pow(2).sum(), leaves, allow_unused=True)
    absent = [i for i, grad in enumerate(grads) if grad is None]
    # The mask's bits are connected to nothing; the residual comes last.
    assert absent == ([len(leaves) - 1] if with_residual is True else [])


def test_grad_output_in_any_layout(backend, device, layout):
    problem = Problem.random((4, 6, 5, 3), torch.float64, layout, device)
    for grad_output in (
        torch.ones(1, dtype=torch.float64, device=device).expand(4, 6, 5, 3),  # stride 0, as .sum() gives
        problem.grad_output.transpose(0, 2).contiguous().transpose(0, 2),
        in_layout(problem.grad_output, "channels_last" if layout == "contiguous" else "contiguous"),
        torch.randn(4, 6, 5, 6, dtype=torch.float64, device=device)[..., ::2],
    ):
        problem.with_(grad_output=grad_output).check()
