"""What only a GPU shows: streams, graphs, several devices, synchronisation. The rest of the suite runs there, too."""

import copy
import multiprocessing

import pytest
import torch
from torch import nn

from resnet_fused import FusedResidual, use_backend
from resnet_fused.functional import batch_norm_add_relu, batch_norm_relu

from .problem import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request):
    with use_backend(request.param):
        yield


def _problem(shape=(32, 64, 14, 14), layout="contiguous", device="cuda", **options):
    return Problem.random(shape, torch.float32, layout, device, **options)


def _assert_bit_equal(actual, expected):
    for name, value in expected.items():
        assert value is None or torch.equal(actual[name], value), name


def test_calls_on_several_streams_at_once_give_the_same_bits(layout):
    problem = _problem(layout=layout)
    expected = problem.run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(problem.run())
    torch.cuda.synchronize()
    for actual in results:
        _assert_bit_equal(actual, expected)


def _step(problem):
    """A training step on static tensors: what it writes, the running statistics from where they are."""

    x, r = problem.input.requires_grad_(), problem.residual.requires_grad_()
    weight, bias = problem.weight.requires_grad_(), problem.bias.requires_grad_()

    def step():
        output = batch_norm_add_relu(x, r, problem.running_mean, problem.running_var, weight, bias, training=True)
        return output, *torch.autograd.grad(output, (x, r, weight, bias), problem.grad_output)

    return step


def _captured(step):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_a_graph_replays_the_same_bits_beside_other_graphs_and_calls(layout):
    problems = [_problem(layout=layout) for _ in range(2)]
    steps = [_step(problem) for problem in problems]
    expected = [step() for step in steps]
    captured = [_captured(step) for step in steps]
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = steps[0]()
    torch.cuda.synchronize()
    for (_, actual), wanted in zip(captured, expected, strict=True):
        assert all(map(torch.equal, actual, wanted))
    assert all(map(torch.equal, beside, expected[0]))


def test_a_graph_gives_its_memory_back(layout):
    step = _step(_problem(layout=layout))
    step()
    before = torch.cuda.memory_allocated()
    graph, results = _captured(step)
    graph.replay()
    torch.cuda.synchronize()
    del graph, results
    assert torch.cuda.memory_allocated() == before


def _network(device="cuda"):
    blocks = FusedResidual(8, 8), FusedResidual(8, 16, use_1x1conv=True, strides=2)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).to(device, torch.float64)


def _assert_trains_alike(forward, model, eager):
    """Three steps of ``forward``, of the model, leave it as they leave eager's."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, eager)]
    for _ in range(3):
        images = torch.randn(4, 8, 12, 12, dtype=torch.float64, device="cuda")
        target = torch.randn(4, 3, dtype=torch.float64, device="cuda")
        for call, optimizer in zip((forward, eager), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(call(images), target).backward()
            optimizer.step()
    for (name, value), expected in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_torch_compile_trains_as_eager(mode):
    eager = _network()
    model = copy.deepcopy(eager)
    _assert_trains_alike(torch.compile(model, mode=mode), model, eager)


def test_graphed_callables_train_as_eager():
    eager = _network()
    model = copy.deepcopy(eager)
    state = copy.deepcopy(model.state_dict())
    images = torch.randn(4, 8, 12, 12, dtype=torch.float64, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (images,))
    with torch.no_grad():  # warming up has moved the statistics
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    _assert_trains_alike(graphed, model, eager)


def _raises(step, raised):
    try:
        step()
    except RuntimeError:
        raised.set()


def test_a_forked_child_raises():
    step, context = _step(_problem()), multiprocessing.get_context("fork")
    step()
    raised = context.Event()
    child = context.Process(target=_raises, args=(step, raised))
    child.start()
    child.join(60)
    child.kill()
    assert raised.is_set()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_step_does_not_wait_for_the_gpu(momentum):
    problem = _problem()
    counter = torch.tensor(3, device="cuda")
    x = problem.input.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        running = problem.running_mean, problem.running_var
        vectors = problem.weight, problem.bias
        output = batch_norm_add_relu(
            x, problem.residual, *running, *vectors, True, momentum, num_batches_tracked=counter
        )
        output.backward(problem.grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.item() == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_device_than_the_current_one():
    problem = _problem(device="cuda:1")
    for stream in (torch.cuda.default_stream(1), torch.cuda.Stream(1)):
        stream.wait_stream(torch.cuda.default_stream(1))
        with torch.cuda.stream(stream), torch.cuda.device(0):
            assert problem.check()["output"].device == torch.device("cuda:1")
            assert torch.cuda.current_device() == 0


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(layout):
    """The last images, past 2^31, equal the same images alone, in eval and with frozen statistics."""

    x = torch.randn(2**31 // (64 * 64 * 64) + 3, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    running = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    assert torch.equal(batch_norm_relu(x, *running)[-3:], batch_norm_relu(x[-3:].clone(), *running))
    output = batch_norm_relu(x, *(v.clone() for v in running), training=True)
    variance, mean = torch.var_mean(x[:, 0].float(), correction=0)
    expected = torch.relu((x[-3:, 0].float() - mean) * torch.rsqrt(variance + 1e-5))
    torch.testing.assert_close(output[-3:, 0].float(), expected, rtol=1e-2, atol=1e-2)
