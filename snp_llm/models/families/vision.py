"""Families of models that classify images, one entry each. Tables alone."""

from snp_llm.models.families.family import Family

VISION = (
    Family("ViT", "vit"),
    Family("DeiT", "deit"),
    Family("ResNet", "resnet"),
    Family("VGG", "vgg"),
    Family("VGG with batch norms", "vgg_bn"),
)
