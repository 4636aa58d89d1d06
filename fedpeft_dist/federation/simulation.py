"""Everything that rounds compute with: a setup, who takes part, the algorithm, privacy and the trainer.

Shapes: N clients, P trainable parameters.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedpeft_dist.algorithms import make_algorithm, traffic
from fedpeft_dist.algorithms.algorithm import Federation
from fedpeft_dist.algorithms.server_optimizers import make_server_optimizer
from fedpeft_dist.algorithms.state import State
from fedpeft_dist.checkpoint import Noise
from fedpeft_dist.config.load import with_values
from fedpeft_dist.config.schema import RunConfig
from fedpeft_dist.federation.aggregation import Aggregation, MeanRule, WeightedMean, fraction_bits
from fedpeft_dist.federation.setup import Setup
from fedpeft_dist.lanes.random import derive_seed
from fedpeft_dist.lanes.wire import Traffic
from fedpeft_dist.methods.compiled import compile_blocks
from fedpeft_dist.participation.plan import Participation
from fedpeft_dist.privacy.noise_seed import derive_noise_seed, draw_noise_seed
from fedpeft_dist.privacy.user_level import NoisyMean
from fedpeft_dist.runtime.collectives import min_over_ranks
from fedpeft_dist.runtime.process import Runtime
from fedpeft_dist.tracking.run_log import NO_TOTALS
from fedpeft_dist.training.batches import EpochBatches, PoissonBatches
from fedpeft_dist.training.gradients import MeanGradient, NoisyGradient
from fedpeft_dist.training.lane_count import choose_lanes, choose_private_lanes, choose_slots
from fedpeft_dist.training.rates import rate_factor
from fedpeft_dist.training.schedule import ClientTask, Schedule
from fedpeft_dist.training.trainer import RoundStart, Trainer

if TYPE_CHECKING:
    from fedpeft_dist.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Preparation:
    """The part of a simulation that each rank builds by itself, before ranks agree on the rest."""

    setup: Setup
    traffic: Traffic
    participation: Participation
    privacy_plan: "PrivacyPlan | None"


def prepare(setup: Setup, begun_with: Noise | None = None) -> Preparation:
    """
    Args:
        begun_with: the noise of a run that goes on.

    Raises:
        ConfigError: a trace cannot be read, a cohort or a deadline is impossible, a privacy target cannot be met.
    """
    config = setup.config
    sizes = traffic(config, setup.model.layout.num_parameters)
    participation = Participation(config, setup.partition, sizes)
    participation.check()
    if config.privacy.name in ("none", "paper_noise"):
        return Preparation(setup, sizes, participation, None)
    from fedpeft_dist.privacy.plan import make_privacy_plan  # dp-accounting takes a second

    stored = None if begun_with is None else begun_with.multipliers
    return Preparation(setup, sizes, participation, make_privacy_plan(config, participation, stored))


class Simulation:
    """Every rank must build it, and gets the same.

    Args:
        begun_with: the noise of a run that goes on.
    """

    def __init__(self, preparation: Preparation, begun_with: Noise | None = None):
        self.setup, self.participation = preparation.setup, preparation.participation
        self.traffic = preparation.traffic
        """What a client sends and receives in a round."""
        self.privacy_plan = preparation.privacy_plan
        self.runtime = self.setup.runtime
        config, vector = self.setup.config, self.setup.initial_vector
        self.algorithm = make_algorithm(
            config,
            Federation(
                num_parameters=len(vector),
                population=self.participation.population,
                device=vector.device,
                server=make_server_optimizer(config.server.optimizer),
                client_lr=config.client.optimizer.lr,
            ),
        )
        self.config = self._with_choices()
        """The run's config, with the values that `auto` stood for."""
        self.noise = self._make_noise(begun_with)
        is_private = config.privacy.name == "sample"
        parts = self._private_parts() if is_private else self._plain_parts(self.config.runtime.lanes)
        self.trainer = self._make_trainer(*parts)
        self.compile_seconds: float | None = None
        """How long the compilation took; None without one."""
        if config.runtime.compile:
            self._compile()

    @property
    def num_rounds(self) -> int:
        """`federation.rounds`, or fewer if the privacy budget is spent before."""
        return self.config.federation.rounds if self.privacy_plan is None else self.privacy_plan.num_rounds

    @property
    def pass_shape(self) -> tuple[int, int]:
        """Rows, and samples of a row, of each forward and backward pass."""
        schedule = self.trainer.schedule
        return (schedule.num_slots, 1) if schedule.num_slots else (schedule.num_lanes, self.setup.batch_size)

    def initial_state(self) -> State:
        vector, algorithm = self.setup.initial_vector, self.algorithm
        own = algorithm.initial_state()
        if self.config.privacy.name == "user":
            own["clip_norm"] = torch.tensor(self.config.privacy.clip_norm, dtype=torch.float64)
        server = algorithm.federation.server.initial_state(len(vector), vector.device)
        return State(0, vector, server, own, totals=NO_TOTALS)

    def aggregation(self, state: State) -> Aggregation:
        """Takes in the updates of the round that follows a state."""
        factor = rate_factor(self.config.client.schedule, state.round, self.config.federation.rounds)
        return Aggregation(self.algorithm, state, factor, self._largest_total_weight, self.mean_rule(state))

    def start(self, aggregation: Aggregation) -> RoundStart:
        """What the clients of a round start with."""
        state = aggregation.state
        offset = aggregation.offset if self.algorithm.row_size else None
        return RoundStart(state.round, state.vector, aggregation.lr_factor, offset)

    def _compile(self) -> None:
        self.trainer.warm_up(*self.pass_shape)  # the model learns how many random numbers a pass takes
        compile_blocks(self.setup.model.backbone.model)
        started = time.perf_counter()
        self.trainer.warm_up(*self.pass_shape)
        self.compile_seconds = time.perf_counter() - started

    def mean_rule(self, state: State) -> MeanRule:
        privacy, plan = self.config.privacy, self.privacy_plan
        if privacy.name != "user":
            return WeightedMean(fraction_bits(self._largest_total_weight))
        return NoisyMean(
            privacy,
            clip_norm=float(state.algorithm["clip_norm"]),
            largest_cohort=self._largest_cohort,
            expected_cohort=self.config.federation.cohort,
            noise_multiplier=plan.delta_noise_multiplier,
            count_noise=plan.count_noise,
            noise_seed=self.noise.seed,
        )

    def privacy_figures(self, state: State) -> dict[str, Any] | None:
        """What the rounds so far have spent; None if nothing is accounted for."""
        if self.privacy_plan is None:
            return None
        return self.privacy_plan.figures(state.round) | self.clipping(state)

    def spending(self, before: State, after: State | None) -> dict[str, float | None]:
        """A round's epsilon and clipping norm, for logs; empty without accounting.

        Args:
            after: the state after the round; None leaves epsilon out, which takes time.
        """
        if self.privacy_plan is None:
            return {}
        is_told = after is not None and self.runtime.is_main
        return {"epsilon": self.privacy_plan.epsilon(after.round) if is_told else None, **self.clipping(before)}

    def clipping(self, state: State) -> dict[str, float]:
        """The clipping norm, if it moves from round to round."""
        moves = getattr(self.config.privacy, "adaptive", None) is not None
        return {"clip_norm": float(state.algorithm["clip_norm"])} if moves else {}

    @property
    def _largest_cohort(self) -> int:
        """The most clients that a round can have."""
        federation = self.config.federation
        is_random = federation.participation.name == "poisson"
        return self.participation.population if is_random else federation.cohort

    @property
    def _largest_total_weight(self) -> int:
        """W."""
        alike = self.algorithm.counts_alike or self.config.privacy.name == "user"
        return self._largest_cohort if alike else self.participation.largest_weight

    def _with_choices(self) -> RunConfig:
        """Every rank must call it: memory may differ between ranks."""
        config, setup, runtime = self.setup.config, self.setup, self.runtime
        is_private = config.privacy.name == "sample"
        if (lanes := config.runtime.lanes) == "auto":
            needed = -(-config.federation.cohort // runtime.num_trainers)
            if is_private:
                lanes = choose_private_lanes(needed, setup.model, runtime)
            else:
                own = (setup.batch_size, setup.training.model, setup.train_store, runtime)
                lanes = choose_lanes(needed, *own, self._train_some)
            lanes = min_over_ranks(lanes, runtime)
        config = with_values(config, "runtime", lanes=lanes, products=setup.products)
        if not is_private:
            return config
        if (slots := config.privacy.slots) == "auto":
            slots = choose_slots(lanes, setup.batch_size, setup.training.model, setup.train_store, runtime)
            slots = min_over_ranks(slots, runtime)
        return with_values(config, "privacy", slots=slots)

    def _make_noise(self, begun_with: Noise | None) -> Noise | None:
        """The noise of the run. Under user-level privacy its seed also draws the cohorts, which are secret."""
        plan, config, setup = self.privacy_plan, self.config, self.setup
        if plan is None:
            return None
        if begun_with is not None:
            seed = begun_with.seed
        elif config.privacy.secure_noise:
            seed = draw_noise_seed(self.runtime)
        else:
            digests = (setup.data_sha256, setup.model.backbone.sha256, self.participation.sha256)
            digests += (setup.start.sha256,) if setup.start.sha256 else ()
            seed = derive_noise_seed(config, digests, setup.dataset.train, plan.noise_multipliers, self.runtime)
        if config.privacy.name == "user":
            self.participation.draw_cohorts_from(derive_seed(seed, "cohorts"))
        return Noise(plan.noise_multipliers, seed)

    def _train_some(self, num_lanes: int) -> None:
        """Two local steps of clients in so many lanes, as in a round. Their results are dropped."""
        samples, vector = torch.zeros(self.setup.batch_size, dtype=torch.int64), self.setup.initial_vector
        tasks = [ClientTask(client, samples, num_steps=2, weight=1) for client in range(num_lanes)]
        offset = (lambda client: torch.zeros_like(vector)) if self.algorithm.row_size else None
        trainer = self._make_trainer(*self._plain_parts(num_lanes))
        try:
            for _ in trainer.train(tasks, RoundStart(0, vector, offset=offset)):
                pass
        finally:
            trainer.store.forget()  # features of other shapes than the run's may round otherwise

    def _make_trainer(self, schedule: Schedule, rule: MeanGradient) -> Trainer:
        config, setup, privacy = self.setup.config, self.setup, self.setup.config.privacy
        client = config.client.model_copy(update={"batch_size": setup.batch_size})
        return Trainer(
            setup.training.model,
            setup.training.store,
            client,
            self.runtime,
            schedule=schedule,
            rule=rule,
            term=self.algorithm.add_to_gradient,
            gradient_noise=privacy.standard_deviation if privacy.name == "paper_noise" else 0.0,
            needs_keys=config.data.augment != "none" or setup.model.is_random,
        )

    def _plain_parts(self, lanes: int) -> tuple[Schedule, MeanGradient]:
        seed, setup = self.setup.config.seed, self.setup
        schedule = Schedule(lanes, EpochBatches(setup.batch_size, seed), seed)
        return schedule, MeanGradient(setup.model.layout, lanes, self.runtime)

    def _private_parts(self) -> tuple[Schedule, MeanGradient]:
        lanes, privacy, setup = self.config.runtime.lanes, self.config.privacy, self.setup
        slots = min(privacy.slots, lanes * setup.largest_client)
        batches = PoissonBatches(setup.batch_size, self.noise.seed, privacy.max_batch, privacy.secure_noise)
        rule = NoisyGradient(
            setup.model.layout,
            lanes,
            slots,
            privacy=privacy,
            batches=batches,
            noise_multipliers=self.noise.multipliers,
            largest_client=setup.largest_client,
            runtime=self.runtime,
        )
        return Schedule(lanes, batches, self.config.seed, slots), rule


def build_simulation(config: RunConfig, runtime: Runtime, begun_with: Noise | None = None) -> Simulation:
    """A simulation in one go, for a caller that has no other rank to agree with."""
    setup = Setup(config, runtime)
    setup.share_weights()
    return Simulation(prepare(setup, begun_with), begun_with)
