"""Real models, torchvision's and timm's: fused, they compute what they computed, and train as they trained."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fused import fuse

from .conftest import represented

# name -> how many batch norms are followed by a ReLU, maybe after a sum, and how many there are
MODELS = {
    "resnet18": (20, 20),
    "resnet34": (36, 36),
    "resnet50": (53, 53),
    "resnet101": (104, 104),
    "resnet152": (155, 155),
    "resnext50_32x4d": (53, 53),
    "wide_resnet50_2": (53, 53),
    "regnet_x_400mf": (71, 71),
    "regnet_y_400mf": (53, 53),
    "densenet121": (121, 121),
    "googlenet": (59, 59),
    "mobilenet_v3_large": (11, 46),
    "mobilenet_v2": (0, 52),
    "timm/resnet18": (20, 20),
    "timm/resnet50": (53, 53),
    "timm/resnet50d": (55, 55),
    "timm/dla34": (37, 37),
    "timm/res2net50_26w_4s": (85, 85),
    "timm/resnet18 with drop_path": (10, 20),
    "timm/seresnet50": (33, 53),
    "timm/regnetx_002": (44, 44),
    "timm/gernet_s": (45, 45),
    "timm/vovnet39a": (39, 39),
    "timm/dpn48b": (52, 54),
    "timm/skresnet18": (36, 36),
    "timm/mobilenetv3_small_050": (5, 34),
    "timm/repvgg_a0": (10, 61),
    "timm/hrnet_w18_small": (72, 91),
    "Faster R-CNN": (20, 20),
    "FCN": (55, 55),
    "U-Net": (6, 6),
}
IMAGES = 4, 3, 32, 32


class Task(nn.Module):
    """A network, and what makes a loss, or outputs for each image, of what it gives."""

    def __init__(self, network, forward):
        super().__init__()
        self.network, self.function = network, forward

    def forward(self, images):
        return self.function(self.network, images)


def detect(network, images):
    if not network.training:
        return network.backbone(images)["0"]
    boxes = torch.tensor([[2, 3, 17, 20], [9, 5, 30, 31]], dtype=images.dtype)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    return sum(network(list(images), targets).values())


def faster_rcnn(num_classes):
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    return Task(torchvision.models.detection.FasterRCNN(backbone, num_classes, min_size=32, max_size=32), detect)


def segment(network, images):
    outputs = tuple(output.mean((2, 3)) for output in network(images).values())
    return outputs if network.training else outputs[0]


def fcn(num_classes):
    network = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, aux_loss=True, num_classes=num_classes
    )
    return Task(network, segment)


class UNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.down, self.bottom, self.up = self.stage(3, 8), self.stage(8, 16), self.stage(16, 8)
        self.upsample, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, num_classes, 1)

    def stage(self, *channels):
        sizes = zip((channels[0], channels[1]), (channels[1], channels[1]), strict=True)
        return nn.Sequential(
            *(layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
        )

    def forward(self, images):
        skipped = self.down(images)
        up = self.upsample(self.bottom(nn.functional.max_pool2d(skipped, 2)))
        return self.head(self.up(torch.cat([skipped, up], 1))).mean((2, 3))


BUILT = {"Faster R-CNN": faster_rcnn, "FCN": fcn, "U-Net": UNet}


def make(name, num_classes=4):
    """The float64 model with batch norms worth the name, and an eps that keeps a rounding error one.

    With the default eps and so few images, the plain resnet152 itself turns a change of one bit into one of 1e-7.
    """
    torch.manual_seed(0)
    if name.startswith("timm/"):
        name, *options = name.removeprefix("timm/").split(" with ")
        model = timm.create_model(name, num_classes=num_classes, **{f"{option}_rate": 0.1 for option in options})
    elif name in BUILT:
        model = BUILT[name](num_classes)
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.double()


def loss_of(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # googlenet's auxiliary classifiers
    labels = torch.arange(IMAGES[0]) % 4
    return sum(output if output.dim() == 0 else nn.functional.cross_entropy(output, labels) for output in outputs)


def train(model, steps=3):
    """Losses of a few steps, and then outputs in eval."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train()(torch.randn(IMAGES, dtype=torch.float64)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        return torch.stack(losses), model.eval()(torch.randn(IMAGES, dtype=torch.float64))


