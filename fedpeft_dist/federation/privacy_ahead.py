"""The privacy plan of a config that is not run: without weights, and with as little data as it takes."""

from __future__ import annotations

from fedpeft_dist.config.schema import AccountedPrivacy, RunConfig
from fedpeft_dist.data import load_dataset
from fedpeft_dist.data.partition import Partition, SharedPoolPartition
from fedpeft_dist.federation.cost import compute_cost
from fedpeft_dist.federation.simulation import make_clients
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.lanes.wire import BYTES_PER_PARAMETER
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy.plan import PrivacyPlan, make_privacy_plan


def plan_ahead(config: RunConfig) -> PrivacyPlan | None:
    """The plan that a run would have; None where nothing is accounted for.

    Raises:
        ConfigError: as `make_privacy_plan`; data that cannot be read, a cohort or a deadline that cannot be.
    """
    if not isinstance(config.privacy, AccountedPrivacy):
        return None
    takes_time = config.federation.participation.devices.name != "none"
    num_parameters = compute_cost(config).trainable_parameters if takes_time else 0
    needs_sizes = config.privacy.name == "sample" or _may_leave_clients_empty(config)
    partition = _partition(config) if needs_sizes or config.data.clients is None else _stand_in(config)
    participation = Participation(config, partition, num_parameters * BYTES_PER_PARAMETER)
    if needs_sizes:  # else nothing depends on who is late, nor are the clients' sizes known here
        participation.check()
    return make_privacy_plan(config, participation)


def _partition(config: RunConfig) -> Partition:
    dataset = load_dataset(config.data, derive_seed(config.seed, "data"))
    return make_clients(config, dataset.train)[0]


def _stand_in(config: RunConfig) -> Partition:
    """As many clients as the config says, all of one size."""
    return SharedPoolPartition(config.data.clients, samples_per_client=config.client.batch_size, pool=1)


def _may_leave_clients_empty(config: RunConfig) -> bool:
    """Whether only the data tells how many clients there are to draw from. Other partitions give each a sample."""
    return getattr(config.data.partition, "min_samples", None) == 0
