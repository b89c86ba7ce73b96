"""The mathematics of beta_vmbpo.py, vmbpo.py and baselines/mbpo.py, against computations that share no code with them."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import load_script
from sklearn.tree import DecisionTreeRegressor
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

BETA, VMBPO, MBPO = load_script("beta_vmbpo"), load_script("vmbpo"), load_script("baselines/mbpo")
VARIATIONAL, ALL = [BETA, VMBPO], [BETA, VMBPO, MBPO]
name = lambda value: getattr(value, "SCRIPT", None)


def build(script, obs_dim=3, action_dim=2, capacity=2000, **flags):
    """A small agent with its two buffers, on the CPU."""
    small = {"hidden_dim": 16, "model_dim": 16, "model_layers": 2, "ensemble_size": 3, "num_elites": 2, "batch_size": 32,
             "rollouts": 100, "updates_per_step": 3, "device": "cpu", "min_first_batches": 1, "min_batches": 1,
             "epochs": 1, "matmul_precision": "highest"}
    args = script.Args(**small | flags)
    buffers = [script.ReplayBuffer(args.trials, capacity, obs_dim, action_dim, "cpu") for _ in range(2)]
    return script.Agent(args, obs_dim, action_dim), *buffers


def fill(script, buffer, n=500, seed=0, terminated=None):
    """Transitions of a random linear system; every trial the same."""
    generator = torch.Generator().manual_seed(seed)
    trials, (obs_dim, action_dim, *_) = len(buffer.trial), buffer.widths
    obs = torch.randn(1, n, obs_dim, generator=generator)
    action = torch.rand(1, n, action_dim, generator=generator) * 2 - 1
    mix = torch.randn(obs_dim + action_dim, obs_dim, generator=generator) * 0.3
    next_obs = obs + torch.cat([obs, action], -1) @ mix + 0.1 * torch.randn(1, n, obs_dim, generator=generator)
    reward = obs.sum(-1, keepdim=True) + action.square().sum(-1, keepdim=True)
    ended = torch.zeros(1, n, 1) if terminated is None else terminated(next_obs)
    buffer.add(*(column.expand(trials, -1, -1) for column in (obs, action, reward, next_obs, ended)))
    return obs, action, reward, next_obs, ended


def moments(agent, obs, action):
    """Means and log-variances of p and q: (2, ensemble, trials, n, out) each; of p alone where there is no q."""
    models = [agent.model, *([agent.posterior_model] if hasattr(agent, "posterior_model") else [])]
    each = [agent.moments(model, obs, action) for model in models]
    return torch.stack([mean for mean, _ in each]), torch.stack([log_var for _, log_var in each])


# --- the variational dynamics


class Line(nn.Module):
    """A critic that answers the same number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((2, *x.shape[:-1], 1), self.value)


def tilted(script, k, mean, std, beta, trials=1, **flags):
    """An agent at the one state of a bandit: s' ~ N(mean, std²), V'(s') = k s', Q = k mean, no discount of V'."""
    flags = {"gamma": 1.0, "model_dim": 32, "ensemble_size": 3, "num_elites": 3, "batch_size": 256, "max_batches": 1000,
             "epochs": 100, "beta": beta, "trials": trials} | flags
    agent, buffer, _ = build(script, obs_dim=1, action_dim=1, capacity=20_000, **flags)
    agent.value = lambda obs: k * obs
    agent.critic_target = Line(k * mean)
    next_obs = mean + std * torch.randn(1, 20_000, 1)
    zero = torch.zeros(trials, 20_000, 1)
    action = 2 * torch.rand_like(zero) - 1  # the policy acts where there are data
    buffer.add(zero, action, zero, next_obs.expand(trials, -1, -1), zero)
    return agent, buffer


@pytest.mark.parametrize("script, beta", [(BETA, 2.0), (BETA, 4.0), (VMBPO, -2.0)], ids=["2", "4", "averse"])
def test_gaussian_tilting(script, beta):
    """q ∝ p exp(k s'/β) with p = N(m, s²) is N(m + k s²/β, s²), and KL(q‖p) = (k s/β)²/2; β < 0 tilts to low values."""
    k, mean, std = 1.5, 0.7, 0.8
    agent, buffer = tilted(script, k, mean, std, beta)
    metrics = agent.fit_model(buffer)
    normal_mean, log_var = moments(agent, torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.5))
    fitted_mean = agent.targets.inverse(normal_mean)[..., 0].mean((1, 2, 3))
    fitted_std = (agent.targets.std * (0.5 * log_var).exp())[..., 0].mean((1, 2, 3))
    assert fitted_mean[0].item() == pytest.approx(mean, abs=0.06)
    assert fitted_mean[1].item() - fitted_mean[0].item() == pytest.approx(k * std**2 / beta, abs=0.05)
    assert fitted_std.tolist() == pytest.approx([std, std], abs=0.06)
    assert metrics["model/kl"].item() == pytest.approx((k * std / beta) ** 2 / 2, rel=0.35)


def test_gaussian_tilting_up_to_the_clamp():
    """At β = 1 a steep value is tilted only as far as exp(clamp(δ, ±4)) does, by numerical integration."""
    k, std = 8.0, 1.0
    agent, buffer = tilted(VMBPO, k, 0.0, std, 1.0)
    agent.fit_model(buffer)
    z = np.linspace(-8, 8, 200_001)
    weight = np.exp(-(z**2) / 2) * np.exp(np.clip(k * z, -4, 4))
    expected = (z * weight).sum() / weight.sum()
    fitted = agent.targets.inverse(moments(agent, torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.5))[0])[1, ..., 0].mean().item()
    assert expected < 0.2 * k and fitted == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("script", VARIATIONAL, ids=name)
def test_weights_against_numpy(script):
    """exp(clamp((r + γ (1 − terminated) V'(s') − Q(s,a)) / β, ±4)) with the smaller twin, scaled to mean 1."""
    agent, buffer, _ = build(script, beta=0.05, gamma=0.9, entropy="none")
    for parameter in agent.critic_target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # another critic than the online one
    fill(script, buffer, 64, terminated=lambda s: (s[..., :1] > 0.5).float())
    data = buffer.storage[:, :64].split(buffer.widths, -1)
    torch.manual_seed(3)
    weights = agent.transition_weights(buffer)
    torch.manual_seed(3)
    noise = torch.randn(1, 64, 2)
    obs, action, reward, next_obs, terminated = data
    mean, log_std = agent.actor(next_obs)
    next_action = torch.tanh(mean + torch.exp(log_std) * noise)
    twins = lambda net, s, a: net(torch.cat([s, a], -1)).detach().numpy().min(0)
    delta = reward.numpy() + 0.9 * (1 - terminated.numpy()) * twins(agent.critic_target, next_obs, next_action)
    expected = np.exp(np.clip((delta - twins(agent.critic_target, obs, action)) / 0.05, -4, 4))
    np.testing.assert_allclose(weights.numpy(), expected / expected.mean(), rtol=1e-4)
    assert expected.max() == pytest.approx(math.exp(4)) and expected.min() == pytest.approx(math.exp(-4))


