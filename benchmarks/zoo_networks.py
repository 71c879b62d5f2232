"""The networks of benchmarks/zoo.py."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.utils.inputs import Example

# Model types of transformers that take images, with small configurations.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2]},
    "mobilenet_v1": {},
    "mobilenet_v2": {},
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 0.5,
        "image_size": 224,
        "hidden_dim": 1280,
        "initializer_range": 0.2,
    },
    "regnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "groups_width": 8},
    "levit": {},
    "segformer": {},
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
    "bit": {"embedding_size": 32, "hidden_sizes": [128, 256], "depths": [1, 2], "num_groups": 8},
    "poolformer": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "vit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "deit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "beit": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "dinov2": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 224},
    "swin": {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    "swinv2": {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
    "pvt_v2": {},
    "focalnet": {"embed_dim": 24, "depths": [1, 2], "hidden_sizes": [48, 96], "focal_levels": [2, 2]},
    "mobilevit": {"initializer_range": 0.2},
}
# Model types that take tokens, with a head that classifies sequences.
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
SIZES |= {"vocab_size": 1000, "pad_token_id": 0}
FEWER_KEYS = {"num_key_value_heads": 2, "head_dim": 16}
TOKENS: dict[str, dict[str, Any]] = dict.fromkeys(
    "bert roberta electra deberta-v2 camembert xlm-roberta mpnet gpt_neox phi".split(), SIZES
)
TOKENS |= dict.fromkeys("llama mistral qwen2 qwen3 gemma gemma2 stablelm".split(), SIZES | FEWER_KEYS)
TOKENS["opt"] = {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 256}
TOKENS["albert"] = {**SIZES, "embedding_size": 32}
TOKENS["gpt2"] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "pad_token_id": 0}
TOKENS["distilbert"] = {"dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 4, "vocab_size": 1000}
TOKENS["bloom"] = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "pad_token_id": 3}
SEQUENCES = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
SEQUENCES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 1000}
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}
DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": RESNET | {"out_features": ["stage2"]}}
SOUNDS = {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embedding_groups": 4}
WHISPER = {"max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Model types with other inputs: the end of the model's class name, the configuration, and the inputs.
OTHERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "t5": (
        "ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 1000},
        ["input_ids", "decoder_input_ids"],
    ),
    "bart": ("ForConditionalGeneration", SEQUENCES, ["input_ids", "decoder_input_ids"]),
    "marian": ("MTModel", SEQUENCES | {"pad_token_id": 0, "eos_token_id": 1}, ["input_ids", "decoder_input_ids"]),
    "whisper": ("ForConditionalGeneration", SEQUENCES | WHISPER, ["input_features", "decoder_input_ids"]),
    "clip": (
        "Model",
        {"text_config": SIZES | {"eos_token_id": 999}, "vision_config": SIZES | {"image_size": 64}},
        ["input_ids", "pixel_values"],
    ),
    "vilt": ("ForQuestionAnswering", SIZES | {"image_size": 64}, ["input_ids", "pixel_values"]),
    "wav2vec2": ("ForCTC", SIZES | SOUNDS, ["input_values"]),
    "detr": ("ForObjectDetection", SEQUENCES | DETR, ["pixel_values"]),
    "yolos": ("ForObjectDetection", SIZES | {"image_size": [64, 64], "num_detection_tokens": 10}, ["pixel_values"]),
    "layoutlm": ("ForTokenClassification", SIZES, ["input_ids"]),
}
INPUTS = {"input_features": (2, 80, 100), "input_values": (2, 4000), "pixel_values": (2, 3, 64, 64)}
# What a model of transformers is for; it also returns what is inside.
RESULTS = ("logits", "logits_per_image", "pred_boxes", "last_hidden_state")


def names(which: str) -> list[str]:
    """The networks of a list: all of torchvision without video and quantized ones, the smallest of each of timm's
    modules by its name, model types of transformers."""
    if which == "torchvision":
        from torchvision import models

        skipped = ("quantized_", "mc3", "r3d", "r2plus1d", "s3d", "mvit", "swin3d")
        return [name for name in models.list_models() if not name.startswith(skipped)]
    if which == "timm":
        import timm

        chosen = {}
        for module in timm.list_modules():
            if found := timm.list_models(module=module):
                sizes = {name: sum(p.numel() for p in on_meta(name).parameters()) for name in found}
                chosen[module] = min(sizes, key=lambda name: sizes[name])
        return list(dict.fromkeys(chosen.values()))
    return [*TRANSFORMERS, *TOKENS, *OTHERS]


def on_meta(name: str) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except Exception:  # Some initialize with numbers.
        return timm.create_model(name)


class Results(nn.Module):
    """A model of transformers that returns its results alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        output = self.model(*args, **kwargs)
        return [output[name] for name in RESULTS if name in output]


