"""Batch norms over several processes: those that hold a part of a batch each compute what one with all of it does."""

import datetime
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from resnet_fused import FusedResidual, Residual, deferred, functional, fuse, synchronized, unfuse, use_backend

from . import cuda_on_cpu
from .conftest import represented_where_interpreted
from .problem import Problem

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
CHANNELS = 6
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


# ---- The stages, in one process ----


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one process that is taken for one of several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    monkeypatch.setattr(functional, "of_several", lambda group: group)
    yield dist.group.WORLD
    dist.destroy_process_group()


SHAPES = [(4, CHANNELS, 5, 3), (2, 3, 40, 40), (0, 4, 3, 3)]


@pytest.mark.parametrize("shape", represented_where_interpreted(SHAPES, by=SHAPES[:1]), ids=str)
def test_stage_by_stage_it_is_the_same(backend, device, dtype, layout, shape, with_residual, alone):
    problem = Problem.random(shape, dtype, layout, device, with_residual).with_input_bias()
    names = ("batch_norm_relu", "batch_norm_add_relu", "batch_norm_add_batch_norm_relu")
    stages = SimpleNamespace(**{name: partial(getattr(functional, name), process_group=alone) for name in names})
    expected = problem.run()
    for name, value in problem.run(stages).items():
        if shape[0] or "running" not in name:  # of nothing there are no statistics
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


# ---- Several processes ----


def _work(rank, ranks, folder, scenario, backend, device):
    torch.set_num_threads(1)
    cuda_on_cpu.load_if_named(backend)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus:
        torch.cuda.set_device(rank % gpus)
    timeout = datetime.timedelta(seconds=60)
    group = "nccl" if gpus >= ranks else "gloo"
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(group, init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout)
    torch.manual_seed(0)
    with use_backend(backend):
        globals()[scenario](rank, ranks, device)
    dist.destroy_process_group()


def _spawn(scenario, ranks, tmp_path, backend="cpu", device="cpu"):
    arguments = ranks, str(tmp_path), scenario.__name__, backend, device
    torch.multiprocessing.spawn(_work, arguments, nprocs=ranks)


def _sizes(ranks):
    """Batches of each rank, one of them empty."""
    sizes = torch.randint(1, 4, (ranks,))
    sizes[torch.randint(ranks, ())] = 0
    return sizes.tolist()


def _part(tensor, sizes, rank):
    return tensor.split(sizes)[rank]


def functions(rank, ranks, device):
    windows = {"kernel_size": 2, "stride": 1, "padding": 1}
    kinds = (True, "channels_last", None), ("normalized", "contiguous", None), (False, "channels_last", windows)
    for seed in range(9):
        torch.manual_seed(seed)
        residual, layout, windows = kinds[seed % 3]
        sizes = _sizes(ranks)
        shape = (sum(sizes), CHANNELS, *torch.randint(1, 6, (2,)).tolist())
        if shape[0] * shape[2] * shape[3] < 2:
            continue
        whole = Problem.random(shape, torch.float64, layout, device, residual, windows=windows).with_input_bias()
        names = ("input", "residual", "grad_output") if residual else ("input", "grad_output")
        parts = {name: _part(getattr(whole, name), sizes, rank) for name in names}
        stages = {
            name: partial(getattr(functional, name), process_group=dist.group.WORLD)
            for name in dir(functional)
            if name.startswith("batch_norm_")
        }
        actual, expected = whole.with_(**parts).run(SimpleNamespace(**stages)), whole.run()
        again = whole.with_(**parts).run(SimpleNamespace(**stages))
        for name, value in actual.items():
            assert torch.equal(value, again[name]), name
            value = value.clone()
            if name in ("output", "grad_input", "grad_residual"):
                assert_close(value, _part(expected[name], sizes, rank), msg=lambda text, name=name: f"{name}: {text}")
                continue
            if name.startswith("grad_"):
                dist.all_reduce(value)
            assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
            if "running" in name:  # to the bit on every rank
                assert all(torch.equal(row, value) for row in synchronized._gather(dist.group.WORLD, value))


@pytest.mark.parametrize("ranks", represented_where_interpreted([2, 3], by=[3]))
def test_parts_of_a_batch_compute_what_the_whole_one_does(backend, device, tmp_path, ranks):
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip("a GPU for each process, by NCCL")
    _spawn(functions, ranks, tmp_path, backend, device)


# ---- Networks ----


