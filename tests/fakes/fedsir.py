"""Options, images and clients of federations, which tests of several folders share."""

import torch

from fulgurite.datamodules.fedsir import ImageArrays, ImageSource, Listing

#: Package of the methods, by which options name them.
METHODS = "fulgurite.models.fedsir.methods"
#: The method that needs least time.
FEDAVG = f"--model.init_args.method={METHODS}.FedAvg"


class NumberedImages(ImageSource):
    """Images whose pixels are their row, even and odd ones in turn.

    Args:
        total: How many there are.
        copies: Copies of each that train.
        names: Names of the two classes.
        key: Name of the image of a row; None for images without names.
        writers: How many have written them in turn, as the column ``client``; 0 for no column.
        options: Of each source.
    """

    num_classes, in_channels, image_size = 2, 1, (2, 2)

    def __init__(
        self, total=60, copies=1, *, names=("even", "odd"), key="{}.png", writers=5, **options
    ):
        super().__init__(**options)
        self.total, self.copies, self.names = total, copies, names
        self.key, self.writers = key, writers

    def read(self):
        rows = torch.arange(self.total)
        images = rows.byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
        keys = tuple(self.key.format(row) for row in range(self.total)) if self.key else None
        columns = {}
        if self.writers:
            columns["client"] = tuple(f"w{row % self.writers}" for row in range(self.total))
        listing = Listing(self.total, keys, columns)
        return ImageArrays(images, rows % 2, images, rows % 2, self.names, listing)


class FakeLabels:
    """Given and current labels of a federation."""

    def __init__(self, given):
        self.given, self.current = given, given.clone()

    def write(self, index, labels):
        self.current[index] = labels


class FakeFederatedData:
    """Images in memory, as the engine of a federation sees them.

    Args:
        images: All of them.
        given: Their labels.
        parts: Indices of each client.
        num_classes: Number of classes.
    """

    def __init__(self, images, given, parts, num_classes):
        self.images, self.labels, self.parts = images, FakeLabels(given), parts
        self.num_classes, self.num_clients = num_classes, len(parts)

    def client_index(self, client):
        return self.parts[client]

    def client_images(self, client):
        return self.images[self.parts[client]]

    def augment_batch(self, images, generator):
        return self.plain_batch(images)

    def plain_batch(self, images):
        return images