def test_infinite_beta_is_the_prior_bit_for_bit():
    agent, buffer, _ = build(BETA, max_batches=20, epochs=20)
    fill(BETA, buffer)
    agent.log_beta.data.fill_(math.inf)
    metrics = agent.fit_model(buffer)
    assert (agent.transition_weights(buffer) == 1).all()
    for key, parameter in agent.model.named_parameters():
        assert torch.equal(parameter, agent.posterior_model.get_parameter(key)), key
    assert metrics["model/kl"].item() == 0 and metrics["model/effective_sample_size"].item() == 1
    agent.log_beta.data.fill_(0.0)
    agent.fit_model(buffer)
    assert not torch.equal(agent.model.layers[0].weight, agent.posterior_model.layers[0].weight), "at β = 1 q must leave p"


def test_own_posterior_has_a_floor():
    """Two independent ensembles differ with all weights 1, where q started at p does not."""
    agent, buffer, _ = build(BETA, fit_rule="constant", max_batches=50, epochs=50, kl_budget=1e-3)
    fill(BETA, buffer)
    agent.log_beta.data.fill_(math.inf)
    assert agent.fit_model(buffer)["model/kl"].item() > 1e-3


@pytest.mark.parametrize("script", VARIATIONAL, ids=name)
def test_posterior_loss_is_the_weighted_likelihood(script):
    """(10) and (11) of one member against torch.distributions, up to the constant log 2π that is left out."""
    agent, buffer, _ = build(script, ensemble_size=1, num_elites=1)
    fill(script, buffer)
    agent.inputs.fit(torch.cat(buffer.storage[:, :500].split(buffer.widths, -1)[:2], -1))
    batch = [column.unsqueeze(0) for column in buffer.storage[:, :50].split(buffer.widths, -1)]
    weights = torch.rand(1, 1, 50, 1)
    with torch.no_grad():
        zero = agent.model_loss(agent.posterior_model, batch, torch.zeros_like(weights))
        loss = agent.model_loss(agent.posterior_model, batch, weights)
    obs, action, reward, next_obs, *_ = batch
    mean, log_var = moments(agent, obs, action)
    target = torch.cat([next_obs - obs, reward], -1)
    log_prob = Normal(mean[1], (0.5 * log_var[1]).exp()).log_prob(target) + 0.5 * math.log(2 * math.pi)
    assert (loss - zero).item() == pytest.approx((-2 * weights * log_prob).mean().item(), rel=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("script", [MBPO, *VARIATIONAL], ids=name)
def test_variance_weight(script, power, monkeypatch):
    """β-NLL: the error of a mean counts by var^(power − 1), at 1 as in least squares; where a variance rests stays."""
    agent, buffer, _ = build(script, ensemble_size=1, num_elites=1, variance_weight=power)
    fill(script, buffer)
    batch = [column[None] for column in buffer.storage[:, :50].split(buffer.widths, -1)]
    target = torch.cat([batch[3] - batch[0], batch[2]], -1)
    mean, log_var = torch.randn(target.shape, requires_grad=True), torch.randn(target.shape, requires_grad=True)
    monkeypatch.setattr(agent, "moments", lambda model, obs, action: (mean, log_var))
    agent.model_loss(agent.model, batch).backward()
    error, count = (mean - target).detach(), target[0, 0].numel()
    torch.testing.assert_close(mean.grad, 2 * error * ((power - 1) * log_var.detach()).exp() / count)
    rests = (log_var.detach() - error.square().log()).sign()  # above the squared error it falls, below it rises
    torch.testing.assert_close(log_var.grad.sign(), rests)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_the_loss_of_the_dynamics_is_a_sum_over_members_and_trials(script):
    agent, buffer, _ = build(script, trials=2)
    fill(script, buffer)
    batch = [column.expand(3, -1, -1, -1) for column in buffer.storage[:, :50].split(buffer.widths, -1)]
    obs, action, reward, next_obs, _ = batch
    mean, log_var = agent.moments(agent.model, obs, action)
    log_prob = Normal(mean, (0.5 * log_var).exp()).log_prob(torch.cat([next_obs - obs, reward], -1))
    nll = -2 * log_prob.mean().item() - math.log(2 * math.pi)
    bounds = 0.01 / 3 * (0.5 + 10) * 4  # of the log-variances of four numbers
    assert agent.model_loss(agent.model, batch).item() == pytest.approx(3 * 2 * (nll + bounds), rel=1e-4)


@pytest.mark.parametrize("script", VARIATIONAL, ids=name)
@pytest.mark.parametrize("estimator", ["mixture", "members"])
def test_divergence_against_distributions(script, estimator):
    """Summed over the dimensions of the state, without the reward, averaged over states (and pairs of members)."""
    agent, buffer, _ = build(script, kl_estimator=estimator, trials=2, beta=0.01, epochs=10)
    fill(script, buffer)
    agent.fit_model(buffer)
    obs = buffer.storage[:, :200, :3]
    torch.manual_seed(5)
    kl = agent.divergence(obs)
    torch.manual_seed(5)
    mean, log_var = moments(agent, obs, agent.actor.sample(obs)[0])  # (2, ensemble, trials, n, out)
    for trial in range(2):
        m, v = (x[:, agent.elites[:, trial], trial, :, :3].detach() for x in (mean, log_var.exp()))
        if estimator == "mixture":
            m, v = m.mean(1, keepdim=True), v.mean(1, keepdim=True) + m.var(1, keepdim=True, correction=0)
        p, q = (Independent(Normal(m[i], v[i].sqrt()), 1) for i in (0, 1))
        assert kl[trial].item() == pytest.approx(kl_divergence(q, p).mean().item(), rel=1e-3)


@pytest.mark.parametrize("script", VARIATIONAL, ids=name)
def test_imagined_rows_and_their_log_ratio(script):
    """s' comes from q and r from p of one elite per chunk; β log q/p of s', if it is subtracted, is as it should be."""
    agent, buffer, _ = build(script, beta=0.05, epochs=10)
    fill(script, buffer, 2000)
    agent.fit_model(buffer)
    agent.state_range[0], agent.state_range[1] = -1e6, 1e6
    obs, action = buffer.storage[:, :4000:2, :3], buffer.storage[:, :4000:2, 3:5]
    torch.manual_seed(1)
    next_obs, reward, _ = (column.double() for column in agent.predict(obs, action))
    torch.manual_seed(1)
    agent.args.log_ratio_in_critic = True
    log_ratio = (reward - agent.predict(obs, action)[1]) / 0.05
    mean, log_var = (x.double().detach() for x in moments(agent, obs, action))
    for i, rows in enumerate(torch.arange(obs.shape[1]).chunk(8)):  # two elites take turns
        elite, chunk = agent.elites[i % 2, 0], slice(rows[0], rows[-1] + 1)
        z = agent.targets(torch.cat([next_obs - obs, reward], -1))[0, chunk]
        p, q = (Normal(mean[i, elite, 0, chunk], (0.5 * log_var[i, elite, 0, chunk]).exp()) for i in (0, 1))
        expected = (q.log_prob(z) - p.log_prob(z))[:, :3].sum(-1)
        torch.testing.assert_close(log_ratio[0, chunk, 0], expected, atol=1e-2, rtol=1e-2)
        standard = torch.cat([((z - q.mean) / q.stddev)[:, :3], ((z - p.mean) / p.stddev)[:, 3:]], -1)
        assert standard.mean(0).abs().max() < 0.4 and (standard.std(0) - 1).abs().max() < 0.3


@pytest.mark.parametrize("script", ALL, ids=name)
def test_imagined_rows_are_of_the_elites_in_turn(script):
    """Where every member predicts a change of its own: s' is obs + that of q and r is p's (mbpo.py: both of p), of one
    elite per chunk and trial, in the task's units; the noise has the standard deviation that the log-variance says."""
    agent, *_ = build(script, trials=2)
    own = 10 * torch.arange(3.0).view(3, 1, 1, 1) + torch.arange(2.0).view(1, 2, 1, 1)  # (member, trial, 1, 1)
    shift = {"model": 100, "posterior_model": 100 if script is MBPO else 1000}
    for part, first in shift.items():
        if hasattr(agent, part):
            model = getattr(agent, part)
            model.layers[-1].weight.data.zero_()
            model.layers[-1].bias.data[..., :4] = first + own
            model.layers[-1].bias.data[..., 4:] = 2 * math.log(0.01)
            model.max_log_var.data.fill_(30.0)
            model.min_log_var.data.fill_(-50.0)
    agent.targets.mean.fill_(1.0)
    agent.targets.std.fill_(2.0)
    agent.state_range[0], agent.state_range[1] = -1e6, 1e6
    agent.elites.copy_(torch.tensor([[2, 0], [1, 2]]))
    obs = torch.full((2, 1600, 3), 7.0)
    next_obs, reward, _ = agent.predict(obs, torch.zeros(2, 1600, 2))
    for i, rows in enumerate(torch.arange(1600).chunk(8)):
        for trial, member in enumerate(([2, 0], [1, 2])[i % 2]):
            for found, first in ((next_obs - obs, shift["posterior_model"]), (reward, shift["model"])):
                noise = found[trial, rows] - (2 * (first + 10 * member + trial) + 1)
                assert abs(noise.mean()) < 0.01 and noise.std().item() == pytest.approx(2 * 0.01, rel=0.25)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_kl_is_the_tilt_alone(precision):
    """KL(q‖p) falls as 1/β²: 100 times from β = 100 to 1000, in the median of five trials, as few minibatches leave
    noise; at a constant rate the noise of two fits keeps it up."""
    torch.manual_seed(1)
    obs, action, zero = torch.randn(5, 1000, 2), 2 * torch.rand(5, 1000, 1) - 1, torch.zeros(5, 1000, 1)
    falls = []
    for rule in ("two_phase", "constant"):
        kl = []
        for beta in (100.0, 1000.0):
            torch.manual_seed(1)
            agent, buffer, _ = build(BETA, obs_dim=2, action_dim=1, trials=5, beta=beta, fit_rule=rule, max_batches=200,
                                     epochs=1000, model_dim=64, model_layers=3, ensemble_size=2, num_elites=2, batch_size=64,
                                     matmul_precision=precision)
            agent.value = lambda obs: 10 * obs.sum(-1, keepdim=True)
            buffer.add(obs, action, zero, obs + 0.1 * obs.flip(-1).sin() * action, zero)
            for _ in range(3):
                metrics = agent.fit_model(buffer)
            kl.append(metrics["model/kl"])
        falls.append((kl[0] / kl[1]).median().item())
    assert 60 < falls[0] < 160 and falls[1] < 10, falls


def refits(script, beta2, precision):
    """Errors of p after a long first fit and three of the least length on the same rows of an exactly linear system."""
    torch.manual_seed(1)
    sizes = {"model_dim": 64, "model_layers": 3, "batch_size": 128, "epochs": 1000}
    agent, buffer, _ = build(script, obs_dim=2, action_dim=1, max_batches=400, matmul_precision=precision, **sizes)
    obs, action, zero = torch.randn(1, 500, 2), 2 * torch.rand(1, 500, 1) - 1, torch.zeros(1, 500, 1)
    next_obs = obs + 0.1 * obs.flip(-1) * torch.tensor([1.0, -1.0]) + 0.1 * action
    buffer.add(obs, action, zero, next_obs, zero)
    for opt in agent.opts.values():
        for group in opt.param_groups:
            group["betas"] = (0.9, beta2 or group["betas"][1])
    errors = [agent.fit_model(buffer)["model/prior_error"].item()]
    agent.args.max_batches = script.Args.min_batches
    return errors + [agent.fit_model(buffer)["model/prior_error"].item() for _ in range(3)]


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("script", ALL, ids=name)
def test_a_refit_on_the_same_rows_does_not_raise_the_error(script, precision):
    """At β₂ = 0.999 the second fit starts with stale second moments and multiplies the error, here more than threefold."""
    sound, stale = refits(script, None, precision), refits(script, 0.999, precision)
    assert max(after / before for before, after in zip(sound, sound[1:])) < 1.5, sound
    assert max(after / before for before, after in zip(stale, stale[1:])) > 3, stale


# --- dual descent


def test_sign_and_size_of_the_dual_step():
    """log β rises while KL > ε, falls while KL < ε, in proportion to log(KL/ε), by at most lr; each trial for itself."""
    agent, *_ = build(BETA, trials=4, beta=10.0, kl_budget=0.1, beta_lr=0.5)
    agent.kl.copy_(torch.tensor([0.1 * math.e**2, 0.1 / math.e**2, 1e9, 0.0]))
    agent.update_beta()
    assert (agent.log_beta - math.log(10)).flatten().tolist() == pytest.approx([0.25, -0.25, 0.5, -0.5], abs=1e-5)


def test_beta_settles_though_the_kl_scatters():
    """KL = ε (60/β)² times log-normal noise, a fit every 250 steps: from every start β ends near 60 and stays there.

    The spread of log β is below 0.25; steps of the clipped KL/ε − 1, simulated beside it, leave it above 0.3.
    """
    agent, *_ = build(BETA, trials=400, kl_budget=0.1, model_dim=4, hidden_dim=4)
    agent.log_beta.data.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0]).log().repeat(100).view(-1, 1, 1))
    relative = agent.log_beta.detach().clone()
    for _ in range(40):
        noise = torch.randn_like(relative).mul(0.75).exp()
        agent.kl.copy_((0.1 * (60 / agent.beta).square() * noise).flatten())
        violation = (60 / relative.exp()).square() * noise - 1
        for _ in range(250):
            agent.update_beta()
        relative += 0.75 * violation.clamp(-1, 1)
    ended = agent.log_beta.detach().view(100, 4) - math.log(60)
    assert ended.mean(0).abs().max() < 0.1 and ended.std(0).max() < 0.25, (ended.mean(0), ended.std(0))
    assert relative.std() > 0.3, "simple steps do as well: the test shows nothing"