def build(which: str, name: str) -> tuple[nn.Module, Example]:
    """Return a network with settled norms, and its inputs."""
    torch.manual_seed(0)
    if which == "torchvision":
        from torchvision import models

        detection = name.startswith(("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd"))
        options: dict[str, Any] = {"weights": None, **({"weights_backbone": None} if detection else {})}
        # Untrained detectors are sure of nothing.
        threshold = "box_score_thresh" if "rcnn" in name else "score_thresh"
        options |= {threshold: 0.0} if detection else {}
        if name.startswith(("deeplab", "fcn", "lraspp")):
            options["weights_backbone"] = None
        model = models.get_model(name, **options)
        if name.startswith("raft"):
            return model.eval(), (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
        size = 299 if name == "inception_v3" else 224
        if detection:
            images = torch.randn(2, 3, size, size)
            settle(model, images, [dict(TARGET) for _ in images])
            return model.eval(), images
    elif which == "timm":
        import timm

        model = timm.create_model(name)
        size = model.default_cfg["input_size"][-1] if getattr(model, "default_cfg", None) else 224
    else:
        return build_transformer(name)
    images = torch.randn(2, 3, size, size)
    settle(model, images)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() > 1 and parameter.std() < 1e-3:
            nn.init.normal_(parameter, std=0.02)  # such as classifiers of zeros
    return model.eval(), images


def build_transformer(name: str) -> tuple[nn.Module, Example]:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification

    if name in OTHERS:
        ending, options, inputs = OTHERS[name]
        config = AutoConfig.for_model(name, **options)
        model = getattr(transformers, type(config).__name__.removesuffix("Config") + ending)(config)
        example = {
            key: torch.randn(INPUTS[key]) if key in INPUTS else torch.randint(5, 90, (2, 16 - 4 * number))
            for number, key in enumerate(inputs)
        }
        return Results(model).eval(), example
    config = AutoConfig.for_model(name, **{**TRANSFORMERS, **TOKENS}[name])
    if name in TOKENS:
        model = AutoModelForSequenceClassification.from_config(config)
        return Results(model).eval(), torch.randint(5, 90, (2, 16))
    config.architectures = []  # so that the first class is taken of a type with several
    try:
        model = AutoModelForImageClassification.from_config(config)
    except (TypeError, ValueError):  # its type has more parts
        model = AutoModel.from_config(config)
    size = getattr(config, "image_size", 224)
    size = size if isinstance(size, int) else size[-1]
    images = torch.randn(2, 3, size, size)
    settle(model, images)
    return Results(model).eval(), images


# Of an image, for detectors in train mode.
TARGET = {
    "boxes": torch.tensor([[20.0, 20.0, 120.0, 150.0]]),
    "labels": torch.tensor([1]),
    "masks": torch.ones(1, 224, 224, dtype=torch.uint8),
    "keypoints": torch.tensor([[[60.0, 60.0, 1.0]] * 17]),
}


def settle(model: nn.Module, images: Tensor, *targets: Any) -> None:
    """Give norms statistics of the data and shifts that are not zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = 1.0
    with torch.no_grad(), suppress(Exception):  # Detectors want targets.
        model.train()(images, *targets)
