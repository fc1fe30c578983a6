"""Whatever changes after a fused model has learnt takes effect, and the numbers stay the plain model's."""
# ruff: noqa: E501  one line a change

import copy
import enum
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from .models import Layers, assert_same_numbers, make_block, make_input, states_of, twins

SETTINGS = types.SimpleNamespace(scale=2.0, log=[])
KINDS = enum.Enum("Kinds", ["PLAIN", "NEGATED"])
NEGATE = False


def tail(self, X):
    return F.relu(self.bn1(self.conv1(X)) + X)


def negated_if_asked(Y):
    return -Y if NEGATE else Y


class Model(Layers):
    flag, factor, kind, act = False, 3, KINDS.PLAIN, nn.ReLU

    def helper(self, Y):
        return Y * 2

    @property
    def a_property(self):
        return self.factor


def on_instance(**attributes):
    return lambda model, patch: [setattr(model, name, value) for name, value in attributes.items()]


def on_class(cls=Model, **attributes):
    return lambda model, patch: [patch.setattr(cls, name, value, raising=False) for name, value in attributes.items()]


def on_layer(name, **attributes):
    return lambda model, patch: [setattr(model.get_submodule(name), k, value) for k, value in attributes.items()]


def in_module(name, value):
    return lambda model, patch: patch.setattr(name if "." in name else f"{__name__}.{name}", value)


def replaced(name, make):
    def change(model, patch):
        parent, _, child = name.rpartition(".")
        torch.manual_seed(0)
        setattr(model.get_submodule(parent), child, make())

    return change


def hooked(name, register="register_forward_hook", hook=lambda module, args, output: output * 0.5):
    return lambda model, patch: [getattr(model.get_submodule(name), register)(hook), None][1]


def other(self, *args):
    return args[0] * 7


