"""Training steps of several processes on a CPU, whose batch norms are each one's own, or over all, and what these send.

Plain and fused, each process its own batch; and fused with SyncBatchNorm, which PyTorch has not on CPUs. Gradients are
not reduced, which DistributedDataParallel would do alike for all.
"""

import contextlib
import functools
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

from resnet_fused import fuse, synchronized

from . import harness
from .models import make_model, shape_of
from .resnet18 import Network

BACKENDS = {"eager": "eager", "fused": "cpu", "fused, synchronised": "cpu"}  # of the providers
WARM_UP = 4  # steps: a batch norm is watched, and agrees with the other processes, before it is put off


def make(name, provider):
    model = make_model(name)
    if provider == "fused, synchronised":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if provider != "eager":
        fuse(model)
    return model


@contextlib.contextmanager
def spy():
    """Yields a list of the bytes that this process sends in each collective but handshakes."""
    sent, gather = [], synchronized._gather

    def counted(group, row):
        sent.extend([row.nbytes] if row.dtype == torch.float64 else [])
        return gather(group, row)

    synchronized._gather = counted
    try:
        yield sent
    finally:
        synchronized._gather = gather


def count(network, images, labels):
    with spy() as forward:
        loss = network.loss(images, labels)
    with spy() as backward:
        loss.backward()
    sent = {"forward": forward, "backward": backward}
    return {phase: {"collectives": len(of_phase), "bytes": sum(of_phase)} for phase, of_phase in sent.items()}


def time_steps(args, networks, images, labels):
    """Seconds of the steps of each network, which take turns; the processes begin each together."""
    times = [[] for _ in networks]
    for turn in range(WARM_UP + args.steps):
        for network, of_one in zip(networks, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            network.train_step(images, labels)
            of_one += [time.perf_counter() - start] if turn >= WARM_UP else []
    return times


def work(rank, args, folder):
    """Of each process; the first writes its rows, and what it sends by model, to ``folder``."""
    rows, sent = [], {}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.processes)
    images = torch.randn(shape_of(args))
    labels = torch.randint(10, images.shape[:1])
    with contextlib.redirect_stdout(None), harness.session(args):
        for name in args.models:
            case = harness.Case(name, shape_of(args), "float32", "train_step")
            for layout in args.memory_format:
                makes = [functools.partial(make, name, provider) for provider in BACKENDS]
                networks = [Network(make, args.device, "float32", layout) for make in makes]
                times = time_steps(args, networks, images, labels)
                providers = [
                    harness.Provider(provider, print, layout, backend) for provider, backend in BACKENDS.items()
                ]
                rows += harness.make_rows(args, case, providers, times)
                sent[name] = count(networks[-1], images, labels)
    dist.destroy_process_group()
    if rank == 0:
        torch.save((rows, sent), f"{folder}/results")


def main(argv=None):
    parser = harness.make_parser("sync", __doc__, 16)
    harness.add_image_size(parser)
    harness.add_models(parser, "resnet18,resnet50")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="timed; default: %(default)s")
    parser.set_defaults(device=torch.device("cpu"), threads=[1])
    args = parser.parse_args(argv)
    with harness.session(args) as machine, tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, folder), nprocs=args.processes)
        rows, sent = torch.load(f"{folder}/results")
    harness.report(args, machine, rows, sent=sent)
    for name, phases in sent.items():
        told = (f"{phase} {row['collectives']} collectives, {row['bytes']} bytes" for phase, row in phases.items())
        print(f"{name}, sent by each of {args.processes} processes in a step: {'; '.join(told)}")


if __name__ == "__main__":
    main()
