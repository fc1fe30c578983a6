"""One call of an op: random tensors of a shape, dtype and layout, run through the package or through the reference."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from resnet_fused import functional, reference

from .tolerances import RTOL, assert_close

MEMORY_FORMATS = {
    ("contiguous", 4): torch.contiguous_format,
    ("channels_last", 4): torch.channels_last,
    ("channels_last", 5): torch.channels_last_3d,
}


def in_layout(tensor, layout):
    """tensor, dense in that layout where its number of dimensions has it."""
    return tensor.contiguous(memory_format=MEMORY_FORMATS.get((layout, tensor.dim()), torch.contiguous_format))


def undecided(rectified, dtype, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """For each window of a pooling whether it is for rounding to decide which of its values is the largest."""
    options = kernel_size, stride or kernel_size, padding, dilation
    pairs = [(o, o) if isinstance(o, int) else (*o, *o)[:2] for o in options]
    sizes, windows = F.max_pool2d(rectified, *pairs, ceil_mode).shape[2:], rectified
    for dim, size, kernel, step, before, distance in zip((2, 3), sizes, *pairs, strict=True):
        reach = (kernel - 1) * distance + 1
        after = max((size - 1) * step + reach - before - rectified.shape[dim], 0)
        beside = [torch.full_like(windows.narrow(dim, 0, 1), -1.0)]
        windows = torch.cat([*beside * before, windows, *beside * after], dim)
        windows = windows.unfold(dim, reach, step)[..., ::distance]
    first, second = F.pad(windows.flatten(4), (0, 1), value=-1.0).topk(2).values.unbind(-1)
    rounding = torch.finfo(dtype).eps * first + min(RTOL[dtype], RTOL[torch.float32]) * rectified.max()
    return (first - second <= rounding) & (first > 0)


def _to(tensor, device, dtype):
    return None if tensor is None else tensor.detach().to(device, dtype, copy=True)


def _for_reference(tensor, dtype):
    """Contiguous: of (2, 2, 1, 2) in strides (4, 1, 2, 2) eager's batch norm in eval errs in backward."""
    return tensor.to("cpu", dtype, copy=True).contiguous()


