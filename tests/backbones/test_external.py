"""Libraries by name. None is installed where the tests run: small modules stand in for them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from prunekit.backbones import build
from prunekit.config import recipe, registry
from prunekit.errors import PluginError, RecipeError

RECIPE = """
name: mine
backbone: {name: timm/resnet18, options: {num_classes: 10}}
data: {name: salient_shapes}
train: {epochs: 1}
finetune: {epochs: 1}
"""


@pytest.fixture
def timm(monkeypatch):
    module, calls = ModuleType("timm"), []

    def create_model(model_name, pretrained=False, **options):
        calls.append((model_name, pretrained, options))
        if "tag" in model_name:
            raise RuntimeError(f"Invalid pretrained tag ({model_name})")
        return nn.Linear(3, options.get("num_classes", 1000))

    module.list_models = lambda: ["resnet18", "resnet34", "mobilenetv3_small_050"]
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


@pytest.fixture
def torchvision(monkeypatch):
    package, models, calls = ModuleType("torchvision"), ModuleType("torchvision.models"), []

    def resnet18(*, weights=None, progress=True, **options): ...

    def deeplab(*, weights=None, weights_backbone="IMAGENET1K_V1", **options): ...

    def get_model(name, **options):
        calls.append((name, options))
        return nn.Identity()

    builders = {"resnet18": resnet18, "deeplabv3_resnet50": deeplab}
    models.list_models = lambda: list(builders)
    models.get_model_builder = builders.__getitem__
    models.get_model = get_model
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return calls


@pytest.fixture
def transformers(monkeypatch):
    package, auto = ModuleType("transformers"), ModuleType("transformers.models.auto.modeling_auto")

    class Classifier(nn.Linear):
        def forward(self, images):
            return SimpleNamespace(logits=super().forward(images.mean((2, 3))), hidden_states=None)

    def for_model(name, num_labels=2, **options):
        if options:
            raise ValueError(f"unknown options {options}")
        return SimpleNamespace(name=name, num_labels=num_labels)

    package.AutoConfig = SimpleNamespace(for_model=for_model)
    package.AutoModelForImageClassification = SimpleNamespace(from_config=lambda c: Classifier(3, c.num_labels))
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES = {"vit": "ViTForImageClassification", "swin": "…"}
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, auto.__name__, auto)


@pytest.fixture
def absent(monkeypatch):
    """absent(name, error): importing it raises this."""

    def make(name, error):
        class Finder:
            @staticmethod
            def find_spec(wanted, path=None, target=None):
                if wanted.partition(".")[0] == name:
                    raise error

        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])

    return make


def test_timm_model(timm):
    assert build("timm/resnet18", {"num_classes": 10}).out_features == 10
    assert timm == [("resnet18", False, {"num_classes": 10})]
    build("timm/resnet18", {"pretrained": True})
    build("timm/resnet34.a1_in1k")
    build("timm/hf-hub:somebody/net")
    assert [name for name, *_ in timm[1:]] == ["resnet18", "resnet34.a1_in1k", "hf-hub:somebody/net"]
    assert [pretrained for _, pretrained, _ in timm[1:]] == [True, False, False]


def test_timm_options_in_a_recipe(timm, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    first = recipe.load(path, ["backbone.options.drop_rate=0.1"])
    assert first.backbone.options == {"pretrained": False, "num_classes": 10, "drop_rate": 0.1}
    path.write_text(first.dump())
    assert recipe.load(path) == first
    with pytest.raises(RecipeError, match=r"backbone\.options\.pretrained: 3 must be a valid boolean"):
        recipe.load(path, ["backbone.options.pretrained=3"])
    with pytest.raises(RecipeError, match=r"backbone\.name: unknown backbone 'timm/resnet81', did you mean"):
        recipe.load(path, ["backbone.name=timm/resnet81"])


def test_transformers_model_returns_its_logits(transformers):
    images = torch.randn(2, 3, 8, 8)
    assert build("transformers/vit", {"num_labels": 10})(images).shape == (2, 10)
    with pytest.raises(RecipeError, match=r"unknown backbone 'transformers/vitt', did you mean 'transformers/vit'"):
        build("transformers/vitt")
    with pytest.raises(RecipeError, match=r"backbone.options: transformers/vit of transformers: unknown options"):
        build("transformers/vit", {"hidden": 3})


def test_unknown_names_raise_with_suggestion(timm, torchvision):
    with pytest.raises(RecipeError, match=r"'timm/resnt18', did you mean 'timm/resnet18'\? timm has 3 models"):
        build("timm/resnt18")
    with pytest.raises(RecipeError, match=r"'torchvision/resnet81', did you mean 'torchvision/resnet18'"):
        build("torchvision/resnet81")
    with pytest.raises(RecipeError, match=r"unknown backbone 'tim/resnet18', did you mean 'timm/resnet18'"):
        build("tim/resnet18")
    with pytest.raises(PluginError, match=r"'timm/resnet18.tag' of timm cannot be built.*Invalid pretrained tag"):
        build("timm/resnet18.tag")


def test_torchvision_model_does_not_download_weights_by_default(torchvision):
    build("torchvision/resnet18", {"num_classes": 10})
    build("torchvision/deeplabv3_resnet50")
    build("torchvision/deeplabv3_resnet50", {"weights": "DEFAULT", "weights_backbone": "DEFAULT"})
    assert torchvision == [
        ("resnet18", {"weights": None, "num_classes": 10}),
        ("deeplabv3_resnet50", {"weights": None, "weights_backbone": None}),
        ("deeplabv3_resnet50", {"weights": "DEFAULT", "weights_backbone": "DEFAULT"}),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm", ["pip install timm"]),
        ("torchvision", ["build for your torch", "pip install torchvision"]),
        ("transformers", ["pip install transformers"]),
    ],
)
def test_missing_library_error_says_how_to_install_it(absent, name, words):
    absent(name, ModuleNotFoundError(f"No module named {name!r}", name=name))
    with pytest.raises(PluginError) as caught:
        build(f"{name}/resnet18")
    for word in (f"{name} is not installed", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("operator torchvision::nms does not exist"), ModuleNotFoundError("No PIL", name="PIL")]
)
def test_library_that_fails_to_import(absent, error):
    absent("torchvision", error)
    with pytest.raises(PluginError, match=f"torchvision fails to import .*{error}.*build for your torch"):
        build("torchvision/resnet18")


def test_missing_library_error_gives_position_in_recipe(absent, tmp_path):
    absent("timm", ModuleNotFoundError("No module named 'timm'", name="timm"))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"r\.yaml:3:\d+: backbone\.name: timm is not installed"):
        recipe.load(path)


def test_registry_entry_gives_library_and_version(timm, monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"timm": "1.0.9"}[name])
    entry = registry.backbones.entry("timm/resnet18")
    assert (entry.name, entry.origin, entry.version) == ("timm/resnet18", "timm", "1.0.9")
    assert SimpleNamespace(**{f.prefix: f.summary for f in registry.backbones.families()}).timm.startswith("Any model")
