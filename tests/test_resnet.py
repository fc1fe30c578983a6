"""ResNet-18 of fused blocks is ResNet-18 of plain ones: structure, checkpoints, training, memory."""

import math

import pytest
import torch
from torch import nn

from resnet_fused import FusedResidual, Residual, resnet18

from .problem import in_layout
from .tolerances import assert_close


def _networks(device, dtype, layout="contiguous"):
    """(plain, fused), of the same weights."""
    plain, fused = resnet18(block=Residual), resnet18()
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)
    for network in (plain, fused):
        network.to(device, dtype)
        if layout == "channels_last":
            network.to(memory_format=torch.channels_last)
    return plain, fused


def _batch(device, dtype, layout="contiguous", batch_size=4):
    images = torch.randn(batch_size, 1, 48, 48, device=device, dtype=torch.float64)
    return in_layout(images.to(dtype), layout), torch.randint(10, (batch_size,), device=device)


@pytest.mark.parametrize("block", [Residual, FusedResidual])
def test_the_state_dict_has_the_reference_networks_keys_in_its_order(block):
    names = list(resnet18(block=block).state_dict())
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    stem = ["0.0.weight", "0.0.bias", *(f"0.1.{name}" for name in statistics)]
    convolutions = [f"{conv}.{name}" for conv in ("conv1", "conv2", "conv3") for name in ("weight", "bias")]
    batch_norms = [f"{bn}.{name}" for bn in ("bn1", "bn2") for name in statistics]
    expected = stem
    for stage in range(1, 5):
        for index in range(2):
            has_conv3 = stage > 1 and index == 0
            expected += [
                f"{stage}.{index}.{name}" for name in (convolutions if has_conv3 else convolutions[:4]) + batch_norms
            ]
    expected += ["7.weight", "7.bias"]
    assert names == expected


def test_the_layers_are_the_reference_networks():
    network = resnet18(in_channels=3, num_classes=7)
    stem, *stages, pool, flatten, linear = network
    assert [layer.__class__ for layer in stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert (stem[0].in_channels, stem[0].kernel_size, stem[0].stride, stem[0].padding) == (3, (7, 7), (2, 2), (3, 3))
    assert (stem[3].kernel_size, stem[3].stride, stem[3].padding) == (3, 2, 1)
    blocks = [block for stage in stages for block in stage]
    assert {type(block) for block in blocks} == {FusedResidual}
    assert [block.conv2.out_channels for block in blocks] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [block.conv1.stride[0] for block in blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [block.conv3 is not None for block in blocks] == [False, False, True, False, True, False, True, False]
    assert (type(pool), type(flatten), linear.in_features, linear.out_features) == (
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        512,
        7,
    )
    assert network(torch.randn(2, 3, 40, 56)).shape == (2, 7)
    assert sum(parameter.numel() for parameter in resnet18().parameters()) == 11_178_378


def test_one_seed_initialises_both_networks_alike():
    networks = []
    for block in (Residual, FusedResidual):
        torch.manual_seed(1)
        networks.append(resnet18(block=block).state_dict())
    plain, fused = networks
    assert all(torch.equal(fused[name], value) for name, value in plain.items())


def _train(network, batches):
    """Losses of steps of SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_five_steps_of_sgd_in_float64_give_the_plain_networks_losses(device):
    plain, fused = _networks(device, torch.float64)
    batches = [_batch(device, torch.float64) for _ in range(5)]
    expected, actual = _train(plain, batches), _train(fused, batches)
    assert expected.max() - expected.min() > 0.1  # there was something to follow
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    for name, value in fused.state_dict().items():
        other = plain.state_dict()[name]
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_in_float32_equals_float64_within_rounding(device, layout):
    """The loss after it, too. Later ones are left out: training is chaotic, and rounding grows from step to step."""
    plain, fused = _networks(device, torch.float32, layout)
    batches = [_batch(device, torch.float32, layout) for _ in range(2)]
    actual = _train(fused, batches)
    expected = _train(plain.double(), [(images.double(), labels) for images, labels in batches])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=0)


def test_inference_equals_the_plain_network(device, layout):
    plain, fused = (network.eval() for network in _networks(device, torch.float64, layout))
    images, _ = _batch(device, torch.float64, layout)
    with torch.inference_mode():
        assert_close(fused(images), plain(images), torch.float64, 10)


def _saved_activations(module, images):
    """Bytes of each storage that is saved for backward and holds one image's values after another's."""
    sizes = {}

    def pack(tensor):
        if tensor.dim() == images.dim() and tensor.shape[0] == len(images):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(images)  # alive until all is counted: a freed storage's address may serve another
    del output
    return list(sizes.values())


@pytest.mark.parametrize(
    ("arguments", "shape"), [((8, 8), (5, 8, 8, 8)), ((8, 16, True, 2), (5, 16, 4, 4))], ids=["identity", "conv3"]
)
def test_a_fused_block_saves_no_more_activations_than_the_plain_one(backend, device, arguments, shape):
    """X, and of its own size the outputs of two convolutions and of relu(bn1(.))."""
    images = torch.randn(5, 8, 8, 8, device=device, requires_grad=True)
    plain, fused = (_saved_activations(block(*arguments).to(device), images) for block in (Residual, FusedResidual))
    assert sum(fused) <= sum(plain)
    assert sorted(fused) == sorted([images.nbytes, *3 * [4 * math.prod(shape)]])
