"""fuse(model, inference=True): a convolution and what follows it are one call of oneDNN, and the numbers stay."""

import copy
import functools
import gc
import io
import itertools
import pickle
import threading
import time
import weakref
from random import Random

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd.profiler import profile
from torchvision.ops import FrozenBatchNorm2d

from resnet_fused import Residual, fuse, inference, resnet18, unfuse, unfused, use_backend

from .models import Layers, make_block, residual_block
from .test_fuse import FORWARDS, in_another_thread

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
UNFUSED = {
    "aten::batch_norm",
    "aten::add",
    "aten::add_",
    "aten::relu",
    "aten::relu_",
    "aten::clamp_min_",
    "aten::hardtanh",
}
ONEDNN = "mkldnn::_convolution"


@pytest.fixture(autouse=True)
def small_and_without_gradients(monkeypatch):
    monkeypatch.setattr(inference, "LEAST_WORK", 0)
    with torch.no_grad():
        yield


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def memory_format(request):
    return request.param


def ready(model, dtype=torch.float32, memory_format=torch.channels_last):
    """In eval, with statistics and affine parameters worth the name."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return in_format(model.to(dtype), memory_format).eval()


def in_format(tensor_or_model, memory_format):
    """In that of its dimensions that is meant."""
    if isinstance(tensor_or_model, nn.Module):
        for parameter in tensor_or_model.parameters():
            parameter.data = in_format(parameter.data, memory_format)
        return tensor_or_model
    formats = {4: memory_format}
    if memory_format is torch.channels_last:
        formats[5] = torch.channels_last_3d
    return tensor_or_model.to(memory_format=formats.get(tensor_or_model.dim(), torch.contiguous_format))


def make_input(seed=0, shape=(3, 6, 5, 7), dtype=torch.float32, memory_format=torch.channels_last):
    input = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return in_format(input, memory_format)


def assert_close(actual, expected):
    magnitude = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = (1e-5 if expected.dtype is torch.float32 else 3e-2) * max(magnitude, 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    strides = [[s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (actual, expected)]
    assert strides[0] == strides[1] and actual.requires_grad == expected.requires_grad


def twins(model, *inputs, **options):
    """The plain model, and a copy that is fused for inference and has learnt."""
    fused = copy.deepcopy(model)
    vars(fused)["report"] = fuse(fused, inference=True, **options)
    for _ in range(2 if inputs else 0):
        fused(*inputs)
    return model, fused


def operators(function):
    """The names of the operators that it calls, of those that matter here."""
    with profile() as events:
        function()
    return [event.name for event in events.function_events if event.name in UNFUSED or event.name.startswith(ONEDNN)]


def assert_one_call_each(plain, fused, *inputs, count):
    """As many calls of oneDNN, and none of what they stand for; the numbers are the plain model's."""
    assert_close(fused(*inputs), plain(*inputs))
    names = operators(lambda: fused(*inputs))
    assert len(names) == count and all(name.startswith(ONEDNN) for name in names), names
    assert type(fused(*inputs)) is torch.Tensor


# What is one call


def conv_bn(*more):
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), *more)


class Sum(nn.Module):
    def __init__(self, layer, shortcut=None, activation=None):
        super().__init__()
        self.layer, self.shortcut, self.activation = layer, shortcut or nn.Identity(), activation or nn.Identity()

    def forward(self, X):
        return self.activation(self.layer(X) + self.shortcut(X))


TAILS = {
    "nothing": lambda: nn.Conv2d(6, 6, 3),
    "batch norm": conv_bn,
    "batch norm without parameters": lambda: nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "addition": lambda: Sum(conv_bn()),
    "addition, ReLU": lambda: Sum(conv_bn(), activation=nn.ReLU(inplace=True)),
    "addition without batch norm": lambda: Sum(nn.Conv2d(6, 6, 1)),
    "two": lambda: Sum(conv_bn(), conv_bn(), nn.ReLU()),
    "two without batch norms": lambda: Sum(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU()),
    "timm's batch norm": lambda: nn.Sequential(nn.Conv2d(6, 6, 3), BatchNormAct2d(6)),
    "timm's batch norm, addition": lambda: Sum(nn.Sequential(nn.Conv2d(6, 6, 1), BatchNormAct2d(6, apply_act=False))),
    "frozen batch norm": lambda: nn.Sequential(nn.Conv2d(6, 6, 3), FrozenBatchNorm2d(6), nn.ReLU()),
}
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.Hardtanh(-0.5, 0.7),
    nn.LeakyReLU(0.3),
    nn.SiLU(inplace=True),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Sigmoid(),
    nn.Tanh(),
]
TAILS |= {f"batch norm, {activation}": functools.partial(conv_bn, activation) for activation in ACTIVATIONS}
TAILS |= {
    f"{activation}": functools.partial(nn.Sequential, nn.Conv2d(6, 6, 1), activation) for activation in ACTIVATIONS
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_convolution_and_what_follows_it_are_one_call(tail, dtype):
    model, input = ready(TAILS[tail](), dtype), make_input(dtype=dtype)
    plain, fused = twins(model, input)
    assert_one_call_each(plain, fused, input, count=sum(isinstance(m, nn.Conv2d) for m in model.modules()))


def test_what_onednn_has_not_is_left_to_pytorch(memory_format):
    for tail in (Sum(conv_bn(), activation=nn.SiLU()), conv_bn(nn.ELU()), Sum(nn.Conv2d(6, 6, 1, groups=2))):
        input = make_input(memory_format=memory_format)
        plain, fused = twins(ready(tail, memory_format=memory_format), input)
        assert_close(fused(input), plain(input))


class FrozenBatchNormByDeviation(FrozenBatchNorm2d):
    def forward(self, x):
        scale = self.weight / (self.running_var.sqrt() + self.eps)
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_frozen_batch_norms_of_another_formula_or_type_are_left_to_themselves():
    other, input = ready(nn.Sequential(nn.Conv2d(6, 6, 3), FrozenBatchNormByDeviation(6), nn.ReLU())), make_input()
    other[1].eps = 0.3
    plain, fused = twins(other, input)
    assert_close(fused(input), plain(input))
    promoting, input = ready(nn.Sequential(nn.Conv2d(6, 6, 3), FrozenBatchNorm2d(6), nn.ReLU())), input.bfloat16()
    promoting[0].bfloat16()
    plain, fused = twins(promoting, input)
    assert fused(input).dtype == plain(input).dtype == torch.float32
    assert_close(fused(input), plain(input))
    for model in (other, promoting):
        _, fused = twins(model, input.to(model[0].weight.dtype))
        assert vars(fused)["report"].inference == {"0": "convolution"}


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=(2, 1)),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "pointwise": lambda: nn.Conv2d(6, 8, 1),
    "same": lambda: nn.Conv2d(6, 8, (3, 5), padding="same"),
    "valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "as large as the input": lambda: nn.Conv2d(6, 8, (5, 7)),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2, bias=False),
    "of volumes": lambda: nn.Conv3d(6, 8, 3, padding=1),
    "of volumes, transposed": lambda: nn.ConvTranspose3d(6, 8, 2, stride=2),
}
OTHERS = {
    "padded by reflection": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "padded unevenly": lambda: nn.Conv2d(6, 8, 2, padding="same"),
    "of rows": lambda: nn.Conv1d(6, 8, 3),
}


