"""fuse, unfuse, unfused and their report; and how a fused model travels."""

import copy
import gc
import io
import json
import pickle
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import FusedResidual, Residual, deferred, fuse, resnet18, unfuse, unfused

from .models import (
    Layers,
    assert_equal,
    assert_same_buffers,
    assert_same_numbers,
    make_block,
    make_input,
    prepared,
    residual_block,
    states_of,
    twins,
)


def snapshot(model):
    """All that fuse and unfuse could change: each module's class, mode and attributes, and each tensor's value."""
    modules = {name: (type(module), module.training, set(vars(module))) for name, module in model.named_modules()}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name]), name


def model_of(block):
    return nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), nn.Identity(), block).double()


# The report


def test_the_report_follows_what_the_layers_do():
    model = model_of(make_block(downsample=False))
    report = fuse(model)
    assert report.fused == [("0", "Sequential", ("1",)), ("2", "BasicBlock", ("bn1", "bn2"))]
    assert report.left == []
    assert set(report.layers.values()) == {"may fuse"}
    model(make_input())
    assert set(report.layers.values()) == {"watched", "plain: its output went to conv2d"}
    model(make_input())
    assert report.layers == {"0.1": "plain: its output went to conv2d", "2.bn1": "relu", "2.bn2": "add+relu"}
    assert str(report).splitlines() == [
        "fused 2 of 3 batch norms:",
        "  2 (BasicBlock): bn1, bn2",
        "1 plain: its output went to conv2d (1):",
        "  0 (Sequential): 1: its output went to conv2d; "
        "only a ReLU, or a sum of two tensors and then a ReLU, is fused with it",
    ]
    assert json.loads(json.dumps(report.to_dict())) == {
        "fused": [{"name": "2", "class_name": "BasicBlock", "batch_norms": ["bn1", "bn2"]}],
        "unfused": [],
        "left": [{"name": "0", "class_name": "Sequential", "reason": "1: its output went to conv2d"}],
        "layers": report.layers,
    }
    model[2].bn1.register_forward_hook(lambda *args: None)
    assert report.layers["2.bn1"] == "plain: a hook, or a forward of its own"
    assert str(unfuse(model)).splitlines() == ["unfused:", "  0 (Sequential): 1", "  2 (BasicBlock): bn1, bn2"]
    assert set(report.layers.values()) == {"plain: it is no longer swapped"}


def test_the_report_tells_what_is_compiled():
    model = make_block(downsample=False)
    report = fuse(model)
    torch.compile(model, backend="eager", fullgraph=True)(make_input())
    assert set(report.layers.values()) == {"plain: under torch.compile"}
    for _ in range(2):
        model(make_input())
    assert report.layers == {"bn1": "relu", "bn2": "add+relu"}


def test_blocks_of_the_package_become_fused_residuals_and_plain_again():
    model = model_of(prepared(Residual(6, 6, use_1x1conv=True)))
    before = snapshot(model)
    report = fuse(model)
    assert type(model[2]) is FusedResidual
    assert report.layers == {"0.1": "may fuse", "2.bn1": "relu", "2.bn2": "add+relu"}
    model[2].bn1.register_forward_hook(lambda *args: None)
    assert report.layers["2.bn2"].startswith("plain: a batch norm of its block has a hook")
    model[2].bn1._forward_hooks.clear()
    assert unfuse(model).unfused[1] == ("2", "FusedResidual", ("bn1", "bn2"))
    assert_unchanged(model, before)
    network = resnet18()
    assert sum(len(module.batch_norms) for module in unfuse(network).unfused) == 17
    assert {type(module) for module in network.modules() if isinstance(module, Residual)} == {Residual}


def test_a_patched_residual_and_a_subclass_are_not_taken_for_the_packages_own(monkeypatch):
    own = type("Mine", (FusedResidual,), {})(6, 6).double()
    assert type(own).__name__ == "Mine" and fuse(own).layers == {"bn1": "may fuse", "bn2": "may fuse"}
    monkeypatch.setattr(Residual, "forward", lambda self, X: F.relu(self.bn2(F.relu(self.bn1(X)))) * 2)
    plain, fused = twins(prepared(Residual(6, 6)))
    assert type(fused) is Residual
    assert_same_numbers(fused, plain)