@dataclass
class Problem:
    """The arguments of one call, and the gradient that its output gets."""

    input: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    grad_output: torch.Tensor
    input_bias: torch.Tensor | None = None
    residual_weight: torch.Tensor | None = None
    residual_bias: torch.Tensor | None = None
    residual_running_mean: torch.Tensor | None = None
    residual_running_var: torch.Tensor | None = None
    residual_input_bias: torch.Tensor | None = None
    normalizes_residual: bool = False
    options: dict = field(default_factory=dict)
    windows: dict = field(default_factory=dict)  # of a pooling of what was rectified, or none

    DIFFERENTIABLE = ("input", "weight", "bias", "input_bias")
    DIFFERENTIABLE += ("residual", "residual_weight", "residual_bias", "residual_input_bias")
    RUNNING = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")

    @classmethod
    def random(
        cls,
        shape,
        dtype=torch.float32,
        layout="contiguous",
        device="cpu",
        residual=True,
        parameter_dtype=None,
        windows=None,
        **options,
    ):
        """Values of both signs in every channel: the ReLU clips 30 to 70 % of the outputs (asserted by the caller).

        ``residual``: whether there is one, or "normalized", by a batch norm of its own.
        """
        channels = shape[1]
        parameter_dtype = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        vector = lambda: torch.randn(channels, dtype=torch.float64)  # noqa: E731
        make = lambda tensor: in_layout(tensor.to(device, dtype), layout)  # noqa: E731
        tensors = torch.randn(3, *shape, dtype=torch.float64)

        def batch_norm(x, prefix=""):
            # Running statistics near the batch's, so that in eval mode, too, the ReLU clips about half of each channel.
            variance, mean = torch.var_mean(x, [0, *range(2, len(shape))], correction=0)
            vectors = {
                "weight": vector() + vector().sign(),
                "bias": vector() * 0.2,
                "running_mean": mean + 0.1 * vector(),
                "running_var": variance * (1 + vector().abs()),
            }
            return {prefix + name: values.to(device, parameter_dtype) for name, values in vectors.items()}

        x = tensors[0] * 2 + vector().view(-1, *[1] * (len(shape) - 2))
        vectors = batch_norm(x)
        if residual == "normalized":
            tensors[1].mul_(3).add_(vector().view(-1, *[1] * (len(shape) - 2)))
            vectors |= batch_norm(tensors[1], "residual_")
            options = {"residual_momentum": 0.3, "residual_eps": 0.02, **options}
        if windows:  # of which the ReLU is to clip as many: all their values
            vectors["bias"] = -vectors["weight"].abs() * (1.2 + 0.3 * vector().tanh().to(vectors["weight"]))
            tensors = *tensors[:2], torch.randn_like(F.max_pool2d(tensors[2], **windows))
        return cls(
            input=make(x),
            residual=make(tensors[1]) if residual else None,
            grad_output=make(tensors[2]),
            normalizes_residual=residual == "normalized",
            options={"training": True, **options},
            windows=windows or {},
            **vectors,
        )

    def with_(self, **changes):
        return replace(self, **changes)

    def with_input_bias(self):
        """With a random one of each batch norm."""
        names = ("input_bias", "residual_input_bias") if self.normalizes_residual else ("input_bias",)
        like = self.running_mean
        return self.with_(**{name: torch.randn(like.shape, dtype=like.dtype, device=like.device) for name in names})

    def run(self, functions=functional, dtype=None, needs_grad=DIFFERENTIABLE):
        """Output, gradients and running statistics by name; of the package, or, in float64, of the reference."""
        tensors = {}
        for name in (*self.DIFFERENTIABLE, *self.RUNNING):
            tensor = getattr(self, name)
            if tensor is not None:
                # detach, not clone: strides, overlaps and offsets are part of the problem
                tensor = tensor.detach().clone() if dtype is None and tensor.dim() == 1 else tensor.detach()
                tensor = tensor if dtype is None else _for_reference(tensor, dtype)
            tensors[name] = tensor
        leaves = {
            name: tensors[name] for name in self.DIFFERENTIABLE if tensors[name] is not None and name in needs_grad
        }
        for leaf in leaves.values():
            leaf.requires_grad_()
        counters = {"num_batches_tracked": torch.tensor(3, device=tensors["input"].device)}
        if self.normalizes_residual:
            counters["residual_num_batches_tracked"] = torch.tensor(5, device=tensors["input"].device)
        output = self.call(functions, {**tensors, **counters, **self.options})
        results = {"output": output.detach(), **counters}
        if leaves:
            grad_output = self.grad_output if dtype is None else _for_reference(self.grad_output, dtype)
            grads = torch.autograd.grad(output, list(leaves.values()), grad_output, allow_unused=True)
            results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        for name in self.RUNNING:
            if tensors[name] is not None:
                results[name] = tensors[name].detach()
        return results

    def call(self, functions, arguments):
        """The op's output; arguments by name, those of the residual's batch norm with ``residual_`` before it."""
        of_residual = {name: arguments[name] for name in arguments if name.startswith("residual_")}
        arguments = {name: value for name, value in arguments.items() if name not in of_residual}
        if functions is reference or self.normalizes_residual:
            input, residual, training = (arguments.pop(name) for name in ("input", "residual", "training"))
            of_residual = {name.removeprefix("residual_"): value for name, value in of_residual.items()}
            residual_batch_norm = functional.BatchNorm(**of_residual) if self.normalizes_residual else None
            of_tail = input, residual, functional.BatchNorm(**arguments), residual_batch_norm, training
            if functions is reference:
                output = reference.batch_norm_add_relu(*of_tail)
                return F.max_pool2d(output, **self.windows) if self.windows else output
            return functions.batch_norm_add_batch_norm_relu(*of_tail)
        if arguments["residual"] is not None:
            return functions.batch_norm_add_relu(**arguments)
        del arguments["residual"]
        if self.windows:
            return functions.batch_norm_relu_max_pool2d(**arguments, **self.windows)
        return functions.batch_norm_relu(**arguments)

    def reference(self, **kwargs):
        return self.run(reference, torch.float64, **kwargs)

    def check(self, scale=1.0, clipped=(0.3, 0.7), **kwargs):
        """The package's results equal the reference's, whose ReLU clips a share of the outputs in that range."""
        actual, expected = self.run(**kwargs), self.reference(**kwargs)
        edge = (actual["output"] > 0).cpu() != (expected["output"] > 0)
        if edge.any():  # rounding decides the side of 0, in one output of a million or so: send no gradient there
            sizes = torch.maximum(actual["output"].to("cpu", torch.float64), expected["output"])
            is_tie = sizes <= 1e-14 * sizes.max()  # an input that is the mean, say: the reference rounds
            assert (edge & ~is_tie).sum() <= 1 + 1e-5 * edge.numel()
        if self.windows:
            rectified = self.with_(windows={}).reference(needs_grad=())["output"]
            edge |= undecided(rectified, self.input.dtype, **self.windows)
            assert clipped is None or edge.double().mean() < (0.3 if self.input.dtype.itemsize == 2 else 0.01)
        if edge.any():
            grad_output = self.grad_output.masked_fill(edge.to(self.grad_output.device), 0)
            problem = self.with_(grad_output=grad_output)
            actual, expected = problem.run(**kwargs), problem.reference(**kwargs)
        if clipped is not None:
            share = (expected["output"] == 0).double().mean().item()
            assert clipped[0] <= share <= clipped[1], (
                f"a test that proves little: {share:.0%} of the outputs are clipped"
            )
        assert actual["output"].dtype == self.input.dtype
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            if name.endswith("num_batches_tracked"):
                assert value.item() == expected[name].item()
                continue
            if value is None or expected[name] is None:
                assert value is None and expected[name] is None, name
                continue
            if name.startswith("grad_") and name.endswith("input_bias") and self.options["training"]:
                assert torch.count_nonzero(value) == 0  # cancelled by batch statistics: rounding noise in the reference
                continue
            leaf = getattr(self, name.removeprefix("grad_"), self.input)
            assert value.dtype == leaf.dtype, name
            assert_close(value, expected[name], self.input.dtype, scale, name)
        return actual