def test_adam_dual_step_descends_equation_9():
    """Its gradient is that of β ε − β KL in log β, by finite differences; Adam's first step has that sign and size lr."""
    agent, *_ = build(BETA, trials=2, beta=10.0, kl_budget=0.1, beta_lr=0.01, dual_step="adam")
    agent.kl.copy_(torch.tensor([0.3, 0.02]))
    loss = lambda log_beta, kl: math.exp(log_beta) * 0.1 - math.exp(log_beta) * kl
    agent.update_beta()
    for trial, kl in enumerate([0.3, 0.02]):
        slope = (loss(math.log(10) + 1e-5, kl) - loss(math.log(10) - 1e-5, kl)) / 2e-5
        assert agent.log_beta.grad[trial].item() == pytest.approx(slope, rel=1e-3)
        assert agent.log_beta[trial].item() - math.log(10) == pytest.approx(-math.copysign(0.01, slope), rel=1e-2)


def test_beta_stays_within_its_clamp():
    agent, *_ = build(BETA, beta_lr=100.0)
    for kl, end in ((10.0, 1e7), (0.0, 1e-2)):
        agent.kl.fill_(kl)
        agent.update_beta()
        assert agent.beta.item() == pytest.approx(end, rel=1e-4)


def test_dual_fixed_point_from_every_start():
    """For the tilted Gaussian KL = (k s/β)²/2: the fixed point is β* = k s/√(2ε), here with the analytic KL."""
    agent, *_ = build(BETA, trials=4, kl_budget=0.1, beta_lr=0.01)
    agent.log_beta.data.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0]).log().view(4, 1, 1))
    for _ in range(6000):
        agent.kl.copy_((1.5 * 0.8 / agent.beta).square().flatten() / 2)
        agent.update_beta()
    assert agent.beta.flatten().tolist() == pytest.approx([1.5 * 0.8 / math.sqrt(0.2)] * 4, rel=1e-2)