OTHERS = {
    "a Mine": lambda: type("Mine", (nn.SyncBatchNorm,), {})(6),
    "it is lazy: run one batch first": nn.LazyBatchNorm2d,
    "a RecursiveScriptModule": lambda: torch.jit.script(nn.BatchNorm2d(6)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("reason", OTHERS)
def test_batch_norms_of_other_classes_are_left_and_named(reason):
    model = nn.Sequential(OTHERS[reason](), nn.ReLU())
    kind = type(model[0])
    report = fuse(model)
    assert report.left == [("", "Sequential", f"0: {reason}")] and type(model[0]) is kind
    assert str(report).startswith("nothing was changed")
    if isinstance(model[0], nn.LazyBatchNorm2d):
        model(torch.randn(2, 6, 3, 3))
        assert fuse(model).layers == {"0": "may fuse"}


def test_models_without_batch_norms_and_what_is_no_module():
    assert str(fuse(nn.Linear(1, 1))) == str(unfuse(nn.Linear(1, 1))) == "nothing was changed"
    for function in (fuse, unfuse, lambda model: unfused(model).__enter__()):
        with pytest.raises(TypeError, match="model: expected an nn.Module, got list"):
            function([make_block()])


def test_filter_fn_is_asked_about_what_could_be_swapped_and_its_errors_leave_everything():
    asked, model = [], nn.Sequential(make_block(downsample=False), prepared(Residual(6, 6)), nn.Linear(1, 1))
    before = snapshot(model)

    def filter_fn(module, name):
        asked.append(name)
        if name == "1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fuse(model, filter_fn)
    assert_unchanged(model, before)
    assert asked == ["0.conv1", "0.bn1", "0.conv2", "0.bn2", "1"]
    report = fuse(model, lambda module, name: name != "0.bn1" and not isinstance(module, Residual))
    assert report.layers == {
        "0.bn1": "plain: filter_fn said no",
        "0.bn2": "may fuse",
        "1.bn1": "may fuse",
        "1.bn2": "may fuse",
    }
    assert type(model[1]) is Residual


def test_small_inputs_run_plain_on_a_cpu(calls, monkeypatch):
    plain, fused = twins(Layers(residual_block), learns=False)
    for is_small in (True, False, True):
        monkeypatch.setattr(deferred, "LEAST_ELEMENTS", make_input().numel() + is_small)
        for _ in range(2):
            calls.clear()
            assert_same_numbers(fused, plain)
        assert bool(calls) is not is_small
        assert states_of(fused)["bn1"] == ("plain: a small input" if is_small else "relu")


def test_a_first_call_with_example_inputs_changes_nothing_and_is_watched(calls):
    model = Layers(lambda self, X, factor: residual_block(self, self.drop(X)) * factor)
    model.bn2.eval()
    plain, before, states = copy.deepcopy(model), snapshot(model), (torch.get_rng_state(), random.getstate())
    report = fuse(model, example_inputs=(make_input(), 2))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [name for name, state in report.layers.items() if state == "watched"] == ["bn1", "bn2"]
    assert_same_buffers(model, plain)
    assert calls == []
    model(make_input(), 2)
    assert calls == ["batch_norm_relu", "batch_norm_add_relu"]
    unfuse(model)
    assert snapshot(model)[0] == before[0]
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()).double()
    assert fuse(model, example_inputs=make_input()).layers == {"0": "watched"}


def test_fusing_again_learns_anew_and_changes_no_more():
    block = make_block()
    handle = block.bn1.register_forward_hook(lambda bn, args, output: output * 2)
    fuse(block)
    before = snapshot(block)
    handle.remove()
    block.bn2(make_input()).sum()
    assert fuse(block).layers == dict.fromkeys(("bn1", "bn2", "downsample.1"), "may fuse")
    unfuse(block)
    assert_unchanged(copy.deepcopy(block), snapshot(block))
    assert snapshot(block)[0] != before[0]
    assert not unfuse(block).unfused


# What stays


def test_layers_pass_for_the_plain_ones():
    plain, fused = twins(make_block())
    assert repr(fused) == repr(plain) and type(fused) is BasicBlock
    for layer, other in zip(fused.modules(), plain.modules(), strict=True):
        assert isinstance(layer, type(other)) and layer.__class__ is type(other)
        assert list(dict(layer.named_children())) == list(dict(other.named_children()))
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fused))
    assert type(converted.bn1) is nn.SyncBatchNorm
    fused.bn1.__class__ = type("Mine", (nn.BatchNorm2d,), {})
    assert type(fused.bn1).__name__ == "Mine"
    assert_same_numbers(fused, plain)


def test_buffers_may_be_deleted_and_made_again():
    _, fused = twins(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()).double())
    bn = fused[0]
    del bn.running_mean
    assert not hasattr(bn, "running_mean")
    bn.register_buffer("running_mean", torch.zeros(6, dtype=torch.float64))
    assert bn.running_mean is bn._buffers["running_mean"]
    del bn.running_mean
    bn.running_mean = "no tensor"
    assert bn.running_mean == "no tensor"


