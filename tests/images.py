"""Tiny classifiers of images of every kind, a folder of images, and the recipe for them."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor

from snp_llm import Recipe
from snp_llm.models import registry  # noqa: F401 - makes VGG known

CLASSES = ("apple", "boot", "coat", "dog")
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
TRANSFORMER = {
    **LABELS,
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RESNET = {**LABELS, "image_size": 16, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
VGG = {**LABELS, "image_size": 16, "layers": [8, "M", 12, 16, "M"], "fc_sizes": [24, 16], "pool_size": 2}
KINDS = {
    "vit": ("vit", TRANSFORMER),
    "deit": ("deit", {**TRANSFORMER, "architectures": ["DeiTForImageClassification"]}),
    "teacher": ("deit", {**TRANSFORMER, "architectures": ["DeiTForImageClassificationWithTeacher"]}),
    "bottleneck": ("resnet", {**RESNET, "layer_type": "bottleneck"}),
    "basic": ("resnet", {**RESNET, "layer_type": "basic"}),
    "vgg": ("vgg", {**VGG, "batch_norm": False}),
    "vgg_bn": ("vgg_bn", VGG),
}
CONVOLUTIONAL = ("bottleneck", "basic", "vgg", "vgg_bn")


def small_classifier(kind: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random model, with statistics of batch norms that are not those of a new one."""
    model_type, values = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**values, **overrides})
    model = AutoModelForImageClassification.from_config(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return model.to(dtype)


def small_processor(size: int = 16) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def image_folder(folder: Path, each: int = 6, grey: bool = False) -> Path:
    """Images of noise in folders by class, 20 x 20 pixels."""
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            shape = (20, 20) if grey else (20, 20, 3)
            values = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            Image.fromarray(values.numpy()).save(folder / name / f"{number}.png")
    return folder


def saved_classifier(kind: str, folder: Path, **overrides) -> Path:
    small_classifier(kind, **overrides).save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


def image_recipe(**overrides) -> Recipe:
    """Noise as images: they cost nothing to read."""
    values = {"calibration": "noise", "num_samples": 32, "sparsity": 0.3, "round_to": 4, "eval": False}
    return Recipe("small", **{**values, **overrides})