def with_batch_norm(convolution):
    dimensions = convolution.weight.dim() - 2
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](convolution.out_channels)
    model = nn.Sequential(convolution, batch_norm, nn.ReLU())
    return model, make_input(shape=(3, 6, 5, 7) if dimensions == 2 else (3, 6, *(4, 5, 6)[:dimensions]))


@pytest.mark.parametrize("weights", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS | OTHERS)
def test_convolutions_of_every_kind(kind, weights, memory_format):
    model, input = with_batch_norm((CONVOLUTIONS | OTHERS)[kind]())
    input = in_format(input, memory_format)
    plain, fused = twins(ready(model, memory_format=weights), input)
    assert_close(fused(input), plain(input))
    calls = [name for name in operators(lambda: fused(input)) if name.startswith(ONEDNN)]
    assert len(calls) == (kind in CONVOLUTIONS and torch.channels_last in (weights, memory_format))


@pytest.mark.parametrize("weights", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_could_be_either(weights, memory_format):
    for channels, size in ((1, 5), (6, 1), (1, 1)):
        model = ready(nn.Sequential(nn.Conv2d(channels, 6, 3, padding=2), nn.BatchNorm2d(6), nn.ReLU()))
        input = make_input(shape=(3, channels, size, size), memory_format=memory_format)
        plain, fused = twins(model.to(memory_format=weights), input)
        assert_close(fused(input), plain(input))


@pytest.mark.parametrize("block", [Residual, make_block], ids=["Residual", "BasicBlock"])
def test_blocks_are_one_call_a_convolution(block, memory_format):
    block = Residual(6, 6, use_1x1conv=True) if block is Residual else make_block()
    input = make_input(memory_format=memory_format)
    plain, fused = twins(ready(block, memory_format=memory_format), input)
    if memory_format is torch.channels_last:
        assert_one_call_each(plain, fused, input, count=3)
    else:  # oneDNN would have to convert each input and output
        assert_close(fused(input), plain(input))
        assert not any(name.startswith(ONEDNN) for name in operators(lambda: fused(input)))
        assert "plain: contiguous tensors" in str(vars(fused)["report"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resnet18_at_any_batch_and_image_size(dtype):
    plain, fused = twins(ready(resnet18(block=Residual), dtype))
    for shape in ((2, 1, 32, 32), (1, 1, 32, 32), (4, 1, 48, 40), (2, 1, 32, 32), (4, 1, 48, 40)):
        input = make_input(shape=shape, dtype=dtype)
        assert_close(fused(input), plain(input))
    assert len(operators(lambda: fused(input))) == 20
    assert torch.equal(fused(input).argmax(1), plain(input).argmax(1))


# Who else touches it


def conv_used_twice(self, X):
    Y = self.conv1(X)
    return F.relu(self.bn1(Y)) + Y


def conv_normalised_twice(self, X):
    Y = self.conv1(X)
    return F.relu(self.bn1(Y)) + F.relu(self.bn2(Y))


def conv_to_another(self, X):
    return F.relu(self.conv2(self.conv1(X)))


def conv_kept(self, X):
    self.kept = self.conv1(X)
    return F.relu(self.bn1(self.kept))


def conv_changed_in_place(self, X):
    return F.relu(self.bn1(self.conv1(X).mul_(2)))


def two_activations(self, X):
    Y = self.bn1(self.conv1(X))
    return F.silu(Y) + F.relu(Y)


def activation_in_place_and_old_name(self, X):
    Y = self.bn1(self.conv1(X))
    F.silu(Y, inplace=True)
    return Y


def sum_in_place_and_old_name(self, X):
    Y = self.conv1(X)
    Y += X
    return Y


def sum_and_its_input(self, X):
    Y = self.bn1(self.conv1(X))
    return F.relu(Y + X) - Y


def residual_used_again(self, X):
    Z = self.conv3(X)
    return F.relu(self.bn2(self.conv2(X)) + Z) * Z


def residual_changed_after_the_relu(self, X):
    Z = self.conv3(X)
    Y = F.relu(self.bn2(self.conv2(X)) + Z)
    Z.zero_()
    return Y


def input_changed_after_the_relu(self, X):
    X = X * 1
    Y = F.relu(self.bn1(self.conv1(X)))
    return Y + X.zero_()


def shortcut_of_its_own(self, X):
    X = F.relu(self.bn1(self.conv1(X)))
    return F.relu(self.bn2(self.conv2(X)) + X) + X


def batch_norm_in_training(self, X):
    self.bn1.train()
    Y = self.bn1(self.conv1(X))
    self.bn1.eval()
    return F.relu(Y)


def out_given(self, X):
    return torch.sigmoid(self.conv1(X), out=torch.empty_like(X))


def bounded_sum(self, X):
    return F.relu6(self.bn1(self.conv1(X)) + X)


def doubled(self, X):
    Y = self.bn2(self.conv2(X))
    return F.relu(Y + Y)


def identity_shortcut(self, X):
    X = F.relu(self.bn1(self.conv1(X)))
    return F.relu(self.bn2(self.conv2(X)) + X)


def identity_shortcut_used_again(self, X):
    X = F.relu(self.bn1(self.conv1(X)))
    Y = self.bn2(self.conv2(X))
    Z = X * 2
    return F.relu(Y + X) + Z


def broadcast_sum(self, X):
    return F.relu(self.bn1(self.conv1(X)) + X.mean((2, 3), keepdim=True))


def sum_larger_than_the_output(self, X):
    return F.relu(self.conv1(X[:1]) + X)


def sum_with_scalar(self, X):
    return F.relu(self.bn1(self.conv1(X)) + 1)


def sum_of_two_types(self, X):
    return F.relu(self.conv1(X) + X.double()).float()


def gradients_from_the_batch_norm_on(self, X):
    Y = self.conv1(X)
    with torch.enable_grad():
        return F.relu(self.bn1(Y))


def one_convolution_twice(self, X):
    return F.relu(self.conv1(F.relu(self.bn1(self.conv1(X)))))


def pending_twice(self, X):
    Y, Z = self.conv1(X), self.conv1(X + 1)
    return F.relu(self.bn1(Y)) + F.relu(self.bn2(Z))


def expanded_residual(self, X):
    return F.relu(self.conv1(X) + X[:1].expand_as(X))


def sliced_input(self, X):
    return F.relu(self.conv1(torch.cat([X, X], 1)[:, 3:9]))


def handed_on(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    Z = F.relu_(self.bn2(self.conv2(Y)))
    return self.conv3(Z) + Y


def handed_on_and_changed_later(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    Z = F.relu(self.bn2(self.conv2(Y)))
    Y.zero_()
    return self.conv3(Z) + Y


def handed_on_and_a_view_changed(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    view = Y.permute(0, 2, 3, 1)
    Z = F.relu(self.bn2(self.conv2(Y)))
    view.zero_()
    return self.conv3(Z)


def handed_on_and_input_changed(self, X):
    X = X * 1
    Y = F.relu(self.bn1(self.conv1(X)))
    X.zero_()
    return self.conv3(F.relu(self.bn2(self.conv2(Y)))) + X


def handed_on_and_residual_changed(self, X):
    X = X * 1
    Y = self.conv3(F.relu(self.bn1(self.conv1(X))))
    Z = F.relu(self.bn2(self.conv2(Y)) + X)
    X.zero_()
    return self.conv3(Z)


def handed_on_and_weight_changed(self, X):
    Z = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))))
    self.conv2.weight.mul_(2)
    Z = self.conv3(Z) * 1
    self.conv2.weight.div_(2)
    return Z


def weight_changed_after_the_relu(self, X):
    Z = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X))))))
    self.conv2.weight.mul_(2)
    Z = Z * 1
    self.conv2.weight.div_(2)
    return Z


