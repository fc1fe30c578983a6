"""ResNet-18 really trained on scikit-learn's handwritten digits, plain and fused side by side from one seed.

The two trainings take turns step by step, so that their images/s are comparable. A fifth of the 1,797 images is held
out for the test accuracy; the learning rate falls to 0 (cosine), so that both settle. In float32 the two losses part
after a few steps, as training magnifies rounding; with `--dtype float64 --steps 5` they agree to 12 digits. The JSON
has a further key, "curves": losses and accuracies.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from resnet_fused import FusedResidual, Residual

from . import harness
from .resnet18 import IMAGES_PER_SECOND, Network, resnet18_of


def load_digits(device, dtype, image_size):
    """(images, labels) to train on and (images, labels) to test with; the images (N, 1, H, W), in [-1, 1]."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.as_tensor(digits.images, dtype=harness.parameter_dtype(dtype)).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear").to(device)
    labels = torch.as_tensor(digits.target).to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return (images[train], labels[train]), (images[test], labels[test])


def accuracy(network, images, labels, batch_size):
    """The share of the images whose label the network finds, in eval mode."""
    network.model.eval()
    guesses = torch.cat([network.infer(batch).argmax(1) for batch in images.split(batch_size)])
    network.model.train()
    return (guesses == labels).double().mean().item()


def batches(count, batch_size):
    """Indices of one batch after the other, shuffled anew every epoch; what is left over of an epoch is dropped."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch_size * batch_size].split(batch_size)


def train(args, dtype, memory_format):
    """Train both networks, taking turns. Returns the rows and, beside each, the curve: losses and accuracies."""
    (images, labels), test = load_digits(args.device, dtype, args.image_size)
    epoch = len(labels) // args.batch_size
    steps = args.steps or args.epochs * epoch
    blocks = {"eager": (Residual, "eager"), "fused": (FusedResidual, harness.fused_backend(args.device))}
    networks, schedules, providers, curves, times = [], [], [], [], []
    for name, (block, backend) in blocks.items():
        networks.append(Network(resnet18_of(block), args.device, dtype, memory_format))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(networks[-1].optimizer, steps))
        providers.append(harness.Provider(name, networks[-1].train_step, memory_format, backend))
        curves.append({"label": f"{name}, {dtype}, {memory_format}", "loss": [], "step": [], "test_accuracy": []})
        times.append([])
    order = itertools.islice(batches(len(labels), args.batch_size), steps)
    for step, batch in enumerate(tqdm(order, desc=args.bench, total=steps, disable=None), start=1):
        batch = batch.to(args.device)
        for network, schedule, curve, of_one in zip(networks, schedules, curves, times, strict=True):
            start = timer()  # this clock waits for the GPU
            loss = network.train_step(images[batch], labels[batch])
            of_one.append(timer() - start)
            schedule.step()
            curve["loss"].append(loss.item())
            if step % epoch == 0 or step == steps:
                curve["step"].append(step)
                curve["test_accuracy"].append(accuracy(network, *test, args.batch_size))
    case = harness.Case("digits", (args.batch_size, *images.shape[1:]), dtype, "train_step")
    warm = [of_one[1:] or of_one for of_one in times]  # the first step allocates
    return harness.make_rows(args, case, providers, warm), curves


def plot_curves(curves, args, machine, rows):
    """The losses, and the accuracy on the held-out images; what runs later is dashed, as it covers the earlier."""
    with harness.figure(args, machine, 2) as (losses, accuracies):
        for i, curve in enumerate(curves):
            style = {"label": curve["label"], "linestyle": "--" if i % 2 else "-"}
            losses.plot(range(1, len(curve["loss"]) + 1), curve["loss"], **style)
            accuracies.plot(curve["step"], curve["test_accuracy"], marker="o", **style)
        losses.set(title="training loss", xlabel="step", yscale="log")
        accuracies.set(title="test accuracy", xlabel="step")
        losses.legend()
        accuracies.legend()


def main(argv=None):
    parser = harness.make_parser("train", __doc__, 32)
    parser.set_defaults(memory_format=["contiguous"])
    harness.add_image_size(parser)
    parser.add_argument("--epochs", type=int, default=4, help="default: %(default)s, some 180 steps")
    parser.add_argument("--steps", type=int, help="so many steps instead")
    args = parser.parse_args(argv)
    rows, curves = [], []
    with harness.session(args) as machine:
        for dtype, memory_format in itertools.product(args.dtype, args.memory_format):
            for done, of_these in zip((rows, curves), train(args, dtype, memory_format), strict=True):
                done += of_these
    harness.report(args, machine, rows, functools.partial(plot_curves, curves), IMAGES_PER_SECOND, curves=curves)
    for curve in curves:
        print(f"{curve['label']}: test accuracy {curve['test_accuracy'][-1]:.2%}, last loss {curve['loss'][-1]:.5f}")


if __name__ == "__main__":
    main()