def test_fits_and_dual_steps_together_reach_the_fixed_point():
    """The same with fitted ensembles: three trials start at β = 1, 10 and 100 and end near k s/√(2ε)."""
    agent, buffer = tilted(BETA, 1.0, 0.0, 1.0, 1.0, trials=3, max_batches=200, model_dim=16, kl_budget=0.1, beta_lr=0.05)
    agent.log_beta.data.copy_(torch.tensor([1.0, 10.0, 100.0]).log().view(3, 1, 1))
    trace = []
    for _ in range(30):
        agent.fit_model(buffer)
        for _ in range(10):
            agent.update_beta()
        trace.append(agent.log_beta.detach().flatten().clone())
    ended = torch.stack(trace[-10:]).mean(0).exp()
    assert (ended / (1 / math.sqrt(0.2))).log().abs().max() < math.log(1.15), ended


# --- actor and critic


def test_squashed_gaussian_density():
    """log-probabilities against torch.distributions; entropy against the integral of a density that integrates to one."""
    actor = BETA.Actor((1,), (3, 16, 4))
    obs = torch.randn(1, 400, 3)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    mean, log_std = actor(obs)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(log_prob, reference.log_prob(action).sum(-1, keepdim=True), atol=2e-3, rtol=1e-3)
    actor = BETA.Actor((1,), (1, 4, 2)).double()
    with torch.no_grad():
        _, log_prob = actor.sample(torch.zeros(1, 400_000, 1, dtype=torch.double))
        mean, log_std = actor(torch.zeros(1, 1, 1, dtype=torch.double))
    u = torch.linspace(-9, 9, 400_001, dtype=torch.double)  # the grid is even before the tanh: the density may be steep at ±1
    density = Normal(mean, log_std.exp()).log_prob(u).exp().flatten() / (1 - u.tanh() ** 2)
    entropy = -torch.trapezoid(density * density.log(), u.tanh())
    assert torch.trapezoid(density, u.tanh()).item() == pytest.approx(1, abs=1e-4)
    assert -log_prob.mean().item() == pytest.approx(entropy.item(), abs=0.01)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_log_std_of_the_actor_is_bounded(script):
    actor = script.Actor((1,), (3, 4, 4))
    actor.layers[-1].weight.data.zero_()
    actor.layers[-1].bias.data[..., 2:] = torch.tensor([9.0, -9.0])
    assert actor(torch.zeros(1, 1, 3))[1].flatten().tolist() == [2, -5]


@pytest.mark.parametrize("script", ALL, ids=name)
def test_target_entropy_by_default(script):
    assert build(script, action_dim=6)[0].target_entropy == -3


class PlainSAC:
    """Soft actor-critic with torch.nn and an unfused Adam, from weights of one trial of an agent."""

    def __init__(self, agent, script):
        self.args, self.entropy_target = agent.args, agent.target_entropy
        self.actor = self.plain(agent.actor, 0)
        self.critics = [self.plain(agent.critic, i, 0) for i in (0, 1)]
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = torch.tensor(0.0 if agent.args.entropy == "both" else math.log(0.2), requires_grad=True)
        self.critic_opt = torch.optim.Adam([p for net in self.critics for p in net.parameters()], agent.args.learning_rate)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), agent.args.learning_rate)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], agent.args.learning_rate)

    @staticmethod
    def plain(mlp, *index):
        layers = []
        for layer in mlp.layers:
            linear = nn.Linear(*layer.weight.shape[-2:])
            linear.weight.data.copy_(layer.weight[index].T)
            linear.bias.data.copy_(layer.bias[index][0])
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def act(self, obs):
        mean, log_std = self.actor(obs).chunk(2, -1)
        base = Normal(mean, log_std.clamp(-5, 2).exp())
        u = base.mean + base.stddev * torch.randn(1, *mean.shape)[0]
        return u.tanh(), (base.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum(-1, keepdim=True)

    def update(self, obs, action, reward, next_obs, terminated):
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            next_action, next_log_prob = self.act(next_obs)
            next_q = torch.min(*(net(torch.cat([next_obs, next_action], -1)) for net in self.targets))
            bonus = 0 if self.args.entropy == "none" else alpha * next_log_prob
            target = reward + self.args.gamma * (1 - terminated) * (next_q - bonus)
        loss = sum(((net(torch.cat([obs, action], -1)) - target) ** 2).mean() for net in self.critics)
        self.critic_opt.zero_grad()
        loss.backward()
        self.critic_opt.step()
        sampled, log_prob = self.act(obs)
        q = torch.min(*(net(torch.cat([obs, sampled], -1)) for net in self.critics))
        loss = ((alpha * log_prob if self.args.entropy == "both" else 0) - q).mean()
        self.actor_opt.zero_grad()
        loss.backward()
        self.actor_opt.step()
        if self.args.entropy == "both":  # an α that the actor does not feel would grow for ever
            loss = (self.log_alpha.exp() * (-log_prob.detach() - self.entropy_target)).mean()
            self.alpha_opt.zero_grad()
            loss.backward()
            self.alpha_opt.step()
        for target_net, net in zip(self.targets, self.critics):
            for old, new in zip(target_net.parameters(), net.parameters()):
                old.data.copy_((1 - self.args.tau) * old.data + self.args.tau * new.data)


@pytest.mark.parametrize("script", ALL, ids=name)
@pytest.mark.parametrize("flags", [{"entropy": "both"}, {"entropy": "critic"}, {"entropy": "none"}], ids=str)
def test_three_updates_equal_plain_sac(script, flags):
    """Critics, target critics, actor and α after three updates."""
    agent, buffer, _ = build(script, learning_rate=1e-2, gamma=0.9, tau=0.1, **flags)
    fill(script, buffer, 32, terminated=lambda s: (s[..., :1] > 0.5).float())
    reference = PlainSAC(agent, script)
    for seed in range(3):
        columns = buffer.storage[:, :32].split(buffer.widths, -1)
        torch.manual_seed(seed)
        agent.update(columns)
        torch.manual_seed(seed)
        reference.update(*(column[0] for column in columns))
    pairs = [(agent.actor, (0,), reference.actor)]
    pairs += [(agent.critic, (i, 0), reference.critics[i]) for i in (0, 1)]
    pairs += [(agent.critic_target, (i, 0), reference.targets[i]) for i in (0, 1)]
    for mlp, index, net in pairs:
        for layer, linear in zip(mlp.layers, net[::2]):
            torch.testing.assert_close(layer.weight[index].T, linear.weight, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(layer.bias[index][0], linear.bias, atol=2e-5, rtol=1e-4)
    assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), abs=1e-5)
    assert (agent.log_alpha.item() == pytest.approx(math.log(0.2))) == (agent.args.entropy != "both")


