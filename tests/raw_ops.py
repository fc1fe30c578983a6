"""Calls of the raw ops, by name: all that tests know of their schemas, of the order of arguments and of what is saved.

Values and gradients are tested by the public functions; by these what only an op shows: launches, refusals.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from resnet_fused.ops import MaxPool


class Call(NamedTuple):
    op: Callable
    arguments: dict  # by name, in order
    outputs: list[str]

    def __call__(self, **changes):
        """The outputs by name, after changes of arguments."""
        assert changes.keys() <= self.arguments.keys()
        outputs = self.op(*(self.arguments | changes).values())
        return dict(zip(self.outputs, outputs if len(self.outputs) > 1 else [outputs], strict=True))


_OF_RESIDUAL = {"residual_momentum": 0.1, "residual_eps": 1e-5}


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
        "num_batches_tracked": torch.tensor(3, device=device),
        "residual_num_batches_tracked": torch.tensor(3, device=device) if problem.normalizes_residual else None,
        "momentum": 0.1,
        "eps": 1e-5,
        **(_OF_RESIDUAL if problem.normalizes_residual else dict.fromkeys(_OF_RESIDUAL)),
        "need_mask": True,
        "statistics": None,
        "grad_means": None,
        "max_pool": MaxPool.of(problem.input, **problem.windows).numbers() if problem.windows else None,
        **problem.options,
        **values,
    }
    arguments = {argument.name: values[argument.name] for argument in schema.arguments}
    return Call(getattr(ops, name), arguments, [output.name for output in schema.returns])


def forward(ops, problem, **values):
    return _call(ops, "batch_norm_add_relu", problem, **values)


def recompute(ops, problem, outputs, **values):
    """The forward by its own statistics, given: the running ones are neither asked for nor written."""
    running = dict.fromkeys(problem.RUNNING)
    return forward(ops, problem, **running, statistics=outputs["statistics"], need_mask=False, **values)


def backward(ops, problem, outputs, **values):
    """``outputs``: of :func:`forward`, by name."""
    if not problem.normalizes_residual:  # of one that is added as it is nothing is needed
        values = {"residual": None} | values
    return _call(ops, "batch_norm_add_relu_backward", problem, **(outputs | values))