def assert_close(actual, expected, name):
    # At least 1e-15: where the next batch norm cancels a bias, its gradient is float64's rounding alone, up to 1e-16.
    tolerance = 1e-10 * max(expected.abs().max().item(), 1e-5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", represented(MODELS, by=["resnet18", "timm/resnet18"]))
def test_three_steps_of_a_fused_model_are_those_of_the_plain_one(name, calls):
    plain = make(name)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for what, actual, expected in zip(("loss", "output"), train(fused), train(plain), strict=True):
        assert_close(actual, expected, what)
    for (parameter_name, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) is (other.grad is None)
        if other.grad is not None:  # not frozen
            assert_close(parameter.grad, other.grad, f"gradient of {parameter_name}")
    for (key, value), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(value.double(), other.double(), key)
    fused_batch_norms = sum(not state.startswith("plain: ") for state in report.layers.values())
    assert (fused_batch_norms, len(report.layers)) == MODELS[name]
    of_two = calls.count("batch_norm_add_batch_norm_relu")
    pooled = sum(state.endswith("max_pool2d") for state in report.layers.values())
    # The first step is watched, and in eval the layers are plain, but where they pool.
    assert len(calls) + of_two == 2 * MODELS[name][0] + pooled


def train_by_recipe(model, autocast, steps=4):
    """Losses and the averaged model of torchvision's reference training in small."""
    torch.manual_seed(1)
    images, labels = torch.randn(8, *IMAGES[1:], dtype=next(model.parameters()).dtype), torch.arange(8) % 4
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = criterion(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.detach())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses.append(criterion(average.eval()(images), labels))
    return torch.stack(losses), average


def test_the_reference_recipe_with_an_average_of_the_weights(calls):
    plain = make("resnet18")
    fused = copy.deepcopy(plain)
    fuse(fused)
    losses, average = train_by_recipe(fused, autocast=False)
    assert len(calls) == 3 * 17  # of four steps the first is watched, and so is the average, a copy
    other_losses, other_average = train_by_recipe(plain, autocast=False)
    assert_close(losses, other_losses, "loss")
    for (key, value), other in zip(average.state_dict().items(), other_average.state_dict().values(), strict=True):
        assert_close(value.double(), other.double(), key)


def test_the_reference_recipe_under_autocast(calls):
    """Both networks' losses are float32's but for a rounding to bfloat16, 2^-8 of them at most."""
    plain = make("resnet18").float()
    exact, _ = train_by_recipe(copy.deepcopy(plain), autocast=False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    losses, _ = train_by_recipe(fused, autocast=True)
    assert len(calls) == 3 * 17
    other_losses, _ = train_by_recipe(plain, autocast=True)
    assert losses.dtype == other_losses.dtype == torch.float32
    assert losses[-2] < 0.7 * losses[0]
    error, other_error = (losses - exact).abs().max(), (other_losses - exact).abs().max()
    assert max(error, other_error) < 2**-8 * exact.abs().max()


def _train_in_parallel(rank, folder):
    """Each rank sees its own images, and saves what it ends with: plain's, then fused's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).double()
        if fused:
            fuse(network)
        # Statistics of each rank's own images stay its own.
        model = DistributedDataParallel(network, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        torch.manual_seed(rank + 1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(torch.randn(IMAGES, dtype=torch.float64))).backward()
            optimizer.step()
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
        results.append({**network.state_dict(), **gradients})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_train_the_fused_model_as_the_plain_one(tmp_path):
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for plain, fused in ranks:
        assert fused.keys() == plain.keys()
        for name, value in fused.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-9, atol=1e-9, msg=name)
    first, second = (fused for _, fused in ranks)
    for name, value in first.items():
        assert torch.equal(value, second[name]) is ("running" not in name), name
