"""The fused class of a module: what its forward computes, when it leaves that to the original, and how it travels."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torchvision.models.densenet import _DenseLayer
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import fuse, unfuse, unfused

from .test_convert import assert_same_numbers, assert_unchanged, make_input, snapshot


def prepared(model):
    """In float64, with batch norms worth the name."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
    return model.double()


def make_block(downsample=True):
    if downsample:
        downsample = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
    return prepared(BasicBlock(6, 6, downsample=downsample or None))


def twins(model):
    """The model, and a fused copy of it."""
    fused = copy.deepcopy(model)
    assert fuse(fused).fused
    return model, fused


class Tail(nn.Module):
    """relu(bn(X) + residual), however a test spells it."""

    def __init__(self, forward, bn=None):
        super().__init__()
        self.bn = bn or nn.BatchNorm2d(6)
        self.function = forward
        prepared(self)

    def forward(self, X, residual):
        return self.function(self.bn, X, residual)


def out_of_place(bn, X, residual):
    return F.relu(residual + bn(X))


def in_place(bn, X, residual):
    Y = bn(X)
    Y += residual
    return F.relu_(Y)


class TwoNorms(nn.Module):
    """relu(bn(X) + other(residual)), however a test spells it."""

    def __init__(self, forward, other=None):
        super().__init__()
        self.bn, self.other = nn.BatchNorm2d(6), other or nn.BatchNorm2d(6)
        self.function = forward
        prepared(self)

    def forward(self, X, residual):
        return self.function(self.bn, self.other, X, residual)


def second_first(bn, other, X, residual):
    R = other(residual)
    Y = bn(X)
    Y += R
    return F.relu(Y)


def first_in_place(bn, other, X, residual):
    Y = bn(X)
    return Y.add_(other(residual)).relu_()


# The class


def test_the_class_passes_for_the_original_one():
    plain, fused = twins(make_block())
    assert isinstance(fused, BasicBlock)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(fused), name) == getattr(BasicBlock, name)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert repr(fused) == repr(plain)
    assert type(fused).expansion == 1


def test_equal_modules_share_a_class():
    blocks = make_block(), make_block(), make_block(downsample=False)
    for block in blocks:
        fuse(block)
    assert type(blocks[0]) is type(blocks[1]) is not type(blocks[2])


@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_a_residual_block_keeps_its_numbers(block_class, downsample, calls):
    if downsample:
        downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    block = prepared(block_class(8, 8 // block_class.expansion, downsample=downsample or None))
    plain, fused = twins(nn.Sequential(nn.Conv2d(6, 8, 1).double(), block))
    assert_same_numbers(fused, plain)
    tails = 2 if block_class is BasicBlock else 3
    last = "batch_norm_add_batch_norm_relu" if downsample else "batch_norm_add_relu"
    assert calls == (["batch_norm_relu"] * (tails - 1) + [last]) * 2


# Two batch norms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "forward", [lambda bn, other, X, R: F.relu(bn(X) + other(R)), second_first, first_in_place], ids=["+", "+=", "add_"]
)
def test_two_batch_norms_are_one_call(forward, training, calls):
    plain, fused = twins(TwoNorms(forward).train(training))
    inputs = make_input(1), make_input(2)
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=0, atol=1e-12)
    assert calls == ["batch_norm_add_batch_norm_relu"]
    for (name, value), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


def in_modes_of_their_own(model):
    model.other.eval()


def without_statistics_of_its_own(model):
    model.other.running_mean = model.other.running_var = None


@pytest.mark.parametrize("change", [in_modes_of_their_own, without_statistics_of_its_own])
def test_each_batch_norm_decides_its_mode(change, calls):
    models = twins(TwoNorms(second_first).train(change is in_modes_of_their_own))
    for model in models:
        change(model)
    plain, fused = (model(make_input(1), make_input(2)) for model in models)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)
    assert calls == ["batch_norm_add_relu"]
    for value, other in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12)


def test_a_residual_that_broadcasts_after_its_batch_norm_is_added_as_in_eager(calls):
    plain, fused = twins(TwoNorms(lambda bn, other, X, R: F.relu(bn(X) + other(R))))
    inputs = make_input(1), make_input(2)[:, :, :1, :1]
    torch.testing.assert_close(fused(*inputs), plain(*inputs), rtol=0, atol=1e-12)
    assert calls == []


