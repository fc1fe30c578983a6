"""Constant batch norms that learn, folded into convolutions: the plain model's numbers, and less kept for backward."""

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from benchmarks.saved import saved_bytes
from resnet_fused import FusedResidual, Residual, deferred, folding, fuse, resnet18, unfuse, use_backend

from .models import assert_equal, assert_same_numbers, make_block, prepared, results_of

FOLDED = "folded into its convolution"


@pytest.fixture(autouse=True)
def scaled(monkeypatch):
    """The layers that were folded."""
    layers, original = [], folding._scaled

    def spy(layer, input, norm):
        output = original(layer, input, norm)
        layers.extend([layer] * (output is not None))
        return output

    monkeypatch.setattr(folding, "_scaled", spy)
    return layers


def frozen(model):
    """In float64, in eval, of statistics worth the name."""
    prepared(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def image(seed=0, shape=(3, 6, 16, 14)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def twins(model, *inputs, **options):
    """The model, and a copy that has been fused; both have been called once, so that it has learnt."""
    fused = copy.deepcopy(model)
    fused.__dict__["report"] = fuse(fused, **options)
    for twin in (model, fused):
        twin(*(inputs or (image(),)))
    return model, fused


def states_of(fused):
    return set(vars(fused)["report"].layers.values())


def assert_same(fused, plain, inputs=(), **options):
    """Outputs and gradients, and what the second derivative gives."""
    for create_graph in (False, True):
        inputs = inputs or (image(1),)
        results = [results_of(model, inputs, create_graph=create_graph, **options) for model in (fused, plain)]
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert_equal(actual, expected, 1e-8 if create_graph else 1e-11, name=f"result {i}")


def tail(conv=None, bn=None, *after):
    return frozen(nn.Sequential(conv or nn.Conv2d(6, 8, 3, padding=1), bn or nn.BatchNorm2d(8), *after or (nn.ReLU(),)))


CONVOLUTIONS = {
    "3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d, (16, 14)),
    "without a bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d, (16, 14)),
    "strided, dilated, oblong": (lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (0, 1), (1, 2)), nn.BatchNorm2d, (32, 28)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d, (16, 14)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d, (16, 14)),
    "padding same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), nn.BatchNorm2d, (16, 14)),
    "reflecting": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (16, 14)),
    "1d": (lambda: nn.Conv1d(6, 8, 3), nn.BatchNorm1d, (200,)),
    "3d": (lambda: nn.Conv3d(6, 8, 2), nn.BatchNorm3d, (8, 9, 7)),
}


