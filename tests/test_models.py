"""Real models, torchvision's and timm's: fused, they compute what they computed, and train as they trained."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from resnet_fused import functional, fuse

# name -> how many batch norms are followed by a ReLU, maybe after a sum, and how many there are
MODELS = {
    "resnet18": (17, 20),
    "resnet34": (33, 36),
    "resnet50": (49, 53),
    "resnet101": (100, 104),
    "resnet152": (151, 155),
    "resnext50_32x4d": (49, 53),
    "wide_resnet50_2": (49, 53),
    "regnet_x_400mf": (67, 71),
    "regnet_y_400mf": (49, 53),
    "densenet121": (121, 121),
    "googlenet": (59, 59),
    "mobilenet_v3_large": (11, 46),
    "mobilenet_v2": (0, 52),
    "timm/resnet18": (17, 20),
    "timm/resnet50": (49, 53),
    "timm/resnet50d": (51, 55),
    "timm/resnet18 with drop_path": (10, 20),
    "timm/seresnet50": (33, 53),
}
IMAGES = 4, 3, 32, 32


def make(name, num_classes=4):
    """The float64 model with batch norms worth the name, and an eps that keeps a rounding error one.

    With the default eps and so few images, the plain resnet152 itself turns a change of one bit into one of 1e-7.
    """
    torch.manual_seed(0)
    if name.startswith("timm/"):
        name, *options = name.removeprefix("timm/").split(" with ")
        model = timm.create_model(name, num_classes=num_classes, **{f"{option}_rate": 0.1 for option in options})
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.double()


def loss_of(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # googlenet's auxiliary classifiers
    return sum(nn.functional.cross_entropy(output, torch.arange(len(output)) % 4) for output in outputs)


def train(model, steps=3):
    """Losses of a few steps, and then outputs in eval."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train()(torch.randn(IMAGES, dtype=torch.float64)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return torch.stack(losses), model.eval()(torch.randn(IMAGES, dtype=torch.float64))


def assert_close(actual, expected, name):
    tolerance = 1e-10 * max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def calls(monkeypatch):
    """The names of the fused operators that ran."""
    calls = []
    for name in ("batch_norm_relu", "batch_norm_add_relu"):
        function = getattr(functional, name)

        def spy(*args, _name=name, _function=function, **kwargs):
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(f"resnet_fused.blocks.{name}", spy)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_of_a_fused_model_are_those_of_the_plain_one(name, calls):
    plain = make(name)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    batch_norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert (sum(len(swapped.batch_norms) for swapped in report.fused), batch_norms) == MODELS[name]
    assert isinstance(fused, type(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    for what, actual, expected in zip(("loss", "output"), train(fused), train(plain), strict=True):
        assert_close(actual, expected, what)
    for (parameter_name, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, f"gradient of {parameter_name}")
    for (key, value), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(value.double(), other.double(), key)
    plain.load_state_dict(fused.state_dict(), strict=True)
    in_training_only = 2 if name == "googlenet" else 0  # its auxiliary classifiers'
    assert len(calls) == 4 * MODELS[name][0] - in_training_only