class _Network(nn.Module):
    """Blocks as torchvision's, the first of which downsamples, and a batch norm that no ReLU follows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, CHANNELS, 3, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(CHANNELS), nn.ReLU()
        self.block = Residual(CHANNELS, CHANNELS)
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=None)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, 8, 3, stride=2), nn.BatchNorm2d(8, affine=False)
        self.last, self.linear = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.block(self.relu(self.bn(self.conv(x))))
        y = self.bn1(self.conv1(x))
        x = torch.sigmoid(self.last(self.relu(y + self.bn2(self.conv2(x)))))
        return self.linear(x.mean((2, 3)))


def _convert(network):
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def _train(network, sizes, rank, steps=5, forward=None):
    """Gradients summed over the ranks, and what the network ends with."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(steps):
        images, weights = torch.randn(sum(sizes), 3, 9, 9).double(), torch.randn(sum(sizes), 3).double()
        if rank is not None:
            images, weights = _part(images, sizes, rank), _part(weights, sizes, rank)
        optimizer.zero_grad()
        ((forward or network)(images) * weights).sum().backward()
        for parameter in network.parameters() if rank is not None else ():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return network.state_dict()


def _check(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def networks(rank, ranks, device):
    sizes = [2, 1, 3][:ranks]
    expected = _train(_Network().double(), sizes, None)

    network = _convert(_Network()).double()
    report, counts = fuse(network), []
    with pytest.MonkeyPatch.context() as patch:
        gather = synchronized._gather
        patch.setattr(synchronized, "_gather", lambda group, row: counts.append(row.dtype) or gather(group, row))
        patch.setattr(deferred, "LEAST_ELEMENTS", 2**17)  # of which each rank may have another number
        _check(_train(network, sizes, rank), expected)
        assert report.layers == {
            "bn": "relu",
            "block.bn1": "relu",
            "block.bn2": "add+relu",
            "bn1": "add+relu",
            "bn2": "add+relu",
            "last": "plain: its output went to sigmoid",
        }
        counts.clear()
        _train(network, sizes, rank, steps=1)
    assert counts.count(torch.float64) == 2 * 5  # of 6 batch norms, two of which share theirs

    assert type(network.block) is FusedResidual
    network.eval()
    counts.clear()
    network(torch.randn(1, 3, 9, 9).double())  # by itself: another rank would wait
    assert not counts
    unfuse(network)
    assert type(network.bn) is nn.SyncBatchNorm

    network = _convert(_Network().double())  # before and after fuse, and recomputing
    fuse(network, memory_efficient=True)
    network = _convert(network)
    fuse(network, memory_efficient=True)
    _check(_train(network, sizes, rank), expected)

    network = _convert(_Network().double())  # a hook on one rank alone
    fuse(network)
    if rank == 0:
        network.bn1.register_forward_hook(lambda module, inputs, output: None)
        network.bn.register_forward_hook(lambda module, inputs, output: print(end=str(output.mean())[:0]))
    _check(_train(network, sizes, rank), expected)


def treatments(rank, ranks, device):
    sizes = [2, 0, 3][:ranks]
    expected = _train(_Network().double(), sizes, None)

    names = [name for name, _ in _Network().named_parameters()]
    for use_reentrant in (False, True):
        network = _convert(_Network().double())
        fuse(network)

        def forward(images, network=network, use_reentrant=use_reentrant):
            return checkpoint(network, images.requires_grad_(), use_reentrant=use_reentrant)

        recomputed = _train(network, sizes, rank, forward=forward)  # which updates running statistics twice, as eager's
        _check({name: recomputed[name] for name in names}, {name: expected[name] for name in names})

    # DistributedDataParallel refuses a SyncBatchNorm on a CPU when it is made.
    network = _Network().double()
    model = DistributedDataParallel(network)
    _convert(network)
    fuse(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    plain = _Network().double()
    torch.manual_seed(1)
    for _ in range(4):
        images, weights = torch.randn(2 * sum(sizes), 3, 9, 9).double(), torch.randn(2 * sum(sizes), 3).double()
        optimizer.zero_grad()
        plain.zero_grad()
        plain.load_state_dict(network.state_dict())
        first, second = images.chunk(2), weights.chunk(2)
        with model.no_sync():
            (model(_part(first[0], sizes, rank)) * _part(second[0], sizes, rank)).sum().backward()
        (model(_part(first[1], sizes, rank)) * _part(second[1], sizes, rank)).sum().backward()
        for image, weight in zip(first, second, strict=True):
            (plain(image) * weight).sum().backward()
        gradients = {name: parameter.grad * ranks for name, parameter in network.named_parameters()}
        _check(gradients, {name: parameter.grad for name, parameter in plain.named_parameters()})
        optimizer.step()


def subgroups(rank, ranks, device):
    """Of ranks 0 and 2, and of rank 1, which is alone."""
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    sizes = [2, 0, 3] if rank % 2 == 0 else [0, 4, 0]
    network = nn.SyncBatchNorm.convert_sync_batchnorm(_Network().double(), groups[rank % 2])
    fuse(network)
    plain = _Network().double()
    for _ in range(4):
        images, weights = torch.randn(sum(sizes), 3, 9, 9).double(), torch.randn(sum(sizes), 3).double()
        (network(_part(images, sizes, rank)) * _part(weights, sizes, rank)).sum().backward()
        (plain(images) * weights).sum().backward()
    for parameter in network.parameters():
        dist.all_reduce(parameter.grad, group=groups[rank % 2])
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    _check(gradients, {name: parameter.grad for name, parameter in plain.named_parameters()})
    _check(network.state_dict(), plain.state_dict())


def shards(rank, ranks, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sizes = [2, 1, 3][:ranks]
    network = _convert(_Network().double())
    fuse(network)
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(network.block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    plain = _Network().double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (network, plain)]
    for _ in range(4):
        images, weights = torch.randn(sum(sizes), 3, 9, 9).double(), torch.randn(sum(sizes), 3).double()
        (network(_part(images, sizes, rank)) * _part(weights, sizes, rank)).sum().backward()
        (plain(images) * weights).sum().div(ranks).backward()  # the shards' gradients are means over the ranks
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    _check(
        {name: parameter.full_tensor() for name, parameter in network.named_parameters()},
        dict(plain.named_parameters()),
    )


@pytest.mark.parametrize("scenario", [networks, treatments, subgroups, shards], ids=lambda scenario: scenario.__name__)
def test_a_network_trains_as_on_the_whole_batch(tmp_path, scenario):
    _spawn(scenario, 3, tmp_path)


def _layer(channels=CHANNELS, dtype=torch.float32):
    layer = nn.SyncBatchNorm(channels).to(dtype)
    fuse(layer)
    return layer


def _check_raises(layer, input, match):
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(RuntimeError, match=match):
        layer(input)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def differences(rank, ranks, device):
    dtype = torch.float64 if rank else torch.float32
    channels = 8 if rank else 6
    _check_raises(
        _layer(channels), torch.randn(2, channels, 3, 3), "same call .*6 channels.*8 channels|8 .* 6 channels"
    )
    _check_raises(_layer(dtype=dtype), torch.randn(2, CHANNELS, 3, 3, dtype=dtype), "float32.*float64|float64.*float32")
    synchronized._HANDSHAKES = 0  # found without one, where sizes agree
    _check_raises(_layer(dtype=dtype), torch.randn(2, CHANNELS, 3, 3, dtype=dtype), "same call on every rank")


def refusal(rank, ranks, device):
    """One rank raises, and ends: the others do not wait for ever."""
    layer = _layer()
    layer(torch.randn(2, CHANNELS, 3, 3))
    if rank == 0:
        with pytest.raises(ValueError, match="at least 2D"):
            layer(torch.randn(CHANNELS))
        dist.destroy_process_group()
        dist.init_process_group = dist.destroy_process_group = lambda *_: None
    else:
        _check_raises(layer, torch.randn(2, CHANNELS, 3, 3), "(?i)connection|timed? ?out|peer")


@pytest.mark.parametrize("scenario", [differences, refusal], ids=lambda scenario: scenario.__name__)
def test_what_goes_wrong_on_one_rank_is_an_error_on_every(tmp_path, scenario):
    _spawn(scenario, 3, tmp_path)


def test_second_derivatives_are_refused(alone):
    problem = Problem.random((4, CHANNELS, 3, 3), torch.float64)
    input = problem.input.requires_grad_()
    output = functional.batch_norm_relu(input, None, None, training=True, process_group=alone)
    (grad,) = torch.autograd.grad(output, input, problem.grad_output, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of a batch norm over several processes"):
        grad.sum().backward()


def test_a_refused_call_leaves_the_statistics(alone):
    statistics, weight = (torch.zeros(CHANNELS), torch.ones(CHANNELS)), torch.ones(CHANNELS).double()
    with pytest.raises(TypeError, match="weight: expected torch.float32"):
        functional.batch_norm_relu(torch.randn(4, CHANNELS), *statistics, weight, training=True, process_group=alone)
    assert statistics[0].count_nonzero() == 0 and torch.equal(statistics[1], torch.ones(CHANNELS))


def test_a_process_group_is_one_with_this_process():
    input = torch.randn(4, CHANNELS, 3, 3)
    with pytest.raises(TypeError, match="process_group: expected a torch.distributed.ProcessGroup, got str"):
        functional.batch_norm_relu(input, None, None, training=True, process_group="world")
    functional.batch_norm_relu(input, torch.zeros(CHANNELS), torch.ones(CHANNELS), process_group="not asked in eval")
