"""The public names are annotated, and say so to type checkers; mypy, in ``make lint``, reads their use below."""

import inspect
import typing

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import resnet_fused
from resnet_fused import backend, functional, fusing

from .test_build import ROOT

PUBLIC = [
    *(getattr(resnet_fused, name) for name in resnet_fused.__all__ if name != "functional"),
    *(function for name, function in vars(functional).items() if name.startswith("batch_norm_")),
    *(resnet_fused.Residual.__init__, resnet_fused.Residual.forward, resnet_fused.FusedResidual.forward),
    *(resnet_fused.FusedResidual.from_residual, fusing.Report.to_dict, backend.register),
]


@pytest.mark.parametrize("function", [f for f in PUBLIC if not inspect.isclass(f)], ids=lambda f: f.__qualname__)
def test_every_argument_and_result_has_a_type(function):
    function = inspect.unwrap(function)
    arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
    assert {*arguments, "return"} == typing.get_type_hints(function).keys()


def read_by_mypy(net: nn.Module, x: Tensor, batch_norm: functional.BatchNorm) -> None:
    report = resnet_fused.fuse(net, example_inputs=(x,), memory_efficient=True)
    assert_type(report.layers, dict[str, str])
    assert_type(report.fused, list[fusing.Fused])
    assert_type(report.left, list[fusing.Left])
    assert_type(resnet_fused.unfuse(net), fusing.Report)
    with resnet_fused.unfused(net) as plain, resnet_fused.use_backend("eager"):
        assert_type(plain, nn.Module)
    assert_type(resnet_fused.available_backends(), list[str])
    assert_type(resnet_fused.resnet18(block=resnet_fused.Residual), nn.Sequential)
    block = resnet_fused.Residual(3, 4, use_1x1conv=True, strides=2)
    assert_type(block.forward(x), Tensor)
    assert_type(resnet_fused.FusedResidual.from_residual(block).forward(x), Tensor)
    assert_type(functional.batch_norm_relu(x, None, None, training=True), Tensor)
    assert_type(functional.batch_norm_add_relu(x, x, *batch_norm[:4], num_batches_tracked=torch.tensor(0)), Tensor)
    assert_type(functional.batch_norm_add_batch_norm_relu(x, x, batch_norm, batch_norm, training=True), Tensor)


def test_py_typed_is_packaged():
    assert (ROOT / "resnet_fused/py.typed").exists()
    assert 'package-data = { resnet_fused = ["py.typed"] }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
