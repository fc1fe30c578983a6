"""The ops equal the float64 reference: values, gradients, running statistics."""

import itertools

import pytest
import torch

from resnet_fused import functional

from .problem import Problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_half_parameters_and_statistics(backend, device, dtype, layout, training, with_residual):
    problem = Problem.random(
        (6, 10, 5, 5), dtype, layout, device, with_residual, parameter_dtype=dtype, training=training
    )
    problem.check()


@pytest.mark.parametrize(
    "absent",
    [("weight", "bias", "residual_weight", "residual_bias"), ("weight", "residual_bias"), ("bias",)],
    ids="-".join,
)
def test_affine_parts_may_be_absent(backend, device, training, with_residual, absent):
    problem = Problem.random((6, 10, 5, 5), device=device, residual=with_residual, training=training)
    problem.with_(**dict.fromkeys(absent)).check()


def test_without_running_statistics_batch_statistics_serve(backend, device, with_residual):
    problem = Problem.random((6, 10, 5, 5), device=device, residual=with_residual)
    problem.with_(**dict.fromkeys(Problem.RUNNING)).check()


@pytest.mark.parametrize("prefix", ["", "residual_"], ids=["input", "residual"])
def test_either_of_two_batch_norms_may_be_without_running_statistics(backend, device, prefix):
    problem = Problem.random((6, 10, 5, 5), device=device, residual="normalized")
    problem.with_(**dict.fromkeys((f"{prefix}running_mean", f"{prefix}running_var"))).check()


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 1.7, -0.3, None])
def test_any_momentum_updates_the_running_statistics_as_eager_does(backend, device, with_residual, momentum):
    for options in ({"momentum": momentum}, {"momentum": 0.2, "residual_momentum": momentum}):
        problem = Problem.random((6, 10, 5, 5), torch.float64, device=device, residual=with_residual, **options)
        results = problem.check()
        assert results["num_batches_tracked"].item() == 4


def test_eval_changes_neither_statistics_nor_counter(backend, device, with_residual):
    problem = Problem.random((6, 10, 5, 5), device=device, residual=with_residual, training=False)
    results = problem.check()
    assert results["num_batches_tracked"].item() == 3
    for name in Problem.RUNNING:
        if name in results:
            torch.testing.assert_close(results[name], getattr(problem, name), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [1e-5, 0.3, 4.0])
def test_eps_is_added_to_the_variance(backend, device, training, with_residual, eps):
    Problem.random(
        (6, 10, 5, 5), torch.float64, "contiguous", device, with_residual, training=training, eps=eps
    ).check()


def test_input_bias_equals_a_biased_input(backend, device, layout, training, with_residual):
    problem = Problem.random((6, 10, 5, 5), torch.float64, layout, device, with_residual, training=training)
    problem.with_input_bias().check(clipped=None)


@pytest.mark.parametrize("needed", Problem.DIFFERENTIABLE)
def test_each_gradient_alone_equals_the_reference(backend, device, training, needed):
    for residual in ("normalized",) if needed.startswith("residual_") else (True, "normalized"):
        problem = Problem.random((6, 10, 5, 5), torch.float64, device=device, residual=residual, training=training)
        results = problem.with_input_bias().check(clipped=None, needs_grad=(needed,))
        assert f"grad_{needed}" in results


@pytest.mark.parametrize(
    "needed", [*itertools.product(("input", "weight"), ("residual", "residual_weight"))], ids="-".join
)
def test_a_gradient_of_each_of_two_batch_norms_equals_the_reference(backend, device, dtype, layout, training, needed):
    Problem.random((6, 10, 5, 5), dtype, layout, device, "normalized", training=training).check(needs_grad=needed)


def test_two_batch_norms_of_one_tensor_equal_the_reference(backend, device, layout, training):
    problem = Problem.random((6, 10, 5, 5), torch.float64, layout, device, "normalized", training=training)
    problem.with_(residual=problem.input).check(clipped=None)


def test_gradients_of_weight_and_bias_with_a_frozen_input(backend, device, with_residual):
    problem = Problem.random((6, 10, 5, 5), torch.float64, device=device, residual=with_residual)
    problem.check(needs_grad=("weight", "bias", "residual_weight", "residual_bias"))


