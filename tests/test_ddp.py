"""DistributedDataParallel: two processes over gloo, or on two GPUs over NCCL, train a fused network as a plain one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fused import FusedResidual, Residual, use_backend

from . import cuda_on_cpu

STEPS, RANKS = 3, 2


def _network(block):
    torch.manual_seed(0)
    blocks = block(3, 6, use_1x1conv=True, strides=2), block(6, 6)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()


def _train(rank, folder, backend, device):
    """Each rank sees its own images, so that gradients differ, and saves what it ends with: plain's, then fused's."""
    torch.set_num_threads(1)
    cuda_on_cpu.load_if_named(backend)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus:
        torch.cuda.set_device(rank % gpus)
    group = "nccl" if gpus >= RANKS else "gloo"
    dist.init_process_group(group, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    results = []
    with use_backend(backend):
        for block in (Residual, FusedResidual):
            network = _network(block).to(device)
            # Statistics of each rank's own images stay its own.
            model = DistributedDataParallel(network, broadcast_buffers=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
            torch.manual_seed(rank + 1)
            losses = []
            for _ in range(STEPS):
                optimizer.zero_grad()
                images, weights = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 3)
                loss = (model(images.to(device)) * weights.to(device)).sum()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            gradients = {f"grad {name}": parameter.grad for name, parameter in network.named_parameters()}
            results.append({"losses": torch.stack(losses), **network.state_dict(), **gradients})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_train_the_fused_network_as_the_plain_one(backend, device, tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path), backend, device), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(RANKS)]
    for plain, fused in ranks:
        assert fused.keys() == plain.keys()
        for name, value in fused.items():
            torch.testing.assert_close(
                value, plain[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
    first, second = (fused for _, fused in ranks)
    for name, value in first.items():
        shared = "running" not in name and name != "losses"
        assert torch.equal(value, second[name]) is shared, name
