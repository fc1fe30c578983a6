"""Calls of the raw ops, by name: all that tests know of their schemas, of the order of arguments and of what is saved.

Values and gradients are tested by the public functions; by these what only an op shows: launches, refusals, fakes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from resnet_fused.ops import saved_for_mask


class Call(NamedTuple):
    op: Callable
    arguments: dict  # by name, in order
    outputs: list[str]

    def __call__(self, **changes):
        """The outputs by name, after changes of arguments."""
        assert changes.keys() <= self.arguments.keys()
        outputs = self.op(*(self.arguments | changes).values())
        return dict(zip(self.outputs, outputs if len(self.outputs) > 1 else [outputs], strict=True))


def _call(ops, name, problem, needed=None, **values):
    """``ops``: of a backend, or functions like them. ``needed``: what gets gradients, by default all that there is."""
    schema, device = getattr(torch.ops.resnet_fused, name).default._schema, problem.input.device
    tensors = {name: getattr(problem, name) for name in problem.DIFFERENTIABLE}
    needed = [name for name in tensors if tensors[name] is not None] if needed is None else needed
    running = {name: getattr(problem, name) for name in problem.RUNNING}
    values = {
        "grad_output": problem.grad_output,
        **tensors,
        **{name: tensor if tensor is None else tensor.clone() for name, tensor in running.items()},
        **{f"need_{name}": name in needed for name in tensors},
        **{f"{prefix}num_batches_tracked": torch.tensor(3, device=device) for prefix in ("", "residual_")},
        **{f"{prefix}momentum": 0.1 for prefix in ("", "residual_")},
        **{f"{prefix}eps": 1e-5 for prefix in ("", "residual_")},
        **problem.options,
        **values,
    }
    arguments = {argument.name: values[argument.name] for argument in schema.arguments}
    return Call(getattr(ops, name), arguments, [output.name for output in schema.returns])


def _name(problem):
    if problem.normalizes_residual:
        return "batch_norm_add_batch_norm_relu"
    return "batch_norm_relu" if problem.residual is None else "batch_norm_add_relu"


def forward(ops, problem, **values):
    return _call(ops, _name(problem), problem, **values)


def backward(ops, problem, outputs, **values):
    """``outputs``: of :func:`forward`, by name."""
    if "mask" in outputs:
        outputs = outputs | {"mask": saved_for_mask(outputs["output"], outputs["mask"])}
    return _call(ops, f"{_name(problem)}_backward", problem, **{**outputs, **values})


def recompute(ops, problem, outputs, **values):
    return _call(ops, "batch_norm_relu_recompute", problem, **outputs, **values)
