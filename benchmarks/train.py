"""ResNet-18 really trained on scikit-learn's handwritten digits, plain and fused side by side from one seed.

The two trainings take turns step by step, so that their images/s are comparable. A fifth of the 1,797 images is held
out for the test accuracy. The JSON has a further key, "curves": the losses and accuracies over the steps.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from resnet_fused import FusedResidual, Residual

from . import harness
from .resnet18 import SIDE, Network, images_per_second


def load_digits(device, dtype):
    """((images, labels) to train on, (images, labels) to test with), the images (N, 1, 96, 96) in about [-1, 1]."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.as_tensor(digits.images, dtype=harness.parameter_dtype(dtype)).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear").to(device)
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
    """Train both networks; returns their rows and, by provider, their curves."""
    (images, labels), test = load_digits(args.device, dtype)
    epoch = len(labels) // args.batch_size
    steps = args.steps or args.epochs * epoch
    networks = {
        "eager": Network(Residual, args.device, dtype, memory_format),
        "fused": Network(FusedResidual, args.device, dtype, memory_format),
    }
    times = {name: [] for name in networks}
    curves = {name: {"loss": [], "test_accuracy": [], "accuracy_after_step": []} for name in networks}
    order = itertools.islice(batches(len(labels), args.batch_size), steps)
    for step, batch in enumerate(tqdm(order, desc=args.bench, total=steps, disable=None), start=1):
        batch = batch.to(args.device)
        for name, network in networks.items():
            start = timer()  # waits for the GPU
            loss = network.train_step(images[batch], labels[batch])
            times[name].append(timer() - start)
            curves[name]["loss"].append(loss.item())
            if step % epoch == 0 or step == steps:
                curves[name]["test_accuracy"].append(accuracy(network, *test, args.batch_size))
                curves[name]["accuracy_after_step"].append(step)
    case = harness.Case("digits", (args.batch_size, *images.shape[1:]), dtype, "train_step", setup=None)
    providers = [
        harness.Provider(name, network.train_step, memory_format, "eager" if name == "eager" else args.fused_backend)
        for name, network in networks.items()
    ]
    warm = [of_one[1:] or of_one for of_one in times.values()]  # the first step allocates
    return harness.make_rows(args, case, providers, warm), curves
