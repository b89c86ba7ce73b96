"""One update of actor, critics and α beside Stable-Baselines3's SAC: the same networks, rows and noise, in float64."""

import math

import gymnasium as gym
import pytest
import torch
from conftest import load_script
from stable_baselines3 import SAC
from stable_baselines3.common import policies
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples

ROWS, OBS, ACT = 64, 11, 3  # Hopper-v4's sizes
ALPHA, TARGET_ENTROPY, RATE = 0.3, -2.0, 0.05
FLAGS = {"device": "cpu", "matmul_precision": "highest", "hidden_dim": 32, "target_entropy": TARGET_ENTROPY}
DIRECT = {"inference": "direct", "prior": "uniform", "action_samples": 1}  # which is SAC


@pytest.fixture
def batch(monkeypatch):
    """obs, action, reward, next_obs, terminated: (ROWS, ·) each, in float64; and one draw of noise for all actions."""
    monkeypatch.setattr(policies, "preprocess_obs", lambda obs, *args, **kwargs: obs)  # it would make it float32
    noise = torch.randn(ROWS, ACT).double()
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda shape, **kwargs: noise)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[None])
    monkeypatch.setattr(load_script("sac_iterative").Agent, "noise", lambda self, obs, samples: noise[None, None])
    torch.set_default_dtype(torch.float64)
    obs, reward, next_obs, end = (torch.randn(ROWS, width) for width in (OBS, 1, OBS, 1))
    yield obs, torch.rand(ROWS, ACT) * 2 - 1, reward, next_obs, (end > 1).double()
    torch.set_default_dtype(torch.float32)


def theirs():
    """Stable-Baselines3's agent with plain gradient steps."""
    model = SAC("MlpPolicy", gym.make("Hopper-v4"), RATE, policy_kwargs={"net_arch": [32, 32]}, device="cpu",
                ent_coef=f"auto_{ALPHA}", target_entropy=TARGET_ENTROPY, buffer_size=10)
    model.set_logger(Logger(None, []))
    model.actor.action_dist.epsilon = 0.0  # it keeps a logarithm finite, and changes it by a millionth
    model.log_ent_coef.data = model.log_ent_coef.data.double()
    model.ent_coef_optimizer = torch.optim.SGD([model.log_ent_coef], RATE)
    for part in (model.actor, model.critic):
        part.optimizer = torch.optim.SGD(part.parameters(), RATE)
    for parameter in model.critic_target.parameters():  # at first it equals the critic
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def layers_of(model):
    """Weight (in, out) and bias of every layer of its actor, critics and target critics, in the order of ours."""
    mu, log_std = model.actor.mu, model.actor.log_std
    heads = torch.cat([mu.weight, log_std.weight]), torch.cat([mu.bias, log_std.bias])
    linear = lambda network: [(layer.weight, layer.bias) for layer in network if isinstance(layer, torch.nn.Linear)]
    critics = [linear(network) for critic in (model.critic, model.critic_target) for network in critic.q_networks]
    layers = [*linear(model.actor.latent_pi), heads, *critics[0], *critics[1], *critics[2], *critics[3]]
    return [(weight.detach().T.clone(), bias.detach().clone()) for weight, bias in layers]


def own_layers(agent):
    layers = [(layer.weight[0], layer.bias[0, 0]) for layer in agent.actor.layers]
    for critic in (agent.critic, agent.critic_target):
        layers += [(layer.weight[i, 0], layer.bias[i, 0, 0]) for i in range(2) for layer in critic.layers]
    return layers


@pytest.mark.parametrize("name", ["sac_iterative", "baselines/mbpo", "vmbpo", "beta_vmbpo"])
def test_an_update_is_that_of_stable_baselines3(batch, name):
    script, model = load_script(name), theirs()
    agent = script.Agent(script.Args(**FLAGS | (DIRECT if name == "sac_iterative" else {})), OBS, ACT)
    with torch.no_grad():
        agent.log_alpha.fill_(math.log(ALPHA))
        for own, other in zip(own_layers(agent), layers_of(model), strict=True):
            own[0].copy_(other[0])
            own[1].copy_(other[1])
    # The sum of both critics' errors is twice theirs, and α itself, not its logarithm, is in our loss.
    agent.opts["critic"] = torch.optim.SGD(agent.critic.parameters(), RATE / 2)
    agent.opts["actor"] = torch.optim.SGD([{"params": agent.actor.parameters()},
                                           {"params": agent.log_alpha, "lr": RATE / ALPHA}], RATE)
    before = layers_of(model)

    obs, action, reward, next_obs, terminated = batch
    model.replay_buffer.sample = lambda *args, **kwargs: ReplayBufferSamples(obs, action, next_obs, terminated, reward)
    model.train(1, ROWS)
    agent.update([column[None] for column in batch])

    for own, other, old in zip(own_layers(agent), layers_of(model), before, strict=True):
        for mine, new, start in zip(own, other, old, strict=True):
            assert not torch.equal(new, start)
            torch.testing.assert_close(mine - start, new - start, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(agent.log_alpha.flatten(), model.log_ent_coef.detach(), rtol=1e-9, atol=0)
