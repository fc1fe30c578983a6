"""A fused model's max poolings on a CPU: PyTorch's outputs and gradients, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.saved import saved_bytes
from resnet_fused import fuse, layers, pooling, unfuse

OPTIONS = {
    "3x3 of stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2x2": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 1, "padding": 1, "ceil_mode": True},
    "oblong, dilated": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 3)},
    "beyond the end": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
}


def few_values(shape, dtype):
    """Many ties, NaN and infinities among them."""
    torch.manual_seed(0)
    input = torch.randint(-2, 3, shape).to(dtype)
    input[torch.rand(shape) < 0.02] = float("nan")
    input[torch.rand(shape) < 0.02] = float("inf")
    input[torch.rand(shape) < 0.2] = float("-inf")
    return input


INPUTS = {"normal": lambda shape, dtype: torch.randn(shape).to(dtype), "few values": few_values}


@pytest.fixture
def pooled(monkeypatch):
    """The shapes that the package has pooled."""
    shapes = []

    def max_pool2d(input, *options):
        shapes.append(tuple(input.shape))
        return pooling.max_pool2d(input, *options)

    monkeypatch.setattr(layers, "max_pool2d", max_pool2d)
    return shapes


def results_of(layer, input):
    input = input.clone().requires_grad_()
    output = layer(input)
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad(output, input, torch.randn(output.shape).to(output.dtype))
    with torch.no_grad():
        without = layer(input)
    return output, grad, without


def assert_same(fused, plain, input):
    for actual, expected in zip(results_of(fused, input), results_of(plain, input), strict=True):
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def twins(**options):
    fused = nn.MaxPool2d(**options)
    fuse(fused)
    return nn.MaxPool2d(**options), fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients_are_pytorchs(options, make, dtype, pooled):
    plain, fused = twins(**options)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_same(fused, plain, make((7, 9, 15, 18), dtype).to(memory_format=memory_format))
    assert len(pooled) == 4


def test_second_gradients(monkeypatch):
    monkeypatch.setattr(pooling, "LEAST_VALUES", 0)
    _, fused = twins(kernel_size=3, stride=2, padding=1)
    input = torch.randperm(2 * 8 * 5 * 5).double().view(2, 8, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(fused, input) and torch.autograd.gradgradcheck(fused, input)


INPUT = torch.randn(4, 8, 24, 24)
LEFT = {
    "few channels": torch.randn(32, 4, 24, 24),
    "few values": INPUT[:2],
    "without a batch": torch.randn(32, 24, 24),
    "transposed": INPUT.transpose(2, 3),
}


@pytest.mark.parametrize("input", LEFT.values(), ids=LEFT)
def test_what_is_not_faster_is_left(input, pooled):
    plain, fused = twins(kernel_size=2)
    assert_same(fused, plain, input)
    assert pooled == []


def test_who_asks_for_more_gets_it(pooled, monkeypatch):
    _, fused = twins(kernel_size=2, return_indices=True)
    output, indices = fused(INPUT)
    assert torch.equal(INPUT.flatten(2).gather(2, indices.flatten(2)), output.flatten(2))
    plain, fused = twins(kernel_size=2)
    for layer in (plain, fused):
        layer.register_forward_hook(lambda layer, inputs, output: output * 2)
    assert_same(fused, plain, INPUT)
    plain, fused = twins(kernel_size=2)
    monkeypatch.setattr(F, "max_pool2d", lambda input, *args, **kwargs: input * 3)
    assert torch.equal(fused(INPUT), INPUT * 3)
    assert pooled == []
    unfuse(fused)
    assert type(fused) is nn.MaxPool2d


def test_bad_options_raise_pytorchs_error():
    plain, fused = twins(kernel_size=2, padding=2)
    with pytest.raises(RuntimeError) as expected:
        plain(INPUT)
    with pytest.raises(RuntimeError) as actual:
        fused(INPUT)
    assert str(actual.value) == str(expected.value)


def test_the_input_is_not_saved_for_backward():
    plain, fused = twins(kernel_size=2)
    input = INPUT.clone().requires_grad_()
    assert saved_bytes(plain, input) - saved_bytes(fused, input) == input.nbytes