def test_residual_none_is_the_op_without_residual(backend, device):
    problem = Problem.random((6, 10, 5, 5), device=device, residual=False)
    args = (problem.running_mean, problem.running_var, problem.weight, problem.bias)
    expected = functional.batch_norm_relu(problem.input, *args)
    actual = functional.batch_norm_add_relu(problem.input, None, *args)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(10, 5, 5), (1, 10, 1, 1), (5,), (6, 1, 5, 5), ()], ids=str)
def test_a_residual_that_broadcasts_is_added_as_in_eager(backend, device, shape):
    problem = Problem.random((6, 10, 5, 5), torch.float64, device=device)
    problem.with_(residual=0.1 * torch.randn(shape, dtype=torch.float64)).check()


@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_a_residual_of_another_dtype_is_converted_to_the_inputs(backend, device, residual_dtype):
    problem = Problem.random((6, 10, 5, 5), torch.float32, device=device)
    problem = problem.with_(residual=(problem.residual * 3).to(residual_dtype))
    needs_grad = ("input", "weight") + (("residual",) if residual_dtype.is_floating_point else ())
    # The residual's own gradient is rounded to its own dtype.
    problem.check(scale=1e4 if residual_dtype == torch.bfloat16 else 1, needs_grad=needs_grad)


def test_the_residual_may_be_the_input(backend, device, layout, training):
    problem = Problem.random((6, 10, 5, 5), torch.float64, layout, device, training=training)
    x = problem.input.clone().requires_grad_()
    vectors = (problem.running_mean, problem.running_var, problem.weight, problem.bias)
    fused = functional.batch_norm_add_relu(x, x, *(v.clone() for v in vectors), training=training)
    normalized = torch.nn.functional.batch_norm(x, *(v.clone() for v in vectors), training=training)
    for actual, expected in zip(
        (fused, torch.autograd.grad(fused, x, problem.grad_output)[0]),
        (lambda y: (y, torch.autograd.grad(y, x, problem.grad_output)[0]))(torch.relu(normalized + x)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


SHAPES = [
    (4, 5, 7, 9),  # odd everywhere; all channels of several images in one row of the CPU kernels
    (2, 1, 9, 9),  # one channel
    (5, 3, 4, 4),
    (7, 6, 1, 1),  # inner = 1 in a contiguous tensor
    (65, 63, 3, 3),  # one more image than a chunk of 64 rows, one channel less than a power of two
    (70, 65, 6, 6),  # several chunks
    (40, 4, 8, 8),  # the shortest run of one channel, in float64; several images in a chunk
    (20, 4, 16, 16),  # and in the half types
    (3, 10, 33, 33),  # an image of one chunk
    (2, 9, 130, 131),  # images of several chunks, of several pieces each
    (3, 728, 5, 5),  # several blocks of channels (Xception's width)
    (2, 1100, 2, 2),  # more channels than columns: several blocks in channels_last
    (16, 48),  # (N, C)
    (6, 10, 37),  # (N, C, L)
    (3, 6, 4, 5, 7),  # (N, C, D, H, W)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_reference(backend, device, dtype, layout, shape, training, with_residual):
    problem = Problem.random(shape, dtype, layout, device, with_residual, training=training)
    problem.check(clipped=(0.2, 0.8) if problem.input.numel() < 1000 else (0.3, 0.7))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (3, 3, 601, 933)),
        pytest.param(torch.float64, (3, 2, 601, 933), marks=pytest.mark.expensive),
        pytest.param(torch.bfloat16, (3, 5, 601, 933), marks=pytest.mark.expensive),
        pytest.param(torch.float16, (3, 5, 601, 933), marks=pytest.mark.expensive),
    ],
    ids=str,
)
def test_a_tensor_too_large_for_the_cache(backend, device, dtype, layout, shape, training, with_residual):
    """Channel by channel, past the cache, from odd addresses."""
    problem = Problem.random(shape, dtype, layout, device, with_residual, training=training)
    problem.check(clipped=(0.2, 0.8))


RESNET18_SHAPES = [(4, 64, 24, 24), (4, 128, 12, 12), (4, 256, 6, 6), (4, 512, 3, 3), (2, 64, 56, 56)]


@pytest.mark.parametrize("shape", RESNET18_SHAPES, ids=str)
def test_resnet18_shapes_equal_the_reference(backend, device, layout, shape):
    for residual in (True, "normalized"):
        Problem.random(shape, torch.float32, layout, device, residual).check()
