"""``fulgurite export``: the network of a trained run as a file that needs no fulgurite.

A LightningModule hands its network over by a method
``export_network(request: ExportRequest) -> ExportableNetwork``
(:meth:`fulgurite.base.SystemModule.export_network` refuses by name). The rest is the same for all:
the file is written, loaded again, and compared with the network before it takes its name.
"""

from fulgurite.export.exportable import ExportableNetwork, ExportRequest, Port

__all__ = ["ExportRequest", "ExportableNetwork", "Port"]
