"""A contestant: the same federation in pfl-research (PyPI `pfl`), as its guide to fast simulations advises.

All data is in memory, in one prepared `pfl.data.Dataset` a client. Several processes share a cohort as with torchrun.
Neither clients nor the global model are evaluated. Its argument is that of benchmarks/bare.py, without `kind`.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    own, first = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    os.environ["PFL_WORKER_RANK"] = str(own)
    os.environ["PFL_WORKER_ADDRESSES"] = ",".join(
        f"localhost:{first + n}" for n in range(int(os.environ["WORLD_SIZE"]))
    )

import torch
from bare import Federation
from contest import claim_output, serve
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import save_file
from torch import nn
from workloads import SGD, Workload


def main() -> None:
    answers, argument = claim_output(), json.loads(sys.argv[1])
    federation = Federation(Workload(**argument["workload"]), argument["file"])
    rounds = Rounds(federation)
    serve(answers, rounds.run, lambda path: save_file(federation.tensors(), path))


class Classifier(nn.Module):
    """The model with the two functions that pfl asks of it. It counts the samples that it is trained on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.samples = model, 0

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.samples += len(images)
        return nn.functional.cross_entropy(self.model(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict:
        return {}


class Rounds:
    """A federation that goes on from round to round, as `run` goes on where the one before has ended."""

    def __init__(self, federation: Federation):
        self.workload = workload = federation.workload
        self.classifier = Classifier(federation.model)
        trained, optimizer = list(federation.trained.values()), {k: v for k, v in SGD.items() if k != "lr"}
        self.model = PyTorchModel(
            model=self.classifier,
            local_optimizer_create=partial(torch.optim.SGD, fused=True, **optimizer),
            central_optimizer=torch.optim.SGD(trained, 1.0),
        )
        datasets = {
            number: Dataset((federation.images[samples], federation.labels[samples]), user_id=str(number))
            for number, samples in enumerate(federation.clients)
        }
        sampler = get_user_sampler("minimize_reuse", list(datasets))
        data = FederatedDataset(datasets.__getitem__, sampler)
        self.backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
        self.algorithm, self.done = FederatedAveraging(), 0
        self.training = NNTrainHyperParams(
            local_learning_rate=SGD["lr"], local_num_epochs=workload.epochs, local_batch_size=workload.batch
        )

    def run(self, number: int) -> int:
        before, self.done = self.classifier.samples, self.done + number
        parameters = NNAlgorithmParams(
            central_num_iterations=self.done,
            evaluation_frequency=10**9,  # in iteration 0 alone, which no turn holds
            train_cohort_size=self.workload.cohort,
            val_cohort_size=0,
        )
        evaluation = NNEvalHyperParams(local_batch_size=None)
        self.algorithm.run(parameters, self.backend, self.model, self.training, evaluation, callbacks=[])
        return self.classifier.samples - before


if __name__ == "__main__":
    main()
