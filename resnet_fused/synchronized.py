"""Batch norms over the batches of all processes of a group, as nn.SyncBatchNorm's: one collective each way.

Forward: each process's statistics are gathered, and combined in the order of the ranks with weights of the counts; then
one pass normalises by them. Backward: likewise the sums of the gradients, then the input's gradient. The gradients of
weight and bias stay each process's own, for DistributedDataParallel. Every process computes the same bits.
"""

import zlib
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import reference
from .checks import check
from .ops import Ops


def group_of(layer):
    """The group over whose batches the layer, a batch norm, normalises now; None: over its own batch."""
    if layer.__class__ is not nn.SyncBatchNorm or not layer.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    return of_several(layer.process_group or dist.group.WORLD)


def of_several(group):
    """The group, if it is of several processes; else None. TypeError, ValueError: it is no group with this process."""
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}")
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("process_group: expected one that this process belongs to")
    return group if size > 1 else None


def over(ops, group, *layers):
    """The ops, over the group where there is one. ``layers``: what they have learnt whose call it is."""
    if group is None:
        return ops
    for learned in layers:
        learned.agreed = bool(learned.agreed)
    return Synchronized(ops, group, layers)


class Synchronized(NamedTuple):
    """The ops of a backend that in training are over the batches of all of the group; None: PyTorch's own operators."""

    ops: Ops | None
    group: Any
    layers: tuple = ()

    spans_processes = True

    def beside(self, other):
        """As :meth:`Ops.beside`."""
        if type(other) is not Synchronized or (other.ops, other.group) != (self.ops, self.group):
            return None
        return self._replace(layers=self.layers + other.layers)

    def forward(
        self,
        input,
        residual,
        batch_norm,
        residual_batch_norm,
        training,
        max_pool=None,
        need_mask=False,
        statistics=None,
    ):
        """As :meth:`Ops.forward`."""
        options = max_pool, need_mask
        if not training:
            return self.ops.forward(input, residual, batch_norm, residual_batch_norm, False, *options, statistics)
        used = statistics
        if used is None:
            # Before the collective: no process is to wait for one that refuses its arguments.
            check(input, residual, batch_norm, residual_batch_norm, training, is_whole_batch=False)
            norms = [(input, batch_norm), (residual, residual_batch_norm)]
            used = self._take_statistics(norms if residual_batch_norm else norms[:1])
        nothing = {"running_mean": None, "running_var": None, "num_batches_tracked": None, "momentum": 0.0}
        batch_norm = batch_norm._replace(**nothing)
        residual_batch_norm = residual_batch_norm and residual_batch_norm._replace(**nothing)
        output, mask, _ = self.ops.forward(input, residual, batch_norm, residual_batch_norm, False, *options, used)
        return output, mask, used if statistics is None else None

    def backward(self, training, max_pool, needed, grad_output, mask, statistics, *tensors):
        """As :meth:`Ops.backward`."""
        saved = grad_output, mask, statistics
        if not training:
            return self.ops.backward(False, max_pool, needed, *saved, *tensors)
        # Of four each: tensors, what is needed and gradients, of the input and, from 4 on, of the residual.
        firsts = [first for first in (0, 4) if tensors[first] is not None]
        # Without vectors: their gradients, which are sums, then are in float64.
        inputs = [tensor if i % 4 == 0 else None for i, tensor in enumerate(tensors)]
        sums = self.ops.backward(True, max_pool, [i % 4 in (1, 2) for i in range(8)], *saved, *inputs)
        means = None
        if any(needed[first] for first in firsts):
            means = self._take_means(tensors[0], [sums[i + k] for i in firsts for k in (2, 1)])
            means = means.view(len(firsts), 2, -1)
        needed_tensors = [is_needed and i % 4 == 0 for i, is_needed in enumerate(needed)]
        gradients = list(self.ops.backward(True, max_pool, needed_tensors, *saved, *tensors, grad_means=means))
        for i, is_needed in enumerate(needed):
            if is_needed and i % 4:  # batch statistics cancel a bias of the input
                gradients[i] = torch.zeros_like(tensors[i]) if i % 4 == 3 else sums[i].to(tensors[i].dtype)
        return tuple(gradients)

    def batch_norm(self, input, norm, training):
        """As reference.batch_norm."""
        if not training:
            return reference.batch_norm(input, norm, training)
        input, norm = reference.add_bias(input, norm.input_bias), norm._replace(input_bias=None)
        return _BatchNorm.apply(self, norm, input, norm.weight, norm.bias)

    def _take_statistics(self, norms):
        """Mean and inverse standard deviation of all batches, (len(norms), 2, C). Updates the running ones."""
        own = []
        for input, _ in norms:
            own += _mean_and_variance(self.ops, input)
        counts, of_all = self._exchange("forward", norms[0][0], own)
        count = counts.sum()
        weights = counts / count
        means, variances = of_all.unflatten(1, (len(norms), 2)).unbind(2)
        mean = (weights * means).sum(0)
        variance = (weights * (variances + (means - mean).square())).sum(0)
        statistics = []
        for i, (_, norm) in enumerate(norms):
            _update_running_statistics(norm, mean[i], variance[i] * (count / (count - 1)))
            statistics += mean[i], (variance[i] + norm.eps).rsqrt()
        return torch.stack(statistics).view(len(norms), 2, -1)

    def _take_means(self, input, sums):
        """The sums over all batches, by their counts."""
        counts, of_all = self._exchange("backward", input, sums)
        return of_all.sum(0) / counts.sum()

    def _exchange(self, direction, input, vectors):
        """Every process's count of values a channel, (ranks, 1, 1), and vectors, (ranks, len(vectors), C)."""
        channels = input.shape[1]
        call = direction, len(vectors) // 2, channels, input.dtype, *(learned.name for learned in self.layers)
        _shake_hands(self.group, call, input.device)
        wants = all(learned.wants() for learned in self.layers)
        own = torch.cat([_header(call, wants, input.numel() // channels, input.device), *vectors])
        rows = _gather(self.group, own)
        _check_same(rows[:, 0] == own[0], call, self.group)
        for learned in self.layers:
            learned.hear(wants, rows[:, 1])
        return rows[:, 2].view(-1, 1, 1), rows[:, 3:].view(len(rows), len(vectors), channels)


def _mean_and_variance(ops, input):
    if input.numel() == 0:  # it has no weight
        return input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    if ops is None:
        variance, mean = torch.var_mean(input.double(), [0, *range(2, input.dim())], correction=0)
        return mean, variance
    mean, invstd = ops.batch_norm_statistics(input, 0.0)
    return mean, invstd.pow(-2)


def _update_running_statistics(norm, mean, variance):
    counter, momentum = norm.num_batches_tracked, norm.momentum
    if counter is not None:
        counter.add_(1)
        momentum = 1 / counter.double() if momentum is None else momentum
    if norm.input_bias is not None:
        mean = mean + norm.input_bias
    for running, batch in ((norm.running_mean, mean), (norm.running_var, variance)):
        if running is not None:
            running.copy_(torch.lerp(running.double(), batch, momentum))


# ---- What the processes tell each other ----

_HANDSHAKES = 256  # collectives of a group that are preceded by one: the first step of a ResNet-152, or more
_shaken: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)  # until 2.13


def _gather(group, row):
    rows = row.new_empty(dist.get_world_size(group) * len(row))
    _all_gather(rows, row, group=group)
    return rows.view(-1, len(row))


def _description(call):
    direction, norms, channels, dtype, *names = call
    of_layers = f" of {' and '.join(names)}" if names else ""
    return f"{direction}{of_layers}, {norms} x {channels} channels of {dtype}"


def _shake_hands(group, call, device):
    """Raises where calls differ, whose collectives would be of different sizes: an abort, or a hang."""
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if is_captured or _shaken.setdefault(group, 0) >= _HANDSHAKES:
        return
    _shaken[group] += 1
    text = torch.tensor([*_description(call).encode()[:256].ljust(256)], dtype=torch.uint8, device=device)
    for rank, row in enumerate(_gather(group, text)):
        if not torch.equal(row, text):
            raise RuntimeError(f"{_differs(group, call)}, and on rank {rank} {bytes(row.tolist()).decode().rstrip()}")


def _check_same(is_same, call, group):
    if is_same.is_cuda:  # without waiting for it
        torch._assert_async(is_same.all(), _differs(group, call))
    elif not is_same.all():
        raise RuntimeError(f"{_differs(group, call)}, and not on ranks {(~is_same).nonzero().flatten().tolist()}")


def _differs(group, call):
    return (
        "synchronised batch norm: expected the same call on every rank, "
        f"got on rank {dist.get_rank(group)} {_description(call)}"
    )


@lru_cache(1024)
def _header(call, wants, count, device):  # made once: a copy to a GPU would break a graph's capture
    number = zlib.crc32(_description(call).encode())
    return torch.tensor([number, wants, count], dtype=torch.float64, device=device)


# ---- By PyTorch's own operators, where nothing is fused ----


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, over, norm, input, weight, bias):
        ((mean, invstd),) = over._take_statistics([(input, norm)])
        dtype = torch.promote_types(input.dtype, torch.float32) if weight is None else weight.dtype
        mean, var = mean.to(dtype), (invstd.pow(-2) - norm.eps).to(dtype)
        ctx.save_for_backward(input, weight, bias, mean, var)
        ctx.over, ctx.eps = over, norm.eps
        return F.batch_norm(input, mean, var, weight, bias, eps=norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, weight, bias, mean, var = ctx.saved_tensors
        dims, shape = [0, *range(2, input.dim())], (-1, *[1] * (input.dim() - 2))
        invstd = (var + ctx.eps).rsqrt()
        normalized = (input - mean.view(shape)) * invstd.view(shape)
        grad_weight, grad_bias = (grad_output * normalized).sum(dims), grad_output.sum(dims)
        _, _, needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        grad_input = None
        if needs_input:
            grad, dot = ctx.over._take_means(input, [grad_bias.double(), grad_weight.double()]).to(mean.dtype)
            scale = invstd if weight is None else invstd * weight
            grad_input = (grad_output - grad.view(shape) - normalized * dot.view(shape)) * scale.view(shape)
            grad_input = grad_input.to(input.dtype)
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        return None, None, grad_input, grad_weight, grad_bias.to(bias.dtype) if needs_bias else None
