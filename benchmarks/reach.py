"""How many of the batch norms that a ReLU follows fuse fuses, in many networks of torchvision and timm.

What a ReLU follows is counted by an observer of its own, which sees each call of a function of PyTorch and no part of
the package: a batch norm counts where all its outputs went to a ReLU, or to a sum of two tensors that went to a ReLU,
and nowhere else. Nothing is timed.
"""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from resnet_fused import fuse

from . import harness
from .models import make_model

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 regnet_x_400mf "
    "regnet_y_400mf mobilenet_v2 mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 vgg11_bn efficientnet_b0 "
    "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large"
)
TIMM = (
    "resnet50d seresnet50 ecaresnet50t resnest14d res2net50_26w_4s skresnet18 resnet50_clip regnetx_008 regnety_008 "
    "ese_vovnet19b_dw vovnet39a dpn68 gernet_s inception_v4 inception_resnet_v2 xception41 hardcorenas_a "
    "mobilenetv3_large_100 ghostnet_100 repvgg_a0 tresnet_m dla34 hrnet_w18_small densenet121 densenetblur121d "
    "cspresnet50 selecsls42 legacy_senet154 semnasnet_100 fbnetc_100"
)
MODELS = TORCHVISION.split() + [f"timm/{name}" for name in TIMM.split()]
LEAST_SIZES = {"inception_v3": 299}  # of an image; that of all others is the argument

PAGE = """\
By `python -m benchmarks.reach --markdown docs/reach.md`, which runs each network three times, in training: plain, under
an observer that sees every call of a function of PyTorch and nothing of this package; then twice after `fuse`. A ReLU
*follows* a batch norm whose output, in each of its calls, went to a ReLU, or to a sum of two tensors that went to a
ReLU, and nowhere else. The last column has what the report says of those that are not fused: `add_` is a sum that is
written into a tensor of the user's, which others may hold."""
HEADER = ["| network | batch norms | a ReLU follows | fused | else |", "|---|---|---|---|---|"]

RELUS = {"relu", "relu_"}
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class Value:
    """What a tensor was between two writes: what made it, of which batch norm, and which functions took it."""

    def __init__(self, layer=None):
        self.layer, self.uses = layer, []


class Observer(TorchFunctionMode):
    """Follows the outputs of batch norms."""

    def __init__(self):
        self.values, self.tensors = {}, []  # by the id of a tensor; kept, so that ids stay theirs
        self.layer, self.normalized = None, []

    def value(self, tensor):
        return self.values.setdefault(id(tensor), Value())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in inputs]
        output = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        is_unchanged = any(
            output is tensor and version == tensor._version for tensor, version in zip(inputs, versions, strict=True)
        )
        if not outputs or is_unchanged:  # a question; dropout in eval
            return output
        result = Value(self.layer if function is F.batch_norm else None)
        for tensor in inputs:
            self.value(tensor).uses.append((name, result, len(inputs)))
        if function is F.batch_norm:
            self.normalized.append(result)
        self.values.update((id(tensor), result) for tensor in outputs)
        self.tensors += outputs + inputs
        return output

    def is_rectified(self, value):
        """Whether it went to a ReLU, or to a sum of two and then to a ReLU, and nowhere else."""
        if len(value.uses) != 1:
            return False
        ((name, result, _),) = value.uses
        if name in RELUS:
            return True
        return name in SUMS and value.uses[0][2] == 2 and [use[0] in RELUS for use in result.uses] == [True]


def rectified_layers(model, images):
    """Names of the batch norms of the model whose outputs go to a ReLU alone, maybe in a sum, by its first call."""
    observer, hooks = Observer(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: setattr(observer, "layer", name)))
    with torch.no_grad(), observer:
        outputs = model(images)
    for hook in hooks:
        hook.remove()
    for tensor in tree_leaves(outputs):
        observer.value(tensor).uses.append(("returned", Value(), 1))
    verdicts = {}
    for value in observer.normalized:
        verdicts[value.layer] = verdicts.get(value.layer, True) and observer.is_rectified(value)
    return {name for name, is_rectified in verdicts.items() if is_rectified}, len(verdicts)


def reach_of(name, image_size):
    """A row: how many batch norms were called, how many a ReLU follows, how many of those are fused, why not others."""
    torch.manual_seed(0)
    model, images = make_model(name).train(), torch.randn(2, 3, *[max(image_size, LEAST_SIZES.get(name, 0))] * 2)
    wanted, called = rectified_layers(model, images)
    report = fuse(model)
    with torch.no_grad():
        for _ in range(2):
            model(images)
    fused = {layer for layer, state in report.layers.items() if state.startswith(("relu", "add+relu"))}
    reasons = Counter(report.layers[layer] for layer in wanted - fused)
    return {
        "model": name,
        "batch_norms": called,
        "followed_by_relu": len(wanted),
        "fused_of_those": len(wanted & fused),
        "reasons": dict(reasons),
    }


def line_of(row):
    reasons = "; ".join(f"{count} {reason}" for reason, count in row["reasons"].items())
    cells = row["model"], row["batch_norms"], row["followed_by_relu"], row["fused_of_those"], reasons
    return f"| {' | '.join(map(str, cells))} |"


def total_of(rows):
    wanted, fused = (sum(row[key] for row in rows) for key in ("followed_by_relu", "fused_of_those"))
    return f"{fused:,} of {wanted:,} batch norms that a ReLU follows are fused, in {len(rows)} networks."


def page_of(rows):
    lines = ["# What fuse fuses", "", total_of(rows), "", *PAGE.splitlines(), "", *HEADER, *map(line_of, rows)]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm's as timm/NAME")
    harness.add_image_size(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page with the table there")
    args = parser.parse_args(argv)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about their defaults
        for name in args.models:
            rows.append(reach_of(name, args.image_size))
            print(line_of(rows[-1]), flush=True)
    print(total_of(rows))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(page_of(rows))


if __name__ == "__main__":
    main()
