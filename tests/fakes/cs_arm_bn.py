"""Small classifiers of plates, which tests of several folders share."""

import torch

from fulgurite.models.cs_arm_bn import PlateClassifier, SmallResNet

#: A world of three plates with three sites, one of another laboratory, that is rendered at once.
TINY_WORLD = {
    "batches": [2, 1], "plates": [1, 1], "sites": 1, "size": 8, "wells_per_class": 1, "controls": 4,
}  # fmt: skip


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
