"""FedSIR and its baselines as a Flower app: the same rounds, with clients that own their data.

``fulgurite federate app`` writes the app's folder; ``flwr run`` starts it. The server is
``fulgurite fit`` (:mod:`.server`), whose clients are asked over Flower's grid (:mod:`.link`); each
client answers from its own samples (:mod:`.client`). What goes over the network are the tensors and
numbers of the method's messages, see :mod:`fulgurite.models.fedsir.federation.messages`.

Needs ``fulgurite[flower]``.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["make_client_app", "make_server_app"]


def make_server_app(folder: Path) -> ServerApp:
    """The server of an app.

    Args:
        folder: The app's package, which holds ``config.yaml``.
    """
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        from fulgurite.models.fedsir.flower.server import run_server

        run_server(grid, context, folder)

    return app


def make_client_app(folder: Path) -> ClientApp:
    """The client of an app.

    Args:
        folder: The app's package, which holds ``config.yaml``.
    """
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        from fulgurite.models.fedsir.flower.client import describe_client
        from fulgurite.models.fedsir.flower.wire import pack

        return Message(pack(describe_client(context, folder)), reply_to=message)

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        from fulgurite.models.fedsir.flower.client import answer_message

        return answer_message(message, context, folder)

    return app
