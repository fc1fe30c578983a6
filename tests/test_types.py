"""The public names are annotated, and say so to type checkers."""

import inspect
import typing

import pytest

import resnet_fused
from resnet_fused import functional, fusing

from .test_build import ROOT

FUNCTIONS = {
    "fuse": resnet_fused.fuse,
    "unfuse": resnet_fused.unfuse,
    "unfused": resnet_fused.unfused,
    "resnet18": resnet_fused.resnet18,
    "use_backend": resnet_fused.use_backend,
    "available_backends": resnet_fused.available_backends,
    "Residual": resnet_fused.Residual.__init__,
    "Residual.forward": resnet_fused.Residual.forward,
    "FusedResidual.forward": resnet_fused.FusedResidual.forward,
    "Report.to_dict": fusing.Report.to_dict,
    "batch_norm_relu": functional.batch_norm_relu,
    "batch_norm_add_relu": functional.batch_norm_add_relu,
    "batch_norm_add_batch_norm_relu": functional.batch_norm_add_batch_norm_relu,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_and_result_has_a_type(name):
    function = inspect.unwrap(FUNCTIONS[name])
    arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
    assert {*arguments, "return"} == typing.get_type_hints(function).keys()


def test_py_typed_is_packaged():
    assert (ROOT / "resnet_fused/py.typed").exists()
    assert 'package-data = { resnet_fused = ["py.typed"] }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