@pytest.mark.parametrize("script", ALL, ids=name)
def test_no_gradient_leaks(script):
    """Fits leave actor and critics alone; the actor's step leaves the critics' gradients alone; targets have none."""
    agent, buffer, model_buffer = build(script)
    fill(script, buffer)
    agent.fit_model(buffer)
    agent.imagine(buffer, model_buffer, 0)
    for part in (agent.actor, agent.critic, agent.critic_target):
        assert all(parameter.grad is None for parameter in part.parameters())
    before = [parameter.detach().clone() for parameter in agent.critic_target.parameters()]
    model = [parameter.detach().clone() for parameter in agent.model.parameters()]
    batch = buffer.sample(32).split(buffer.widths, -1)
    torch.manual_seed(1)
    with torch.no_grad():
        target = batch[2] + agent.args.gamma * agent.value(batch[3])
    q = agent.critic(torch.cat(batch[:2], -1))
    loss = (q - target).square().mean((-2, -1)).sum()
    expected = torch.autograd.grad(loss, list(agent.critic.parameters()))
    torch.manual_seed(1)
    agent.update(batch)
    for parameter, gradient in zip(agent.critic.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in agent.critic_target.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model, agent.model.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.critic_target.parameters()))


@pytest.mark.parametrize("script", ALL, ids=name)
@pytest.mark.parametrize("ratio, real", [(0.05, 13), (0.0, 0), (1.0, 256), (0.5, 128)])
def test_batches_mix_real_and_imagined_rows(script, ratio, real):
    agent, buffer, model_buffer = build(script, real_ratio=ratio, batch_size=256, updates_per_step=4, trials=2)
    buffer.add(torch.ones(2, 50, sum(buffer.widths)))
    model_buffer.add(torch.full((2, 50, sum(buffer.widths)), 2.0))
    seen, update = [], agent.update
    agent.update = lambda batch: seen.append(batch) or update(batch)
    agent.learn(buffer, model_buffer)
    assert len(seen) == 4
    for batch in seen:
        rows = torch.cat(batch, -1)
        assert rows.shape[:2] == (2, 256) and (rows.amin(-1) == rows.amax(-1)).all()
        assert ((rows[..., 0] == 1).sum(1) == real).all() and ((rows[..., 0] == 2).sum(1) == 256 - real).all()


@pytest.mark.parametrize("script", ALL, ids=name)
def test_updates_of_a_step_have_rows_of_their_own(script):
    agent, buffer, model_buffer = build(script, real_ratio=0.5, updates_per_step=4)
    for kind, first in ((buffer, 0.0), (model_buffer, 5000.0)):
        kind.add((first + torch.arange(1000.0)).view(1, 1000, 1).expand(-1, -1, sum(kind.widths)))
    seen, nothing = [], torch.zeros(2, 1, 32, 1)
    agent.update = lambda batch: seen.append(batch[0][0, :, 0]) or (nothing, nothing[0], nothing[0])
    agent.learn(buffer, model_buffer)
    assert torch.cat(seen).unique().numel() > 100  # of 128 draws; were real rows shared, 80 at most


@pytest.mark.parametrize("script", ALL, ids=name)
def test_what_updates_report(script):
    """Of the last one: the squared error and the value as means over twins, the entropy, α; per trial."""
    agent, buffer, model_buffer = build(script, trials=2)
    fill(script, buffer)
    fill(script, model_buffer)
    agent.log_alpha.data.copy_(torch.tensor([0.3, -0.2]).view(2, 1, 1))
    twins = torch.tensor([[3.0, 5.0], [5.0, 9.0]]).view(2, 2, 1, 1).expand(2, 2, 32, 1)  # (twin, trial, n, 1)
    target, log_prob = torch.ones(2, 32, 1), torch.tensor([-2.0, 1.0]).view(2, 1, 1).expand(2, 32, 1)
    agent.update = lambda batch: (twins, target, log_prob)
    found = agent.learn(buffer, model_buffer)
    expected = {"loss/critic": [(4 + 16) / 2, (16 + 64) / 2], "value/q": [4, 7], "policy/entropy": [2, -1],
                "policy/alpha": [math.exp(0.3), math.exp(-0.2)]}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.tolist() == pytest.approx(expected[key]), key


# --- dynamics


@pytest.mark.parametrize("script", ALL, ids=name)
def test_members_see_their_own_bootstraps(script):
    """Each member (and trial) draws from its own resample of the training rows, and never from the held-out ones."""
    agent, buffer, _ = build(script, trials=2, batch_size=64, epochs=60, max_batches=200)
    index = torch.arange(200.0).view(1, 200, 1).expand(2, -1, -1)
    width = sum(buffer.widths) - 1
    buffer.add(index, torch.rand(2, 200, width).mul(torch.tensor([1.0] * width)).clamp(max=0.9).round(decimals=3) * 0.1)
    seen, loss = [], agent.model_loss
    agent.model_loss = lambda model, batch, *rest: seen.append(batch[0][..., 0].long()) or loss(model, batch, *rest)
    agent.fit_model(buffer)
    rows = torch.cat(seen, -1)  # (ensemble, trials, draws)
    sets = [frozenset(rows[member, trial].tolist()) for member in range(3) for trial in range(2)]
    assert len(set(sets)) == 6 and not any(row % 5 == 0 for drawn in sets for row in drawn)
    for drawn in sets:  # a bootstrap of n rows holds n (1 − 1/e) distinct ones, here 101 of 160, give or take 4 × 5
        assert abs(len(drawn) - 160 * (1 - math.exp(-1))) < 20


