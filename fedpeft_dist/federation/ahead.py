"""What a config costs and spends, without running it: no weights, and as little data as it takes."""

from dataclasses import dataclass

from fedpeft_dist.algorithms import traffic
from fedpeft_dist.config.schema import AccountedPrivacy, RunConfig
from fedpeft_dist.data import count_classes, load_dataset
from fedpeft_dist.data.partition import Partition, SharedPoolPartition
from fedpeft_dist.federation.setup import make_clients
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.methods import build_lane_model
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy.plan import PrivacyPlan, make_privacy_plan


@dataclass(frozen=True)
class Cost:
    """Parameters of a run, and the bytes that its clients send. They receive as many as they send."""

    trainable_parameters: int
    backbone_parameters: int
    uplink_bytes_per_client: int
    uplink_bytes_per_round: int
    uplink_bytes_total: int
    share_of_full: float
    """Share of the bytes that full fine-tuning of the same backbone would send."""


def compute_cost(config: RunConfig) -> Cost:
    """Computed on the meta device, in seconds.

    Raises:
        ConfigError: the backbone cannot be made, or the method does not fit it.
    """
    model = build_lane_model(config, count_classes(config.data), device="meta")
    parameters = model.layout.num_parameters
    per_client = traffic(config, parameters).uplink
    per_round = per_client * config.federation.cohort
    return Cost(
        trainable_parameters=parameters,
        backbone_parameters=model.backbone.num_parameters,
        uplink_bytes_per_client=per_client,
        uplink_bytes_per_round=per_round,
        uplink_bytes_total=per_round * config.federation.rounds,
        share_of_full=parameters / model.backbone.num_parameters,
    )


def plan_privacy(config: RunConfig) -> PrivacyPlan | None:
    """The privacy plan that a run would have; None if nothing is accounted for.

    Raises:
        ConfigError: no plan meets the config, its data cannot be read, or its cohort or deadline is impossible.
    """
    if not isinstance(config.privacy, AccountedPrivacy):
        return None
    takes_time = config.federation.participation.devices.name != "none"
    num_parameters = compute_cost(config).trainable_parameters if takes_time else 0
    needs_sizes = config.privacy.name == "sample" or _may_leave_clients_empty(config)
    partition = _partition(config) if needs_sizes or config.data.clients is None else _stand_in(config)
    participation = Participation(config, partition, traffic(config, num_parameters))
    if needs_sizes:  # else nothing depends on who is late, and the clients' sizes are not known here
        participation.check()
    return make_privacy_plan(config, participation)


def _partition(config: RunConfig) -> Partition:
    dataset = load_dataset(config.data, derive_seed(config.seed, "data"))
    return make_clients(config, dataset.train)[0]


def _stand_in(config: RunConfig) -> Partition:
    """As many clients as the config says, all of one size."""
    return SharedPoolPartition(config.data.clients, samples_per_client=config.client.batch_size, pool=1)


def _may_leave_clients_empty(config: RunConfig) -> bool:
    """Whether only the data tells how many clients have samples. Other partitions give each client some."""
    return getattr(config.data.partition, "min_samples", None) == 0
