"""The ops of csrc/ops.cpp in Triton, as ``torch.ops.resnet_fused_triton.*``: on GPUs, without a compiler at hand.

Under ``TRITON_INTERPRET=1``, read at this import, they serve CPU tensors, too, interpreted: to debug and to test.
"""

import os
import re
from importlib import import_module

import torch

NAMESPACE = "resnet_fused_triton"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPES = ("cuda", "cpu") if IS_INTERPRETED else ("cuda",)

_NORM = "Tensor? weight, Tensor? bias, Tensor? input_bias"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
_OPTIONS = "bool training, float? momentum, float eps"
_NEEDS = "bool need_weight, bool need_bias, bool need_input_bias"
_GRADIENTS = "Tensor grad_weight, Tensor grad_bias, Tensor grad_input_bias"


def _of_residual(arguments):
    """The same arguments of the residual's batch norm."""
    for alias, other in zip("abc", "def", strict=True):
        arguments = arguments.replace(f"({alias}!)", f"({other}!)")
    return re.sub(r" (need_|grad_|)(\w+)(?=,|$)", r" \1residual_\2", arguments)


_SCHEMAS = (
    f"batch_norm_add_relu(Tensor input, Tensor residual, {_NORM}, {_RUNNING}, {_OPTIONS}) "
    "-> (Tensor output, Tensor statistics, Tensor mask)",
    f"batch_norm_add_relu_backward(Tensor grad_output, Tensor input, Tensor mask, {_NORM}, Tensor statistics, "
    f"bool training, bool need_input, bool need_residual, {_NEEDS}) "
    f"-> (Tensor grad_input, Tensor grad_residual, {_GRADIENTS})",
    f"batch_norm_relu(Tensor input, {_NORM}, {_RUNNING}, {_OPTIONS}) -> (Tensor output, Tensor statistics)",
    f"batch_norm_relu_backward(Tensor grad_output, Tensor input, {_NORM}, Tensor statistics, bool training, "
    f"bool need_input, {_NEEDS}) -> (Tensor grad_input, {_GRADIENTS})",
    "batch_norm_relu_recompute(Tensor input, Tensor? weight, Tensor? bias, Tensor statistics) -> Tensor output",
    f"batch_norm_add_batch_norm_relu(Tensor input, {_NORM}, {_RUNNING}, float? momentum, float eps, Tensor residual, "
    f"{_of_residual(_NORM)}, {_of_residual(_RUNNING)}, float? residual_momentum, float residual_eps, bool training) "
    "-> (Tensor output, Tensor statistics, Tensor residual_statistics, Tensor mask)",
    f"batch_norm_add_batch_norm_relu_backward(Tensor grad_output, Tensor mask, Tensor input, {_NORM}, "
    f"Tensor statistics, Tensor residual, {_of_residual(_NORM)}, Tensor residual_statistics, bool training, "
    f"bool need_input, {_NEEDS}, bool need_residual, {_of_residual(_NEEDS)}) -> (Tensor grad_input, "
    f"{_GRADIENTS}, Tensor grad_residual, {_of_residual(_GRADIENTS)})",
)


def _on_first_call(name):
    """The op of that name; imports Triton, which takes a third of a second, when it is called."""

    def op(*arguments):
        return getattr(import_module(".batch_norm_add_relu", __name__), name)(*arguments)

    return op


_DISPATCH_KEYS = [device_type.upper() for device_type in DEVICE_TYPES]
for _schema in _SCHEMAS:
    _name, _, _signature = _schema.partition("(")
    if not hasattr(getattr(torch.ops, NAMESPACE), _name):  # else this is a second import in one process
        torch.library.define(f"{NAMESPACE}::{_name}", f"({_signature}")
        torch.library.impl(f"{NAMESPACE}::{_name}", _DISPATCH_KEYS, _on_first_call(_name))