@pytest.mark.parametrize("script", ALL, ids=name)
def test_dynamics_learn_a_linear_system(script):
    """Mean and noise of p on fresh states of a known system; elites are the members with the lowest hold-out error."""
    neutral = {} if script is MBPO else {"beta": 1e7}
    agent, buffer, _ = build(script, epochs=100, max_batches=1500, batch_size=128, model_dim=32, **neutral)
    _, _, _, next_obs, _ = fill(script, buffer, 2000)
    metrics = agent.fit_model(buffer)
    obs, action, reward, next_obs, *_ = buffer.storage[:, :2000].split(buffer.widths, -1)
    noise = 0.1 / agent.targets.std[0, 0, :3]  # the system's noise in units of the normalised target
    assert metrics["model/prior_error"].item() < 0.5 * noise.square().mean().item() + 0.05
    _, log_var = agent.moments(agent.model, obs, action)
    torch.testing.assert_close((0.5 * log_var[..., :3]).exp().mean((0, 1, 2)), noise, rtol=0.3, atol=0.02)
    target = agent.targets(torch.cat([next_obs - obs, reward], -1))[:, ::5]  # every fifth row is held out
    mean, _ = agent.moments(agent.model, obs[:, ::5], action[:, ::5])
    error = (mean - target).square().mean((-2, -1))[:, 0]
    assert sorted(agent.elites[:, 0].tolist()) == sorted(error.argsort()[:2].tolist())


@pytest.mark.parametrize("script", ALL, ids=name)
def test_log_variance_bounds_are_learned(script):
    """Their gradient includes the penalty, 0.01 per ensemble, and they keep the log-variance between them."""
    agent, buffer, _ = build(script)
    fill(script, buffer)
    before = [agent.model.max_log_var.detach().clone(), agent.model.min_log_var.detach().clone()]
    mean, log_var = agent.model(100 * torch.randn(1000, 5))
    assert (log_var < before[0] + 1e-3).all() and (log_var > before[1] - 1e-3).all()
    agent.fit_model(buffer)
    assert (agent.model.max_log_var != before[0]).all() and (agent.model.min_log_var != before[1]).all()
    agent.zero_grad()
    batch = [column.unsqueeze(0).expand(3, -1, -1, -1) for column in buffer.storage[:, :50].split(buffer.widths, -1)]
    agent.moments = lambda *_: (torch.zeros(3, 1, 50, 4), torch.zeros(3, 1, 50, 4))  # the penalty is all that is left
    agent.model_loss(agent.model, batch).backward()
    torch.testing.assert_close(agent.model.max_log_var.grad, torch.full_like(before[0], 0.01 / 3))
    torch.testing.assert_close(agent.model.min_log_var.grad, torch.full_like(before[0], -0.01 / 3))


@pytest.mark.parametrize("layers, rates", [(4, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]), (2, [2.5e-5, 5e-5, 1e-4])])
@pytest.mark.parametrize("script", ALL, ids=name)
def test_weight_decay_is_that_of_mbpo(script, layers, rates):
    """By layer, of the dynamics' weights alone."""
    agent, *_ = build(script, model_layers=layers)
    decay = {id(p): group["weight_decay"] for group in agent.opts["models"].param_groups for p in group["params"]}
    for model in (agent.model, *([] if script is MBPO else [agent.posterior_model])):
        assert [decay.pop(id(layer.weight)) for layer in model.layers] == rates
    assert decay and not any(decay.values())


@pytest.mark.parametrize("rule, factors", [("two_phase", [4, 5, 1.25, 0.25]), ("constant", [1, 1, 1, 1])])
@pytest.mark.parametrize("script", ALL, ids=name)
def test_learning_rate_within_a_fit(script, rule, factors):
    """From 0 to eight times the rate at a quarter of a fit, then a quarter of that per quarter, and 0; or constant."""
    agent, buffer, _ = build(script, fit_rule=rule, min_first_batches=4, max_batches=4, model_learning_rate=0.01)
    fill(script, buffer)
    rates, descend = [], agent.descend
    agent.descend = lambda *args: rates.append(float(agent.opts["models"].param_groups[0]["lr"])) or descend(*args)
    agent.fit_model(buffer)
    assert rates == pytest.approx([0.01 * factor for factor in factors])


@pytest.mark.parametrize("precision, rule, low", [("highest", "two_phase", 0), ("medium", "two_phase", 2),
                                                  ("medium", "constant", 0)])
@pytest.mark.parametrize("script", ALL, ids=name)
def test_precision_within_a_fit(script, precision, rule, low):
    """At medium the first two of four minibatches have bfloat16 inside, before q learns; all that follows is exact."""
    agent, buffer, _ = build(script, fit_rule=rule, min_first_batches=4, max_batches=4, matmul_precision=precision)
    fill(script, buffer)
    kinds, descend = [], agent.descend
    agent.descend = lambda *args: kinds.append(agent.model.dtype) or descend(*args)
    agent.fit_model(buffer)
    assert kinds == [torch.bfloat16] * low + [None] * (4 - low)
    assert agent.model.dtype is None and (script is MBPO or agent.posterior_model.dtype is None)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_what_a_fit_reports(script):
    """Errors on the held-out rows, the members that err least, E[V(s')] less V(s'), and the share of rows in use."""
    agent, buffer, _ = build(script)
    rows = torch.zeros(1, 100, sum(buffer.widths))  # obs (3), action (2), reward, next_obs (3), terminated
    rows[..., 5:9] = 2
    rows[:, torch.arange(100) % 5 > 0, 5] = 1e3  # of the rows that are trained on
    buffer.add(rows)
    means = {agent.model: torch.tensor([0.0, 1.0, 3.0])}
    if script is not MBPO:
        means[agent.posterior_model] = torch.tensor([5.0, 5.0, 6.0])
    agent.moments = lambda model, obs, action: (means[model].view(3, 1, 1, 1).expand(3, 1, 20, 4), None)
    agent.predict = lambda obs, action: (torch.full_like(obs, 5.0), None, torch.full_like(obs[..., :1], 0.25))
    agent.value = lambda obs: obs[..., :1]
    agent.divergence = lambda obs: torch.tensor([7.0])
    weights = torch.tensor([0.5, 1.5]).repeat(50).view(1, 100, 1)
    for ended in (0, 1):
        buffer.storage[:, :100, 9] = ended
        found = agent.assess(buffer, *([] if script is MBPO else [weights]))
        found = {key: value.tolist() for key, value in found.items()}
        assert sorted(agent.elites[:, 0].tolist()) == [1, 2]
        assert found["model/prior_error"] == [(4 + 1 + 1) / 3]
        assert found["model/optimism_gap"] == [0.75 * 5 - (1 - ended) * 2]
        if script is not MBPO:
            assert found["model/posterior_error"] == pytest.approx([(9 + 9 + 16) / 3])
            assert found["model/effective_sample_size"] == pytest.approx([1 / 1.25]) and found["model/kl"] == [7]
        if script is BETA:
            assert agent.kl.tolist() == [7] and found["model/beta"] == pytest.approx([100])


@pytest.mark.parametrize("script", ALL, ids=name)
def test_hold_out_errors_of_a_large_buffer_are_of_all_of_it(script, monkeypatch):
    monkeypatch.setattr(script, "HOLD_OUT_MAX", 10)
    agent, buffer, _ = build(script)
    rows = torch.zeros(1, 100, sum(buffer.widths))
    rows[:, 50:, 5] = 2.0
    buffer.add(rows)
    agent.moments = lambda model, obs, action: (torch.zeros(3, 1, obs.shape[1], 4), None)
    agent.predict = lambda obs, action: (obs, None, torch.zeros_like(obs[..., :1]))
    agent.divergence = lambda obs: torch.zeros(1)
    found = agent.assess(buffer, *([] if script is MBPO else [torch.ones(1, 100, 1)]))
    assert found["model/prior_error"].item() == pytest.approx(0.5)  # of half the rows 2², of one in four numbers