CHANGES = {  # what changes; what the forward is, where it is not the tail
    "flag on the instance": (on_instance(flag=True), lambda self, X: tail(self, X) * (2 if self.flag else 1)),
    "flag on the class": (on_class(flag=True), lambda self, X: tail(self, X) * (2 if self.flag else 1)),
    "enum": (on_class(kind=KINDS.NEGATED), lambda self, X: tail(self, X) * (2 if self.kind is KINDS.PLAIN else 1)),
    "method on the class": (on_class(helper=other), lambda self, X: self.helper(tail(self, X))),
    "method on the instance": (on_instance(helper=lambda Y: Y * 7), lambda self, X: self.helper(tail(self, X))),
    "property": (on_class(a_property=property(lambda self: 5)), lambda self, X: tail(self, X) * self.a_property),
    "forward on the class": (on_class(forward=lambda self, X: -tail(self, X)), tail),
    "forward on the instance": (on_instance(forward=torch.neg), tail),
    "global": (in_module("NEGATE", True), lambda self, X: negated_if_asked(tail(self, X))),
    "setting": (in_module("tests.test_fuse_changes.SETTINGS.scale", 4.0), lambda self, X: tail(self, X) * SETTINGS.scale),
    "list": (lambda model, patch: SETTINGS.log.append(1), lambda self, X: tail(self, X) * (1 + len(SETTINGS.log))),
    "function of torch": (in_module("torch.tanh", torch.neg), lambda self, X: torch.tanh(tail(self, X))),
    "F.relu": (in_module("torch.nn.functional.relu", torch.tanh), tail),
    "F.batch_norm": (in_module("torch.nn.functional.batch_norm", lambda X, *args, **kwargs: X * 3), tail),
    "forward of all batch norms": (on_class(nn.modules.batchnorm._BatchNorm, forward=other), tail),
    "forward of 2d batch norms": (on_class(nn.BatchNorm2d, forward=other), tail),
    "call of batch norms": (on_class(nn.BatchNorm2d, __call__=other), tail),
    "forward of ReLUs": (on_class(nn.ReLU, forward=other), lambda self, X: self.relu(self.bn1(X))),
    "forward of a batch norm": (on_layer("bn1", forward=torch.tanh), tail),
    "ReLU with a forward": (on_layer("relu", forward=torch.tanh), lambda self, X: self.relu(self.bn1(X))),
    "ReLU replaced": (replaced("relu", nn.Tanh), lambda self, X: self.relu(self.bn1(X))),
    "ReLU in place": (on_layer("relu", inplace=True), lambda self, X: self.relu(self.bn1(X))),
    "something between": (replaced("last", nn.Tanh), lambda self, X: F.relu(self.last(self.bn1(X)))),
    "something beside": (on_instance(flag=True), lambda self, X: tail(self, X) + (self.bn1(X) if self.flag else 0)),
    "batch norm replaced": (replaced("bn1", lambda: nn.GroupNorm(2, 6).double()), tail),
    "batch norm folded away": (replaced("bn1", nn.Identity), tail),
    "batch norm parametrized": (lambda model, patch: parametrizations.weight_norm(model.bn1), tail),
    "batch norm pruned": (lambda model, patch: prune.l1_unstructured(model.bn1, "weight", 0.5), tail),
    "hook": (hooked("bn1"), tail),
    "hook that sees the output": (hooked("bn1", hook=lambda bn, args, Y: SETTINGS.log.append(Y.sum())), tail),
    "pre-hook": (hooked("bn1", "register_forward_pre_hook", lambda module, args: (args[0] * 2,)), tail),
    "hook on a convolution": (hooked("conv1"), tail),
    "hook on the ReLU": (hooked("relu"), lambda self, X: self.relu(self.bn1(X))),
    "backward hook": (hooked("bn1", "register_full_backward_hook", lambda m, gi, go: (gi[0] * 2,)), tail),
    "backward hook on the ReLU": (
        hooked("relu", "register_full_backward_hook", lambda m, gi, go: (gi[0] * 2,)),
        lambda self, X: self.relu(self.bn1(X) + X),
    ),
    "backward pre-hook on the ReLU": (
        hooked("relu", "register_full_backward_pre_hook", lambda m, go: (go[0] * 2,)),
        lambda self, X: self.relu(self.bn1(X) + X),
    ),
    "momentum": (on_layer("bn1", momentum=None), tail),
    "eps": (on_layer("bn1", eps=0.5), tail),
    "frozen": (on_layer("bn1", weight=None, bias=None), tail),
    "weights without gradients": (lambda model, patch: model.bn1.requires_grad_(False), tail),
    "mode": (lambda model, patch: model.bn1.train(not model.training), tail),
    "statistics taken away": (on_layer("bn1", running_mean=None, running_var=None), tail),
    "statistics not tracked": (on_layer("bn1", track_running_stats=False), tail),
    "statistics of another batch norm": (
        lambda model, patch: [setattr(model.bn1, name, getattr(model.bn2, name)) for name in ("running_mean", "running_var")],
        lambda self, X: F.relu(self.bn2(X)) + tail(self, X),
    ),
    "float counter": (lambda model, patch: setattr(model.bn1, "num_batches_tracked", torch.tensor(3.0)), tail),
    "checkpointed": (on_instance(flag=True), lambda self, X: checkpoint(tail, self, X, use_reentrant=False) if self.flag else tail(self, X)),
    "ReLU checkpointed alone": (
        on_instance(flag=True),
        lambda self, X: checkpoint(F.relu, self.bn1(X), use_reentrant=False) if self.flag else F.relu(self.bn1(X)),
    ),
    "ReLU checkpointed reentrantly": (
        on_instance(flag=True),
        lambda self, X: checkpoint(F.relu, self.bn1(X), use_reentrant=True) if self.flag else F.relu(self.bn1(X)),
    ),
    "ReLU scripted": (on_instance(flag=True), lambda self, X: SCRIPTED(self.bn1(X)) if self.flag else F.relu(self.bn1(X))),
    "ReLU of somebody": (on_instance(flag=True), lambda self, X: Own.apply(self.bn1(X) + X) if self.flag else tail(self, X)),
    "ReLU without gradients": (on_instance(flag=True), lambda self, X: without(self.bn1(X), self.flag) + X),
    "used without gradients, and then with": (on_instance(flag=True), lambda self, X: used_again(self.bn1(X), self.flag, without)),
    "rectified twice": (on_instance(flag=True), lambda self, X: used_again(self.bn1(X), self.flag, lambda Y, asked: F.relu(Y) * 2)),
    "changed after its sum": (on_instance(flag=True), lambda self, X: changed_after_its_sum(self.bn1(X), X, self.flag)),
    "second batch norm's output changed after its sum": (
        on_instance(flag=True),
        lambda self, X: changed_after_its_sum(self.bn1(X), self.bn2(self.conv1(X)), self.flag),
    ),
    "summed without gradients": (on_instance(flag=True), lambda self, X: F.relu(summed_without(self.bn1(X), X, self.flag)) + X),
    "added to a tensor in place": (on_instance(flag=True), lambda self, X: F.relu(added_in_place(X * 2, self.bn1(X), self.flag))),
    "returned after its ReLU in place": (on_instance(flag=True), lambda self, X: rectified_in_place(self.bn1(X), self.flag)),
    "returned": (on_instance(flag=True), lambda self, X: self.bn1(X) if self.flag else F.relu(self.bn1(X))),
    "returned beside": (on_instance(flag=True), lambda self, X: both(self.bn1(X), self.flag)),
    "sum returned beside": (on_instance(flag=True), lambda self, X: both(self.bn1(X) + X, self.flag)),
}  # fmt: skip


def used_again(Y, asked, use):
    Z = use(Y, asked)
    return F.relu(Y) + Z if asked else Z


def changed_after_its_sum(Y, X, asked):
    Z = X + Y
    if asked:
        Y.mul_(2)
    return F.relu(Z)


def rectified_in_place(Y, asked):
    Z = F.relu_(Y)
    return Y if asked else Z


