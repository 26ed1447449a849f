"""FedAvg in Flower's simulation, on a problem that ``fedsir_rounds`` saved.

Run by it as ``python -m benchmarks.flower_fedavg PROBLEM ROUNDS CPUS`` with a Python that has
``flwr[simulation]``; prints the seconds of each round as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def main(path: str, rounds: int, cpus: int) -> list[float]:
    """Seconds of each round."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    from torch.utils.data import DataLoader

    from benchmarks.plain_fedavg import ClientImages, load_problem, train_client

    client_app, server_app = ClientApp(), ServerApp()
    times: list[float] = []

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        model, problem = load_problem(path)
        client = int(context.node_config["partition-id"])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data = ClientImages(problem, client)
        train_client(model, DataLoader(data, problem.batch_size, shuffle=True), problem)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(data)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        model, _ = load_problem(path)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        result = strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: times.append(time.perf_counter()),
        )
        if len(result.train_metrics_clientapp) != rounds:
            times.clear()  # clients failed: their messages are in Flower's log

    backend = {
        "init_args": {"num_cpus": cpus, "include_dashboard": False},
        "client_resources": {"num_cpus": 1},
    }
    clients = len(load_problem(path)[1].labels)
    run_simulation(server_app, client_app, clients, backend_config=backend)
    return [b - a for a, b in pairwise(times)]


if __name__ == "__main__":
    print("SECONDS", json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