def used_again(bn, other, X, residual):
    R = other(residual)
    return F.relu(bn(X) + R) * R


def input_changed_between(bn, other, X, residual):
    R = other(residual)
    residual.mul_(2)
    return F.relu(bn(X) + R)


@pytest.mark.parametrize("forward", [used_again, input_changed_between])
def test_a_second_batch_norm_that_cannot_wait_runs_by_itself(forward, calls):
    plain, fused = twins(TwoNorms(forward))
    torch.testing.assert_close(
        fused(make_input(1), make_input(2)), plain(make_input(1), make_input(2)), rtol=0, atol=1e-12
    )
    assert calls == ["batch_norm_add_relu"]


# Where a batch norm hides

STEMS = {
    "Sequential": lambda conv, bn, relu: nn.Sequential(conv, bn, relu),
    "Sequential before the ReLU": lambda conv, bn, relu: nn.Sequential(nn.Sequential(conv, bn), relu),
    "Sequential after the batch norm": lambda conv, bn, relu: nn.Sequential(conv, bn, nn.Sequential(relu)),
    "both": lambda conv, bn, relu: nn.Sequential(nn.Sequential(nn.Sequential(conv), bn), nn.Sequential(relu)),
    "Identity between": lambda conv, bn, relu: nn.Sequential(
        conv, bn, nn.Identity(), nn.Sequential(nn.Identity()), relu
    ),
    "deep": lambda conv, bn, relu: nn.Sequential(nn.Sequential(nn.Sequential(conv, bn), nn.Identity()), relu),
    "subclass": lambda conv, bn, relu: type("Stem", (nn.Sequential,), {})(conv, bn, relu),
}


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS.keys())
@pytest.mark.parametrize("inplace", [True, False])
def test_a_stem_is_fused_through_sequentials_and_identities(stem, inplace, calls):
    model = prepared(stem(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace)))
    plain, fused = twins(model)
    assert_same_numbers(fused, plain)
    assert calls == ["batch_norm_relu"] * 2


def test_an_identity_with_hooks_is_called_and_hinders_nothing_before_it():
    model = prepared(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Identity()))
    called = []
    model[3].register_forward_hook(lambda *args: called.append("3"))
    assert fuse(model).fused == [("", "Sequential", ("1",))]
    model(make_input())
    assert called == ["3"]


def test_a_sequential_that_nothing_crosses_stays_a_step_of_its_own():
    model = prepared(nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()), nn.ReLU()))
    assert fuse(model).fused == [("0", "Sequential", ("1",))]
    called = []
    model[0].register_forward_hook(lambda *args: called.append("0"))
    model(make_input())
    assert called == ["0"]


def test_a_sequential_that_something_crosses_brings_all_it_has(calls):
    layers = [nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)]
    plain, fused = twins(prepared(nn.Sequential(nn.Sequential(*layers), nn.ReLU())))
    assert [swapped.batch_norms for swapped in fuse(copy.deepcopy(plain)).fused] == [("0.1", "0.4")]
    assert_same_numbers(fused, plain)
    assert len(calls) == 4


def test_a_sequential_with_hooks_is_not_looked_into():
    model = prepared(nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.ReLU()))
    model[0].register_forward_hook(lambda *args: None)
    before = snapshot(model)
    report = fuse(model)
    assert report.left == [("0", "Sequential", "1: its output is returned")]
    assert_unchanged(model, before)


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_nor_is_it_where_the_outer_module_has_something_to_fuse(change, calls):
    inner = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    plain = prepared(nn.Sequential(inner, nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU()))
    if change == "hook":
        inner.register_forward_hook(lambda module, args, output: -output)
    else:
        inner.forward = nn.Softplus().forward  # a method, not a function
    plain, fused = twins(plain)
    assert [swapped.batch_norms for swapped in fuse(copy.deepcopy(plain)).fused] == [("2",)]
    assert_same_numbers(fused, plain, clips=False)
    assert len(calls) == 2


def test_where_the_outer_module_is_left_the_inner_one_is_fused():
    layers = [nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)]
    model = prepared(nn.Sequential(nn.Sequential(*layers), nn.ReLU()))
    report = fuse(model, lambda module, name: name == "0")
    assert report.fused == [("0", "Sequential", ("1",))]
    assert report.left == [("", "Sequential", "0.4: filter_fn said no")]


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))

    def forward(self, X):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            X = bn(conv(X)).relu_()
        return X


