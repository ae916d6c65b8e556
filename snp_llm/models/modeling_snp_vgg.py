"""VGG for image classification with the widths of all layers in its config; this file travels with the model.

    AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)

needs nothing but transformers. Modules are named as in torchvision, whose checkpoints therefore fit.
"""

# mypy: ignore-errors

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class SnpVggConfig(PretrainedConfig):
    """Widths of a VGG.

    Attributes:
        layers: channels of each convolution in turn; "M" is a pooling of 2 x 2.
        fc_sizes: channels of the hidden linear layers.
        pool_size: height and width to which the last feature map is pooled.
        batch_norm: whether a batch norm follows each convolution.
        image_size: that the preprocessor makes; others are taken as well.
    """

    model_type = "snp_vgg"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        layers=VGG16,
        fc_sizes=(4096, 4096),
        pool_size=7,
        batch_norm=True,
        num_channels=3,
        image_size=224,
        dropout=0.5,
        **kwargs,
    ):
        self.layers, self.fc_sizes, self.pool_size = list(layers), list(fc_sizes), pool_size
        self.batch_norm, self.num_channels = batch_norm, num_channels
        self.image_size, self.dropout = image_size, dropout
        super().__init__(**kwargs)


class VggConfig(SnpVggConfig):
    """Widths of a VGG that was never pruned."""

    model_type = "vgg"

    def __init__(self, **kwargs):  # transformers gives a config without one its own
        super().__init__(**kwargs)


class VggBnConfig(SnpVggConfig):
    """Widths of a VGG with batch norms that was never pruned."""

    model_type = "vgg_bn"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class SnpVggForImageClassification(PreTrainedModel):
    """VGG, with widths of its own in every layer."""

    config_class = SnpVggConfig
    main_input_name = "pixel_values"
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config):
        super().__init__(config)
        modules, width = [], config.num_channels
        for layer in config.layers:
            if layer == "M":
                modules.append(nn.MaxPool2d(2, 2))
                continue
            modules.append(nn.Conv2d(width, layer, 3, padding=1))
            modules += [nn.BatchNorm2d(layer)] if config.batch_norm else []
            modules.append(nn.ReLU())
            width = layer
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(config.pool_size)
        head, width = [], width * config.pool_size**2
        for size in config.fc_sizes:
            head += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = size
        self.classifier = nn.Sequential(*head, nn.Linear(width, config.num_labels))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(torch.flatten(self.avgpool(self.features(pixel_values)), 1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
