"""Small float64 models for the tests of fuse, and twins: a plain one, and a fused copy that has learnt."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import fuse


def prepared(model):
    """In float64, with batch norms worth the name."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
    return model.double()


def make_input(seed=0):
    return torch.randn(3, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """A block's layers as anybody would declare them; ``forward(self, X)`` is the test's."""

    def __init__(self, forward, use_1x1conv=True):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.conv3 = nn.Conv2d(6, 6, 1) if use_1x1conv else None
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(6) for _ in range(3))
        self.relu, self.relu_in_place, self.drop = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.last = nn.Identity()
        self.register_buffer("buffer", torch.zeros(()))
        self.function = forward
        prepared(self)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def make_block(downsample=True):
    downsample = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)) if downsample else None
    return prepared(BasicBlock(6, 6, downsample=downsample))


def residual_block(self, X):
    Y = F.relu(self.bn1(self.conv1(X)))
    Y = self.bn2(self.conv2(Y))
    if self.conv3:
        X = self.conv3(X)
    Y += X
    return F.relu(Y)


def run_twice(model, inputs):
    """In training, with gradients, which are dropped."""
    mode = {module: module.training for module in model.modules()}
    for seed in (10, 11):
        outputs = model.train()(*(tensor.detach() for tensor in inputs(seed)))
        loss = sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
        if loss.requires_grad:
            loss.backward()
    model.zero_grad()
    for module, training in mode.items():
        module.training = training


def twins(model, inputs=lambda seed: (make_input(seed),), learns=True, **options):
    """The model, and a fused copy; both have been called twice, unless there is nothing to learn."""
    plain, fused = model, copy.deepcopy(model)
    report = fuse(fused, **options)
    fused.__dict__["report"] = plain.__dict__["report"] = report
    for twin in (plain, fused) if learns else ():
        run_twice(twin, inputs)
    return plain, fused


def states_of(fused):
    """What the batch norms do, by their names."""
    return vars(fused)["report"].layers


def assert_equal(actual, expected, tolerance=1e-11, name=""):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def assert_same_buffers(fused, plain):
    for (name, value), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_equal(value, other, name=name)


def results_of(model, inputs, create_graph=False):
    """Outputs, and the gradients of inputs and parameters for random ones of the output."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    leaves = *inputs, *(parameter for parameter in model.parameters() if parameter.requires_grad)
    grad_outputs = [torch.randn_like(output) for output in outputs]
    model.zero_grad()
    torch.autograd.backward(outputs, grad_outputs, create_graph=create_graph)
    results = *outputs, *(leaf.grad for leaf in leaves)
    if create_graph:
        loss = sum(leaf.grad.square().sum() for leaf in leaves if leaf.grad is not None)
        results += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return tuple(result if result is None else result.detach() for result in results)


def assert_same_numbers(fused, plain, inputs=lambda seed: (make_input(seed),), clips=True, tolerance=1e-11, **options):
    """Outputs, gradients, and the statistics left behind, in training, and in eval with and without gradients."""
    for training in (True, False):
        results = [results_of(model.train(training), inputs(1), **options) for model in (fused, plain)]
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert (actual is None) is (expected is None), i
            if actual is not None:
                assert_equal(actual, expected, tolerance, name=f"result {i}, training={training}")
        clipped = (results[0][0] == 0).double().mean()
        assert not clips or 0.3 < clipped < 0.7  # the ReLU clips, and not all
    assert_same_outputs(fused, plain, inputs)


def assert_same_outputs(fused, plain, inputs=lambda seed: (make_input(seed),)):
    """Without gradients, also of forwards that write to what autograd needs, and what they make of the inputs."""
    for training in (True, False):
        outputs = []
        for model in (fused, plain):
            arguments = inputs(2)
            with torch.no_grad():
                outputs.append((model.train(training)(*arguments), arguments))
        assert_equal(*outputs, name=f"without gradients, training={training}")
    assert_same_buffers(fused, plain)