def test_layers_in_lists_are_found(calls):
    plain, fused = twins(prepared(Lists()))
    assert_same_numbers(fused, plain)
    assert len(calls) == 6


class Holder(nn.Module):
    """Its forward is never called."""

    def __init__(self):
        super().__init__()
        self.bn, self.last_bn = nn.BatchNorm2d(6), nn.BatchNorm2d(6)


class CallsALayersLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)
        self.holder = Holder()

    def forward(self, X):
        return self.holder.last_bn(F.relu(self.holder.bn(F.relu(self.bn(X)))))


def test_layers_of_a_layer_are_found_where_they_are_called(calls):
    plain, fused = twins(prepared(CallsALayersLayers()))
    report = fuse(copy.deepcopy(plain))
    assert report.fused == [("", "CallsALayersLayers", ("bn", "holder.bn"))]
    assert ("", "CallsALayersLayers", "holder.last_bn: its output is returned") in report.left
    assert_same_numbers(fused, plain, clips=False)
    assert len(calls) == 4


def append_layers(model):
    model.convs.append(model.convs[0])
    model.bns.append(model.bns[0])


def test_lists_may_grow():
    plain, fused = twins(prepared(Lists()))
    for model in (plain, fused):
        append_layers(model)
    assert_same_numbers(fused, plain)


@pytest.mark.parametrize(
    ("bn", "shape"), [(nn.BatchNorm1d, (8, 6)), (nn.BatchNorm1d, (4, 6, 5)), (nn.BatchNorm3d, (2, 6, 3, 2, 3))]
)
def test_batch_norms_of_any_dimension(bn, shape, calls):
    plain, fused = twins(prepared(nn.Sequential(bn(6), nn.ReLU())))
    X = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(fused(X), plain(X), rtol=0, atol=1e-12)
    assert calls == ["batch_norm_relu"]
    wrong = torch.randn(2, 6, 1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for model in (plain, fused):
        with pytest.raises(ValueError, match="expected") as error:
            model(wrong)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


# The sum

RESIDUALS = {
    "alike": (lambda: make_input(2), True),
    "channels_last": (lambda: make_input(2).to(memory_format=torch.channels_last), True),
    "broadcast": (lambda: make_input(2)[:1, :, :1], False),
    "float32": (lambda: make_input(2).float(), False),
    "a number": (lambda: 0.5, False),
}


@pytest.mark.parametrize("forward", [out_of_place, in_place])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_residual_of_any_kind_gives_the_sum_that_eager_gives(forward, residual, dtype, calls):
    make, is_alike = RESIDUALS[residual]
    plain, fused = twins(Tail(forward).to(dtype))
    X, residual = make_input().to(dtype), make()
    if is_alike:
        residual = residual.to(dtype)
    elif dtype == torch.float32 and torch.is_tensor(residual) and residual.dtype == dtype:
        residual = residual.double()
    Y, other_Y = fused(X, residual), plain(X, residual)
    torch.testing.assert_close(Y, other_Y, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    keeps_the_shape = forward is in_place and torch.is_tensor(residual) and residual.dtype == dtype
    assert calls == (["batch_norm_add_relu"] if is_alike or keeps_the_shape else [])


def test_a_residual_that_widens_the_sum():
    plain, fused = twins(Tail(out_of_place))
    wide = torch.randn(2, 3, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(make_input(), wide), plain(make_input(), wide), rtol=0, atol=1e-12)
    narrow = Tail(in_place)
    fuse(narrow)
    with pytest.raises(RuntimeError, match="broadcast"):
        narrow(make_input(), wide)


def changes_the_input_before_the_add(bn, X, residual):
    Y = bn(X)
    residual = residual + X.mul_(2)
    return F.relu(Y + residual)


def changes_the_residual_before_the_relu(bn, X, residual):
    Y = bn(X) + residual
    residual.mul_(2)
    return F.relu(Y)


def changes_the_output_before_the_add(bn, X, residual):
    Y = bn(X)
    Y.mul_(2)
    return F.relu(Y + residual)


def keeps_the_sum(bn, X, residual):
    Y = bn(X) + residual
    return F.relu_(Y) + Y


def returns_what_the_relu_changed(bn, X, residual):
    Y = bn(X) + residual
    F.relu_(Y)
    return Y


def by_function(bn, X, residual):
    Y = F.batch_norm(X, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    return F.relu(Y + residual)


TRAPS = {
    changes_the_input_before_the_add: False,
    changes_the_residual_before_the_relu: True,
    changes_the_output_before_the_add: False,
    keeps_the_sum: False,
    returns_what_the_relu_changed: False,
}


@pytest.mark.parametrize("forward", TRAPS, ids=lambda forward: forward.__name__)
def test_the_order_of_changes_is_kept(forward):
    plain = Tail(forward)
    fused = copy.deepcopy(plain)
    assert bool(fuse(fused).fused) is TRAPS[forward]
    inputs, other_inputs = [[make_input(), make_input(2)] for _ in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs), plain(*other_inputs), rtol=0, atol=1e-12)
    for tensor, other in zip((*inputs, *fused.buffers()), (*other_inputs, *plain.buffers()), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-12)


class ReadsTheStatisticsBeforeTheAdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, X):
        Y = self.bn(self.conv(X))
        return F.relu(Y + X * self.bn.running_mean.view(-1, 1, 1))


def test_statistics_are_updated_before_they_are_read():
    plain = prepared(ReadsTheStatisticsBeforeTheAdd())
    fused = copy.deepcopy(plain)
    fuse(fused)
    torch.testing.assert_close(fused(make_input()), plain(make_input()), rtol=0, atol=1e-12)


def test_a_functional_batch_norm_is_left():
    model = Tail(by_function)
    before = snapshot(model)
    assert not fuse(model).fused
    assert_unchanged(model, before)


# Arguments


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)
        prepared(self)

    def forward(self, X, skip, scale=1.0, *, mask=None):
        Y = F.relu(self.bn(X))
        if skip is not None:
            Y = Y + skip
        return Y * scale if mask is None else Y * mask


