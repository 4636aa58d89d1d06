"""Server optimizers against torch.optim.SGD and a literal transcription of Reddi et al. 2021, algorithm 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft_dist.algorithms.server_optimizers import SERVER_OPTIMIZERS, make_server_optimizer
from fedpeft_dist.config import schema

P, ROUNDS = 40, 6
CPU = torch.device("cpu")
ADAPTIVE = {
    "adam": schema.ServerAdamConfig(name="adam", lr=0.02, beta1=0.8, beta2=0.95, tau=0.01),
    "yogi": schema.ServerYogiConfig(name="yogi", lr=0.02, beta1=0.8, beta2=0.95, tau=0.01),
    "adagrad": schema.ServerAdagradConfig(name="adagrad", lr=0.02, beta1=0.3, tau=0.01),
}


def mean_deltas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(P, generator=generator) * 0.05 for _ in range(ROUNDS)]


def start_vector() -> torch.Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(1))


def run(config: schema.ServerOptimizerConfig) -> torch.Tensor:
    """The vector after all rounds: in each, the server steps on minus the mean delta."""
    optimizer = make_server_optimizer(config)
    vector, state = start_vector(), optimizer.initial_state(P, CPU)
    for delta in mean_deltas():
        vector, state = optimizer.step(vector, -delta, state)
    return vector


def reddi_algorithm_2(config: schema.ServerAdaptiveSection, name: str) -> np.ndarray:
    """Lines 10 to 16 of the paper's algorithm in float64, with its symbols and v_{-1} = tau^2."""
    eta, beta_1, beta_2, tau = config.lr, config.beta1, config.beta2, config.tau
    x = start_vector().double().numpy()
    m, v = np.zeros(P), np.full(P, tau**2)
    for delta_t in (delta.double().numpy() for delta in mean_deltas()):
        m = beta_1 * m + (1 - beta_1) * delta_t
        if name == "adagrad":
            v = v + delta_t**2
        elif name == "yogi":
            v = v - (1 - beta_2) * delta_t**2 * np.sign(v - delta_t**2)
        else:
            v = beta_2 * v + (1 - beta_2) * delta_t**2
        x = x + eta * m / (np.sqrt(v) + tau)
    return x


def test_sgd_with_rate_1_adds_the_mean_delta() -> None:
    config = schema.ServerSgdConfig(name="sgd")
    optimizer = make_server_optimizer(config)
    assert optimizer.initial_state(P, CPU) == {}
    delta = mean_deltas()[0]
    vector, state = optimizer.step(start_vector(), -delta, {})
    assert torch.equal(vector, start_vector() + delta)
    assert state == {}


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.3, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_sgd_equals_torchs_on_the_pseudo_gradient(lr: float, momentum: float) -> None:
    parameter = start_vector().requires_grad_()
    reference = torch.optim.SGD([parameter], lr=lr, momentum=momentum)
    for delta in mean_deltas():
        parameter.grad = -delta
        reference.step()
    found = run(schema.ServerSgdConfig(name="sgd", lr=lr, momentum=momentum))
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, start_vector())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_optimizers_equal_the_papers_algorithm(name: str) -> None:
    config = ADAPTIVE[name]
    found = run(config).double().numpy()
    np.testing.assert_allclose(found, reddi_algorithm_2(config, name), rtol=1e-5, atol=1e-6)
    for other in ADAPTIVE.keys() - {name}:
        assert np.abs(found - reddi_algorithm_2(config, other)).max() > 1e-3, "the reference cannot tell them apart"


@pytest.mark.parametrize(
    "config", [schema.ServerSgdConfig(name="sgd", momentum=0.9), *ADAPTIVE.values()], ids=lambda c: c.name
)
def test_the_state_is_all_that_a_checkpoint_needs(config: schema.ServerOptimizerConfig) -> None:
    """An optimizer that takes over the state in the middle goes on to the bit."""
    optimizer = make_server_optimizer(config)
    vector, state = start_vector(), optimizer.initial_state(P, CPU)
    assert all(tensor.shape == (P,) and tensor.dtype == torch.float32 for tensor in state.values())
    for round_number, delta in enumerate(mean_deltas()):
        if round_number == ROUNDS // 2:
            optimizer = make_server_optimizer(config)
            state = {name: tensor.clone() for name, tensor in state.items()}
        vector, state = optimizer.step(vector, -delta, state)
    assert all(tensor.shape == (P,) and tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(vector, run(config))


def test_a_step_leaves_its_inputs_alone() -> None:
    """So a round that is dropped leaves the state before it."""
    for config in (schema.ServerSgdConfig(name="sgd", momentum=0.9), *ADAPTIVE.values()):
        optimizer = make_server_optimizer(config)
        _, state = optimizer.step(start_vector(), mean_deltas()[1], optimizer.initial_state(P, CPU))
        before = {name: tensor.clone() for name, tensor in state.items()}
        vector, gradient = start_vector(), mean_deltas()[0]
        optimizer.step(vector, gradient, state)
        assert torch.equal(vector, start_vector())
        assert torch.equal(gradient, mean_deltas()[0])
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_every_config_has_an_optimizer() -> None:
    choices = schema.ServerOptimizerConfig.__origin__.__args__
    assert set(SERVER_OPTIMIZERS) == set(choices)
