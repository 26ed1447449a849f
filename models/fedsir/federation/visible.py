"""The data that a method may see.

Axes: N_k samples of client k.
"""

from __future__ import annotations

from fulgurite.domains.fedsir import FederatedData

__all__ = ["VisibleData"]


class VisibleData:
    """View of a DataModule that has the members of :class:`FederatedData` and no others.

    Args:
        data: The DataModule, whose true labels stay out of reach.
    """

    def __init__(self, data: FederatedData) -> None:
        self.num_classes, self.num_clients = data.num_classes, data.num_clients
        self.labels = data.labels
        # functions, not bound methods: those would carry the DataModule along
        self.client_index = lambda client: data.client_index(client)
        self.client_images = lambda client: data.client_images(client)
        self.augment_batch = lambda images, generator: data.augment_batch(images, generator)
        self.plain_batch = lambda images: data.plain_batch(images)
