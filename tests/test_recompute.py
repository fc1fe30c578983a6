"""The outputs of batch_norm_relu that nobody keeps: recomputed to the bit, and everything else stays as it was."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import Bottleneck

from benchmarks.saved import saved_bytes
from resnet_fused import FusedResidual, Residual, fuse, unfuse, use_backend
from resnet_fused.backend import get

from . import raw_ops
from .models import make_block, make_input, prepared, run_twice
from .problem import Problem, in_layout
from .test_models import make

# The op


def _output_and_recomputed(backend, problem):
    ops = get(backend).ops
    outputs = raw_ops.forward(ops, problem)()
    return outputs["output"], raw_ops.recompute(ops, problem, outputs)()["output"]


@pytest.mark.parametrize("shape", [(6, 10, 5, 5), (3, 10, 33, 33), (16, 48), (2, 3, 4, 5, 7)], ids=str)
def test_the_output_is_recomputed_to_the_bit(backend, device, dtype, layout, training, shape):
    problem = Problem.random(shape, dtype, layout, device, False, training=training).with_input_bias()
    for affine in ({}, {"weight": None, "bias": None}):
        for x in (problem.input, torch.stack([problem.input] * 2, -1)[..., 0], problem.input[:0]):
            output, recomputed = _output_and_recomputed(backend, problem.with_(input=x, **affine))
            assert recomputed.stride() == output.stride()
            assert torch.equal(recomputed, output)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_channel_with_strange_values_is_recomputed_to_the_bit(backend, device, layout, training, value):
    problem = Problem.random((4, 6, 5, 5), layout=layout, device=device, residual=False, training=training)
    problem.input[:, 1] += value
    output, recomputed = _output_and_recomputed(backend, problem.with_(weight=None, bias=None))
    torch.testing.assert_close(recomputed, output, rtol=0, atol=0, equal_nan=True)


# The consumers

LARGE_POOLING = nn.MaxPool2d((16, 17))  # of smaller windows the ReLU is fused with the pooling
CONSUMERS = {
    "Conv1d": (nn.Conv1d(6, 5, 3), (3, 6, 7)),
    "Conv2d": (nn.Conv2d(6, 5, 3), (3, 6, 5, 7)),
    "Conv2d, groups": (nn.Conv2d(6, 6, 3, groups=6), (3, 6, 5, 7)),
    "Conv2d, reflect": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (3, 6, 5, 7)),
    "Conv3d": (nn.Conv3d(6, 5, 3), (3, 6, 5, 4, 3)),
    "ConvTranspose2d": (nn.ConvTranspose2d(6, 5, 3), (3, 6, 5, 7)),
    "MaxPool1d": (nn.MaxPool1d(2), (3, 6, 7)),
    "MaxPool2d": (LARGE_POOLING, (3, 6, 17, 17)),
    "MaxPool3d": (nn.MaxPool3d(2), (3, 6, 5, 4, 3)),
}
BATCH_NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def make_model(consumer=None, dim=4):
    """bn, ReLU, consumer; in float64."""
    consumer = nn.Conv2d(6, 5, 3) if consumer is None else copy.deepcopy(consumer)
    return prepared(nn.Sequential(BATCH_NORMS[dim](6), nn.ReLU(), nn.Identity(), consumer))


def twins(model, X=None):
    """The model fused, and fused memory-efficiently, which have learnt."""
    kept, recomputed = copy.deepcopy(model), copy.deepcopy(model)
    reports = fuse(kept), fuse(recomputed, memory_efficient=True)
    for twin in (kept, recomputed):
        run_twice(twin, lambda seed: (make_input() if X is None else X,))
    assert reports[0].layers == reports[1].layers and reports[0].fused
    return kept, recomputed


def gradients(model, X, create_graph=False, loss_of=lambda Y: Y.square().sum()):
    """The output's and, maybe, those of the gradients' sum of squares, of the input and every parameter."""
    X = X.clone(memory_format=torch.preserve_format).requires_grad_()
    Y = model(X)
    leaves = X, *model.parameters()
    results = torch.autograd.grad(loss_of(Y), leaves, create_graph=create_graph)
    if create_graph:
        results += torch.autograd.grad(sum(result.square().sum() for result in results), leaves)
    return Y, *results


def assert_equal_bits(actual, expected):
    for tensor, other in zip(actual, expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("name", CONSUMERS)
def test_every_consumer_gives_the_same_bits_and_saves_less(backend, device, layout, training, name):
    consumer, shape = CONSUMERS[name]
    X = torch.randn(shape, dtype=torch.float64, device=device)
    kept, recomputed = twins(make_model(consumer, len(shape)).to(device), X)
    if layout == "channels_last" and len(shape) == 4:
        X = X.to(memory_format=torch.channels_last)
    for create_graph in (False, True):
        results = [gradients(model.train(training), X, create_graph) for model in (recomputed, kept)]
        assert_equal_bits(*results)
    saved = [saved_bytes(model, X.clone().requires_grad_()) for model in (recomputed, kept)]
    assert saved[1] - saved[0] == X.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_gives_the_same_bits(dtype):
    """Of a float32 output the convolution saves a bfloat16 copy, which is not recomputed."""
    kept, recomputed = (model.float() for model in twins(make_model()))
    X = torch.randn(3, 6, 5, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_bits(gradients(recomputed, X), gradients(kept, X))
        saved = [saved_bytes(model, X.clone().requires_grad_()) for model in (recomputed, kept)]
    assert saved[1] - saved[0] == (X.nbytes if dtype == torch.bfloat16 else 0)


def test_the_output_is_freed_when_its_consumer_has_run():
    for model, is_freed in zip(twins(make_model()), (False, True), strict=True):
        outputs = []
        model[-1].register_forward_pre_hook(lambda layer, args, outputs=outputs: outputs.append(weakref.ref(args[0])))
        Y = model(make_input())
        assert (outputs[0]() is None) is is_freed
        Y.sum().backward()


@pytest.mark.parametrize("frozen", ["bn", "consumer", "input"])
def test_gradients_that_nobody_needs_make_no_difference(frozen):
    kept, recomputed = twins(make_model())
    for model in (kept, recomputed):
        layers = {"bn": model[:1], "consumer": model[-1:], "input": []}[frozen]
        for layer in layers:
            layer.requires_grad_(False)
    X = make_input().requires_grad_(frozen != "input")
    for model in (kept, recomputed):
        model(X).square().sum().backward()
    for parameter, other in zip(recomputed.parameters(), kept.parameters(), strict=True):
        assert (parameter.grad is None) is (other.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight", "input"])
def test_an_edit_before_the_backward_is_autograds_error(name):
    for model in twins(make_model()):
        X = make_input().requires_grad_() * 1
        Y = model(X)
        with torch.no_grad():
            (X if name == "input" else model.get_parameter(name)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            Y.sum().backward()


@pytest.mark.parametrize("recorded", [True, False])
def test_an_output_that_a_hook_edits_is_kept(recorded):
    def edit(layer, args):
        with torch.set_grad_enabled(recorded):
            args[0].mul_(2)

    kept, recomputed = twins(make_model())
    for model in (kept, recomputed):
        model[-1].register_forward_pre_hook(edit)
    assert_equal_bits(gradients(recomputed, make_input()), gradients(kept, make_input()))


def test_a_hook_may_replace_the_output_and_the_consumers_is_called():
    kept, recomputed = twins(make_model())
    for model in (kept, recomputed):
        model[-1].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        model[-1].register_forward_hook(lambda layer, args, output: output * 2)
    assert_equal_bits(gradients(recomputed, make_input()), gradients(kept, make_input()))


@pytest.mark.parametrize("replacement", [nn.ReLU(inplace=True), nn.Identity(), nn.Softplus(), nn.Flatten()], ids=str)
def test_a_consumer_may_be_replaced(replacement):
    kept, recomputed = twins(make_model())
    for model in (kept, recomputed):
        model[-1] = replacement
    assert_equal_bits(gradients(recomputed, make_input()), gradients(kept, make_input()))


def test_a_second_backward_recomputes_again():
    for model in twins(make_model()):
        Y = model(make_input()).square().sum()
        first = torch.autograd.grad(Y, list(model.parameters()), retain_graph=True)
        assert_equal_bits(torch.autograd.grad(Y, list(model.parameters())), first)
        with pytest.raises(RuntimeError, match="second time"):
            Y.backward()


# What is around


def test_hooks_around_get_every_tensor_but_the_output():
    X, packed, unpacked = torch.randn(3, 6, 17, 17, dtype=torch.float64), [[], []], [[], []]
    for model, pack, unpack in zip(twins(make_model(LARGE_POOLING), X), packed, unpacked, strict=True):
        hooks = (lambda tensor, shapes=shapes: shapes.append(list(tensor.shape)) or tensor for shapes in (pack, unpack))
        with saved_tensors_hooks(*hooks):
            Y = model(X)
        Y.sum().backward()
    kept, recomputed = packed
    kept.remove(list(X.shape))
    assert sorted(recomputed) == sorted(kept)  # the pool's indices among them
    assert sorted(unpacked[1]) == sorted(recomputed)  # each once


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    results = []
    for model in twins(nn.Sequential(make_block(), make_block(downsample=False))):
        X = make_input().requires_grad_()
        checkpoint(model, X, use_reentrant=use_reentrant).square().sum().backward()
        results.append([X.grad, *(parameter.grad for parameter in model.parameters())])
    assert_equal_bits(*results)


def test_an_offload_gives_the_same_bits(layout):
    """save_on_cpu returns contiguous tensors of a channels_last one."""
    X = in_layout(make_input(), layout)
    for model in twins(make_block()):
        expected = gradients(model, X)
        with save_on_cpu():
            assert_equal_bits(gradients(model, X), expected)


RETURNED = {
    "of other strides": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "of float64": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor,
    "of bfloat16": lambda tensor: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor,
    "not contiguous": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@pytest.mark.parametrize("returned", RETURNED)
def test_what_hooks_return_is_taken_as_what_it_is(backend, device, layout, training, with_residual, returned):
    problem = Problem.random((6, 10, 5, 5), torch.float32, layout, device, with_residual, training=training)
    expected = problem.run()
    with saved_tensors_hooks(RETURNED[returned], lambda tensor: tensor):
        actual = problem.run()
    tolerance = 0.05 if returned == "of bfloat16" else 0  # a mask that is recomputed differs where the output is near 0
    for name, value in expected.items():
        assert (actual[name] - value).double().norm() <= tolerance * value.double().norm(), name


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
@pytest.mark.parametrize("make", [make_block, lambda: prepared(Residual(6, 6))], ids=["fuse", "FusedResidual"])
def test_nothing_is_done_twice_where_a_hook_raises(make, error):
    model, _ = twins(make())
    counters = [dict(bn.named_buffers())["num_batches_tracked"] for bn in (model.bn1, model.bn2)]
    before = [counter.item() for counter in counters]

    def raises(tensor):  # once a batch norm has written
        if counters[0].item() > before[0]:
            raise error("no room")
        return tensor

    with saved_tensors_hooks(raises, lambda tensor: tensor), pytest.raises(error, match="no room"):
        model(make_input().requires_grad_())
    assert [counter.item() for counter in counters] == [before[0] + 1, before[1]]


def test_refused_hooks_run_without():
    kept, recomputed = twins(make_model())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_equal_bits(gradients(recomputed, make_input()), gradients(kept, make_input()))


def test_the_eager_backend_and_inference_run_without():
    kept, recomputed = twins(make_model())
    with use_backend("eager"):
        assert_equal_bits(gradients(recomputed, make_input()), gradients(kept, make_input()))
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad():
            assert torch.equal(recomputed(make_input()), kept(make_input()))


@pytest.mark.parametrize("make", [make_block, lambda: FusedResidual(6, 6).double()])
def test_it_compiles_without_a_graph_break(make):
    block = make()
    unfuse(block)
    kept, recomputed = twins(block)
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled, make_input()), gradients(kept, make_input()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# fuse

BLOCKS = {
    "BasicBlock": (lambda: make_block(), 1),
    "Bottleneck": (lambda: prepared(Bottleneck(8, 2)), 2),
    "Residual": (lambda: prepared(Residual(8, 8)), 1),
    "Residual with a 1x1 convolution": (lambda: prepared(Residual(8, 8, use_1x1conv=True)), 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_gives_the_same_bits_and_saves_less(name, calls):
    make, recomputations = BLOCKS[name]
    block = make()
    channels = block.conv1.in_channels
    X = torch.randn(3, channels, 5, 7, dtype=torch.float64)
    kept, recomputed = twins(block, X)
    assert isinstance(recomputed, FusedResidual) is isinstance(block, Residual)
    assert_equal_bits(gradients(recomputed, X), gradients(kept, X))
    saved = [saved_bytes(model, X.clone().requires_grad_()) for model in (recomputed, kept)]
    assert saved[1] - saved[0] == recomputations * X.nbytes * block.conv1.out_channels // channels
    assert calls


@pytest.mark.parametrize(
    ("name", "share"), [("resnet18", 0.2), ("timm/resnet18", 0.2), ("resnet50", 0.15), ("densenet121", 0.2)]
)
def test_a_network_saves_less_than_eager(name, share):
    plain = make(name).float()
    X = torch.randn(2, 3, 64, 64)
    kept, recomputed = twins(plain, X)
    eager, fused, efficient = (saved_bytes(model, X) for model in (plain, kept, recomputed))
    assert efficient <= (1 - share) * eager
    assert efficient < fused
    assert_equal_bits(gradients(recomputed, X), gradients(kept, X))