@pytest.mark.parametrize("conv, bn, sizes", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_convolution_is_folded(conv, bn, sizes, channels_last, scaled):
    input = image(1, (3, 6, *sizes))
    if channels_last and input.dim() == 3:
        pytest.skip("no such layout")
    format = folding.CHANNELS_LAST[input.dim()] if channels_last else torch.contiguous_format
    model = tail(conv(), bn(8 if "6, 12" not in str(conv()) else 12)).to(memory_format=format)
    input = input.contiguous(memory_format=format)
    plain, fused = twins(model, input)
    scaled.clear()
    assert_same(fused, plain, (input,))
    # PyTorch's convolution of float64 in channels_last_3d has a contiguous output, which is not foreseen.
    assert len(scaled) == (0 if input.dim() == 5 and channels_last else 2)


AFTER = {
    "ReLU": (nn.ReLU(),),
    "ReLU in place": (nn.ReLU(inplace=True),),
    "SiLU": (nn.SiLU(),),
    "nothing": (nn.Identity(),),
    "dropout": (nn.Dropout(0.5), nn.ReLU()),
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_whatever_follows(after):
    plain, fused = twins(tail(None, None, *after))
    assert_same(fused, plain)
    assert states_of(fused) == {FOLDED}


class Pair(nn.Module):
    """What a network may do beside convolving and normalising."""

    def __init__(self, forward, bias=True):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(6, 6, 1, bias=bias), nn.Conv2d(6, 6, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.function, self.kept = forward, []
        frozen(self)

    def forward(self, *args):
        return self.function(self, *args)


def kept(self, X):
    self.kept.append(self.conv(X))
    return F.relu(self.bn(self.kept[-1])) + self.kept.pop()


def by_a_function_of_its_own(self, X):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    Y = self.conv(X)
    return F.relu(self.bn(Y)) + Double.apply(Y)


FORWARDS = {
    "used twice": lambda self, X: F.relu(self.bn(Y := self.conv(X))) + Y,
    "used before": lambda self, X: (Y := self.conv(X)).sum() + F.relu(self.bn(Y)),
    "kept": kept,
    "a Function": by_a_function_of_its_own,
    "two batch norms": lambda self, X: F.relu(self.bn(Y := self.conv(X)) + self.bn2(Y)),
    "two convolutions": lambda self, X: F.relu(self.bn(self.conv(X)) + self.bn(self.conv2(X))),
    "a sum": lambda self, X: F.relu(self.bn(self.conv(X)) + X),
    "a sum in place": lambda self, X: F.relu_(self.bn(self.conv(X)).add_(X)),
    "a sum of two": lambda self, X: F.relu(self.bn(self.conv(X)) + self.bn2(self.conv2(X))),
    "both first": lambda self, X: [Y := self.conv(X), Z := self.conv2(X), F.relu(self.bn(Y)) + self.bn2(Z)][-1],
    "a batch norm that is called": lambda self, X: F.relu(
        F.batch_norm(self.conv(X), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
    ),
    "weights of another call": lambda self, X: F.relu(self.bn(self.conv(self.bn2(self.conv2(X))))),
    "hooks on what is saved": lambda self, X: F.relu(self.bn(checkpoint(self.conv, X, use_reentrant=False))),
    "checkpointing": lambda self, X: checkpoint(lambda X: F.relu(self.bn(self.conv(X))), X, use_reentrant=False),
    "reentrant": lambda self, X: checkpoint(lambda X: F.relu(self.bn(self.conv(X))), X, use_reentrant=True),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize("options", [{}, {"memory_efficient": True}], ids=str)
def test_forwards(forward, options):
    plain, fused = twins(Pair(forward), **options)
    for _ in range(2):
        for create_graph in (False, True):
            if create_graph and forward is FORWARDS["reentrant"]:
                continue
            results = [results_of(model, (image(1),), create_graph=create_graph) for model in (fused, plain)]
            for i, (actual, expected) in enumerate(zip(*results, strict=True)):
                assert_equal(actual, expected, 1e-8 if create_graph else 1e-11, name=f"result {i}")
    assert_same_numbers(fused, plain, lambda seed: (image(seed),), clips=False)


def test_who_else_takes_a_convolutions_output_ends_it(scaled):
    _, fused = twins(Pair(FORWARDS["used twice"]))
    fused(image())
    assert scaled
    scaled.clear()
    fused(image())
    assert not scaled


def normalised_by_a_function(self, X):
    bn = self.bn
    return F.relu(F.batch_norm(self.conv(X), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True))


CHANGES = {
    "training": lambda model: model.train(),
    "training of the batch norm": lambda model: model.bn.train(),
    "a frozen weight": lambda model: model.conv.weight.requires_grad_(False),
    "a frozen batch norm": lambda model: model.bn.weight.requires_grad_(False),
    "float16": lambda model: model.half(),
    "a batch norm in float32": lambda model: model.bfloat16().bn.float(),
    "a hook on the convolution": lambda model: model.conv.register_forward_hook(lambda self, args, output: output * 2),
    "a batch norm that is called": lambda model: setattr(model, "function", normalised_by_a_function),
    "no statistics": lambda model: vars(model.bn)["_buffers"].update(running_mean=None, running_var=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_unfolds_and_its_end_folds_again(change, scaled):
    plain, fused = twins(Pair(lambda self, X: F.relu(self.bn(self.conv(X)))))
    before = image().to(plain.conv.weight.dtype)
    fused(before)
    assert scaled
    for model in (plain, fused):
        change(model)
    scaled.clear()
    tolerance = 1e-11 if plain.conv.weight.dtype is torch.float64 else 1e-2
    input = image().to(plain.conv.weight.dtype)
    for actual, expected in zip(*([*results_of(model, (input,))] for model in (fused, plain)), strict=True):
        assert_equal(actual, expected, tolerance)
    assert not scaled
    if change is CHANGES["training"]:
        fused.eval()(before)
        assert scaled


def test_a_batch_norm_that_begins_to_train_when_the_convolution_has_been_put_off(scaled):
    def forward(self, X):
        Y = self.conv(X)
        return F.relu(self.bn.train(self.bn2.training)(Y))

    plain, fused = twins(Pair(forward))
    for training in (True, False, True, False):
        for model in (plain, fused):
            model.bn2.train(training)
        scaled.clear()
        assert_same(fused, plain)
        assert bool(scaled) is not training


def test_a_convolution_whose_class_was_patched_runs_as_it_is(scaled, monkeypatch):
    plain, fused = twins(tail())
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, input: original(self, input) * 2)
    scaled.clear()
    assert_same(fused, plain)
    assert not scaled


def test_a_hook_on_the_batch_norm_sees_what_eager_gives(scaled):
    plain, fused = twins(Pair(lambda self, X: F.relu(self.bn(self.conv(X)))))
    seen = []
    for model in (plain, fused):
        model.bn.register_forward_hook(lambda self, args, output: seen.append((args[0].clone(), output.clone())))
    assert_same(fused, plain)
    for expected, actual in zip(seen[2:], seen[:2], strict=True):
        assert_equal(actual, expected)


def test_a_folded_output_that_meets_one_that_is_not_ends_nothing():
    """Eager's in-place sum of a block, whose shortcut has more weights than outputs."""
    downsample = nn.Sequential(nn.Conv2d(6, 6, 13, padding=6, bias=False), nn.BatchNorm2d(6))
    plain, fused = twins(frozen(BasicBlock(6, 6, downsample=downsample)))
    for _ in range(2):
        assert_same(fused, plain)
    assert states_of(fused) == {FOLDED, "add+relu"}
    results_of(fused.train(), (image(),))
    assert states_of(fused) == {"relu", "add+relu"}


def test_less_is_kept():
    plain, fused = twins(frozen(nn.Sequential(make_block(), make_block(downsample=False))))
    output = image().nbytes
    # Of five convolutions the output, and what is rectified, once; of them the latter, and five scaled weights.
    kept, kept_by_plain = (saved_bytes(model, image()) for model in (fused, plain))
    assert kept < kept_by_plain - 4.5 * output


def test_few_outputs_are_not_folded(scaled, monkeypatch):
    plain, fused = twins(tail())
    assert_same(fused, plain, (image(1, (1, 6, 12, 12)),))  # 1152 outputs, 432 weights
    assert not scaled
    assert_same(fused, plain, (image(1, (1, 6, 15, 15)),))  # 1800
    assert scaled
    scaled.clear()
    monkeypatch.setattr(deferred, "LEAST_ELEMENTS", 1801)
    assert_same(fused, plain, (image(1, (1, 6, 15, 15)),))
    assert not scaled


def test_neither_without_gradients_nor_by_float16_nor_on_the_eager_backend(scaled):
    model = tail().float()
    plain, fused = twins(model, image().float())
    scaled.clear()
    with torch.no_grad():
        assert_equal(fused(image().float()), plain(image().float()), 1e-5)
    with torch.autocast("cpu", torch.float16):
        assert_equal(fused(image().float()), plain(image().float()))
    with use_backend("eager"):
        assert_equal(fused(image().float()), plain(image().float()))
    assert not scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_are_about_as_near_to_float64_as_eager_is(dtype, scaled):
    model, input, results = tail().to(dtype), image(1).to(dtype), []
    plain, fused = twins(model, input)
    scaled.clear()
    for model in (fused, plain):
        x = input.detach().clone().requires_grad_()
        output = model(x)
        grad_output = image(2, output.shape).to(torch.bfloat16)
        results.append((output, *torch.autograd.grad(output, (x, *model.parameters()), grad_output.to(output.dtype))))
    assert len(scaled) == 1
    x, exact = input.double().requires_grad_(), copy.deepcopy(plain).double()
    output = exact(x)
    results.append((output, *torch.autograd.grad(output, (x, *exact.parameters()), grad_output.double())))
    assert results[0][0].dtype is results[1][0].dtype
    for actual, by_eager, expected in zip(*results, strict=True):
        error, eagers = ((result.double() - expected).norm() for result in (actual, by_eager))
        assert error <= 3 * eagers + 4 * torch.finfo(results[0][0].dtype).eps * expected.norm()  # of 0.03, or 5e-7


def test_autocast_that_ends_between(scaled):
    """Nothing is folded under it, and what was put off before it is made without."""

    def forward(self, X):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bn2.training):
            Y = self.conv(X)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.conv2.training):
            return F.relu(self.bn(Y))

    plain, fused = twins(Pair(forward).float(), image().float())
    for first, second in ((False, False), (True, True), (True, False), (False, True)):
        for model in (plain, fused):
            model.bn2.train(first), model.conv2.train(second)
        scaled.clear()
        actual, expected = fused(image().float()), plain(image().float())
        assert actual.dtype is expected.dtype
        assert_equal(actual, expected, 0.2 if first else 1e-5)
        assert bool(scaled) is not (first or second)


class BatchNormAct2d(nn.BatchNorm2d):
    """A forward of its own, as timm's."""

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(x)


@pytest.mark.parametrize("bn", [BatchNormAct2d, nn.SyncBatchNorm, nn.BatchNorm2d], ids=lambda bn: bn.__name__)
def test_batch_norms_of_any_class(bn):
    plain, fused = twins(tail(None, bn(8)))
    assert_same(fused, plain)
    assert states_of(fused) == {FOLDED}


@pytest.mark.parametrize("use_1x1conv", [False, True], ids=["identity", "1x1conv"])
@pytest.mark.parametrize("fused_by_fuse", [False, True], ids=["from_residual", "fuse"])
def test_fused_residual(use_1x1conv, fused_by_fuse, scaled):
    plain = frozen(Residual(6, 6, use_1x1conv))
    fused = copy.deepcopy(plain)
    if fused_by_fuse:
        fuse(fused)
    else:
        fused = FusedResidual.from_residual(fused)
    assert_same(fused, plain)
    assert len(scaled) == 4
    for training in (True, False):
        assert_same(fused.train(training), plain.train(training))


def test_resnet18_keeps_less():
    torch.manual_seed(0)
    plain, fused = (resnet18(3, block=block).eval() for block in (Residual, FusedResidual))
    fused.load_state_dict(plain.state_dict())
    image = torch.randn(8, 3, 64, 64)
    for _ in range(2):
        assert_equal(fused(image), plain(image), 1e-4)
    assert saved_bytes(fused, image) < 0.8 * saved_bytes(plain, image)


def test_three_steps_with_frozen_statistics():
    plain, fused = twins(frozen(nn.Sequential(make_block(), make_block(downsample=False))).train())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5) for model in (plain, fused)]
    for step in range(6):
        for model, optimizer in zip((plain, fused), optimizers, strict=True):
            for module in model.modules():
                module.train(step > 3 or not isinstance(module, nn.BatchNorm2d))
            optimizer.zero_grad()
            model(image(step)).square().mean().backward()
            optimizer.step()
    for (name, value), expected in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_equal(value, expected, name=name)


def test_what_is_changed_before_the_output_is_used_is_an_error_that_names_the_layer():
    def forward(self, X):
        Y = self.conv(X)
        with torch.no_grad():
            self.conv.weight.add_(1)
        return F.relu(self.bn(Y))

    _, fused = twins(Pair(forward))
    with pytest.raises(RuntimeError, match="conv, a convolution that fuse put off: .* changed in place"):
        fused(image())


def test_what_is_watched_keeps_no_tensor():
    for model in (nn.Conv2d(6, 6, 1).double(), tail()):
        fuse(model)
        for _ in range(2):
            input = image().requires_grad_()
            kept = weakref.ref(input)
            checkpoint(model, input, use_reentrant=False).sum().backward()
            del input
            assert kept() is None


def test_copies_files_and_unfuse(scaled):
    plain, fused = twins(tail())
    del fused.__dict__["report"]
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded[0]) is nn.Conv2d
    assert vars(loaded[0]).keys() == vars(plain[0]).keys()
    copied = copy.deepcopy(fused)
    for _ in range(2):
        assert_same(copied, plain)
    assert scaled
    unfuse(fused)
    assert type(fused[0]) is nn.Conv2d
    assert vars(fused[0]).keys() == vars(plain[0]).keys()
