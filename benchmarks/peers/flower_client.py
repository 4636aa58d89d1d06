"""Flower's client: the bare loop's local training, on a model that each worker process keeps."""

from __future__ import annotations

from functools import cache

import torch
from bare import Federation, Loop
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from workloads import Workload

app = ClientApp()


@cache
def loop(workload: str, file: str, threads: int) -> Loop:
    """Built once in each worker. Flower's own examples build a model for each message, which takes longer."""
    import json

    torch.set_num_threads(threads)
    return Loop(Federation(Workload(**json.loads(workload)), file))


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    own = loop(config["workload"], config["file"], config["threads"])
    received = message.content["arrays"].to_torch_state_dict()
    own.load([received[name] for name in own.federation.trained])
    samples = own.federation.clients[context.node_config["partition-id"]]
    before = own.samples
    own.train_client(samples)
    content = {
        "arrays": ArrayRecord(own.federation.tensors()),
        "metrics": MetricRecord({"num-examples": len(samples), "seen": own.samples - before}),
    }
    return Message(content=RecordDict(content), reply_to=message)