def handed_on_to_batch_norm(self, X):
    return self.bn3(F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(X)))))))


def handed_on_by_the_shortcut(self, X):
    X = F.relu(self.bn1(self.conv1(X)))
    Y, X = self.bn2(self.conv2(X)), self.conv3(X)
    Y += X
    return self.conv1(F.relu(Y)) * X


FORWARDS_OF_CONVOLUTIONS = [value for value in list(globals().values()) if getattr(value, "__code__", None)]
FORWARDS_OF_CONVOLUTIONS = [f for f in FORWARDS_OF_CONVOLUTIONS if f.__code__.co_varnames[:2] == ("self", "X")]
EVERY_FORWARD = [*FORWARDS_OF_CONVOLUTIONS, *(forward for forward in FORWARDS if forward is not in_another_thread)]


def set_forward(model, forward):
    """Of what the forwards leave behind, too."""
    model.function = forward
    model.bn1.track_running_stats = model.bn2.track_running_stats = True
    model.eval()


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:None of the inputs have:UserWarning")
@pytest.mark.parametrize("forward", EVERY_FORWARD, ids=lambda forward: forward.__name__)
def test_a_forward_of_any_kind_also_after_the_layers_have_learnt_another(forward, memory_format):
    plain = ready(Layers(residual_block), memory_format=memory_format)
    for learnt in (forward, residual_block, handed_on, conv_used_twice, two_activations, residual_used_again):
        fused = copy.deepcopy(plain)
        fuse(fused, inference=True)
        for seed, function in enumerate((learnt, learnt, learnt, forward, forward, learnt, forward)):
            input, other = (make_input(seed, memory_format=memory_format) for _ in range(2))
            outputs = []
            for model, argument in ((fused, input), (plain, other)):
                set_forward(model, function)
                output = model(argument)
                outputs.append(output if isinstance(output, tuple) else (output,))
            for actual, expected in zip(*outputs, strict=True):
                assert_close(actual, expected)
            assert torch.equal(input, other)