@pytest.mark.parametrize("script", VARIATIONAL, ids=name)
def test_kl_is_measured_where_actions_were_taken(script):
    """At the states before a step, here 0, and not at those after it, here 2."""
    agent, buffer, _ = build(script)
    rows = torch.zeros(1, 100, sum(buffer.widths))
    rows[..., 6:9] = 2
    buffer.add(rows)
    agent.divergence = lambda obs: 7 + obs.amax((1, 2))
    assert agent.assess(buffer, torch.ones(1, 100, 1))["model/kl"].tolist() == [7]


@pytest.mark.parametrize("script", ALL, ids=name)
def test_statistics_are_those_of_each_trial_s_rows_and_leave_them_as_they_are(script):
    """Of 500 rows in a buffer that holds more, against NumPy; the second trial's rows are twice the first's."""
    agent, buffer, _ = build(script, trials=2, capacity=1000)
    fill(script, buffer)
    buffer.storage[1] *= 2
    before = buffer.storage.clone()
    agent.fit_statistics(buffer)
    assert torch.equal(buffer.storage, before)
    for trial in range(2):
        obs, action, reward, next_obs, _ = np.split(before[trial, :500].double().numpy(), np.cumsum(buffer.widths)[:-1], 1)
        for normalizer, x in ((agent.inputs, (obs, action)), (agent.targets, (next_obs - obs, reward))):
            x = np.concatenate(x, 1)
            np.testing.assert_allclose(normalizer.mean[trial, 0], x.mean(0), atol=1e-5)
            np.testing.assert_allclose(normalizer.std[trial, 0], x.std(0, ddof=1), rtol=1e-5)
        both = np.concatenate([obs, next_obs])
        np.testing.assert_array_equal(agent.state_range[:, trial, 0], [both.min(0), both.max(0)])


@pytest.mark.parametrize("script", ALL, ids=name)
def test_ends_are_learned_from_few(script):
    """Of 6,000 states in 17 dimensions about 30 end their episodes, by a sharp rule on two of them: new ends are seen."""
    agent, buffer, _ = build(script, obs_dim=17, action_dim=1, buffer_size=6000, trials=2)
    rule = lambda s: ((s[..., :1] > 2.8) | (s[..., 1:2] < -3)).float()
    fill(script, buffer, 6000, terminated=rule)
    agent.fit_statistics(buffer)
    fresh = torch.randn(2, 20_000, 17)
    ended = agent.termination(fresh, None, fresh)
    missed, false = (rule(fresh) - ended).relu().sum((1, 2)), (ended - rule(fresh)).relu().sum((1, 2))
    assert (missed < 0.1 * rule(fresh).sum((1, 2))).all()
    assert (false < 0.2 * rule(fresh).sum((1, 2))).all()
    buffer.storage[1, :, sum(buffer.widths[:4])] = 0
    agent.fit_statistics(buffer)
    ended = agent.termination(fresh, None, fresh)
    assert ended[0].any() and not ended[1].any()  # each trial has its own


@pytest.mark.parametrize("script", ALL, ids=name)
def test_end_error_is_that_of_the_last_fit_on_the_rows_since(script):
    """In two trials, of 200 rows at first and 100 more; all of the first live, of the others every fourth, or none, ends."""
    agent, buffer, _ = build(script, trials=2, fit_every=100)
    fill(script, buffer, 200)
    assert agent.fit_statistics(buffer)["model/end_error"].tolist() == [0, 0]
    fill(script, buffer, 100, seed=1, terminated=lambda s: (torch.arange(100) % 4 == 0).float()[None, :, None])
    buffer.storage[1, :, sum(buffer.widths[:4])] = 0
    assert agent.fit_statistics(buffer)["model/end_error"].tolist() == [0.25, 0]
    assert agent.fit_statistics(buffer)["model/end_error"][0] < 0.2  # now it has seen them


@pytest.mark.parametrize("script", ALL, ids=name)
def test_end_error_finds_the_newest_rows_of_a_full_buffer(script):
    """Of a ring of 100 rows, which all live, 20 are overwritten by ends, in its first places."""
    agent, buffer, _ = build(script, capacity=100, fit_every=20)
    fill(script, buffer, 100)
    agent.fit_statistics(buffer)
    fill(script, buffer, 20, terminated=lambda s: torch.ones(1, 20, 1))
    assert agent.fit_statistics(buffer)["model/end_error"].tolist() == [1]


@pytest.mark.parametrize("script", ALL, ids=name)
def test_tree_of_ends_predicts_as_its_library_does(script):
    """Ends at random have leaves at every depth, and shares between 0 and 1."""
    x, fresh = torch.randn(2, 500, 3), torch.randn(2, 1000, 3)
    ended = (torch.rand(2, 500, 1) < x[..., :1].sigmoid()).float()
    terminator = script.Terminator(2)
    assert (terminator(fresh) == 0).all()  # before any fit
    terminator.fit(x, ended)
    for trial in range(2):
        tree = DecisionTreeRegressor(max_depth=script.TREE_DEPTH, random_state=0).fit(x[trial], ended[trial])
        expected = torch.as_tensor(tree.predict(fresh[trial]), dtype=torch.float32)
        assert 0.1 < expected.mean() < 0.9 and tree.get_depth() == script.TREE_DEPTH
        torch.testing.assert_close(terminator(fresh)[trial, :, 0], expected)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_tree_of_ends_tells_neighbouring_floats_apart(script):
    """A threshold lies between them, where float32 has no number."""
    x = torch.full((1, 8, 1), 1000.0)
    for i in range(1, 8):
        x[0, i] = torch.nextafter(x[0, i - 1], torch.tensor(torch.inf))
    for first in range(1, 8):
        ended = (torch.arange(8) >= first).float()[None, :, None]
        terminator = script.Terminator(1)
        terminator.fit(x, ended)
        assert torch.equal(terminator(x), ended)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_tree_of_ends_keeps_all_of_them_and_their_share(script, monkeypatch):
    """Of 5,000 rows about 600 count: 10 beyond a sharp bound, and a hundredth of the rest, whatever they are, at random."""
    monkeypatch.setattr(script, "TREE_ROWS", 500)
    monkeypatch.setattr(script, "TREE_DEPTH", 2)  # too shallow to single out what is random
    x = torch.rand(1, 5000, 2)
    ended = (torch.rand(1, 5000, 1) < 0.02).float()
    x[:, :10, 0], ended[:, :10] = 3, 1
    terminator = script.Terminator(1)
    terminator.fit(x, ended)
    assert (terminator(x)[:, :10] == 1).all()
    assert terminator(torch.rand(1, 5000, 2)).mean() == pytest.approx(0.02, abs=0.01)  # of the rows that count, 0.17


def ends_above_two(obs, action, next_obs):
    return next_obs[..., 0] > 2


