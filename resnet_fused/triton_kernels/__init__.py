"""The ops of csrc/ops.cpp in Triton, as ``torch.ops.resnet_fused_triton.*``: on GPUs, without a compiler at hand.

Under ``TRITON_INTERPRET=1``, read at this import, they serve CPU tensors, too, interpreted: to debug and to test.
"""

import os
from importlib import import_module

import torch

NAMESPACE = "resnet_fused_triton"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "cpu") if IS_INTERPRETED else ("cuda",)

_SCHEMAS = {
    "batch_norm_add_relu": "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, float? momentum, float eps, Tensor(c!)? num_batches_tracked, Tensor? input_bias, bool training, "
    "bool need_mask, Tensor? residual=None, Tensor(d!)? residual_running_mean=None, "
    "Tensor(e!)? residual_running_var=None, Tensor? residual_weight=None, Tensor? residual_bias=None, "
    "float? residual_momentum=None, float? residual_eps=None, Tensor(f!)? residual_num_batches_tracked=None, "
    "Tensor? residual_input_bias=None, Tensor? statistics=None, int[]? max_pool=None) "
    "-> (Tensor output, Tensor mask, Tensor statistics)",
    "batch_norm_add_relu_backward": "(Tensor grad_output, Tensor mask, Tensor statistics, bool training, Tensor input, "
    "Tensor? weight, Tensor? bias, Tensor? input_bias, bool need_input, bool need_weight, bool need_bias, "
    "bool need_input_bias, bool need_residual, Tensor? residual=None, Tensor? residual_weight=None, "
    "Tensor? residual_bias=None, Tensor? residual_input_bias=None, bool need_residual_weight=False, "
    "bool need_residual_bias=False, bool need_residual_input_bias=False, Tensor? grad_means=None, "
    "int[]? max_pool=None) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_input_bias, Tensor grad_residual, "
    "Tensor grad_residual_weight, Tensor grad_residual_bias, Tensor grad_residual_input_bias)",
    "batch_norm_statistics": "(Tensor input, float eps) -> Tensor",
}


def _on_first_call(name):
    """The op of that name; imports Triton, which takes a third of a second, when it is called."""

    def op(*arguments):
        return getattr(import_module(".batch_norm_add_relu", __name__), name)(*arguments)

    return op


_DISPATCH_KEYS = [device_type.upper() for device_type in DEVICE_TYPES]
for _name, _schema in _SCHEMAS.items():
    if not hasattr(getattr(torch.ops, NAMESPACE), _name):  # else this is a second import in one process
        torch.library.define(f"{NAMESPACE}::{_name}", _schema)
        torch.library.impl(f"{NAMESPACE}::{_name}", _DISPATCH_KEYS, _on_first_call(_name))
