"""Flower without a network: a grid that hands each message to the client app in this process."""

import uuid
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity


def identify_task():
    """Say which run this process belongs to, as Flower's launcher does."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def make_context(node_config=None, run_config=None):
    return Context(
        run_id=1,
        node_id=1,
        node_config=node_config or {},
        state=RecordDict(),
        run_config=run_config or {},
    )


def send_over_wire(message):
    """What arrives of a message: it goes through Flower's own bytes."""
    return message_from_proto(message_to_proto(message))


@dataclass
class FakeGrid:
    """Nodes by number, whose apps run when the server looks for their replies.

    ``before_reply`` sees each question (message, node) and may return an error's reason instead of
    letting the client answer; ``exchanged`` holds all messages and replies.
    """

    app: ClientApp
    nodes: dict[int, dict]
    before_reply: object = None
    exchanged: list = field(default_factory=list)
    inbox: dict = field(default_factory=dict)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        identify_task()
        names = []
        for message in messages:
            names.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = names[-1]
            self.inbox[names[-1]] = send_over_wire(message)
        return names

    def pull_messages(self, names):
        return [self.answer(self.inbox.pop(name)) for name in names if name in self.inbox]

    def answer(self, message):
        node = message.metadata.dst_node_id
        reason = self.before_reply(message, node) if self.before_reply else None
        if node not in self.nodes:
            reason = "the node is away"
        if reason:
            return Message(Error(5, reason), reply_to=message)
        reply = send_over_wire(self.app(message, make_context(self.nodes[node])))
        self.exchanged.append((message, reply))
        return reply


def envelope_of(message):
    return dict(message.content.config_records["envelope"])


def class_of(message):
    return str(message.content.config_records["message"]["class"]).rpartition(".")[2]


def tensors_of(message):
    return {k: v.numpy() for k, v in message.content.array_records["tensors"].items()}