CALLS = {
    "positional": (lambda model, X, Z: model(X, Z), True),
    "by name": (lambda model, X, Z: model(skip=Z, X=X), True),
    "None": (lambda model, X, Z: model(X, None), False),
    "None by name": (lambda model, X, Z: model(X, skip=None), False),
    "a default by position": (lambda model, X, Z: model(X, Z, 2.0), False),
    "a default by name": (lambda model, X, Z: model(X, Z, mask=Z), False),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_taken_as_the_original_takes_them(call, calls):
    call, is_fused = CALLS[call]
    plain, fused = twins(Arguments())
    Y, other_Y = (call(model, make_input(), make_input(2)) for model in (fused, plain))
    torch.testing.assert_close(Y, other_Y, rtol=0, atol=1e-12)
    assert len(calls) == is_fused


@pytest.mark.parametrize("arguments", [(), (1,), (1, 2, 3, 4)])
def test_wrong_arguments_are_refused_as_the_original_refuses_them(arguments):
    plain, fused = twins(Arguments())
    messages = []
    for model in (plain, fused):
        with pytest.raises((TypeError, AttributeError)) as error:
            model(*arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_forward_that_asks_for_the_class_of_its_argument_gets_the_right_answer(calls):
    plain, fused = twins(prepared(_DenseLayer(6, 4, 2, 0.0)))
    X = make_input()
    for argument in (X, [X], [X[:, :3], X[:, 3:]]):
        torch.testing.assert_close(fused(argument), plain(argument), rtol=0, atol=1e-12)
    assert len(calls) == 6
    for model in (plain, fused):  # neither a list nor a Tensor
        torch.testing.assert_close(model((X,)), plain(X), rtol=0, atol=1e-1)
    assert len(calls) == 6


# What may change after fuse


def add_hook(name, called):
    def change(model):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, output: called.append(name) or output * 0.5)

    return change


def replace(name, make_module):
    def change(model):
        parent, _, child = name.rpartition(".")
        torch.manual_seed(0)
        setattr(model.get_submodule(parent), child, make_module())

    return change


def set_attribute(name, **attributes):
    def change(model):
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)

    return change


def weight_norm(model):
    parametrizations.weight_norm(model.bn1)