def summed_without(Y, X, asked):
    with torch.set_grad_enabled(not asked):
        return Y + X


def added_in_place(X, Y, asked):
    Z = X
    if asked:
        Z += Y
    return X if asked else X + Y


def both(Y, asked):
    return (F.relu(Y), Y) if asked else F.relu(Y)


def without(Y, asked):
    with torch.set_grad_enabled(not asked):
        return F.relu(Y)


class Own(torch.autograd.Function):
    """A ReLU that never asks __torch_function__."""

    @staticmethod
    def forward(ctx, X):
        ctx.save_for_backward(X)
        return X.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


@torch.jit.script
def SCRIPTED(X):
    return torch.relu(X)


@pytest.mark.filterwarnings("ignore:None of the inputs have:UserWarning", "ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_model_has_learnt_takes_effect(change, monkeypatch):
    if change == "returned after its ReLU in place" and torch.__version__ < (2, 11):
        pytest.skip("torch.autograd.backward does not ask __torch_function__, and so raises")
    monkeypatch.setattr(SETTINGS, "log", [])
    change, forward = CHANGES[change]
    plain, fused = twins(Model(forward))
    assert states_of(fused)["bn1"] in ("relu", "add+relu")
    for model in (plain, fused):
        change(model, monkeypatch)
    for _ in range(2):
        assert_same_numbers(fused, plain, clips=False)


BLOCK_CHANGES = {
    "Sequential replaced": replaced("downsample", lambda: nn.Conv2d(6, 6, 1).double()),
    "batch norm in the Sequential replaced": replaced("downsample.1", lambda: nn.GroupNorm(2, 6).double()),
    "Sequential taken away": replaced("downsample", lambda: None),
    "hook on the Sequential": hooked("downsample"),
    "layer appended": lambda model, patch: model.downsample.append(nn.Tanh()),
    "tied": lambda model, patch: setattr(model, "bn2", model.bn1),
    "shared statistics": lambda model, patch: model.downsample[1].register_buffer(
        "running_mean", model.bn2.running_mean
    ),
    "shared counter": lambda model, patch: model.downsample[1].register_buffer(
        "num_batches_tracked", model.bn2.num_batches_tracked
    ),
}


@pytest.mark.parametrize("change", BLOCK_CHANGES)
def test_a_change_of_a_block_takes_effect(change, monkeypatch):
    plain, fused = twins(make_block())
    for model in (plain, fused):
        BLOCK_CHANGES[change](model, monkeypatch)
    for _ in range(2):
        assert_same_numbers(fused, plain, clips=False)


def test_a_global_hook_is_called_with_tensors():
    _, fused = twins(make_block())
    called = {}
    handle = register_module_forward_hook(lambda module, args, output: called.update({module: type(output)}))
    try:
        fused(make_input())
    finally:
        handle.remove()
    assert [called[layer] for layer in (fused.bn1, fused.bn2, fused.relu)] == [torch.Tensor] * 3


def test_statistics_follow_what_loads_and_resets_them():
    plain, fused = twins(make_block())
    state = copy.deepcopy(plain.state_dict())
    for model in (plain, fused):
        model.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
        model.bn1.reset_running_stats()
        model.bn2.running_mean = torch.full((6,), 0.5, dtype=torch.float64)
        model.float().double()
    assert_same_numbers(fused, plain, clips=False)


@pytest.mark.parametrize("what", ["input", "weight", "bias", "running_mean", "running_var", "residual"])
def test_a_change_in_place_before_the_relu_is_an_error_that_names_the_layer(what):
    changes = [False]

    def forward(self, X):
        X, residual = X * 1, X * 2
        Y = self.bn1(X)
        Y = Y + residual if what == "residual" else Y
        if changes[0]:
            with torch.no_grad():
                tensors = {"input": X, "residual": residual, **self.bn1._parameters, **vars(self.bn1)["_buffers"]}
                tensors[what].add_(1)
        return F.relu(Y)

    _, fused = twins(Layers(forward))
    fused.eval()
    changes[0] = True
    with pytest.raises(RuntimeError, match="bn1, a batch norm .* changed in place before .* or unfuse"):
        fused(make_input())
    changes[0] = False
    fused(make_input())


def test_the_gradient_for_who_never_asks_may_be_differentiated():
    plain, fused = twins(Layers(tail))
    plain.function = fused.function = lambda self, X: Own.apply(self.bn1(X) + X)
    assert_same_numbers(fused, plain, create_graph=True, tolerance=1e-9)


def test_an_output_that_was_changed_in_place_has_no_gradient_under_its_old_name():
    asked = [False]

    def forward(self, X):
        Y = self.bn1(X)
        Z = Y
        Y += X
        return F.relu(Y) + (Own.apply(Z) if asked[0] else 0)

    _, fused = twins(Layers(forward))
    asked[0] = True
    with pytest.raises(RuntimeError, match="bn1, a batch norm .*: its output was changed in place"):
        fused(make_input().requires_grad_()).sum().backward()