def handed_on_and_changed(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    Z = self.conv2(Y)
    Y.mul_(2)
    return self.conv3(F.relu(self.bn2(Z))) + Y


def handed_on_without_batch_norm_and_weight_changed(self, X):
    Z = self.conv2(F.relu(self.bn1(self.conv1(X))))
    self.conv2.weight.mul_(2)
    Z = self.conv3(Z) * 1
    self.conv2.weight.div_(2)
    return Z


def handed_on_and_shortcuts_input_changed(self, X):
    X = X * 1
    Y = F.relu(self.bn1(self.conv1(X)))
    Z = F.relu(self.bn2(self.conv2(Y)) + self.conv3(X))
    X.zero_()
    return self.conv4(Z)


@pytest.mark.parametrize(
    "forward",
    [
        handed_on_and_changed,
        handed_on_without_batch_norm_and_weight_changed,
        handed_on_and_shortcuts_input_changed,
    ],
)
def test_what_was_handed_on_is_of_what_it_was_given(forward):
    """Of layers that have learnt this forward: it is in the middle of the steps that others take."""
    model = Layers(forward)
    model.conv4 = nn.Conv2d(6, 6, 1)
    plain, fused = twins(ready(model))
    for seed in range(5):
        assert_close(fused(make_input(seed)), plain(make_input(seed)))


OPERATIONS = {  # of what is there, a and b, by the n-th layers
    "convolution": lambda net, n, a, b: net.conv[n](a),
    "batch norm": lambda net, n, a, b: net.bn[n](net.conv[n](a)),
    "ReLU": lambda net, n, a, b: F.relu(net.bn[n](net.conv[n](a))),
    "ReLU in place": lambda net, n, a, b: F.relu_(net.bn[n](net.conv[n](a))),
    "sum": lambda net, n, a, b: F.relu(net.bn[n](net.conv[n](a)) + b),
    "sum in place": lambda net, n, a, b: F.relu_(net.bn[n](net.conv[n](a)).add_(b)),
    "sum of two": lambda net, n, a, b: F.relu(net.bn[n](net.conv[n](a)).add_(net.bn[n - 1](net.conv[n - 1](b)))),
    "SiLU": lambda net, n, a, b: F.silu(net.conv[n](a)),
}
OTHER_OPERATIONS = {
    "plain sum": lambda net, n, a, b: a + b,
    "plain ReLU in place": lambda net, n, a, b: F.relu_(a),
    "changed": lambda net, n, a, b: a.mul_(0.5),
    "changed by what is there": lambda net, n, a, b: a.add_(b, alpha=0.5),
    "a view changed": lambda net, n, a, b: (a.permute(0, 2, 3, 1)[..., :2].mul_(0.5), a)[1],
    "weight changed": lambda net, n, a, b: (net.conv[n].weight.mul_(-1), a)[1],
    "batch norm changed": lambda net, n, a, b: (net.bn[n].weight.mul_(0.5), a)[1],
}


class Programmed(nn.Module):
    """Runs a list of (operation, which are a and b, number of the layers); gives the last values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(6, 6, size, padding=size // 2) for size in (3, 1, 3, 1, 3))
        self.bn = nn.ModuleList(nn.BatchNorm2d(6) for _ in self.conv)

    def forward(self, X, program):
        values = [X * 1]
        for operation, a, b, n in program:
            values = [*values[-3:], operation(self, n, values[a % len(values)], values[b % len(values)])]
        return values


def a_program(random):
    """Mostly layers, each of the last value."""
    operations = [*OPERATIONS.values()] * random.choice((1, 4)) + [*OTHER_OPERATIONS.values()]
    numbers = (-1, -1, -1, 0, 1, 2)
    return [
        (random.choice(operations), random.choice(numbers), random.randrange(4), random.randrange(5))
        for _ in range(random.randrange(2, 12))
    ]


@pytest.mark.parametrize("seeds", [range(start, start + 40) for start in range(0, 200, 40)], ids=str)
def test_random_programs(seeds):
    """That take turns, after three calls of the first; outputs are used after the call."""
    for seed in seeds:
        random = Random(seed)
        plain, fused = twins(ready(Programmed()))
        programs = [a_program(random) for _ in range(random.randrange(1, 4))]
        mode = random.choice((torch.no_grad, torch.no_grad, torch.inference_mode))
        for call in range(9):
            program, input = programs[0] if call < 3 else random.choice(programs), make_input(call)
            with mode():
                expected = plain(input, program)
            try:
                with mode():
                    actual = fused(input, program)
                actual = [value * 1 for value in actual]
            except RuntimeError as error:  # between a convolution and its activation
                assert "was changed in place" in str(error), (seed, call)
                break
            for values in zip(actual, expected, strict=True):
                torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4, msg=lambda m: f"{seed}, {call}: {m}")  # noqa: B023


def test_a_kept_output_stays_what_it_was():
    plain, fused = twins(ready(Layers(conv_kept)))
    for seed in range(4):
        input = make_input(seed)
        for model in (plain, fused):
            model(input)
    kept = plain.kept.clone()
    input.zero_()
    assert_close(fused.kept, kept)


def test_the_watched_call_keeps_no_activation():
    model = ready(nn.Sequential(conv_bn(nn.ReLU()), conv_bn(), Sum(conv_bn(), conv_bn(), nn.ReLU(inplace=True))))
    fuse(model, inference=True)
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    model(make_input())
    assert len(outputs) == 2 and not any(output() is not None for output in outputs)


def test_a_layer_goes_no_further_than_it_was_touched():
    plain, fused = twins(ready(Layers(residual_block)), make_input())
    fused(make_input())
    fused.function = conv_used_twice
    fused(make_input())
    assert len([name for name in operators(lambda: fused(make_input())) if name.startswith(ONEDNN)]) == 1


def blocks_in_a_row():
    return nn.Sequential(conv_bn(nn.ReLU()), make_block(downsample=False), make_block(), conv_bn(nn.SiLU()))


def test_what_goes_to_convolutions_is_computed_when_it_is_asked_for():
    plain, fused = twins(ready(blocks_in_a_row()), make_input())
    input = make_input(1)
    assert_one_call_each(plain, fused, input, count=7)
    for count, calls in ((1, 1), (2, 1), (3, 1), (4, 7)):  # the first, of a tensor, is computed at once
        assert len(operators(lambda count=count: fused[:count](input))) == calls
    handed_on = fused[:3](input)
    assert type(handed_on) is not torch.Tensor
    assert_close(handed_on * 1, plain[:3](input))
    assert type(fused[:3](input)) is torch.Tensor  # since it went to a multiplication
    assert_one_call_each(plain, fused, input, count=7)


def test_a_shortcut_is_written_to_where_nobody_else_has_it():
    plain, fused = twins(ready(blocks_in_a_row()), make_input())
    input = make_input(1)
    assert operators(lambda: fused(input)).count("mkldnn::_convolution_pointwise_") == 2
    shortcut = fused[0](input)
    assert_close(fused[1:](shortcut), plain(input))
    assert_close(shortcut * 1, plain[0](input))


def test_threads_that_ask_for_the_same_compute_it_once(monkeypatch):
    plain, fused = twins(ready(blocks_in_a_row()), make_input())
    run, runs, barrier, outputs = inference.Chain._run, [], threading.Barrier(4), []

    def slow_run(*args):
        time.sleep(0.01)
        runs.append(args)
        return run(*args)

    def ask():
        barrier.wait()
        outputs.append(handed_on * 1)

    monkeypatch.setattr(inference.Chain, "_run", slow_run)
    handed_on = fused[:3](make_input(1))
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 6 and len(outputs) == 4
    for output in outputs:
        assert_close(output, plain[:3](make_input(1)))


def test_what_is_kept_is_not_handed_on():
    plain, fused = twins(ready(blocks_in_a_row()))
    kept = []
    for seed in range(3):
        kept.append(make_input(seed))
        for layer in fused:
            kept.append(layer(kept[-1]))
    assert {type(tensor) for tensor in kept[len(fused) + 1 :]} == {torch.Tensor}  # but for the watched call's last
    assert_close(kept[-1], plain(make_input(2)))


def test_any_number_of_layers_in_a_row():
    """More than Python has frames."""
    plain, fused = twins(ready(nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(600)))), make_input())
    assert_one_call_each(plain, fused, make_input(1), count=600)


def test_what_is_computed_late_is_freed_in_turn(monkeypatch):
    _, fused = twins(ready(nn.Sequential(*(conv_bn(nn.ReLU()) for _ in range(9)))), make_input())
    run, outputs, alive = inference.Chain._run, [], []

    def watched_run(*args):
        output = run(*args)
        outputs.append(weakref.ref(output))
        alive.append(sum(output() is not None for output in outputs))
        return output

    monkeypatch.setattr(inference.Chain, "_run", watched_run)
    fused(make_input())
    assert len(outputs) == 9 and max(alive) <= 3


def changes_its_input(self, X):
    Y = self.conv1(X)
    X.mul_(2)
    return F.relu(self.bn1(Y))


def changes_its_residual(self, X):
    Y, Z = self.bn2(self.conv2(X)), X * 1
    Y = Y + Z
    Z.mul_(2)
    return F.relu(Y)


def changes_its_weight(self, X):
    Y = self.conv1(X)
    self.conv1.weight.add_(0)
    return F.relu(self.bn1(Y))


@pytest.mark.parametrize("forward", [changes_its_input, changes_its_residual, changes_its_weight])
def test_what_changes_before_it_is_used_is_seen(forward):
    """In the watched call, and the numbers are right; later, and it is an error."""
    plain, fused = twins(ready(Layers(forward)))
    for seed in range(4):
        assert_close(fused(make_input(seed)), plain(make_input(seed)))
    plain, fused = twins(ready(Layers(residual_block)))
    for twin in (plain, fused):
        twin(make_input())
        twin(make_input())
    fused.function = forward
    with pytest.raises(RuntimeError, match="conv[12], a convolution that fuse put off: .* was changed in place"):
        fused(make_input())


def test_hooks_see_and_change_outputs():
    for layer in ("conv1", "bn1", "relu"):
        plain, fused = twins(ready(make_block(downsample=False)), make_input())
        seen = {plain: [], fused: []}
        for model in (plain, fused):

            def hook(module, args, output, seen=seen[model]):
                seen.append(output)
                return output * 2

            getattr(model, layer).register_forward_hook(hook)
        for seed in range(3):
            assert_close(fused(make_input(seed)), plain(make_input(seed)))
        for actual, expected in zip(seen[fused], seen[plain], strict=True):
            assert_close(actual.clone(), expected)
        calls = 2 if layer == "relu" else 1
        assert len(seen[fused]) == 3 * calls
        # What had been seen to go to a convolution alone is handed on when the hook first sees it.
        assert {type(tensor) for tensor in seen[fused][calls:]} == {torch.Tensor}


def test_nobodys_tensor_is_overwritten(memory_format):
    """Not the input, an identity shortcut, nor what a hook or the caller keeps."""
    model = nn.Sequential(make_block(downsample=False), make_block(), Residual(6, 6), Residual(6, 6, use_1x1conv=True))
    plain, fused = twins(ready(model, memory_format=memory_format), make_input(memory_format=memory_format))
    kept = []
    for block in fused:
        block.register_forward_hook(lambda block, args, output: kept.append((output, output.clone())))
    input = make_input(1, memory_format=memory_format)
    copied = input.clone()
    outputs = [fused(input) for _ in range(3)]
    assert torch.equal(input, copied) and input._version == 0
    assert all(torch.equal(tensor, copied) for tensor, copied in kept)
    assert len({tensor.data_ptr() for tensor in outputs}) == 3
    assert_close(outputs[0], plain(input))


def test_empty_batches_and_bad_inputs_are_as_in_the_plain_model():
    plain, fused = twins(ready(conv_bn(nn.ReLU())), make_input())
    assert_close(fused(make_input(shape=(0, 6, 5, 7))), plain(make_input(shape=(0, 6, 5, 7))))
    for shape in ((3, 5, 5, 7), (3, 6, 5), (3, 6, 5, 7, 2)):
        errors = []
        for model in (plain, fused):
            with pytest.raises(RuntimeError) as error:
                model(torch.randn(shape))
            errors.append(str(error.value))
        assert errors[0] == errors[1]


# The packed weights follow


def step(fused):
    def change(model):
        with torch.enable_grad():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
            model(make_input()).square().mean().backward()
            optimizer.step()

    return change


def of_tensors(edit, only=""):
    """A change of each parameter and buffer of floats, by ``edit(module, name, tensor, new value)``."""

    def change(model):
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if tensor.is_floating_point() and name.endswith(only):
                path, _, attribute = name.rpartition(".")
                edit(model.get_submodule(path), attribute, tensor, tensor * 1.5 + 0.1)

    return change


def load(assign):
    def change(model):
        state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def set_data(module, name, tensor, value):
    tensor.data = value


def set_parameter(module, name, tensor, value):
    setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)


def swap(model):
    """What an average of the weights does before and after it is evaluated."""
    other = [tensor * 1.5 for tensor in model.parameters()]
    for tensor, value in zip(model.parameters(), other, strict=True):
        tensor.data, value.data = value.data, tensor.data


def set_eps(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


def to_nan(model):
    model.bn1.running_mean.fill_(float("nan"))


IN_PLACE = {
    "mul_": lambda module, name, tensor, value: tensor.copy_(value),
    "data.copy_": lambda module, name, tensor, value: tensor.data.copy_(value),
    "NumPy": lambda module, name, tensor, value: tensor.detach().numpy().__setitem__(..., value.detach().numpy()),
}
CHANGES = {
    "one value": lambda model: model.conv1.weight[0, 0, 0, 0].add_(1),
    "step": step(fused=False),
    "fused step": step(fused=True),
    "load_state_dict": load(assign=False),
    "load_state_dict, assign": load(assign=True),
    "data = ": of_tensors(set_data),
    "another parameter": of_tensors(set_parameter),
    "swap": swap,
    "eps": set_eps,
    "train and back": lambda model: model.train()(make_input(5)) is None or model.eval(),
    "half and back": lambda model: model.half().float(),
    "double and back": lambda model: model.double().float(),
    "bfloat16": lambda model: model.bfloat16(),
    "contiguous": lambda model: model.to(memory_format=torch.contiguous_format),
    "stride": lambda model: [
        setattr(layer, "dilation", (2, 2)) or setattr(layer, "padding", (2, 2)) for layer in (model.conv1, model.conv2)
    ],
    "pruned": lambda model: nn.utils.prune.custom_from_mask(model.conv1, "weight", model.conv1.weight > 0),
    "pruned bias": lambda model: nn.utils.prune.custom_from_mask(model.conv1, "bias", model.conv1.bias > 0),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.conv1),
    "another batch norm": lambda model: setattr(model, "bn1", ready(nn.BatchNorm2d(6, eps=0.1))),
    "another convolution": lambda model: setattr(model, "conv1", ready(nn.Conv2d(6, 6, 3, padding=1))),
    "share_memory": lambda model: of_tensors(IN_PLACE["data.copy_"])(model.share_memory()),
}
CHANGES |= {
    f"{edit} of {only}": of_tensors(IN_PLACE[edit], only)
    for edit in IN_PLACE
    for only in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "running_mean", "running_var", "")
}


@pytest.mark.parametrize("least_work", [0, inference.LEAST_WORK], ids=["packed", "little to compute"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_forward_follows(change, least_work, monkeypatch):
    monkeypatch.setattr(inference, "LEAST_WORK", least_work)
    plain, fused = twins(ready(make_block_with_biases()), make_input())
    for model in (plain, fused):
        torch.manual_seed(1)
        CHANGES[change](model)
    dtype = plain.bn2.weight.dtype
    for seed in range(2):
        input = make_input(seed, dtype=dtype)
        assert_close(fused(input), plain(input))


def make_block_with_biases():
    block = make_block()
    block.conv1, block.conv2 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
    return block


def test_every_output_channel_of_a_weight_is_looked_at():
    """An edit of all that goes to one channel, which no version counts."""
    for kind, make in CONVOLUTIONS.items():
        model, input = with_batch_norm(make())
        for weights in LAYOUTS.values():
            plain, fused = twins(ready(copy.deepcopy(model), memory_format=weights), input)
            for channel in range(model[0].out_channels):
                for twin in (plain, fused):
                    weight = twin[0].weight.data
                    if twin[0].transposed:
                        size = weight.shape[1]
                        weight.unflatten(0, (twin[0].groups, -1))[channel // size, :, channel % size].mul_(2)
                    else:
                        weight[channel].mul_(2)
                assert_close(fused(input), plain(input))
            assert any(name.startswith(ONEDNN) for name in operators(lambda: fused(input))), kind  # noqa: B023


def test_every_value_of_a_vector_is_looked_at():
    plain, fused = twins(ready(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())), make_input())
    names = "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    for name, channel in itertools.product(names, range(6)):
        for twin in (plain, fused):
            twin.state_dict()[name].data[channel] += 1  # without a version
        assert_close(fused(make_input()), plain(make_input()))
    assert any(name.startswith(ONEDNN) for name in operators(lambda: fused(make_input())))


def test_types_that_are_mixed():
    model = ready(conv_bn(nn.ReLU()), torch.bfloat16)
    model[1].float()
    input = make_input(dtype=torch.bfloat16)
    plain, fused = twins(model, input)
    assert_one_call_each(plain, fused, input, count=1)
    fused[0].bias.data = fused[0].bias.data.float()  # which PyTorch refuses
    for wrong in (fused, twins(ready(conv_bn(nn.ReLU())), make_input())[1]):
        with pytest.raises(RuntimeError, match="type"):
            wrong(input)


def test_a_weight_of_another_shape():
    plain, fused = twins(ready(nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())), make_input())
    for twin in (plain, fused):
        twin[0].weight, twin[0].bias = nn.Parameter(plain[0].weight[:4]), nn.Parameter(plain[0].bias[:4])
    assert_close(fused(make_input()), plain(make_input()))


def test_where_there_is_little_to_compute_the_layers_are_plain(monkeypatch):
    monkeypatch.undo()
    plain, fused = twins(ready(make_block()), make_input())
    assert torch.equal(fused(make_input()), plain(make_input()))
    assert set(vars(fused)["report"].inference.values()) == {"plain: too little work"}


@pytest.mark.parametrize("of", ["multiplications", "outputs", "packing"])
def test_there_is_enough_to_compute_of_any_kind(monkeypatch, of):
    """Of 8 channels of 8x8: 2^12 multiplications, 2^9 outputs, 2^6 values of the weight."""
    monkeypatch.setattr(inference, "WORK_OF_OUTPUT", 2**3 * (of == "outputs"))
    monkeypatch.setattr(inference, "WORK_OF_PACKING", 2**6 * (of == "packing"))
    work = 2**12 if of == "multiplications" else 2**13
    for least, state in ((work, "convolution+relu"), (work + 1, "plain: too little work")):
        monkeypatch.setattr(inference, "LEAST_WORK", least)
        _, fused = twins(ready(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())), make_input(shape=(1, 8, 8, 8)))
        assert {*vars(fused)["report"].inference.values()} == {state}


def test_weights_are_packed_once():
    _, fused = twins(ready(make_block()), make_input())
    packed = {
        name: dict(module._learned.packed) for name, module in fused.named_modules() if hasattr(module, "transposed")
    }
    for shape in ((3, 6, 5, 7), (1, 6, 9, 9), (2, 6, 5, 7)):
        fused(make_input(shape=shape))
    assert all(fused.get_submodule(name)._learned.packed == entries and entries for name, entries in packed.items())


def test_packed_weights_are_freed():
    _, fused = twins(ready(make_block()), make_input())
    report, input = vars(fused)["report"], make_input()
    weights = sum(p.nbytes for name, p in fused.named_parameters() if "conv" in name or name == "downsample.0.weight")
    for free in (nn.Module.train, nn.Module.bfloat16, nn.Module.float, unfuse):
        for _ in range(2):
            fused.eval().float()(input)
        assert report.packed_bytes >= weights
        free(fused)
        assert report.packed_bytes == 0


def test_several_batch_norms_of_one_convolution_do_not_pile_up():
    model = ready(conv_bn(nn.ReLU()))
    plain, fused = twins(model, make_input())
    for _ in range(9):
        plain[1] = ready(nn.BatchNorm2d(6))
        fused[1] = copy.deepcopy(plain[1])
        assert_close(fused(make_input()), plain(make_input()))
    assert len(fused[0]._learned.packed) <= 4


# Modes


def test_with_gradients_and_in_training_it_is_as_fused_without(memory_format):
    for inference_first in (True, False):
        plain = ready(make_block(), memory_format=memory_format)
        models = [copy.deepcopy(plain) for _ in range(2)]
        for model, options in zip(models, ({"inference": True}, {}), strict=True):
            fuse(model, **options)
            for _ in range(2 if inference_first else 0):
                model(make_input(memory_format=memory_format))
            with torch.enable_grad():  # which is watched
                model.train()(make_input(memory_format=memory_format)).sum().backward()
            model.zero_grad()
            model.load_state_dict(plain.state_dict())
        for training in (True, False, True, False):
            results = []
            for model in models:
                with torch.enable_grad():
                    input = make_input(memory_format=memory_format).requires_grad_()
                    output = model.train(training)(input)
                    output.square().sum().backward()
                results.append((output, input.grad, *(p.grad for p in model.parameters()), *model.buffers()))
            for actual, expected in zip(*results, strict=True):
                assert torch.equal(actual, expected)


def test_inference_mode():
    plain, fused = twins(
        ready(nn.Sequential(make_block(), nn.MaxPool2d(2), make_block(downsample=False))), make_input()
    )
    with torch.inference_mode():
        for input in (make_input(), make_input() * 1):
            assert_close(fused(input), plain(input))
            names = [name for name in operators(lambda input=input: fused(input)) if name.startswith(ONEDNN)]
            assert len(names) == 5
    plain, fused = twins(ready(Layers(residual_block)), make_input())
    for forward in (changes_its_input, changes_its_residual):
        plain.function = fused.function = forward
        with torch.inference_mode():  # tensors made here count no versions
            assert_close(fused(make_input() * 1), plain(make_input() * 1))
    plain, fused = twins(ready(Layers(identity_shortcut)), make_input())
    for forward in (identity_shortcut, identity_shortcut_used_again, identity_shortcut):
        plain.function = fused.function = forward
        with torch.inference_mode():
            assert_close(fused(make_input()), plain(make_input()))
    with torch.inference_mode():
        plain = ready(make_block())
        _, fused = twins(plain, make_input())
        assert_close(fused(make_input()), plain(make_input()))


def test_where_others_watch_or_choose_it_is_the_plain_model():
    plain, fused = twins(ready(make_block()), make_input())
    for context in (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: use_backend("eager"),
        lambda: torch.backends.mkldnn.flags(enabled=False),
    ):
        with context():
            assert torch.equal(fused(make_input()), plain(make_input()))
            assert not any(name.startswith(ONEDNN) for name in operators(lambda: fused(make_input())))
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert torch.equal(compiled(make_input()), plain(make_input()))
    exported = torch.export.export(fused, (make_input(),)).module()
    assert_close(exported(make_input()), plain(make_input()))
    assert_close(torch.func.vmap(fused)(make_input()[None])[0], plain(make_input()))
    assert len(operators(lambda: fused(make_input()))) == 3


# How it travels


def test_copies_and_files(tmp_path):
    plain, fused = twins(ready(make_block()), make_input())
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    assert list(state) == list(plain.state_dict())
    copied = copy.deepcopy(fused)
    assert type(copied.conv1) is type(fused.conv1) and not copied.conv1._learned.packed
    torch.save(fused.conv1, tmp_path / "layer.pt")
    del fused.report, copied.report
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    assert b"resnet_fused" not in buffer.getvalue() + pickle.dumps(fused)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded.conv1) is nn.Conv2d
    for model in (copied, loaded, pickle.loads(pickle.dumps(fused))):
        for _ in range(3):
            assert_close(model(make_input()), plain(make_input()))


def _run(model, input, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(input).tolist())


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes(method):
    plain, fused = twins(ready(make_block()), make_input())
    del fused.report
    context = torch.multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork inherits OpenMP's state, not its threads
    process = context.Process(target=_run, args=(fused.share_memory(), make_input(), queue))
    process.start()
    output = torch.tensor(queue.get())
    process.join()
    torch.set_num_threads(threads)
    torch.testing.assert_close(output, plain(make_input()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("has_learnt", [True, False])
def test_four_threads_on_a_cold_cache(has_learnt):
    plain, fused = twins(ready(make_block()), *[make_input()] * has_learnt)
    for module in fused.modules():
        if "_learned" in vars(module) and hasattr(module._learned, "packed"):
            module._learned.packed.clear()
    barrier, outputs = threading.Barrier(4), {}

    def run(seed):
        with torch.no_grad():
            barrier.wait()
            outputs[seed] = [fused(make_input(seed)) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        for output in outputs[seed]:
            assert_close(output, plain(make_input(seed)))


def test_the_model_goes_when_it_is_deleted():
    model, input = ready(make_block()), make_input()
    report = fuse(model, inference=True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model(input)
        references = [type(module) for module in model.modules()]
        del model
        assert report.packed_bytes == 0 and references
        assert set(report.inference.values()) == {"plain: it is no longer swapped"}
    finally:
        gc.enable()


# fuse, unfuse and the report


def test_fuse_upgrades_keeps_and_gives_back():
    plain = ready(nn.Sequential(conv_bn(nn.ReLU()), Residual(6, 6), nn.ConvTranspose2d(6, 6, 2)))
    before = [(type(module), set(vars(module))) for module in plain.modules()]
    _, fused = twins(plain, make_input(), memory_efficient=True)
    upgraded = copy.deepcopy(plain)
    fuse(upgraded, memory_efficient=True)
    fuse(upgraded, inference=True)
    kept = copy.deepcopy(fused)
    fuse(kept)
    for model in (fused, upgraded, kept):
        for _ in range(2):
            model(make_input())
        assert len(operators(lambda model=model: model(make_input()))) == 4
        assert len({base.__name__ for base in type(model[0][0]).__mro__} & {"Inferring", "RecomputingConvolution"}) == 2
        with unfused(model):
            assert [type(module) for module in model.modules()] == [kind for kind, _ in before]
            assert_close(model(make_input()), plain(make_input()))
        assert len(operators(lambda model=model: model(make_input()))) == 4
        unfuse(model)
        assert [type(module) for module in model.modules()] == [kind for kind, _ in before]
        assert_close(model(make_input()), plain(make_input()))
    with pytest.raises(TypeError):
        fuse(plain, None, True)


def test_the_report():
    model = ready(nn.Sequential(make_block(downsample=False), nn.Conv2d(6, 6, 3, padding_mode="reflect", padding=1)))
    report = fuse(model, lambda module, name: name != "0.conv2", inference=True)
    assert report.inference == {"0.conv1": "may fuse", "1": "plain: padding of (1, 1), reflect"}
    model(make_input())
    assert report.inference["0.conv1"] == "watched"
    model(make_input())
    assert report.inference["0.conv1"] == "convolution+batch norm+relu"
    assert report.packed_bytes > model[0].conv1.weight.nbytes
    assert "in inference: 1 convolutions with what follows them, 0.0 MiB packed\n  1: plain: padding" in str(report)
    assert report.to_dict()["inference"] == report.inference
    assert "convert" not in str(report)
    model(make_input(memory_format=torch.contiguous_format))
    assert "1 convert their input" in str(report)
    model.double()
    assert report.inference["0.conv1"] == "plain: float32 and bfloat16 on a CPU only, not float64 on cpu"
    assert_close(model(make_input(dtype=torch.float64)), unfuse(model) and model(make_input(dtype=torch.float64)))
    assert set(report.inference.values()) == {"plain: it is no longer swapped"}


def test_a_model_without_batch_norms():
    plain, fused = twins(ready(nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.MaxPool2d(2))), make_input())
    assert_close(fused(make_input()), plain(make_input()))
    assert str(vars(fused)["report"]).splitlines() == [
        "in inference: 1 convolutions with what follows them, 0.0 MiB packed"
    ]


@pytest.mark.parametrize("missing", ["_reorder_convolution_weight", "_convolution_pointwise_"])
def test_without_onednns_operators_it_is_the_plain_model(missing, monkeypatch):
    class Without:
        def __getattr__(self, name):
            if name == missing:
                raise AttributeError(f"no {name}")
            return getattr(torch.ops.mkldnn, name)

    monkeypatch.setattr(inference, "_ops", Without())
    inference._unavailable.cache_clear()
    plain, fused = twins(ready(make_block()), make_input())
    monkeypatch.undo()
    inference._unavailable.cache_clear()
    assert torch.equal(fused(make_input()), plain(make_input()))
