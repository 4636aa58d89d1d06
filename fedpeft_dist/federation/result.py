"""What a complete run leaves: its trained parameters by name, its summary, its state."""

import hashlib
from typing import Any

from fedpeft_dist.algorithms.state import State
from fedpeft_dist.federation.simulation import Simulation
from fedpeft_dist.privacy.statements import summarize
from fedpeft_dist.tracking.run_directory import COMPLETE, RunDirectory

PARTICIPATION = ("selected", "dropped", "late", "surplus", "partial", "wasted_samples")
"""Totals that a summary shows of runs whose clients are not always there."""


def write_result(state: State, simulation: Simulation, directory: RunDirectory) -> None:
    """Writes the directory's last files; for rank 0."""
    config, setup = simulation.config, simulation.setup
    vector = state.vector.cpu()
    digest = hashlib.sha256(vector.numpy().astype("<f4").tobytes()).hexdigest()
    metadata = {
        "method": config.method.name,
        "backbone": config.backbone.name,
        "backbone_sha256": setup.model.backbone.sha256,
        **setup.recipe.metadata(),
        "weights_sha256": digest,
    }
    directory.write_trainable(setup.model.layout.split(vector), metadata)
    directory.write_summary(_summary(state, simulation, digest))
    is_short = state.round < config.federation.rounds
    budget = {"stopped_at_epsilon": config.privacy.stop_at_epsilon} if is_short else {}
    directory.write_state(COMPLETE, state.round, **budget)


def _summary(state: State, simulation: Simulation, digest: str) -> dict[str, Any]:
    config, totals = simulation.config, state.totals
    return {
        "method": config.method.name,
        "trainable_parameters": len(state.vector),
        "backbone_parameters": simulation.setup.model.backbone.num_parameters,
        "rounds": state.round,
        "final_accuracy": totals["final_accuracy"],
        "best_accuracy": totals["best_accuracy"],
        "uplink_bytes_total": int(totals["uplink_bytes"]),
        "downlink_bytes_total": int(totals["downlink_bytes"]),
        "rejected_total": int(totals["rejected"]),
        "participation": {key: int(totals[key]) for key in PARTICIPATION if key in totals} or None,
        "simulated_hours": totals["simulated_seconds"] / 3600 if "simulated_seconds" in totals else None,
        "samples_per_second": totals["samples"] / totals["seconds"],
        "lanes": config.runtime.lanes,
        "world_size": simulation.runtime.world_size,
        "sharding": simulation.setup.sharding_figures,
        "weights_sha256": digest,
        "privacy": summarize(config.privacy, simulation.privacy_figures(state)),
    }