def test_unfuse_restores_everything():
    model = nn.Sequential(make_block(), prepared(Residual(6, 6)), nn.MaxPool2d(2).double())
    before = snapshot(model)
    for options in ({}, {"memory_efficient": True}):
        fuse(model, **options)
        with torch.no_grad():
            model.eval()(make_input())
        unfuse(model.train())
        assert_unchanged(model, before)


def test_inside_unfused_every_module_is_plain_and_outside_it_is_fused_again():
    model = nn.Sequential(make_block(), FusedResidual(6, 6).double(), nn.Conv2d(6, 6, 1).double())
    plain = copy.deepcopy(model)
    unfuse(plain)
    report = fuse(model, memory_efficient=True)
    for _ in range(2):
        model(make_input())
    fused, states = snapshot(model), report.layers
    with pytest.raises(KeyError), unfused(model) as given:
        assert given is model
        assert snapshot(model)[0] == snapshot(plain)[0]
        with unfused(model):
            assert type(model[1]) is Residual
        assert type(model[1]) is Residual
        raise KeyError
    assert_unchanged(model, fused)
    assert report.layers == states
    with unfused(model):
        model[0].bn1.__class__ = own = type("Mine", (nn.BatchNorm2d,), {})
    assert type(model[0].bn1) is own and type(model[1]) is FusedResidual
    never = model_of(make_block())
    before = snapshot(never)
    with unfused(never):
        assert_unchanged(never, before)
    assert_unchanged(never, before)


# How it travels


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_weights_only(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    classes = {type(module) for module in twins(model)[0].modules()} | {m.__class__ for m in model.modules()}
    with torch.serialization.safe_globals([*classes, set]):
        return torch.load(file, weights_only=True)


WAYS = {"torch.save": through_torch_save, "weights_only": through_weights_only}


@pytest.mark.parametrize("way", [*WAYS, *range(6)])
def test_a_file_names_no_class_of_ours_and_loads_as_the_plain_model(way):
    plain, fused = twins(make_block())
    del plain.report, fused.report
    pickled = pickle.dumps(fused, way) if isinstance(way, int) else b""
    loaded = pickle.loads(pickled) if pickled else WAYS[way](fused)
    assert b"resnet_fused" not in pickled
    assert snapshot(loaded)[0] == snapshot(plain)[0]
    assert_same_numbers(loaded, plain)
    assert type(copy.copy(fused.bn1)) is nn.BatchNorm2d


def test_a_deepcopy_stays_fused_and_learns_for_itself(calls):
    plain, fused = twins(make_block())
    copied = copy.deepcopy(fused)
    assert [type(module) for module in copied.modules()] == [type(module) for module in fused.modules()]
    fused.bn1(make_input()).sum()
    for model in (plain, copied):
        for _ in range(2):
            model(make_input())
    calls.clear()
    copied(make_input())
    assert calls == ["batch_norm_relu", "batch_norm_add_batch_norm_relu"]
    plain(make_input())
    assert_same_buffers(copied, plain)


def test_replicas_share_what_was_learnt():
    _, fused = twins(make_block())
    replicas = [module._replicate_for_data_parallel() for module in (fused.bn1, fused.bn2)]
    for replica, layer in zip(replicas, (fused.bn1, fused.bn2), strict=True):
        assert type(replica) is type(layer) and replica._learned is layer._learned
        assert vars(replica)["_buffers"] is not vars(layer)["_buffers"]


def test_the_model_goes_when_it_is_deleted_and_the_report_does_not_keep_it():
    gc.collect()
    gc.disable()
    try:
        model = make_block()
        report = fuse(model)
        for _ in range(3):
            model(make_input()).sum().backward()
        reference = weakref.ref(model)
        del model
        assert reference() is None
        assert set(report.layers.values()) == {"plain: it is no longer swapped"}
    finally:
        gc.enable()


def test_what_leaves_a_model_that_has_learnt_is_a_plain_tensor():
    for forward in (lambda self, X: self.bn1(X), lambda self, X: self.bn1(X) + X, residual_block):
        _, fused = twins(Layers(forward))
        for training in (True, False):
            assert type(fused.train(training)(make_input())) is torch.Tensor


def test_a_tensor_that_a_watched_output_is_added_to_stays_one():
    def forward(self, X):
        Z = self.conv1(X)
        Z += self.bn1(X)
        return Z

    model = Layers(forward)
    fuse(model)
    assert type(model(make_input())) is torch.Tensor


def test_a_watched_output_is_saved_and_copied_as_a_tensor():
    model = nn.Sequential(nn.BatchNorm2d(6)).double().eval()
    fuse(model)
    with torch.no_grad():
        Y = model(make_input())
        assert_equal(pickle.loads(pickle.dumps(Y)), model(make_input()))
    assert b"resnet_fused" not in pickle.dumps(Y) and type(Y) is torch.Tensor