@pytest.mark.parametrize("script", ALL, ids=name)
def test_known_termination_replaces_the_learned_one(script):
    agent, buffer, model_buffer = build(script, termination_fn="test_model_based:ends_above_two")
    fill(script, buffer)
    agent.fit_model(buffer)
    agent.imagine(buffer, model_buffer, 0)
    columns = model_buffer.storage[:, :100].split(buffer.widths, -1)
    assert torch.equal(columns[4], (columns[3][..., :1] > 2).float())
    agent.state_range[1, ..., 0] = 1  # had the data ended there, the rule would see beyond
    next_obs, _, ended = agent.predict(*buffer.rows()[..., :5].split((3, 2), -1))
    assert next_obs[..., 0].max() <= 1 and ended.any()


@pytest.mark.parametrize("script", ALL, ids=name)
def test_imagination_stays_in_range_and_follows_its_schedule(script):
    agent, buffer, model_buffer = build(script, horizon=5, horizon_from=100, horizon_until=200, rollouts=20)
    obs, _, _, next_obs, _ = fill(script, buffer)
    agent.fit_model(buffer)
    agent.targets.std *= 100  # wild predictions
    for step, steps in ((0, 1), (100, 1), (150, 3), (200, 5), (10_000, 5)):
        before = int(model_buffer.added)
        agent.imagine(buffer, model_buffer, step)
        assert int(model_buffer.added) - before == 20 * steps
    agent.args.horizon_from = agent.args.horizon_until = 1  # the default: at once
    agent.imagine(buffer, model_buffer, 10)
    assert int(model_buffer.added) - before == 20 * (5 + 5)
    imagined = model_buffer.storage[:, :100].split(buffer.widths, -1)[3]
    both = torch.cat([obs, next_obs], 1)
    assert (imagined >= both.amin(1) - 1e-5).all() and (imagined <= both.amax(1) + 1e-5).all()
    assert (imagined == both.amax(1)).any(), "nothing was clipped: the test shows nothing"


@pytest.mark.parametrize("script", ALL, ids=name)
def test_a_branch_goes_on_from_where_it_came_unless_it_ended(script):
    """A model that adds 100 and ends where the second number is positive: only ended branches restart, at real states."""
    agent, buffer, model_buffer = build(script, horizon=3, rollouts=50)
    fill(script, buffer)
    ends = lambda obs: (obs[..., 1:2] > 0).float()
    agent.predict = lambda obs, action: (obs + torch.tensor([100.0, 0, 0]), 0 * obs[..., :1], ends(obs))
    agent.act = lambda obs, deterministic=False: torch.full_like(obs[..., :2], 0.0 if deterministic else 0.5)
    agent.imagine(buffer, model_buffer, 10)
    obs, action, _, next_obs, terminated = model_buffer.rows().split(buffer.widths, -1)
    assert (action == 0.5).all()  # of the policy as it explores
    real = {tuple(row.tolist()) for row in buffer.rows()[0, :, :3]}
    assert 10 < terminated[:, :100].sum() < 90
    for i in range(50, 150):
        before = i - 50
        if terminated[0, before]:
            assert tuple(obs[0, i].tolist()) in real
        else:
            assert torch.equal(obs[0, i], next_obs[0, before])


@pytest.mark.parametrize("script", ALL, ids=name)
def test_a_branch_ends_with_its_probability(script):
    agent, buffer, model_buffer = build(script, horizon=2, rollouts=1000)
    fill(script, buffer)
    agent.predict = lambda obs, action: (obs + 100, 0 * obs[..., :1], torch.full_like(obs[..., :1], 0.25))
    agent.imagine(buffer, model_buffer, 10)
    began_anew = model_buffer.rows()[0, 1000:, 0] < 50
    assert began_anew.float().mean().item() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("script", ALL, ids=name)
def test_number_of_minibatches(script):
    """Five passes, at least min_first_batches in the first fit and min_batches in later ones, at most max_batches."""
    agent, buffer, _ = build(script, epochs=5, min_first_batches=60, min_batches=30, max_batches=70, batch_size=32)
    count, loss = [], agent.model_loss
    agent.model_loss = lambda model, *rest: count.append(model) or loss(model, *rest)
    for rows, expected in ((100, 60), (100, 30), (100, 5 * 240 // 32), (400, 70)):
        fill(script, buffer, rows)
        count.clear()
        agent.fit_model(buffer)
        assert count.count(agent.model) == expected
        if script is not MBPO:  # p alone in the first half
            assert count.count(agent.posterior_model) == expected - expected // 2


# --- buffer and trials


def test_buffer_wraps_and_samples_every_row():
    buffer = BETA.ReplayBuffer(2, 10, 1, 1, "cpu")
    row = lambda first, n: torch.arange(first, first + n).float().view(1, n, 1).expand(2, n, 5)
    buffer.add(row(0, 7))
    assert buffer.rows().shape == (2, 7, 5) and set(buffer.sample(2000)[0, :, 0].tolist()) == set(range(7))
    buffer.add(row(7, 7))
    assert buffer.rows().shape == (2, 10, 5) and sorted(buffer.storage[1, :, 0].tolist()) == list(range(4, 14))
    buffer.add(row(14, 1))
    assert sorted(buffer.storage[0, :, 0].tolist()) == list(range(5, 15))
    drawn = buffer.sample(20_000)[0, :, 0]
    counts = torch.bincount(drawn.long())[5:]
    assert len(counts) == 10 and (counts - 2000).abs().max() < 250  # five standard deviations


@pytest.mark.parametrize("script", ALL, ids=name)
def test_trials_do_not_feel_each_other(script):
    """Changing the second trial's data leaves every bit of the first trial's parameters as it was."""
    agents = []
    for changed in (False, True):
        torch.manual_seed(0)
        budget = {"kl_budget": 1e-3, "beta": 1.0, "beta_lr": 1.0} if script is BETA else {}  # so that no step is clipped
        agent, buffer, model_buffer = build(script, trials=2, **budget)
        fill(script, buffer, terminated=lambda s: (s[..., :1] > 0.5).float())
        if changed:
            buffer.storage[1] = buffer.storage[1].flip(0) * 3 + 1
            buffer.storage[1, :, sum(buffer.widths[:4])] = 1
        for _ in range(3):
            agent.fit_model(buffer)
            agent.imagine(buffer, model_buffer, 0)
            agent.learn(buffer, model_buffer)
            if script is BETA:
                agent.update_beta()
        agents.append(agent)
    for (key, one), (_, other) in zip(agents[0].named_parameters(), agents[1].named_parameters()):
        assert torch.equal(one.select(-3, 0), other.select(-3, 0)), key
        assert not torch.equal(one.select(-3, 1), other.select(-3, 1)), f"{key} does not depend on the data"


@pytest.mark.parametrize("script", ALL, ids=name)
def test_trials_start_differently(script):
    agent, *_ = build(script, trials=2)
    for key, parameter in agent.named_parameters():
        if key.endswith("weight"):
            flat = parameter.detach().flatten(0, -3)
            assert len({tuple(matrix.flatten().tolist()) for matrix in flat}) == len(flat), key
