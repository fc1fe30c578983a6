"""fuse raises for no model: one of each family of torchvision and timm, without data where it can be built so."""

import inspect

import pytest
import timm
import torch
import torchvision.models

from resnet_fused import fuse, unfuse

from .conftest import represented


def _families():
    for module in timm.list_modules():
        if names := timm.list_models(module=module):
            yield module, f"timm/{min(names, key=len)}"
    families = {}
    for name in torchvision.models.list_models():
        families.setdefault(torchvision.models.get_model_builder(name).__module__, []).append(name)
    for module, names in families.items():
        yield module, min(names, key=len)


FAMILIES = dict(_families())
REPRESENTATIVES = ("resnet", "torchvision.models.resnet", "torchvision.models.densenet")


def _build(name):
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    builder = torchvision.models.get_model_builder(name)
    no_weights = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
    return builder(**dict.fromkeys(no_weights))


@pytest.mark.filterwarnings("ignore")  # of old names and old initialisations
@pytest.mark.parametrize("family", represented(FAMILIES, by=REPRESENTATIVES))
def test_fuse_raises_for_no_family_and_unfuse_gives_every_class_back(family):
    try:
        with torch.device("meta"):
            model = _build(FAMILIES[family])
    except NotImplementedError:  # it looks at the values that it draws
        model = _build(FAMILIES[family])
    classes = [type(module) for module in model.modules()]
    str(fuse(model, memory_efficient=True))
    unfuse(model)
    assert [type(module) for module in model.modules()] == classes
