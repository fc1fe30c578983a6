"""A small network of each kind of layer that runs fused, and its training. Imported by processes that start often."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_fused import FusedResidual, fuse


class Tail(nn.Module):
    """What fuse finds: relu(bn(x)), and relu(bn(x) + residual)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def network(seed=0, **options):
    torch.manual_seed(seed)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Tail(), FusedResidual(8, 16, use_1x1conv=True, strides=2), *head)
    net.report = fuse(net, **options)
    return net


def batch(seed, size=18):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, size, size, generator=generator), torch.randint(4, (8,), generator=generator)


def train(net, steps=10, seed=0, size=18):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)
    for step in range(steps):
        images, classes = batch(seed + step % 3, size)
        loss = cross_entropy(net(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": loss.detach(), **net.state_dict()}
