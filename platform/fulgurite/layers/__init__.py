"""Networks that several papers use."""

from fulgurite.layers.resnet import ResNet, ResNet18, ResNet34, ResNet50

__all__ = ["ResNet", "ResNet18", "ResNet34", "ResNet50"]
