"""Batch norms of other classes, with forwards of their own, and what may stand between one and its ReLU."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from resnet_fused import fuse

from .models import Layers, assert_same_numbers, prepared, residual_block, states_of, twins

# Batch norms of other classes -----------------------------------------------------------------------------------------


class Doubling(nn.BatchNorm2d):
    """Somebody's, of which only the forward says what it does."""

    def forward(self, x):
        assert x.dim() == 4 and len(x) == x.size(0) and str(x.device) == "cpu"
        return super().forward(x * 2)


class Twofold(nn.BatchNorm2d):
    """A second batch norm of the same input, of the batch's statistics alone."""

    def forward(self, x):
        return super().forward(x) + F.batch_norm(x, None, None, training=True)


class Clamped(nn.BatchNorm2d):
    """Momentum and eps of its own, and an activation."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.3, 1e-3)
        return torch.relu_(y)


class Affine(nn.Module):
    """A FrozenBatchNorm2d as DETR and MMDetection have it, and, of other names, what differs from it."""

    def __init__(self, channels=6):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.1)

    def vectors(self):
        weight, bias, mean, var = (
            vector.reshape(1, -1, 1, 1) for vector in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, x):
        scale, shift = self.vectors()
        return x * scale + shift


def class_of(name, forward):
    return type(name, (Affine,), {"forward": forward})


def by_batch_norm(self, x):  # detectron2's
    if x.requires_grad:
        scale, shift = self.vectors()
        return x * scale.to(x.dtype) + shift.to(x.dtype)
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def another_formula(self, x):
    scale, shift = self.vectors()
    return torch.tanh(x) * scale + shift


def of_each_value(self, x):
    scale, shift = self.vectors()
    return x * scale.expand_as(x) + shift


def kept(self, x):
    scale, shift = self.vectors()
    self.product = x * scale
    return self.product + shift


def learnt_by_gradient(norm):
    for name, buffer in list(norm.named_buffers()):
        if name in ("weight", "bias"):
            delattr(norm, name)
            setattr(norm, name, nn.Parameter(buffer))
    return norm


def frozen_by_timm(norm):
    return timm.layers.freeze_batch_norm_2d(nn.Sequential(norm))[0]


def with_dropout(channels):
    return timm.layers.BatchNormAct2d(channels, drop_layer=lambda: nn.Dropout(0.0))


NORMS = {
    "torchvision's frozen": FrozenBatchNorm2d,
    "DETR's frozen": class_of("FrozenBatchNorm2d", Affine.forward),
    "detectron2's frozen": class_of("FrozenBatchNorm2d", by_batch_norm),
    "frozen, by its parameters": lambda channels: learnt_by_gradient(class_of("MyBatchNorm", Affine.forward)(channels)),
    "a subclass": type("Mine", (nn.BatchNorm2d,), {}),
    "a parametrized one": lambda channels: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(channels)),
    "without an activation": lambda channels: timm.layers.BatchNormAct2d(channels, apply_act=False),
    "frozen by timm": lambda channels: frozen_by_timm(timm.layers.BatchNormAct2d(channels, apply_act=False)),
    "without parameters": lambda channels: timm.layers.BatchNormAct2d(channels, affine=False, apply_act=False),
    "by cumulative averages": lambda channels: timm.layers.BatchNormAct2d(channels, momentum=None, apply_act=False),
    "without statistics": lambda channels: timm.layers.BatchNormAct2d(
        channels, track_running_stats=False, apply_act=False
    ),
}
RECTIFYING = {
    "timm's": timm.layers.BatchNormAct2d,
    "timm's, not in place": lambda channels: timm.layers.BatchNormAct2d(channels, inplace=False),
    "timm's with dropout": with_dropout,
    "timm's, frozen": lambda channels: frozen_by_timm(timm.layers.BatchNormAct2d(channels)),
    "somebody's": Clamped,
}
OTHERS = {
    "of something else than the input": Doubling,
    "two of one input": Twofold,
    "split batches": lambda channels: timm.layers.split_batchnorm.SplitBatchNorm2d(channels, num_splits=3),
    "SiLU": lambda channels: timm.layers.BatchNormAct2d(channels, act_layer=nn.SiLU),
    "another formula": class_of("FrozenBatchNorm2d", another_formula),
    "a scale of each value": class_of("FrozenBatchNorm2d", of_each_value),
    "a product that is kept": class_of("FrozenBatchNorm2d", kept),
}


def block_of(norm, forward):
    torch.manual_seed(0)
    block = Layers(forward, use_1x1conv=False)
    block.bn1, block.bn2, block.bn3 = norm(6), norm(6), None
    for name, buffer in block.named_buffers():
        if "BatchNorm" in type(block.get_submodule(name.rpartition(".")[0])).__name__ and buffer.dim():
            nn.init.uniform_(buffer, 0.5, 1.5) if name.endswith("var") else nn.init.normal_(buffer, std=0.5)
    return prepared(block)


def rectified_by_themselves(self, X):
    return self.bn2(self.conv2(self.bn1(self.conv1(X))))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_batch_norms_of_other_classes_are_fused(norm, calls):
    plain, fused = twins(block_of(norm, residual_block))
    assert list(states_of(fused).values()) == ["relu", "add+relu"]
    calls.clear()
    assert_same_numbers(fused, plain)
    assert calls[:2] == ["batch_norm_relu", "batch_norm_add_relu"]


@pytest.mark.parametrize("norm", RECTIFYING.values(), ids=RECTIFYING)
def test_batch_norms_with_a_relu_are_fused(norm, calls):
    plain, fused = twins(block_of(norm, rectified_by_themselves))
    assert set(states_of(fused).values()) == {"relu"}
    calls.clear()
    assert_same_numbers(fused, plain)
    assert set(calls) == {"batch_norm_relu"}


@pytest.mark.parametrize("norm", OTHERS.values(), ids=OTHERS)
def test_what_is_no_batch_norm_of_the_input_or_goes_elsewhere_stays_plain(norm, calls):
    plain, fused = twins(block_of(norm, residual_block))
    assert all(state.startswith("plain: ") for state in states_of(fused).values())
    assert_same_numbers(fused, plain)
    assert calls == []


class Conditional(nn.BatchNorm2d):
    def forward(self, x, gain=1, *, shift=0):
        return super().forward(x) * gain + shift


def called_by_name_and_with_more(self, X):
    return (
        F.relu(self.bn1(X, 2, shift=self.conv1.bias.view(-1, 1, 1))) + F.relu(self.bn2(x=X)) + F.relu(self.bn3(input=X))
    )


def test_other_arguments_than_a_tensor_reach_the_layers_own_forward(calls):
    model = Layers(called_by_name_and_with_more)
    model.bn1, model.bn2 = prepared(Conditional(6)), prepared(Conditional(6))
    plain, fused = twins(model)
    assert_same_numbers(fused, plain, clips=False)
    states = states_of(fused)
    assert states["bn1"] == states["bn2"] == "plain: it was called with other arguments than a tensor"
    assert states["bn3"] == "relu" and calls


class Delegating(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    running_mean = property(lambda self: self.inner.running_mean)

    def forward(self, x):
        return F.relu(self.inner(x)) * self.running_mean.view(-1, 1, 1)


def test_what_holds_a_batch_norm_is_none_whatever_its_name():
    model = Layers(lambda self, X: self.bn1(X))
    model.bn1 = type("DelegatingBatchNorm", (Delegating,), {})(model.bn1)
    plain, fused = twins(model)
    assert_same_numbers(fused, plain, clips=False)
    assert states_of(fused)["bn1.inner"] == "relu" and "bn1" not in states_of(fused)


def test_a_parametrized_statistic():
    model = Layers(lambda self, X: F.relu(self.bn1.eval()(self.conv1(X))))
    nn.utils.parametrize.register_parametrization(model.bn1, "running_var", nn.Softplus())
    plain, fused = twins(model)
    assert_same_numbers(fused, plain)


@pytest.mark.parametrize("arguments", [(), (torch.randn(6),), ([1],), (torch.randn(3, 6, 2), 1)])
def test_what_pytorch_refuses_is_refused_alike(arguments):
    errors = []
    for function in (fuse, lambda layer: layer):
        layer = nn.BatchNorm1d(6)
        function(layer)
        with pytest.raises((AttributeError, TypeError, ValueError)) as error:
            layer(*arguments)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


# Between a batch norm and its ReLU ------------------------------------------------------------------------------------


def dropout_that_drops_nothing(self, X):
    Y = F.dropout2d(self.bn1(self.conv1(X)), 0.0, self.training)
    Y = F.dropout(self.bn2(self.conv2(F.threshold(Y, 0, 0))), 0.3, training=False)
    return F.relu(torchvision.ops.stochastic_depth(Y, 0.0, "row", self.training) + X)


def dropout_that_drops(self, X):
    Y = F.dropout(self.bn1(self.conv1(X)), 1.0)
    return F.threshold(self.bn2(self.conv2(F.relu(Y))), 0, 0.5)


def test_dropout_of_rate_0_and_in_eval_is_seen_through(calls):
    plain, fused = twins(Layers(dropout_that_drops_nothing))
    assert list(states_of(fused).values()) == ["relu", "add+relu", "may fuse"]
    calls.clear()
    assert_same_numbers(fused, plain)
    assert calls[:2] == ["batch_norm_relu", "batch_norm_add_relu"]


def test_other_dropouts_and_thresholds_are_not(calls):
    plain, fused = twins(Layers(dropout_that_drops))
    assert_same_numbers(fused, plain, clips=False)
    assert calls == []
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        twins(Layers(lambda self, X: F.relu(F.dropout(self.bn1(X), -1.0, training=False))))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_vector_becomes_the_bias_of_a_batch_norm_of_constants_without_one(training, affine):
    def forward(self, X):
        return F.relu(self.bn1.train(training)(self.conv1(X)) + self.conv2.bias.view(1, -1, 1, 1))

    model = Layers(forward)
    model.bn1 = prepared(nn.BatchNorm2d(6, affine=affine))
    plain, fused = twins(model)
    assert_same_numbers(fused, plain)
    assert states_of(fused)["bn1"].startswith("plain: " if training or affine else "relu")
