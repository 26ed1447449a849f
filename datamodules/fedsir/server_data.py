"""The images by which the server of a federation judges its model.

Shapes: N samples, H W image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.batches import ImageBatches
from fulgurite.datamodules.fedsir.datamodule import FederatedDataModule
from fulgurite.datamodules.fedsir.labels import LabelStore
from fulgurite.errors import ConfigError

__all__ = ["ServerDataModule"]


class ServerDataModule(FederatedDataModule):
    """Validation and test images of a federation whose clients hold the training images.

    Its options are those of :class:`FederatedDataModule`, so that a federation and its simulation
    have one configuration: the validation split, and the normalisation where that is measured, are
    those of the simulation. Partition and noise are the clients', and nothing of them is made here.
    A source without training images has no validation split.

    Raises:
        ConfigError: There are no training images, and no normalisation is given.
    """

    def setup(self, stage: str | None = None) -> None:
        """Load the images, and let go of those of training; a second call does nothing."""
        if self._ready:
            return
        arrays = self.source.load()
        options = self.image_options
        if len(arrays.samples()):
            self._split_samples(arrays)
        else:
            if options.mean is None or options.std is None:
                raise ConfigError(
                    "The server has no training images to measure the normalisation on.",
                    "Give `data.init_args.images.mean` and `std`, one number for each channel.",
                )
            self._images, self._rows = arrays.train_images, torch.zeros(0, dtype=torch.int64)
            empty = torch.zeros(0, dtype=torch.int64)
            self._val = ImageBatches(arrays.train_images, empty, empty, self.plain_batch)
            self._test = ImageBatches(
                arrays.test_images, arrays.test_labels, None, self.plain_batch
            )
        self._measure_channels(arrays.train_images)
        self._images = self._images[:0]
        del self._rows
        self.class_names = arrays.class_names
        self.labels = LabelStore(torch.zeros(0, dtype=torch.int64), len(arrays.class_names))
        self.evaluation = None
        self._ready = True

    def client_index(self, client: int) -> Tensor:
        """Return no sample: the clients have them. Shape: (0,)."""
        return torch.zeros(0, dtype=torch.int64)

    def client_images(self, client: int) -> Tensor:
        """Return no image. Shape: (0, C, H, W)."""
        return self._images