CHANGES = {  # and how many of the block's two tails still run fused
    "hook on a batch norm": (add_hook("bn1", []), 0),
    "hook on the ReLU": (add_hook("relu", []), 0),
    "hook on the Sequential": (add_hook("downsample", []), 0),
    "hook on a convolution": (add_hook("conv1", []), 2),
    "batch norm replaced": (replace("bn2", lambda: nn.GroupNorm(2, 6).double()), 0),
    "batch norm folded away": (replace("bn2", nn.Identity), 0),
    "ReLU replaced": (replace("relu", nn.Tanh), 0),
    "ReLU with a forward": (set_attribute("relu", forward=torch.tanh), 0),
    "batch norm parametrized": (weight_norm, 0),
    "convolution replaced": (replace("conv1", lambda: nn.Conv2d(6, 6, 1, padding=0).double()), 2),
    "Sequential replaced": (replace("downsample", lambda: nn.Conv2d(6, 6, 1).double()), 0),
    "batch norm in the Sequential replaced": (replace("downsample.1", lambda: nn.GroupNorm(2, 6).double()), 0),
    "Sequential taken away": (replace("downsample", lambda: None), 0),
    "momentum": (set_attribute("bn1", momentum=None), 2),
    "eps": (set_attribute("bn1", eps=0.5), 2),
    "frozen": (set_attribute("bn2", weight=None, bias=None), 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_fuse_takes_effect(change, calls):
    change, tails = CHANGES[change]
    plain, fused = twins(make_block())
    for model in (plain, fused):
        change(model)
    assert_same_numbers(fused, plain, clips=False)
    assert len(calls) == 2 * tails


def test_layers_of_an_inlined_sequential_may_change():
    def make_model():
        return prepared(nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.ReLU()))

    for change in (
        lambda model: model[0].append(nn.Tanh()),
        lambda model: model[0].register_forward_hook(lambda module, args, output: -output),
        lambda model: model[0].insert(0, nn.Tanh()),
        lambda model: model.append(nn.Tanh()),
        lambda model: model.insert(1, nn.Identity()),
        lambda model: setattr(model[0], "forward", torch.tanh),
    ):
        plain, fused = twins(make_model())
        for model in (plain, fused):
            change(model)
        assert_same_numbers(fused, plain, clips=False)


def test_a_global_hook_is_called():
    block = make_block()
    fuse(block)
    called = []
    handle = register_module_forward_hook(lambda module, args, output: called.append(module))
    try:
        block(make_input())
    finally:
        handle.remove()
    assert {block.bn1, block.bn2, block.relu} <= set(called)


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)
        self.act = F.relu
        self.scale = 1
        self.late = None
        self.register_module("extra", None)
        self.register_parameter("gain", None)
        prepared(self)

    def forward(self, X):
        X = self.act(self.bn(X)) * self.scale + getattr(self, "shift", 0)
        X = X if self.late is None else self.late(X)
        X = X if self.extra is None else self.extra(X)
        return X if self.gain is None else X * self.gain


@pytest.mark.parametrize(
    "attributes",
    [
        {"scale": 2},
        {"scale": True},
        {"act": torch.tanh},
        {"shift": 1},
        {"late": torch.neg},
        {"late": nn.Tanh()},
        {"extra": nn.Tanh()},
        {"gain": nn.Parameter(torch.full((), 2.0, dtype=torch.float64))},
    ],
    ids=lambda attributes: "-".join(f"{name}-{type(value).__name__}" for name, value in attributes.items()),
)
def test_an_attribute_that_the_forward_reads_may_change(attributes, calls):
    plain, fused = twins(Configured())
    for model in (plain, fused):
        set_attribute("", **attributes)(model)
    torch.testing.assert_close(fused(make_input()), plain(make_input()))
    assert not calls


def test_an_attribute_that_a_trace_could_change_is_not_taken_for_absent():
    model = Configured()
    model.shift = torch.ones(6, 1, 1).tolist()
    (left,) = fuse(model).left
    assert left.reason == "bn: in a forward that cannot be traced in training: RuntimeError: it reads shift, a list"


def test_an_attribute_that_the_forward_does_not_read_makes_no_difference(calls):
    _, fused = twins(Configured())
    fused.epoch = 3
    fused.probe = nn.Linear(1, 1)
    fused(make_input())
    assert calls == ["batch_norm_relu"]


def test_a_slice_of_a_fused_sequential_is_a_sequential_of_its_own():
    plain, fused = twins(prepared(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())))
    plain, fused = plain.eval(), fused.eval()
    for length in (1, 2, 3):
        torch.testing.assert_close(fused[:length](make_input()), plain[:length](make_input()), rtol=0, atol=1e-12)


