"""The residual block, plain and fused. A block holds its layers and the data flow between them, no more."""

import torch.nn.functional as F
from torch import Tensor, nn

from .backend import ops_for
from .calls import Convolved, call_tail, convolve, is_plain
from .deferred import WatchedRectified
from .folding import folded
from .inference import Route, layout_for
from .reference import add_bias

_BATCH_NORMS = nn.BatchNorm2d, nn.SyncBatchNorm


class Residual(nn.Module):
    """The plain block, and the reference: ``relu(bn2(conv2(relu(bn1(conv1(X))))) + X)``.

    Args:
        input_channels: channels of X.
        num_channels: channels of the output.
        use_1x1conv: send X through ``conv3``, a 1x1 convolution, before it is added; needed where the channels or,
            by ``strides``, the size change.
        strides: stride of ``conv1`` and ``conv3``.

    Shape: (N, input_channels, H, W) -> (N, num_channels, ceil(H / strides), ceil(W / strides)).

    Source: https://arxiv.org/abs/1512.03385, in the form of "Dive into Deep Learning", section 8.6.
    """

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        if use_1x1conv:
            self.conv3 = nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
        else:
            self.conv3 = None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3 is not None:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class FusedResidual(Residual):
    """A drop-in for :class:`Residual`: the same parameters, ``state_dict`` and numbers, with less memory traffic.

    Both batch norms run fused with what follows them, and the convolutions run without their biases: batch statistics
    cancel those of ``conv1`` and ``conv2`` (their gradient is a zero tensor), and that of ``conv3`` joins ``bn2``'s.

    The children stay plain ``nn.Conv2d``, and ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``. Where a batch norm is of
    another class, carries hooks or parametrizations, or has a ``forward`` of its own, the block runs unfused; such a
    convolution is called as it is.

    Arguments, shapes and errors as :class:`Residual`'s.
    """

    @classmethod
    def from_residual(cls, block: Residual) -> "FusedResidual":
        """A FusedResidual that shares ``block``'s layers, and so its parameters and buffers."""
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        for name in ("conv1", "conv2", "conv3", "bn1", "bn2"):
            setattr(fused, name, getattr(block, name, None))
        fused.training = block.training  # not .train(): each batch norm keeps a mode of its own
        return fused

    def runs_fused(self) -> bool:
        return is_plain(self.bn1, *_BATCH_NORMS) and is_plain(self.bn2, *_BATCH_NORMS)

    def _infers(self, X):
        return type(vars(self.conv1).get("_learned")) is Route and layout_for(self.conv1, X) is not None

    def forward(self, X: Tensor) -> Tensor:
        if type(X) is WatchedRectified:
            X.let_go()
        if ops_for(X) is None or not self.runs_fused() or self._infers(X):
            return super().forward(X)
        residual = Convolved(X) if self.conv3 is None else convolve(self.conv3, X)
        return _tail(self.conv2, self.bn2, _tail(self.conv1, self.bn1, X), residual)


def _tail(conv, bn, input, residual=None):
    """relu of ``bn(conv(input))``, or of its sum with what is :class:`Convolved`."""
    output = folded(conv, bn, input)
    if output is None:
        return call_tail(bn, convolve(conv, input), residual)
    return F.relu_(output if residual is None else output.add_(add_bias(*residual)))
