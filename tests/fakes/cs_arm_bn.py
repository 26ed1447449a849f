"""Small classifiers of plates, which tests of several folders share."""

import torch

from fulgurite.models.cs_arm_bn import PlateClassifier, SmallResNet


def small_classifier(method=None, *, classes=4, channels=3, **options):
    """A classifier of width 4, whose weights are the same each time.

    Args:
        method: The method; None for the default one.
        classes: Number of classes.
        channels: Number of channels.
        options: Of the classifier.
    """
    torch.manual_seed(0)
    return PlateClassifier(
        lambda c, k: SmallResNet(c, k, width=4), method,
        num_classes=classes, in_channels=channels, **options,
    )  # fmt: skip