# How it travels


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(protocol):
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_torch_save, *map(through_pickle, range(6))])
def test_a_copy_is_fused_and_can_be_unfused(copy_of, calls):
    model = nn.Sequential(make_block(), prepared(Lists()))
    before = snapshot(model)
    fuse(model)
    copied = copy_of(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(copied.eval()(make_input()), model.eval()(make_input()))
    assert len(calls) == 10
    unfuse(copied.train())
    assert_unchanged(copied, before)


class Saved(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, X):
        return F.relu(self.bn(X))


def test_a_pickle_holds_no_forward_and_follows_the_class(monkeypatch, calls):
    model = Saved()
    fuse(model, memory_efficient=True)
    pickled = pickle.dumps(model)
    assert b"def forward" not in pickled and b"resnet_fused.calls" not in pickled
    monkeypatch.setattr(Saved, "forward", lambda self, X: -F.relu(self.bn(X)))
    loaded = pickle.loads(pickled)
    assert type(loaded)._recomputes and loaded(make_input().float()).max() == 0
    assert calls == ["batch_norm_relu"]
    monkeypatch.setattr(Saved, "forward", lambda self, X: torch.tanh(self.bn(X)))
    with pytest.warns(
        UserWarning, match="a Saved was saved fused, and loads unfused: bn: its output is used by tanh()"
    ):
        assert type(pickle.loads(pickled)) is Saved


def test_a_pickle_of_another_version_loads_unfused_or_says_what_to_do(monkeypatch):
    model = Saved()
    fuse(model)
    monkeypatch.setattr("resnet_fused.rewriting.rewrite.FORMAT", 3)
    pickled = pickle.dumps(model)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="a Saved saved by another version of resnet_fused loads unfused: fuse it"):
        loaded = pickle.loads(pickled)
    assert type(loaded) is Saved and set(vars(loaded)) == set(vars(model))
    with pytest.raises(ImportError, match="saved fused by resnet_fused 0.1"):
        pickle.loads(b"cresnet_fused.rewrite\n_new\n.")


def test_unfuse_restores_everything():
    model = nn.Sequential(make_block(), prepared(Lists()), prepared(_DenseLayer(6, 4, 2, 0.0)))
    before = snapshot(model)
    assert len(fuse(model).fused) == 3
    assert len(unfuse(model).unfused) == 3
    assert_unchanged(model, before)


def test_fusing_twice_changes_nothing_more():
    model = nn.Sequential(make_block())
    fuse(model)
    before = snapshot(model)
    assert ("0", "BasicBlock", "bn1, bn2, downsample.1: already fused") in fuse(model).left
    assert_unchanged(model, before)


def test_a_parametrized_fused_module_is_not_unfused():
    block = make_block()
    fuse(block)
    block.scale = nn.Parameter(torch.ones(2))
    parametrizations.weight_norm(block, "scale", dim=None)
    (left,) = unfuse(block).left
    assert left.reason == "a subclass of a fused class"


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_graph_break(training, calls):
    plain, fused = twins(make_block())
    for model in (plain, fused):
        model.train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for batch_size in (3, 3, 5):
        X = torch.randn(batch_size, 6, 5, 7, dtype=torch.float64)
        torch.testing.assert_close(compiled(X), plain(X), rtol=0, atol=1e-12)
    for (name, buffer), other in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("strict", [True, False])
def test_it_exports(strict):
    plain, fused = twins(make_block().eval())
    exported = torch.export.export(fused, (make_input(),), strict=strict)
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    operators = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "resnet_fused.batch_norm_add_batch_norm_relu.default" in operators
    torch.testing.assert_close(exported.module()(make_input(1)), plain(make_input(1)), rtol=0, atol=1e-12)


def test_unfused_it_exports_to_onnx():
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    block = make_block().eval()
    fuse(block)
    with pytest.raises(torch.onnx.OnnxExporterError, match="resnet_fused"):
        torch.onnx.export(block, (make_input(),), dynamo=True)
    with unfused(block):
        exported, X = torch.onnx.export(block, (make_input(),), dynamo=True).model_proto, make_input(1)
    (actual,) = reference.ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), block(X).detach(), rtol=0, atol=1e-9)
