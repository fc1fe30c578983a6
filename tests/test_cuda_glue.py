"""What the CUDA backend does about devices, streams, graphs and memory, seen on the emulated device.

There work runs at once, and what might have run beside it is known: see cuda_on_cpu/runtime.h.
"""

import re
import threading

import pytest
import torch

from resnet_fused import use_backend
from resnet_fused.functional import batch_norm_add_relu

from . import cuda_on_cpu
from .problem import Problem


@pytest.fixture(autouse=True)
def emulation():
    """Of a test that leaves no more memory allocated than it found."""
    module = cuda_on_cpu.load()
    before = module.allocations()
    with use_backend(cuda_on_cpu.BACKEND):
        yield module
    module.set_device(0)
    module.set_stream(0)
    module.before_next_launch(None)
    # What was found may go: of a backward that failed, in another test, autograd keeps a gradient until the next.
    assert module.allocations() <= before


def _to_device(tensor, device):
    emulation = cuda_on_cpu.load()
    before = emulation.current_device()
    emulation.set_device(device)
    memory = emulation.Memory(tensor.nbytes + 8)  # torch.frombuffer takes no empty one
    emulation.set_device(before)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


class Step:
    """A training step on tensors that stay where they are."""

    def __init__(self, shape=(4, 8, 6, 6), device=0, layout="contiguous"):
        problem = Problem.random(shape, torch.float32, layout, "cpu")
        tensors = [problem.input, problem.residual, problem.weight, problem.bias]
        tensors += [problem.running_mean, problem.running_var, problem.grad_output]
        if device:
            tensors = [_to_device(tensor, device) for tensor in tensors]
        *self.leaves, self.running_mean, self.running_var, self.grad_output = tensors
        for leaf in self.leaves:
            leaf.requires_grad_()

    def __call__(self):
        """The output, and the gradients. The running statistics move, which changes neither."""
        x, residual, *vectors = self.leaves
        output = batch_norm_add_relu(x, residual, self.running_mean, self.running_var, *vectors, training=True)
        return output, *torch.autograd.grad(output, self.leaves, self.grad_output)


def _in_thread(function):
    """What the function gives, or raises, in a thread of its own."""
    results = []

    def run():
        try:
            with use_backend(cuda_on_cpu.BACKEND):
                results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def _captured(emulation, step, stream):
    """(a graph of a step on the stream, the tensors that it writes)"""
    emulation.set_stream(stream)
    graph = emulation.Graph(stream)
    results = [tensor.detach() for tensor in step()]
    graph.end()
    emulation.set_stream(0)
    return graph, results


def test_nothing_outlives_a_call(layout):
    Step(layout=layout)()


def test_a_graph_can_be_replayed_and_gives_its_memory_back(emulation, layout):
    step = Step(layout=layout)
    expected = step()
    graph, results = _captured(emulation, step, emulation.create_stream())
    for _ in range(2):
        graph.replay()
        _assert_equal(results, expected)


def test_graphs_of_one_stream_replay_beside_each_other_and_beside_its_calls(emulation):
    step, stream = Step(), emulation.create_stream()
    expected = step()
    graphs = [_captured(emulation, step, stream) for _ in range(2)]
    emulation.set_stream(stream)
    _assert_equal(step(), expected)
    for graph, results in graphs:
        graph.replay()
        _assert_equal(results, expected)


@pytest.mark.parametrize("channels", [64, 8192])  # of which the latter do not fit
def test_what_another_thread_does_before_the_launch_does_not_matter(emulation, channels):
    step, other = Step((4, channels)), Step((4, 2 * channels))
    expected = step()
    meanwhile = []
    emulation.before_next_launch(lambda: meanwhile.append(_in_thread(other)))
    _assert_equal(step(), expected)
    _assert_equal(meanwhile[0], other())


@pytest.mark.parametrize("channels", [64, 8192])
def test_streams_share_no_semaphores(emulation, channels):
    step = Step((4, channels))
    expected = step()
    for _ in range(3):
        emulation.set_stream(emulation.create_stream())
        _assert_equal(step(), expected)


def test_default_streams_of_threads_share_no_semaphores(emulation):
    step = Step()
    expected = step()

    def on_per_thread_stream():
        emulation.set_stream(emulation.PER_THREAD_STREAM)
        return step()

    for _ in range(2):
        _assert_equal(_in_thread(on_per_thread_stream), expected)


def test_a_stream_inherits_nothing_from_a_destroyed_one_of_the_same_handle(emulation):
    step = Step()
    expected = step()
    handles = []
    for _ in range(2):
        handles.append(emulation.create_stream())
        emulation.set_stream(handles[-1])
        _assert_equal(step(), expected)
        emulation.set_stream(0)
        emulation.destroy_stream(handles[-1])
    assert handles[0] == handles[1]


def test_more_streams_than_have_semaphores_of_their_own(emulation):
    emulation.set_device(7)  # whose streams no other test uses
    step = Step(device=7)
    expected = step()
    for _ in range(100):
        emulation.set_stream(emulation.create_stream())
        _assert_equal(step(), expected)
    emulation.set_stream(0)


def test_tensors_of_another_device_than_the_current_one(emulation):
    emulation.set_device(1)
    emulation.set_stream(emulation.create_stream())
    emulation.set_device(0)
    results = []
    for device in (0, 1):
        torch.manual_seed(0)
        results.append(Step(device=device)())
        assert emulation.current_device() == 0
    _assert_equal(*results)


INVALID_CONFIGURATION, NO_KERNEL_IMAGE = 9, 209  # cudaError_t


@pytest.mark.parametrize("launch", range(4))
def test_a_failed_launch_names_op_shape_and_grid(emulation, with_residual, launch):
    problem = Problem.random((4, 8, 6, 5), torch.float32, "contiguous", "cpu", with_residual)
    emulation.fail_launch(INVALID_CONFIGURATION, launch)
    op = "batch_norm_add_relu" + ("" if launch < 2 else "_backward")
    message = f"resnet_fused: {op} of an input of shape (4, 8, 6, 5): a launch of "
    message = re.escape(message) + r"\d+ blocks of \d+ x \d+ threads: cudaErrorInvalidConfiguration: "
    with pytest.raises(RuntimeError, match=message):
        problem.run()
    problem.check(clipped=None)  # it leaves nothing behind


def test_a_gpu_that_was_not_built_for_is_told_how(emulation):
    emulation.fail_launch(NO_KERNEL_IMAGE, 0)
    message = "This GPU's compute capability is 7.5, the CUDA extension was built for 8.0;9.0+PTX: build it anew with "
    with pytest.raises(RuntimeError, match=re.escape(message) + "TORCH_CUDA_ARCH_LIST=7.5"):
        Step()()


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("shape", [(0, 8, 6, 6), (4, 8, 0, 6)], ids=str)
def test_empty_tensors_on_another_device_and_stream_than_the_current_ones(emulation, shape):
    emulation.set_device(1)
    emulation.set_stream(emulation.create_stream())
    emulation.set_device(0)
    output, *gradients = Step(shape, device=1)()
    assert output.shape == shape and not any(gradient.any() for gradient in gradients)
