"""What a process may do around the operators: threads, forks, an exit amid work, a long life, a lack of memory."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .conftest import represented
from .training import batch, network, train

ROOT = Path(__file__).resolve().parent.parent


def run(code, timeout=120):
    """In a process of its own; what it printed."""
    command = [sys.executable, "-c", f"import os, torch\nfrom tests.training import *\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 and done.stderr == "", f"status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("memory_efficient", represented([False, True], by=[True]))
def test_eight_threads_train_a_network_each_to_the_bits_of_one(memory_efficient):
    def train_one(net, seed):
        return train(net, seed=seed)

    networks = [[network(seed, memory_efficient=memory_efficient) for seed in range(8)] for _ in range(2)]
    expected = list(map(train_one, networks[0], range(8)))
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(train_one, networks[1], range(8)))
    for state, other in zip(states, expected, strict=True):
        for name, value in other.items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("inference", [False, True])
def test_eight_threads_share_a_network_that_has_yet_to_learn_what_follows_its_layers(inference):
    net = network(inference=inference).eval().to(memory_format=torch.channels_last)
    images = [batch(seed, size=66)[0].to(memory_format=torch.channels_last) for seed in range(32)]

    def serve(image):
        with torch.no_grad():  # each thread has a mode of its own
            return net(image)

    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(serve, images))
    assert bool(net.report.packed_bytes) == inference
    for output, image in zip(outputs, images, strict=True):  # the first call of each is not yet on packed weights
        torch.testing.assert_close(output, serve(image))


def test_processes_train_one_network_in_shared_memory_without_locks():
    """Hogwild: the order of their writes differs from run to run; what must hold is that the network learns."""
    losses = run(
        """
import torch.multiprocessing as multiprocessing
net = network().share_memory()
first = train(net, steps=1)["loss"]
context = multiprocessing.get_context("fork")  # each with one thread, as OpenMP's pool does not outlive a fork
def work():
    torch.set_num_threads(1)
    train(net, steps=60)
workers = [context.Process(target=work) for _ in range(2)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert [worker.exitcode for worker in workers] == [0, 0]
assert net[1].bn1.num_batches_tracked > 61 + 10  # both wrote
print(first.item(), train(net, steps=1)["loss"].item())
"""
    ).split()
    assert float(losses[1]) < 0.5 * float(losses[0])


def test_a_child_forked_after_use_computes_the_same_bits():
    printed = run(
        """
torch.set_num_threads(2)
images = torch.randn(8, 3, 96, 96)
trained, served = network(), network(inference=True).eval().to(memory_format=torch.channels_last)
def results():
    with torch.no_grad():
        output = served(images.to(memory_format=torch.channels_last))
    trained.zero_grad()
    trained(images).square().sum().backward()
    return [output, *(parameter.grad for parameter in trained.parameters())]
results(), results()
assert served.report.packed_bytes
torch.set_num_threads(1)  # of which convolutions have bits of their own; and OpenMP's pool does not outlive a fork
expected = results()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(torch.equal, results(), expected)) else 1)
print(os.waitpid(child, 0)[1], all(map(torch.equal, results(), expected)))
"""
    )
    assert printed.split() == ["0", "True"]


@pytest.mark.parametrize("amid", represented(["a graph", "threads", "atexit"], by=["atexit"]))
def test_the_interpreter_shuts_down_in_silence(amid):
    run(
        f"""
import atexit, threading
net = network(memory_efficient=True)
images, classes = batch(0)
train(net)
loss = cross_entropy(net(images), classes)
if {amid == "threads"}:  # not daemons, amid whose work PyTorch itself aborts
    for seed in range(2):
        threading.Thread(target=train, args=(network(seed), 50)).start()
if {amid == "atexit"}:
    atexit.register(lambda: (loss.backward(), train(net)))
"""
    )


def _held():
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(gc.get_objects())


@pytest.mark.expensive
@pytest.mark.parametrize("options", [{}, {"memory_efficient": True}, {"inference": True}], ids=str)
def test_a_thousand_steps_leave_nothing_behind(options):
    net, images = network(**options), batch(0, size=66)[0]

    def steps(count):
        if "inference" not in options:
            return train(net, count, size=34)
        net.eval().to(memory_format=torch.channels_last)
        with torch.no_grad():
            for _ in range(count):
                net(images.to(memory_format=torch.channels_last))
        assert net.report.packed_bytes

    steps(100)
    memory, *others, objects = _held()
    steps(1000)
    memory_after, *others_after, objects_after = _held()
    # A mask left behind at each step, the smallest tensor but vectors, would be 8 MiB; eager, too, grows by 2 at first.
    assert memory_after - memory < 4 * 2**20
    assert others_after == others and objects_after - objects < 500


_OUT_OF_MEMORY = """
import resource
from resnet_fused import functional
torch.set_num_threads(1)
channels, failed = 200_000, 0
x, residual = torch.randn(2, 4, channels).contiguous()
norms = [[torch.ones(channels) for _ in range(4)] for _ in range(2)]
norms = [functional.BatchNorm(*vectors, num_batches_tracked=torch.tensor(0)) for vectors in norms[:{norms}]]
def call():
    if len(norms) == 2:
        return functional.batch_norm_add_batch_norm_relu(x, residual, *norms, training=True)
    counter = norms[0].num_batches_tracked
    return functional.batch_norm_add_relu(x, residual, *norms[0][:4], training=True, num_batches_tracked=counter)
tracked = lambda norm: [norm.running_mean, norm.running_var, norm.num_batches_tracked]
before = [[tensor.clone() for tensor in tracked(norm)] for norm in norms]
{requires_grad}
call()
for norm, vectors in zip(norms, before):
    for vector, value in zip(tracked(norm), vectors): vector.copy_(value)
del vector, value
for extra in range(0, 2**26, 2**18):
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
    try:
        output = call()
        break
    except (RuntimeError, MemoryError) as error:
        failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for norm, vectors in zip(norms, before):
        assert all(map(torch.equal, tracked(norm), vectors)), extra
assert not torch.equal(norms[0].running_mean, before[0][0])
print(failed)
"""


@pytest.mark.parametrize("norms", represented([1, 2], by=[2]))
@pytest.mark.parametrize("requires_grad", represented(["", "x.requires_grad_()"], by=["x.requires_grad_()"]))
def test_an_allocation_that_fails_leaves_the_running_statistics_as_they_were(norms, requires_grad, monkeypatch):
    """Whichever it is: the limit on the process's memory grows by 256 KiB, until the call goes through."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")  # each vector is a mapping of its own
    failed = int(run(_OUT_OF_MEMORY.format(norms=norms, requires_grad=requires_grad)))
    assert failed >= 10
