"""fuse and unfuse: what is recognised, what is left and why, and what stays as it was."""

import copy
import functools
import io
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from resnet_fused import FusedResidual, Residual, fuse, resnet18, unfuse, unfused


class Layers(nn.Module):
    """A block's layers as anybody would declare them; the tests add the forwards."""

    def __init__(self, input_channels=6, num_channels=6, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, 3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(input_channels, num_channels, 1, stride=strides) if use_1x1conv else None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)
        self.relu = nn.ReLU()
        self.relu_in_place = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("buffer", torch.zeros(()))


class NotebookResidual(Layers):
    def forward(self, X):
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class LazyResidual(nn.Module):
    """As in "Dive into Deep Learning"."""

    def __init__(self, num_channels=6, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1)
        self.conv3 = nn.LazyConv2d(num_channels, kernel_size=1, stride=strides) if use_1x1conv else None
        self.bn1 = nn.LazyBatchNorm2d()
        self.bn2 = nn.LazyBatchNorm2d()

    forward = NotebookResidual.forward


class ReluChildResidual(Layers):
    """As in the book's older editions."""

    def forward(self, X):
        Y = self.relu_in_place(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3 is not None:
            X = self.conv3(X)
        Y += X
        return self.relu_in_place(Y)


class NoConv3Residual(nn.Module):
    """A block that has never heard of a third convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


BOTH = ("bn1", "bn2")
BLOCK_CLASSES = [Residual, NotebookResidual, LazyResidual, ReluChildResidual, NoConv3Residual]


def make(block_class, use_1x1conv=False):
    """A float64 block with 6 channels, whose batch norms have statistics, gammas and betas worth the name."""
    torch.manual_seed(0)
    if block_class is NoConv3Residual:
        block = block_class()
    elif block_class is LazyResidual:
        block = block_class(6, use_1x1conv)
    else:
        block = block_class(6, 6, use_1x1conv)
    with torch.no_grad():
        block.double()(make_input())
    for bn in (block.bn1, block.bn2):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias, std=0.3)
    return block


def make_input(seed=0):
    return torch.randn(3, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block_with(forward, **attributes):
    return type("Block", (Layers,), {"forward": forward, **attributes})


def model_of(block):
    return nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.Identity(), block).double()


def snapshot(model):
    """All that fuse and unfuse could change: each module's class, mode and attributes, and each tensor's value."""
    modules = {name: (type(module), module.training, set(module.__dict__)) for name, module in model.named_modules()}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


def assert_same_numbers(fused, plain, clips=True):
    """Output, gradients and the statistics left behind, in training and then in eval."""
    for training in (True, False):
        X, other_X = make_input(1).requires_grad_(), make_input(1).requires_grad_()
        Y, other_Y = fused.train(training)(X), plain.train(training)(other_X)
        if isinstance(Y, tuple):
            Y, other_Y = torch.cat(Y), torch.cat(other_Y)
        grad_output = torch.randn_like(Y)
        Y.backward(grad_output)
        other_Y.backward(grad_output)
        assert not clips or 0.3 < (Y == 0).double().mean() < 0.7  # the ReLU clips, and not all
        torch.testing.assert_close(Y, other_Y, rtol=0, atol=1e-12)
        torch.testing.assert_close(X.grad, other_X.grad, rtol=1e-12, atol=1e-12)
    for (name, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) is (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, buffer), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)


def assert_same_outputs(fused, plain):
    """Likewise, of forwards that change in place what autograd needs."""
    for training in (True, False):
        X, other_X = make_input(1), make_input(1)
        with torch.no_grad():
            torch.testing.assert_close(fused.train(training)(X), plain.train(training)(other_X), rtol=0, atol=1e-12)
        torch.testing.assert_close(X, other_X, rtol=0, atol=1e-12)
    for (name, buffer), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)


def reason_to_leave(block):
    """Why fuse leaves all of the block, having checked that it leaves it as it was."""
    before = snapshot(block)
    report = fuse(block)
    assert not report.fused
    assert_unchanged(block, before)
    (left,) = report.left
    assert left[:2] == ("", type(block).__name__)
    return left.reason


# Recognised, and equal in numbers


@pytest.mark.parametrize("use_1x1conv", [False, True])
@pytest.mark.parametrize("block_class", BLOCK_CLASSES)
def test_a_block_of_any_class_is_fused_and_keeps_its_numbers(block_class, use_1x1conv):
    plain = model_of(make(block_class, use_1x1conv))
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.fused == [("2", block_class.__name__, BOTH)]
    assert isinstance(fused[2], FusedResidual) is (block_class is Residual)
    assert isinstance(fused[2], block_class)
    assert_same_numbers(fused, plain)


def test_a_fused_block_runs_the_fused_operators(calls):
    block = make(NotebookResidual)
    fuse(block)
    block(make_input())
    assert calls == ["batch_norm_relu", "batch_norm_add_relu"]


def test_a_whole_network_keeps_its_numbers():
    torch.manual_seed(0)
    plain = resnet18(6, block=NotebookResidual).double()
    fused = copy.deepcopy(plain)
    assert [swapped.class_name for swapped in fuse(fused).fused] == ["Sequential"] + ["NotebookResidual"] * 8
    assert not any(isinstance(module, FusedResidual) for module in fused.modules())
    X = torch.randn(4, 6, 64, 64, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(X), plain.train(training)(X), rtol=0, atol=1e-12)


ADDS = {
    "Y += X": lambda Y, X: functools.reduce(lambda a, b: a.__iadd__(b), [X], Y),
    "Y + X": lambda Y, X: Y + X,
    "X + Y": lambda Y, X: X + Y,
    "torch.add": lambda Y, X: torch.add(Y, X),
    "torch.add, by name": lambda Y, X: torch.add(input=X, other=Y, alpha=1),
    "add": lambda Y, X: X.add(Y),
    "add_": lambda Y, X: Y.add_(X),
}
RELUS = {
    "F.relu": lambda self, Y: F.relu(Y),
    "F.relu, in place": lambda self, Y: F.relu(Y, inplace=True),
    "F.relu, in place by position": lambda self, Y: F.relu(Y, True),
    "F.relu, by name": lambda self, Y: F.relu(input=Y),
    "F.relu_": lambda self, Y: F.relu_(Y),
    "torch.relu": lambda self, Y: torch.relu(Y),
    "torch.relu_": lambda self, Y: torch.relu_(Y),
    "relu": lambda self, Y: Y.relu(),
    "relu_": lambda self, Y: Y.relu_(),
    "nn.ReLU": lambda self, Y: self.relu(Y),
    "nn.ReLU, in place": lambda self, Y: self.relu_in_place(Y),
}


def forward_spelled(relu=RELUS["F.relu"], add=ADDS["Y + X"]):
    def forward(self, X):
        identity = X if self.conv3 is None else self.conv3(X)
        Y = self.bn2(self.conv2(relu(self, self.bn1(self.conv1(X)))))
        return relu(self, add(Y, identity))

    return forward


SPELLINGS = {**{f"add as {name}": forward_spelled(add=add) for name, add in ADDS.items()}}
SPELLINGS |= {f"relu as {name}": forward_spelled(relu=relu) for name, relu in RELUS.items()}


@pytest.mark.parametrize("use_1x1conv", [False, True])
@pytest.mark.parametrize("forward", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_of_add_and_relu_is_recognised(forward, use_1x1conv):
    plain = make(block_with(forward), use_1x1conv)
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused == [("", "Block", BOTH)]
    assert_same_numbers(fused, plain)


def test_layers_of_other_classes_and_with_hooks_are_called_as_modules():
    plain = make(NotebookResidual, use_1x1conv=True)
    plain.conv1 = parametrizations.weight_norm(plain.conv1)
    plain.conv3 = nn.Sequential(plain.conv3, nn.AvgPool2d(1))
    plain.bn1.register_forward_hook(lambda bn, args, output: output * 2)
    plain.conv2.register_forward_pre_hook(lambda conv, args: (args[0] * 0.5,))
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused
    assert_same_numbers(fused, plain)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_keep_modes_of_their_own(training):
    plain = make(NotebookResidual).train(training)
    plain.bn1.train(not training)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert (fused.training, fused.bn1.training, fused.bn2.training) == (training, not training, training)
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_a_block_under_two_names_is_swapped_once():
    block = make(NotebookResidual)
    model = nn.Sequential(block, block)
    assert fuse(model).fused == [("0", "NotebookResidual", BOTH)]
    assert model[0] is model[1] is block
    assert unfuse(model).unfused == [("0", "NotebookResidual", ())]


def test_blocks_inside_a_module_that_looks_like_a_block_are_found():
    outer = block_with(lambda self, X: self.inner(self.bn1(X)))()
    outer.inner = make(NotebookResidual)
    report = fuse(outer)
    assert report.fused == [("inner", "NotebookResidual", BOTH)]
    assert [left.name for left in report.left] == [""]


# Left, and named


def no_last_relu(self, X):
    return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X


def no_first_relu(self, X):
    return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(X)))) + X)


def no_residual(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))))


def pre_activation(self, X):
    return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(X)))))) + X


def swapped_batch_norms(self, X):
    return F.relu(self.bn1(self.conv2(F.relu(self.bn2(self.conv1(X))))) + X)


def one_batch_norm_twice(self, X):
    return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X)


def relu_before_the_add(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))) + X


def residual_of_the_first_batch_norm(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    return F.relu(self.bn2(self.conv2(Y)) + Y)


def three_inputs_to_the_add(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X + X)


def scalar_added(self, X):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + 1)


def dropout_between(self, X):
    return F.relu(self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(X)))))) + X)


def dropout_in_training_only(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    if self.training:
        Y = self.drop(Y)
    return F.relu(self.bn2(self.conv2(Y)) + X)


def residual_in_training_only(self, X):
    Y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))
    return F.relu(Y + X if self.training else Y)


def depends_on_a_layers_mode(self, X):
    Y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))
    return F.relu(Y + X if self.bn1.training else Y)


def relu6_at_the_end(self, X):
    return F.relu6(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + X)


def conv1_twice(self, X):
    self.conv1(X)
    return NotebookResidual.forward(self, X)


def bn1_counts_twice(self, X):
    Y = self.conv1(X)
    self.bn1(Y)
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(Y)))) + X)


def counts_in_a_buffer(self, X):
    self.buffer += 1
    return NotebookResidual.forward(self, X)


def two_outputs(self, X):
    Y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))
    return F.relu(Y + X), X


def changes_its_input(self, X):
    Y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))
    X += Y
    return F.relu(X)


def second_argument(self, X, input=0):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))) + input)


def unused_argument(self, X, mask=None):
    return NotebookResidual.forward(self, X)


def any_arguments(self, *X):
    return NotebookResidual.forward(self, X[0])


DIFFERENT = {  # forward -> the batch norms that are fused, and why others are not
    no_last_relu: (["bn1"], "bn2: its output is added, and the sum returned"),
    no_first_relu: (["bn2"], "bn1: its output is used by conv2 (Conv2d)"),
    no_residual: (["bn1", "bn2"], None),
    pre_activation: (["bn1", "bn2"], None),
    swapped_batch_norms: (["bn2", "bn1"], None),
    one_batch_norm_twice: ([], "bn1: it is used twice"),
    relu_before_the_add: (["bn1", "bn2"], None),
    residual_of_the_first_batch_norm: (["bn1", "bn2"], None),
    three_inputs_to_the_add: (["bn1"], "bn2: its output is added, and the sum used by add()"),
    scalar_added: (["bn1"], "bn2: its output is used by add()"),
    dropout_between: (["bn1", "bn2"], None),
    dropout_in_training_only: ([], "bn1, bn2: in a forward that differs between training and eval"),
    residual_in_training_only: ([], "bn1, bn2: in a forward that differs between training and eval"),
    depends_on_a_layers_mode: ([], "bn1, bn2: in a forward that differs between training and eval"),
    relu6_at_the_end: (["bn1"], "bn2: its output is added, and the sum used by relu6()"),
    conv1_twice: (["bn1", "bn2"], None),
    bn1_counts_twice: (["bn2"], "bn1: it is used twice"),
    two_outputs: (["bn1", "bn2"], None),
    changes_its_input: (["bn1"], "bn2: its output is added in place to X"),
    second_argument: (["bn1"], "bn2: its output is used by add()"),
    unused_argument: (["bn1", "bn2"], None),
}


@pytest.mark.parametrize("forward", DIFFERENT, ids=lambda forward: forward.__name__)
def test_a_forward_of_another_kind_is_fused_in_part_and_the_rest_is_named(forward):
    fused, reason = DIFFERENT[forward]
    plain = make(block_with(forward))
    plain.drop.p = 0.0
    model = copy.deepcopy(plain)
    report = fuse(model)
    assert report.fused == ([("", "Block", tuple(fused))] if fused else [])
    assert report.left == ([("", "Block", reason)] if reason else [])
    assert isinstance(model, type(plain))
    if forward is changes_its_input:
        assert_same_outputs(model, plain)
    else:
        assert_same_numbers(model, plain, clips=False)


DIFFERENT_ADDS = {
    "torch.add, alpha=2": lambda Y, X: torch.add(Y, X, alpha=2),
    "add_, alpha=2": lambda Y, X: Y.add_(X, alpha=2),
    "subtraction": lambda Y, X: Y - X,
    "another output": lambda Y, X: torch.add(Y, X, out=Y),
    "in place, onto the residual": lambda Y, X: X.add_(Y),
    "twice bn2": lambda Y, X: Y + Y,
}


@pytest.mark.parametrize("use_1x1conv", [False, True])
@pytest.mark.parametrize("add", DIFFERENT_ADDS.values(), ids=DIFFERENT_ADDS.keys())
def test_another_sum_is_left(add, use_1x1conv):
    plain = make(block_with(forward_spelled(add=add)), use_1x1conv)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.fused == [("", "Block", ("bn1",))]
    assert report.left[0].reason.startswith("bn2: its output is ")
    assert_same_outputs(fused, plain)


def skips_at_random(self, X):
    if self.training and torch.rand(()) < 0:
        return X
    return NotebookResidual.forward(self, X)


def skips_at_random_in_python(self, X):
    if random.random() < 0:
        return X
    return NotebookResidual.forward(self, X)


def branches_on_values(self, X):
    return X if X.sum() > 0 else NotebookResidual.forward(self, X)


def keeps_its_output(self, X):
    self.kept = NotebookResidual.forward(self, X)
    return self.kept


def averages_in_a_buffer(self, X):
    self.buffer = self.buffer * 0.9 + X.mean()
    return NotebookResidual.forward(self, X)


def resets_a_buffer(self, X):
    self.buffer = torch.zeros(())
    return NotebookResidual.forward(self, X)


def keeps_something_in_a_layer(self, X):
    self.conv1.calls = 1
    return NotebookResidual.forward(self, X)


def asks_for_a_class(self, X):
    Y = self.conv1(X)
    return NotebookResidual.forward(self, X) if isinstance(Y, torch.Tensor) else X


def counts_its_calls(self, X):
    self.calls += 1
    return NotebookResidual.forward(self, X)


def writes_a_log(self, X):
    self.log.append("called")
    return NotebookResidual.forward(self, X)


def without_gradients(self, X):
    with torch.no_grad():
        return NotebookResidual.forward(self, X)


def with_gradients(self, X):
    with torch.enable_grad():
        return NotebookResidual.forward(self, X)


def in_full_precision(self, X):
    with torch.autocast("cpu", enabled=False):
        return NotebookResidual.forward(self, X)


def checkpointed(self, X):
    return checkpoint(functools.partial(NotebookResidual.forward, self), X, use_reentrant=False)


UNTRACEABLE = {
    any_arguments: "in training: RuntimeError: it takes any number of arguments",
    skips_at_random: "in training: RuntimeError: it runs rand() on no input",
    skips_at_random_in_python: "in training: RuntimeError: it reads random.random, a builtin",
    branches_on_values: "in training: TraceError: symbolically traced variables cannot be used as inputs",
    asks_for_a_class: "in training: RuntimeError: it asks for the class of conv1",
    keeps_its_output: "in training: RuntimeError: it assigns to kept",
    counts_in_a_buffer: "in training: RuntimeError: it assigns to buffer",
    averages_in_a_buffer: "in training: RuntimeError: it assigns to buffer",
    resets_a_buffer: "in training: RuntimeError: it runs zeros() on no input",
    keeps_something_in_a_layer: "in training: RuntimeError: it assigns to conv1.calls",
    counts_its_calls: "in training: RuntimeError: it assigns to calls",
    writes_a_log: "in training: RuntimeError: it reads log, a list",
    without_gradients: "in training: RuntimeError: it runs steps under no_grad",
    with_gradients: "in eval: RuntimeError: it runs steps under no_grad",
    in_full_precision: "in training: RuntimeError: it runs steps under no_grad, autocast",
    checkpointed: "in training: ",
}


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda forward: forward.__name__)
def test_a_forward_whose_trace_would_hide_something_is_left_and_leaves_no_trace(forward):
    block = block_with(forward)()
    block.calls = 0
    block.log = []
    prefix = f"bn1, bn2: in a forward that cannot be traced {UNTRACEABLE[forward]}"
    assert reason_to_leave(block).startswith(prefix)
    assert block.calls == 0
    assert block.log == []


def test_state_that_the_forward_does_not_use_is_no_hindrance():
    block = make(NotebookResidual)
    block.log = ["kept"]
    block.scale = nn.Parameter(torch.ones(1))
    assert fuse(block).fused
    assert block.log == ["kept"]


def test_lazy_layers_are_left_until_the_first_batch():
    block = LazyResidual(6)
    (left,) = fuse(block).left
    assert left.reason == "bn1, bn2: it is lazy and not initialised: run one batch first"
    assert type(block) is LazyResidual
    block(make_input().float())
    assert fuse(block).fused == [("", "LazyResidual", BOTH)]


def with_relu_hook(block):
    block.relu_in_place.register_forward_hook(lambda relu, args, output: None)


def with_relu_forward(block):
    block.relu_in_place.forward = torch.tanh


def with_relu_subclass(block):
    block.relu_in_place = type("LeakyAtHeart", (nn.ReLU,), {})()


def with_forward(block):
    block.forward = lambda X: X


def with_sync_batch_norm(block):
    block.bn1 = nn.SyncBatchNorm(6)
    block.bn2 = nn.SyncBatchNorm(6)


def with_batch_norm_hook(block):
    block.bn1.register_forward_hook(lambda bn, args, output: None)
    block.bn2.register_full_backward_hook(lambda bn, grad_input, grad_output: None)


def with_parametrized_batch_norms(block):
    for bn in (block.bn1, block.bn2):
        nn.utils.parametrize.register_parametrization(bn, "weight", nn.Identity())


def with_scripted_batch_norms(block):
    block.bn1, block.bn2 = (torch.jit.script(bn) for bn in (block.bn1, block.bn2))


def with_frozen_batch_norms(block):
    block.bn1, block.bn2 = FrozenBatchNorm2d(6), FrozenBatchNorm2d(6)


def with_shared_batch_norm(block):
    block.bn2 = block.bn1


def with_quantisation(block):
    block.add = torch.ao.nn.quantized.FloatFunctional()


def with_parametrization(block):
    block.scale = nn.Parameter(torch.ones(3, 3))
    nn.utils.parametrize.register_parametrization(block, "scale", nn.Identity())


def without_bn2(block):
    del block.bn2


UNFIT = {
    with_relu_hook: "the sum used by relu_in_place (ReLU, with hooks or a forward of its own)",
    with_relu_forward: "the sum used by relu_in_place (ReLU, with hooks or a forward of its own)",
    with_relu_subclass: "the sum used by relu_in_place (LeakyAtHeart)",
    with_forward: "in a module whose forward was replaced on the instance",
    with_sync_batch_norm: "bn1, bn2: a SyncBatchNorm",
    with_batch_norm_hook: "bn1, bn2: it has hooks or a forward of its own",
    with_parametrized_batch_norms: "bn1, bn2: a ParametrizedBatchNorm2d",
    with_scripted_batch_norms: "bn1, bn2: a RecursiveScriptModule",
    with_frozen_batch_norms: "bn1, bn2: a FrozenBatchNorm2d",
    with_shared_batch_norm: "bn1: it is used twice",
    with_quantisation: "bn1, bn2: in a module made for quantisation",
    with_parametrization: "in a parametrized module",
    without_bn2: "cannot be traced in training: AttributeError",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_block_that_was_changed_is_left(change):
    block = ReluChildResidual()
    change(block)
    assert UNFIT[change] in reason_to_leave(block)


def test_one_odd_layer_leaves_the_other_to_be_fused():
    plain = make(ReluChildResidual)
    plain.bn2 = nn.GroupNorm(2, 6).double()
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert report.fused == [("", "ReluChildResidual", ("bn1",))]
    assert not report.left
    assert_same_numbers(fused, plain)


def test_a_function_as_conv3_is_called_as_it_was():
    plain = make(ReluChildResidual)
    del plain.conv3
    plain.conv3 = torch.neg
    fused = copy.deepcopy(plain)
    assert fuse(fused).fused == [("", "ReluChildResidual", BOTH)]
    assert_same_numbers(fused, plain)


@pytest.mark.parametrize("method", ["train", "state_dict", "__call__", "__getstate__", "__len__"])
def test_a_class_that_overrides_what_modules_do_keeps_it(method):
    block = make(block_with(NotebookResidual.forward, **{method: getattr(nn.Module, method, lambda self: 0)}))
    overriding = getattr(type(block), method)
    assert fuse(block).fused == [("", "Block", BOTH)]
    assert getattr(type(block), method) is overriding


@pytest.mark.parametrize("method", ["__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"])
def test_a_class_that_pickles_or_copies_in_its_own_way_is_left(method):
    block_class = block_with(NotebookResidual.forward, **{method: lambda self, *args: None})
    assert reason_to_leave(block_class()) == f"bn1, bn2: in a module whose class overrides {method}"


def test_a_class_of_another_layout_keeps_its_slots():
    block = make(block_with(NotebookResidual.forward, __slots__=("slot",)))
    block.slot = 1
    assert fuse(block).fused == [("", "Block", BOTH)]
    assert block.slot == 1


def test_a_subclass_of_fused_residual_is_left_both_ways():
    block = type("Mine", (FusedResidual,), {})(6, 6)
    assert reason_to_leave(block) == "bn1, bn2: already fused"
    assert unfuse(block).left == [("", "Mine", "a subclass of a fused class")]
    assert type(block).__name__ == "Mine"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_scripted_block_is_left():
    scripted = torch.jit.trace(make(Residual).eval(), make_input())
    (left,) = fuse(scripted).left
    assert left.reason == "bn1, bn2: in a scripted module"


def test_a_traced_block_is_left():
    assert "whose class overrides" in reason_to_leave(torch.fx.symbolic_trace(make(Residual)))


# filter_fn, and errors


def test_filter_fn_is_asked_about_blocks_that_could_be_swapped_and_no_more():
    asked = []

    def filter_fn(module, name):
        asked.append((name, module))
        return name != "2"

    model = nn.Sequential(
        nn.BatchNorm2d(6), make(NotebookResidual), make(NotebookResidual), block_with(one_batch_norm_twice)()
    )
    report = fuse(model, filter_fn)
    assert asked == [("1", model[1]), ("2", model[2])]
    assert report.fused == [("1", "NotebookResidual", BOTH)]
    assert ("2", "NotebookResidual", "bn1, bn2: filter_fn said no") in report.left
    assert type(model[2]) is NotebookResidual


def test_an_error_in_filter_fn_leaves_every_block_as_it_was():
    model = nn.Sequential(make(NotebookResidual), make(NoConv3Residual))
    before = snapshot(model)

    def filter_fn(module, name):
        if name == "1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fuse(model, filter_fn)
    assert_unchanged(model, before)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_what_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module, got list"):
        function([make(Residual)])


def test_random_generators_stand_where_they_stood():
    block = make(NotebookResidual)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    fuse(block)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


# What stays


def test_references_and_a_bare_root_survive():
    block = make(NotebookResidual)
    children = dict(block.named_children())
    parameters = list(block.parameters())
    assert fuse(block).fused
    assert dict(block.named_children()) == children
    assert all(after is before for after, before in zip(block.parameters(), parameters, strict=True))


def test_hooks_on_the_block_survive():
    block = make(NotebookResidual)
    calls = []
    block.register_forward_pre_hook(lambda module, args: calls.append("forward pre"))
    block.register_forward_hook(lambda module, args, output: calls.append("forward"))
    block.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    fuse(block)
    assert not calls  # nor does tracing call them
    block(make_input().requires_grad_()).sum().backward()
    assert calls == ["forward pre", "forward", "backward"]
    unfuse(block)
    block(make_input().requires_grad_()).sum().backward()
    assert calls == ["forward pre", "forward", "backward"] * 2


def test_hooks_on_the_layers_survive_and_are_not_called_by_fuse():
    block = make(NotebookResidual, use_1x1conv=True)
    calls = []

    def add_hooks(*names):
        for name in names:
            hook = lambda module, args, output, name=name: calls.append(name)  # noqa: E731
            block.get_submodule(name).register_forward_hook(hook)

    add_hooks("conv1", "conv2", "conv3")
    assert fuse(block).fused
    assert not calls
    add_hooks("bn1", "bn2")
    block(make_input())
    assert sorted(calls) == ["bn1", "bn2", "conv1", "conv2", "conv3"]


@pytest.mark.parametrize("block_class", BLOCK_CLASSES)
def test_state_dicts_load_strictly_both_ways(block_class):
    plain, fused = make(block_class), make(block_class)
    fuse(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)


@pytest.mark.parametrize("block_class", BLOCK_CLASSES)
def test_unfuse_restores_everything(block_class):
    model = model_of(make(block_class, use_1x1conv=True))
    before = snapshot(model)
    fuse(model)
    assert unfuse(model).unfused == [("2", block_class.__name__, ())]
    assert_unchanged(model, before)


def test_unfuse_makes_a_native_fused_block_plain():
    model = resnet18()
    assert len(unfuse(model).unfused) == 8
    assert {type(module) for module in model.modules() if isinstance(module, Residual)} == {Residual}
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_inside_unfused_every_module_is_plain_and_outside_it_is_fused_again():
    model = nn.Sequential(
        make(NotebookResidual), make(Residual), FusedResidual(6, 6).double(), nn.Conv2d(6, 6, 1).double()
    )
    fuse(model, memory_efficient=True)
    fused = snapshot(model)
    with pytest.raises(KeyError), unfused(model) as given:
        assert given is model
        assert [type(module) for module in model] == [NotebookResidual, Residual, Residual, nn.Conv2d]
        assert "_memory_efficient" not in vars(model[1])
        with unfused(model):
            assert type(model[1]) is Residual
        assert type(model[1]) is Residual
        raise KeyError
    assert_unchanged(model, fused)
    with unfused(model):
        model[0].__class__ = FusedResidual  # the user's, to stay
    assert type(model[0]) is FusedResidual


def test_unfused_leaves_alone_what_was_never_fused_and_refuses_what_is_no_module():
    model = model_of(make(NotebookResidual))
    before = snapshot(model)
    with unfused(model):
        assert_unchanged(model, before)
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got list"), unfused([model]):
        pass


def test_fusing_twice_changes_nothing_more():
    model = model_of(make(NotebookResidual))
    fuse(model)
    before = snapshot(model)
    report = fuse(model)
    assert not report.fused
    assert ("2", "NotebookResidual", "bn1, bn2: already fused") in report.left
    assert_unchanged(model, before)
    unfuse(model)
    assert type(model[2]) is NotebookResidual
    assert not unfuse(model).unfused


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("block_class", BLOCK_CLASSES)
def test_copies_of_a_fused_model_run_and_can_be_unfused(copy_of, block_class):
    model = model_of(make(block_class))
    before = snapshot(model)
    fuse(model)
    copied = copy_of(model)
    assert type(copied[2]) is type(model[2])
    assert torch.equal(copied.eval()(make_input()), model.eval()(make_input()))
    copied.train()
    unfuse(copied)
    assert_unchanged(copied, before)


# The report


def test_the_report_names_what_was_swapped_and_what_was_left():
    model = model_of(make(NotebookResidual))
    report = fuse(model)
    assert report.fused == [("2", "NotebookResidual", BOTH)]
    assert report.left == [("", "Sequential", "0.1: its output is used by 2 (NotebookResidual)")]
    assert str(report).splitlines() == [
        "fused 2 batch norms:",
        "  2 (NotebookResidual): bn1, bn2",
        "left:",
        "  the model (Sequential): 0.1: its output is used by 2 (NotebookResidual)",
    ]
    assert json.loads(json.dumps(report.to_dict())) == {
        "fused": [{"name": "2", "class_name": "NotebookResidual", "batch_norms": ["bn1", "bn2"]}],
        "unfused": [],
        "left": [{"name": "", "class_name": "Sequential", "reason": report.left[0].reason}],
    }
    assert str(unfuse(model)).splitlines() == ["unfused:", "  2 (NotebookResidual)"]


def test_a_model_without_blocks_is_unchanged_and_the_report_says_so():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU6()), nn.Linear(1, 1))
    before = snapshot(model)
    report = fuse(model)
    assert_unchanged(model, before)
    assert not report.fused
    assert report.left == [("1", "Sequential", "0: its output is used by 1 (ReLU6)")]
    assert str(report).startswith("nothing was changed")
    assert str(fuse(nn.Linear(1, 1))) == str(unfuse(model)) == "nothing was changed"


def test_a_bare_block_is_named_as_the_model():
    assert str(fuse(make(NotebookResidual))) == ("fused 2 batch norms:\n  the model (NotebookResidual): bn1, bn2")
