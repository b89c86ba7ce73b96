"""The mathematics of active_vem.py on linear-Gaussian models, against the Kalman filter and smoother written here."""

import copy
import csv
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from benchmarks import tasks as TASKS
from conftest import load_script
from torch.distributions import Normal, TanhTransform, kl_divergence

VEM = load_script("active_vem")
AGENTS = ["generative", "discriminative"]
SMALL = {"hidden_dim": 16, "model_dim": 16, "latent_dim": 4, "windows": 6, "window_length": 5, "device": "cpu"}


def build(obs_dim=2, action_dim=1, **flags):
    """A small agent, on the CPU."""
    args = VEM.Args(**SMALL | flags)
    return VEM.Agent(args, obs_dim, action_dim)


def fill(agent, obs_dim=2, action_dim=1, steps=60, seed=0, length=9, capacity=1000):
    """A buffer of random episodes that terminate and that are cut off, in turn."""
    generator, trials = torch.Generator().manual_seed(seed), agent.args.trials
    buffer = VEM.EpisodeBuffer(trials, capacity, agent.widths, "cpu")
    random = lambda width: torch.randn(trials, 1, width, generator=generator)
    obs = random(obs_dim)
    for step in range(steps):
        time, action, reward, next_obs = step % length, random(action_dim).tanh(), random(1), random(obs_dim)
        ended = torch.full((trials, 1, 1), float(step % (2 * length) == length - 1))
        latent = random(agent.latent_dim)
        buffer.add(obs, action, reward, next_obs, ended, latent, torch.full((trials, 1, 1), float(time)))
        obs = random(obs_dim) if time == length - 1 else next_obs
    agent.fit_scales(buffer)
    agent.ever_ended.fill_(1)
    return buffer


def replace(agent, **parts):
    """Put plain functions in the place of networks."""
    for name, part in parts.items():
        agent._modules.pop(name, None)
        setattr(agent, name, part)


# --- densities


def test_densities_against_distributions():
    mean, log_std, other_mean, other_log_std, x = torch.randn(5, 7, 3, dtype=torch.float64)
    one, other = Normal(mean, log_std.exp()), Normal(other_mean, other_log_std.exp())
    torch.testing.assert_close(VEM.log_density(x, mean, log_std)[:, 0], one.log_prob(x).sum(-1))
    kl = kl_divergence(one, other).sum(-1)
    torch.testing.assert_close(VEM.divergence(mean, log_std, other_mean, other_log_std)[:, 0], kl)
    torch.testing.assert_close(VEM.log_mean_exp(x), x.exp().mean(0).log())


# --- a linear-Gaussian state-space model: z' = a z + b u + N(0, q), percept = c z + N(0, diag r)

A, B, Q, R, C = 0.9, 0.5, 0.3, np.array([0.2, 0.5]), np.array([1.0, -0.7])
START = 0.4
PARTS = ("last_latent", "last_action", "percept", "posterior")


def sequence(steps=6, seed=0):
    """Actions (steps,), percepts (steps, 2) of the model."""
    rng, z = np.random.default_rng(seed), START
    actions, percepts = rng.normal(size=steps), []
    for u in actions:
        z = A * z + B * u + math.sqrt(Q) * rng.normal()
        percepts.append(C * z + np.sqrt(R) * rng.normal(size=2))
    return actions, np.array(percepts)


def normal_log_pdf(x, mean, cov):
    sign, log_det = np.linalg.slogdet(2 * np.pi * cov)
    return -0.5 * (log_det + (x - mean) @ np.linalg.solve(cov, x - mean))


def kalman_log_likelihood(actions, percepts):
    mean, var, total = START, 0.0, 0.0
    for u, x in zip(actions, percepts):
        mean, var = A * mean + B * u, A * A * var + Q
        cov = var * np.outer(C, C) + np.diag(R)
        total += normal_log_pdf(x, C * mean, cov)
        gain = var * C @ np.linalg.inv(cov)
        mean, var = mean + gain @ (x - C * mean), var - var * gain @ C
    return total


def smoother(actions, percepts):
    """q(z_t | z_{t-1}, x_{t:T}) ∝ p(z_t|z_{t-1}) exp(−J z²/2 + h z): J and h of the backward messages, per step."""
    messages, future_j, future_h = [], 0.0, 0.0
    for u, x in zip(actions[::-1], percepts[::-1]):
        j, h = (C**2 / R).sum() + future_j, (C * x / R).sum() + future_h
        messages.append((j, h))
        # ∫ N(z; a y + b u, Q) exp(−j z²/2 + h z) dz as a function of y
        slope = A / (1 + j * Q)
        future_j, future_h = A * slope * j, slope * (h - j * B * u)
    return messages[::-1]


def linear_agent(posterior, kind="generative", **flags):
    """An agent whose networks are the model's own and whose q is `posterior`(t, prior mean, percept) -> mean, std."""
    agent = build(1, 1, agent=kind, **{"latent_dim": 1} | flags).double()
    clock = SimpleNamespace(t=-1)  # a window begins with the percept before its first step
    predict = lambda z, u: A * z + B * u
    constant = lambda like, std: torch.full_like(like, math.log(std))

    def infer(z, u, x):
        mean, std = posterior(clock.t, predict(z, u), x[..., :2])  # without the change of the observation
        clock.t += 1
        return mean, constant(mean, std)

    def bayes_prior(z, u, x):
        mean, std = exact(None, predict(z, u), x[..., :2])
        return mean, constant(mean, std)

    prior = (lambda z, u: (predict(z, u), constant(z, math.sqrt(Q)))) if kind == "generative" else bayes_prior
    replace(agent, latent_posterior=infer, latent_prior=prior)
    if kind == "generative":
        agent.log_scale.data[:] = torch.as_tensor(np.log(R) / 2)
        agent.decode = lambda z: (z * torch.as_tensor(C), agent.log_scale, torch.full_like(z, -50.0))
    return agent.requires_grad_(False)


def exact(t, prior_mean, x):
    """q(z_t | z_{t-1}, x_t), by Bayes' rule."""
    j = 1 / Q + (C**2 / R).sum()
    return (prior_mean / Q + x @ torch.as_tensor(C / R)[:, None]) / j, j**-0.5


def smoothed(messages, shift=0.0, scale=1.0):
    def posterior(t, prior_mean, x):
        j, h = messages[t]
        return (prior_mean / Q + h) / (1 / Q + j) + shift, scale * (1 / Q + j) ** -0.5

    return posterior


def expected_terms(agent, actions, percepts):
    """Sum over time of E_q of the bound's terms: quadratic in the noise, so 2T points with its moments are exact."""
    steps = len(actions)
    noise = math.sqrt(steps) * torch.cat([torch.eye(steps), -torch.eye(steps)]).double().T.reshape(1, -1, 1)
    n = noise.shape[1] // steps
    columns = {"obs": 0, "action": actions, "reward": percepts[:, 1], "next_obs": percepts[:, 0], "terminated": 0,
               "latent": START, "time": 1 + np.arange(steps)}
    rows = torch.stack([torch.as_tensor(x).double().expand(steps) for x in columns.values()], -1)
    rows = rows[None, :, None].expand(1, steps, n, -1)
    with pytest.MonkeyPatch.context() as patch:  # no noise where the window begins: z is the row's there
        patch.setattr(torch, "randn", lambda *size, device: torch.cat([torch.zeros(1, n, 1).double(), noise], 1))
        window = agent.infer_latents(rows, torch.ones_like(rows[..., :1]))
    cut = lambda value: [x[:, n:] for x in value] if isinstance(value, list) else value[:, n:]
    window = {key: cut(value) for key, value in window.items()}  # without that percept, which does not count
    means = agent.model_loss(**window)[1]
    return {name.removeprefix("model/"): steps * mean.item() for name, mean in means.items()}, window


def test_elbo_of_the_exact_smoother_is_the_log_likelihood():
    """And of any other q it is below, by exactly the KL where only one q is shifted."""
    actions, percepts = sequence()
    expected = kalman_log_likelihood(actions, percepts)
    messages = smoother(actions, percepts)

    def elbo(posterior):
        terms, _ = expected_terms(linear_agent(posterior), actions, percepts)
        return terms["log_likelihood"] - terms["kl"]

    assert elbo(smoothed(messages)) == pytest.approx(expected, abs=1e-8)
    for worse in (exact, smoothed(messages, shift=0.1), smoothed(messages, scale=1.2), smoothed(messages, scale=0.8)):
        assert elbo(worse) < expected - 1e-3
    last = len(actions) - 1
    scaled = lambda t, mean, x: smoothed(messages, scale=1.3 if t == last else 1.0)(t, mean, x)
    kl = -math.log(1.3) + 0.5 * (1.3**2 - 1)
    assert elbo(scaled) == pytest.approx(expected - kl, abs=1e-8)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_model_loss_is_minus_the_bound(weight):
    """With exact filtering posteriors (8) is (1 − w) Σ_t log p(x_t|z_{t-1}), here in expectation over q(z_{t-1})."""
    actions, percepts = sequence()
    agent = linear_agent(exact, marginal_weight=weight)
    _, window = expected_terms(agent, actions, percepts)
    predicted = agent.log_marginal(*(window[key] for key in PARTS)).mean().item()
    loss = agent.model_loss(**window)[0]
    assert loss.item() == pytest.approx(-(1 - weight) * predicted, abs=1e-8)
    wrong = agent.model_loss(**window | {"ended": window["weight"]})[0]  # a logit of −50 that the episode ends
    assert wrong.item() - loss.item() == pytest.approx(50, abs=1e-6)


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_full_marginal_weight_leaves_nothing_to_an_exact_posterior(samples):
    """The bracket of (8) at w = 1 is 0 at every sample, and the marginal is log p(x_t|z_{t-1}) for every K."""
    actions, percepts = sequence()
    agent = linear_agent(exact, marginal_weight=1.0, marginal_samples=samples)
    terms, window = expected_terms(agent, actions, percepts)
    before, u, x, posterior = (window[key] for key in PARTS)
    cov = Q * np.outer(C, C) + np.diag(R)
    rows = zip(before[0, :, 0].numpy(), u[0, :, 0].numpy(), x[0].numpy())
    predicted = [normal_log_pdf(percept, C * (A * z + B * action), cov) for z, action, percept in rows]
    marginal = agent.log_marginal(before, u, x, posterior)
    np.testing.assert_allclose(marginal[0, :, 0].detach(), predicted, atol=1e-8)
    assert terms["log_likelihood"] - terms["kl"] == pytest.approx(len(actions) * marginal.mean().item(), abs=1e-8)
    prior = agent.latent_prior(before, u)
    ratio = VEM.log_density(window["latent"], *posterior) - VEM.log_density(window["latent"], *prior)
    bracket = VEM.log_density(x, *agent.decode(window["latent"])[:2]) - marginal - ratio
    assert bracket.abs().max() < 1e-8


def test_marginal_of_another_proposal_is_low_by_an_error_that_shrinks_with_the_samples():
    off = lambda t, mean, x: (exact(t, mean, x)[0] + 0.1, 1.25 * exact(t, mean, x)[1])
    n, errors = 40_000, []
    rows = lambda *values: torch.tensor(values, dtype=torch.float64).expand(1, n, -1)
    before, u, x = rows(START), rows(0.3), rows(1.0, -0.2)
    expected = normal_log_pdf(np.array([1.0, -0.2]), C * (A * START + B * 0.3), Q * np.outer(C, C) + np.diag(R))
    for samples in (4, 16, 64):
        agent = linear_agent(off, marginal_samples=samples)
        posterior = agent.latent_posterior(before, u, x)
        errors.append(expected - agent.log_marginal(before, u, x, posterior).mean().item())
    assert errors[-1] > 0
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35) and errors[1] / errors[2] == pytest.approx(4, rel=0.35)


def test_marginal_sends_the_proposal_no_gradient():
    """q could raise the bound by becoming a bad proposal; the model and z_{t-1} get the gradient."""
    agent = build(marginal_weight=1.0)
    before, u, x = torch.randn(1, 8, 4, requires_grad=True), torch.randn(1, 8, 1), torch.randn(1, 8, 3)
    posterior = agent.latent_posterior(before.detach(), u, x, torch.randn(1, 8, 2))
    agent.log_marginal(before, u, x, posterior).sum().backward()
    assert all(p.grad is None for p in agent.latent_posterior.parameters())
    assert all(p.grad.abs().sum() > 0 for p in [*agent.latent_prior.parameters(), before, agent.log_scale])


def test_generative_bound_at_full_weight_is_the_discriminative_one():
    """(8) at w = 1 equals (6) when the discriminative prior is the Bayes posterior, for any q."""
    actions, percepts = sequence()
    for shift, scale in ((0.0, 1.0), (0.3, 1.0), (-0.2, 1.5)):
        q = lambda t, mean, x: (exact(t, mean, x)[0] + shift, scale * exact(t, mean, x)[1])
        one, other = linear_agent(q), linear_agent(q, "discriminative")
        terms, window = expected_terms(one, actions, percepts)
        before, u, x, _ = (window[key] for key in PARTS)
        mean, std = exact(None, A * before + B * u, x)
        bayes = [mean, torch.full_like(mean, math.log(std))]  # with it as the proposal, the marginal is exact
        marginal = one.log_marginal(before, u, x, bayes).detach().view(len(actions), -1).mean(1).sum()
        other_kl = expected_terms(other, actions, percepts)[0]["kl"]
        assert terms["log_likelihood"] - float(marginal) - terms["kl"] == pytest.approx(-other_kl, abs=1e-8)
        assert (other_kl > 1e-3) == (shift != 0)


@pytest.mark.parametrize("samples", [1, 16, 200])
def test_information_lies_between_its_bounds(samples):
    """The exact information of a percept is ½ log det(I + C Q Cᵀ R⁻¹); the lower estimate is at most log(K + 1)."""
    generator, n = torch.Generator().manual_seed(1), 4000
    loading = torch.randn(3, 4, generator=generator).double()
    q, r = torch.tensor([1.5, 0.5, 1.0]).double(), torch.tensor([0.3, 0.5, 1.0, 0.8]).double()
    agent = build(3, 1, latent_dim=3, info_samples=samples).double()
    agent.decode = lambda z: (z @ loading, r.log() / 2, None)
    prior = [torch.zeros(1, n, 3).double(), (q.log() / 2).expand(1, n, 3)]
    lower, upper = agent.information(VEM.sample(*prior), prior)
    ratio = loading.T @ torch.diag(q) @ loading @ torch.diag(1 / r)
    exact_information = 0.5 * torch.logdet(torch.eye(4) + ratio).item()
    error = 4 * (lower.std() + upper.std()).item() / math.sqrt(n)
    assert lower.mean() < exact_information + error and upper.mean() > exact_information - error
    assert lower.max() <= math.log(samples + 1) + 1e-9
    if samples == 200:
        assert upper.mean() - lower.mean() < 1.0


# --- actions


def simple_planner(horizon, decode, **flags):
    agent = build(1, 1, latent_dim=1, plan_horizon=horizon, **flags).double()
    replace(agent, critic=lambda x: torch.zeros(2, *x.shape[:-1], 1, dtype=x.dtype),
            latent_prior=lambda z, u: (A * z + B * u, torch.full_like(z, math.log(Q) / 2)))
    agent.decode = lambda z: (decode(z)[0], None, decode(z)[1])
    agent.log_alpha.data.fill_(-math.inf)  # V without its nats
    return agent


def test_planned_bound_of_one_step_is_the_expected_reward():
    """(10) with H = 1 and Q = 0, for the reward 3 − 2 z²: 3 − 2 ((a z + b u)² + Q), in units of the rewards' spread."""
    agent = simple_planner(1, lambda z: (torch.cat([z, 3 - 2 * z.square()], -1), torch.zeros_like(z)))
    agent.percepts.mean[..., 1], agent.percepts.std[..., 1] = 5.0, 2.0
    z, u, n = 0.8, -0.4, 200_000
    bound = agent.planned_bound(torch.full((1, n, 1), z).double(), torch.full((1, n, 1), u).double()).detach()
    error = 4 * bound.std().item() / math.sqrt(n)
    assert bound.mean().item() == pytest.approx(3 - 2 * ((A * z + B * u) ** 2 + Q) + 5 / 2, abs=error)
    assert error < 0.02


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_planned_bound_discounts_and_may_end(horizon):
    """Reward 1 per step, ending with probability ¼ after each: Σ (¾ γ)^(k−1), and what V says behind it."""
    agent = simple_planner(horizon, lambda z: (torch.ones(*z.shape[:-1], 2).double(), torch.full_like(z, -math.log(3))))
    z = torch.zeros(1, 3, 1).double()
    discount = 0.99 * (1 - 0.25 * torch.tensor([0.0, 1.0]))  # no episode has ended yet, or some have
    for ever_ended, factor in enumerate(discount.tolist()):
        agent.ever_ended.fill_(ever_ended)
        expected = sum(factor**k for k in range(horizon))
        assert agent.planned_bound(z, z)[0, 0].item() == pytest.approx(expected, rel=1e-6)
        agent.critic = lambda x: torch.stack([torch.full((*x.shape[:-1], 1), v).double() for v in (7.0, 9.0)])
        assert agent.planned_bound(z, z)[0, 0].item() == pytest.approx(expected + 7 * factor**horizon, rel=1e-6)
        agent.critic = lambda x: torch.zeros(2, *x.shape[:-1], 1).double()


def test_gradient_of_a_plan_is_that_of_its_expectation():
    """∂Ê/∂a of the reward 3 − 2 z'²: −4 b (a z + b u)."""
    agent = simple_planner(1, lambda z: (torch.cat([z, 3 - 2 * z.square()], -1), torch.zeros_like(z)))
    u = torch.full((1, 200_000, 1), -0.4).double().requires_grad_()
    agent.planned_bound(torch.full_like(u, 0.8).detach(), u).mean().backward()
    assert u.grad.sum().item() == pytest.approx(-4 * B * (A * 0.8 + B * -0.4), rel=0.02)


@pytest.mark.parametrize("prior, budget", [("learned", 1.0), ("uniform", 2.4)])
def test_plans_do_not_move_alpha(prior, budget):
    """Its gradient is α (budget − KL of q(a) where it acts), whatever the plan costs."""
    agent = build(2, 2, trials=2, plan_horizon=2, action_prior=prior)
    rows, _, weight = fill(agent, 2, 2).sample(60, 5)
    for opt in agent.opts.values():
        opt.step = opt.zero_grad = lambda: None
    metrics = agent.update(rows, weight)[1]
    expected = agent.log_alpha.detach().exp().flatten() * (budget - metrics["policy/kl"])
    torch.testing.assert_close(agent.log_alpha.grad.flatten(), expected)


def test_the_action_prior_acts_in_imagined_steps():
    """Between the first action and V."""
    agent, calls = build(plan_horizon=4), []
    for name in ("actor", "prior_actor"):
        net = getattr(agent, name)
        replace(agent, **{name: lambda z, net=net, name=name: calls.append(name) or net(z)})
    agent.planned_bound(torch.randn(1, 5, 4), torch.zeros(1, 5, 1))
    assert calls == ["prior_actor"] * 3 + ["actor", "prior_actor"]  # the last two: V


@pytest.mark.parametrize("prior", ["learned", "uniform"])
def test_every_action_of_a_plan_but_the_first_costs_its_kl(prior):
    """Without rewards Ê = −α Σ_{1≤k<H} γ^k KL(p(a)‖prior) − α γ^H KL(q(a)‖prior); to a uniform, by quadrature over a."""
    horizon, mean, log_std = 3, 0.4, -0.7
    agent = simple_planner(horizon, lambda z: (torch.zeros(*z.shape[:-1], 2).double(), torch.zeros_like(z)),
                           action_prior=prior)
    agent.log_alpha.data.fill_(math.log(0.2))
    fixed = lambda z: (torch.full_like(z, mean), torch.full_like(z, log_std))
    replace(agent, actor=fixed, prior_actor=fixed)
    z = torch.zeros(1, 100_000, 1).double()
    bound = agent.planned_bound(z, z).detach()
    a = torch.linspace(-1 + 1e-7, 1 - 1e-7, 1_000_001).double()
    log_density = Normal(mean, math.exp(log_std)).log_prob(a.atanh()) - (1 - a.square()).log()
    kl = torch.trapezoid(log_density.exp() * (log_density + math.log(2)), a).item() if prior == "uniform" else 0
    expected = -0.2 * kl * sum(0.99**k for k in range(1, horizon + 1))
    assert bound.mean().item() == pytest.approx(expected, abs=4 * bound.std().item() / math.sqrt(z.numel()) + 1e-9)


@pytest.mark.parametrize("horizon, steps", [(1, 1), (2, 1 + 0.99)])
def test_information_enters_the_plan_with_its_weight(horizon, steps):
    bounds = []
    for weight in (0.0, 2.0):
        agent = build(info_weight=weight, plan_horizon=horizon)
        agent.decode = lambda z: (torch.zeros(*z.shape[:-1], 3), None, torch.zeros_like(z[..., :1]))
        agent.information = lambda latent, prior: (torch.full_like(latent[..., :1], 0.3), None)
        agent.soft_value = lambda latent, critic: 0.0
        bounds.append(agent.planned_bound(torch.zeros(1, 5, 4), torch.zeros(1, 5, 1)).mean().item())
    assert bounds[1] - bounds[0] == pytest.approx(0.1 * 2 * 0.3 * steps, rel=1e-5)  # α is 0.1 at the start


@pytest.mark.parametrize("prior", ["learned", "uniform"])
def test_divergence_of_actions(prior):
    """E log q/p against distributions over a = tanh(u), with many samples."""
    agent = build(2, 2, action_prior=prior).double()
    moments = lambda *values: torch.tensor(values).double()[:, None, None].expand(2, 1, 200_000, 2)
    posterior, fitted = moments([0.5, -0.3], [-0.9, -0.2]), moments([0.0, 0.2], [-0.4, -0.5])
    action, kl, log_prob = agent.draw_action(posterior, fitted)
    q, p = (torch.distributions.TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
            for mean, log_std in (posterior, fitted))
    log_prior = p.log_prob(action) if prior == "learned" else torch.full_like(action, -math.log(2))
    expected = (q.log_prob(action) - log_prior).sum(-1)
    assert kl.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
    torch.testing.assert_close(log_prob[..., 0], q.log_prob(action).sum(-1))


def test_prior_is_fitted_to_the_posterior_and_a_share_of_uniform_actions():
    """The loss is least, with gradient 0, at the moments of the mixture, and sends q no gradient."""
    agent, eps = build(prior_mix=0.1), 0.1
    mean, log_std = torch.tensor([[[0.7]]], requires_grad=True), torch.tensor([[[-1.2]]], requires_grad=True)
    u = torch.atanh(torch.rand(2_000_000, dtype=torch.float64) * 2 - 1)
    variance = (1 - eps) * (math.exp(-2.4) + 0.7**2) + eps * u.square().mean().item() - ((1 - eps) * 0.7) ** 2
    prior = [torch.full((1, 1, 1), x, requires_grad=True) for x in ((1 - eps) * 0.7, 0.5 * math.log(variance))]
    replace(agent, actor=lambda z: (1 * mean, 1 * log_std), prior_actor=lambda z: prior)
    agent.planned_bound = lambda latent, action: torch.zeros(1, 1, 1)
    agent.policy_losses(torch.zeros(1, 1, 4), torch.ones(1, 1, 1))[1].backward()
    assert mean.grad is None and log_std.grad is None
    assert all(abs(x.grad.item()) < 2e-3 for x in prior)


def one_update(monkeypatch, **flags):
    """An update of two trials at H = 0, whose gradients stay: its agent, metrics, rows, weights, window, noise in the
    order in which it was drawn, and the target critics before it."""
    agent = build(2, 2, trials=2, plan_horizon=0, max_grad_norm=1e9, tau=0.1, **flags)
    rows, _, weight = fill(agent, 2, 2).sample(60, 5)
    agent.double().log_alpha.data.copy_(torch.tensor([-1.0, 0.5]).view(2, 1, 1))
    for parameter in agent.critic_target.parameters():
        parameter.data.normal_(0, 0.3)
    slow, windows, noise, infer_latents = copy.deepcopy(agent.critic_target), [], [], agent.infer_latents

    def sample(mean, log_std):
        noise.append(torch.randn_like(mean))
        return mean + log_std.exp() * noise[-1]

    monkeypatch.setattr(VEM, "sample", sample)
    agent.infer_latents = lambda *args: windows.append(infer_latents(*args)) or windows[-1]
    for opt in agent.opts.values():
        opt.step = opt.zero_grad = lambda: None
    metrics = agent.update(rows.double(), weight.double())[1]
    return agent, metrics, rows.double().flatten(1, 2), weight.double().flatten(1, 2), windows[0], noise, slow


def plain_policy(agent, latent, noise):
    """Action, KL(q(a)‖p(a)) and log q(a|z), by torch.distributions."""
    q, p = (Normal(mean, log_std.exp()) for mean, log_std in (agent.actor(latent), agent.prior_actor(latent)))
    u = q.mean + q.stddev * noise
    log_prob = (q.log_prob(u) - (1 - u.tanh() ** 2).log()).sum(-1, keepdim=True)
    kl = kl_divergence(q, p).sum(-1, keepdim=True)
    return u.tanh(), kl if agent.args.action_prior == "learned" else log_prob + 2 * math.log(2), log_prob


def plain_mean(x, weight):
    """Weighted mean over the rows of each trial."""
    return torch.stack([(x[..., i, :, 0] @ weight[i, :, 0]) / weight[i].sum() for i in range(len(weight))], -1)


@pytest.mark.parametrize("prior", ["learned", "uniform"])
@pytest.mark.parametrize("kind", AGENTS)
def test_critics_of_an_update(kind, prior, monkeypatch):
    """(Q − r/σ − γ (1 − end) (min Q'(z', a') − α KL))², of both twins; Q' follows."""
    agent, metrics, rows, weight, window, noise, slow = one_update(monkeypatch, agent=kind, action_prior=prior)
    alpha, unit, latent = agent.log_alpha.exp(), agent.percepts.std[..., -1:], window["latent"].detach()
    next_action, kl, _ = plain_policy(agent, latent[:, 60:], noise[0])
    value = slow(torch.cat([latent[:, 60:], next_action], -1)).amin(0) - alpha * kl
    target = rows[..., 4:5] / unit + 0.99 * (1 - rows[..., 7:8]) * value
    q = agent.critic(torch.cat([latent[:, :-60], rows[..., 2:4]], -1))
    error = plain_mean((q - target.detach()) ** 2, weight)  # (2, trials)
    expected = torch.autograd.grad(error.sum(), [*agent.critic.parameters()])
    for parameter, grad, old, new in zip(agent.critic.parameters(), expected, slow.parameters(),
                                         agent.critic_target.parameters()):
        torch.testing.assert_close(parameter.grad, grad)
        torch.testing.assert_close(new, 0.9 * old + 0.1 * parameter)
    torch.testing.assert_close(metrics["loss/critic"], error.mean(0))
    torch.testing.assert_close(metrics["value/q"], plain_mean(q, weight).mean(0) * unit.flatten())


@pytest.mark.parametrize("prior", ["learned", "uniform"])
@pytest.mark.parametrize("kind", AGENTS)
def test_policy_of_an_update(kind, prior, monkeypatch):
    """q(a) climbs min Q(z, a) − α KL where an action follows; ∂/∂log α = α (budget − KL)."""
    agent, metrics, _, _, window, noise, _ = one_update(monkeypatch, agent=kind, action_prior=prior)
    latent, alpha = window["latent"].detach()[:, ::2], agent.log_alpha.detach().exp()  # every other row
    weight = window["weight"][:, ::2] * (window["ended"][:, ::2] == 0)
    assert (window["weight"] * window["ended"])[:, ::2].any(1).all()  # some episodes ended
    action, kl, log_prob = plain_policy(agent, latent, noise[-1])
    q = agent.critic(torch.cat([latent, action], -1)).amin(0)
    expected = torch.autograd.grad(plain_mean(alpha * kl - q, weight).sum(), [*agent.actor.parameters()])
    for parameter, grad in zip(agent.actor.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad)
    kl, budget = plain_mean(kl, weight), {"learned": 2 * 0.5, "uniform": 2 * 1.2}[prior]
    torch.testing.assert_close(agent.log_alpha.grad.flatten(), alpha.flatten() * (budget - kl))
    torch.testing.assert_close(metrics["policy/kl"], kl)
    torch.testing.assert_close(metrics["policy/entropy"], -plain_mean(log_prob, weight))
    torch.testing.assert_close(metrics["policy/alpha"], alpha.flatten())


def test_discriminative_prior_of_an_update(monkeypatch):
    """(6) in units of reward: α KL(q(z) ‖ p(z)), of which p(z) gets the gradient."""
    agent, metrics, *_, window, _, _ = one_update(monkeypatch, agent="discriminative")
    inputs = [window[key].detach() for key in ("last_latent", "last_action", "sight")]
    (mean, log_std), (prior_mean, prior_log_std) = window["posterior"], agent.latent_prior(*inputs)
    q, p = Normal(mean.detach(), log_std.detach().exp()), Normal(prior_mean, prior_log_std.exp())
    kl = plain_mean(kl_divergence(q, p).sum(-1, keepdim=True), window["weight"])
    loss = (agent.log_alpha.detach().exp().flatten() * kl).sum()
    for parameter, grad in zip(agent.latent_prior.parameters(),
                               torch.autograd.grad(loss, [*agent.latent_prior.parameters()])):
        torch.testing.assert_close(parameter.grad, grad)
    torch.testing.assert_close(metrics["model/kl"], kl)


def test_the_end_is_learned_from_the_prior():
    """Deviation 5: log p(end) of z ~ p, here N(3, 2²), and not of the z ~ q that has seen it, here −3."""
    agent = build(1, 1, latent_dim=1)
    replace(agent, latent_prior=lambda z, u: (torch.full_like(z, 3.0), torch.full_like(z, math.log(2))))
    agent.decode = lambda z: (torch.cat([z, z], -1), agent.log_scale, z)
    zero = torch.zeros(1, 100_000, 1)
    ended, latent = (torch.arange(100_000).view(1, -1, 1) % 4 == 0).float(), zero - 3
    metrics = agent.model_loss(zero, latent, (latent, zero), zero, torch.zeros(1, 100_000, 2), None, ended, zero + 1)[1]
    z = np.linspace(-17, 23, 4001)
    log_end, log_no_end = -np.log1p(np.exp(-z)), -np.log1p(np.exp(z))
    expected = ((0.25 * log_end + 0.75 * log_no_end) * np.exp(-((z - 3) ** 2) / 8)).sum() * 0.01 / math.sqrt(8 * math.pi)
    assert metrics["model/log_end"].item() == pytest.approx(expected, abs=0.03)  # at the mean of p it is 0.2 above


def test_terms_that_are_only_reported(monkeypatch):
    """Each under its name, as a mean over what counts, of z ~ p; the random numbers of a run stay as they are."""
    agent = build()
    buffer, state = fill(agent), torch.get_rng_state()
    mark = lambda value: lambda latent, *_: torch.full_like(latent[..., :1], value)
    agent.log_marginal = mark(3.0)
    agent.information = lambda latent, prior: (mark(1.0)(latent), 2.0 * (latent == prior[0])[..., :1])
    monkeypatch.setattr(VEM, "sample", lambda mean, log_std, *count: mean)
    found = {name: value.item() for name, value in agent.assess(buffer).items()}
    assert found == pytest.approx({"model/log_marginal": 3, "model/information": 1, "model/information_upper": 2})
    assert torch.equal(torch.get_rng_state(), state) and build(agent="discriminative").assess(buffer) == {}


@pytest.mark.parametrize("kind", AGENTS)
def test_each_step_moves_its_own_networks(kind, monkeypatch):
    """The E-step of the action moves q(a) (and α) alone, the M-step of the action prior p(a) alone."""
    agent = build(agent=kind, info_weight=0.5, marginal_weight=0.5)
    buffer, moved, backward = fill(agent), [], torch.Tensor.backward

    def watched(loss, inputs=None):
        before = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}
        backward(loss, inputs=inputs)
        moved.append({name.split(".")[0] for name, p in agent.named_parameters()
                      if p.grad is not None and not (name in before and torch.equal(p.grad, before[name]))})

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    agent.learn(buffer)
    inference = {"generative": {"latent_posterior", "latent_prior", "first_latent", "decoder", "log_scale"},
                 "discriminative": {"latent_posterior", "latent_prior", "first_latent"}}[kind]
    assert moved == [{"critic"} | inference, {"actor", "log_alpha"}, {"prior_actor"}]


@pytest.mark.parametrize("kind", AGENTS)
def test_gradient_of_the_bound_by_finite_differences(kind):
    """Of every parameter that the model's loss moves, in a random direction: through q(z), through time, into p(z)."""
    agent = build(agent=kind)
    rows, _, weight = fill(agent, length=9).sample(20, 5)
    rows, weight = rows.double(), weight.double()
    agent.double()

    def loss():
        torch.manual_seed(0)
        return agent.model_loss(**agent.infer_latents(rows, weight))[0]

    gradients, names = torch.autograd.grad(loss(), agent.model), {id(p): name for name, p in agent.named_parameters()}
    for parameter, gradient in zip(agent.model, gradients):
        direction, ends = torch.randn_like(parameter), []
        for step in (1e-6, -2e-6):
            parameter.data += step * direction
            ends.append(loss().item())
        parameter.data += 1e-6 * direction
        expected = (ends[0] - ends[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-6), names[id(parameter)]


@pytest.mark.parametrize("kind", ["generative", "discriminative"])
def test_the_critics_error_shapes_the_discriminative_latent_state_alone(kind):
    agent = build(agent=kind)
    buffer = fill(agent)
    seen, critic_loss = [], agent.critic_loss
    agent.critic_loss = lambda latent, *rest: seen.append(latent.requires_grad) or critic_loss(latent, *rest)
    agent.learn(buffer)
    assert seen == [kind == "discriminative"]


@pytest.mark.parametrize("alpha, direction", [(1e9, -1), (1e-9, 1)])
def test_alpha_meets_its_target(alpha, direction):
    """α falls while the KL is below the target and rises while it is above; a fixed one stays."""
    agent = build(kl_target=alpha)
    before = agent.log_alpha.item()
    agent.learn(fill(agent))
    assert (agent.log_alpha.item() - before) * direction > 0
    agent = build(alpha=0.3)
    agent.learn(fill(agent))
    assert agent.log_alpha.exp().item() == pytest.approx(0.3)


# --- inference along episodes


def test_online_filter_is_batch_inference():
    agent = build(trials=2)
    agent.percepts.mean += torch.randn(2, 1, 3)
    agent.changes.std += torch.rand(2, 1, 2)
    rows, noise = torch.randn(2, 12, 3, sum(agent.widths)), torch.randn(2, 13 * 3, 4)  # (trials, time, n, row)
    rows[:, 1:, :, :2] = rows[:, :-1, :, 4:6]  # obs is the last next_obs
    rows[..., -1] = torch.arange(12).view(12, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, device: noise)
        batch = agent.infer_latents(rows, torch.full((2, 12, 3, 1), 1 / 12))["latent"].unflatten(1, (13, 3))
    last, obs = agent.begin(rows[:, 0, :, :2]), rows[:, 0, :, :2]
    for t in range(13):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VEM, "sample", lambda mean, log_std: mean + log_std.exp() * noise[:, 3 * t : 3 * t + 3])
            latent = agent.perceive(obs, *last)
        torch.testing.assert_close(latent, batch[:, t])
        if t < 12:
            last, obs = (latent, rows[:, t, :, 2:3], rows[:, t, :, 3:4], obs), rows[:, t, :, 4:6]


@pytest.mark.parametrize("kind", AGENTS)
def test_later_scales_change_no_output_in_the_units_of_the_task(kind):
    """Latent state, density of a percept, value and α in units of reward, and what is done, before and after a fit."""
    agent = build(agent=kind, trials=2).double()
    fill(agent)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(0)
    random = lambda width: torch.randn(2, 7, width, dtype=torch.float64)
    before, action, obs, reward, last_obs = (random(n) for n in (agent.latent_dim, 1, 2, 1, 2))

    def outputs():
        percept, unit = agent.percepts(torch.cat([obs, reward], -1)), agent.percepts.std[..., -1:]
        torch.manual_seed(2)
        latent = agent.perceive(obs, before, action, reward, last_obs)
        found = {"q": agent.critic(torch.cat([latent, action], -1)) * unit, "alpha": agent.log_alpha.exp() * unit,
                 "target": agent.critic_target(torch.cat([latent, action], -1)) * unit,
                 "action": agent.act(latent, deterministic=True), "prior": agent.act(latent, "prior", deterministic=True)}
        prior = agent.latent_prior(before, action, *([] if kind == "generative" else [percept, last_obs]))
        found |= {"latent": latent, "prior mean": prior[0], "prior scale": prior[1]}
        if kind == "generative":
            volume = agent.percepts.std.log().sum(-1, keepdim=True)
            mean, log_std, end = agent.decode(latent)
            found |= {"density": VEM.log_density(percept, mean, log_std) - volume, "end": end,
                      "bound": planned(agent, latent, action) * unit}
        return found

    def planned(agent, latent, action):
        torch.manual_seed(1)
        return agent.planned_bound(latent, action)

    agent.updates += 1
    first = outputs()
    other = VEM.EpisodeBuffer(2, 50, agent.widths, "cpu")
    for step in range(50):  # other means, other spreads, in each trial its own
        columns = [torch.randn(2, 1, width) * torch.tensor([0.5, 4.0]).view(2, 1, 1) + 3 for width in other.widths]
        other.add(*columns[:4], torch.ones(2, 1, 1), *columns[5:])  # some episodes have ended, as before
    std = agent.percepts.std.clone()
    agent.fit_scales(other)
    assert ((agent.percepts.std / std).log().abs() > 0.2).all()
    for name, value in outputs().items():
        torch.testing.assert_close(value, first[name], msg=lambda text: f"{name}: {text}")


def test_scales_of_the_first_fit_leave_the_untrained_networks_alone():
    agent = build()
    weights = [parameter.clone() for parameter in agent.parameters()]
    fill(agent)
    assert not torch.equal(agent.percepts.std, torch.ones_like(agent.percepts.std))
    assert all(torch.equal(new, old) for new, old in zip(agent.parameters(), weights))


@pytest.mark.parametrize("kind", ["generative", "discriminative"])
def test_untrained_latent_state_is_bounded(kind):
    agent = build(agent=kind, latent_dim=8, model_dim=64, trials=5)
    last = agent.begin(torch.randn(5, 4, 2))
    for _ in range(1000):
        obs = torch.randn(5, 4, 2)
        latent = agent.perceive(obs, *last)
        last = latent, agent.act(latent), torch.randn(5, 4, 1), obs
        assert latent.abs().max() < 20
    imagined = latent
    for _ in range(1000 if kind == "generative" else 0):
        imagined = VEM.sample(*agent.latent_prior(imagined, agent.act(imagined)))
        assert imagined.abs().max() < 20


@pytest.mark.parametrize("kind", ["generative", "discriminative"])
def test_latent_state_is_bounded_where_its_recurrence_expands(kind):
    """Nothing but the critic holds the scale of a discriminative z: weights tenfold must not make it grow for ever."""
    agent = build(agent=kind, latent_dim=8, model_dim=64)
    for parameter in agent.latent_posterior.parameters():
        parameter.data *= 10
    latent, action, reward, obs = agent.begin(torch.randn(1, 4, 2))
    for _ in range(50):
        latent = agent.perceive(torch.randn(1, 4, 2), latent, action, reward, obs)
    assert latent.abs().max() < 10 + 6 * math.exp(2)


def run(path, **flags):
    """A training run in this process; the arguments it had."""
    small = {"hidden_dim": 16, "model_dim": 16, "windows": 4, "window_length": 5, "learning_starts": 20,
             "log_every": 10, "eval_every": 20, "eval_episodes": 2,
             "total_steps": 40, "device": "cpu", "run_dir": path}
    argv = [text for key, value in (small | flags).items() for text in (f"--{key.replace('_', '-')}", str(value))]
    VEM.main(argv)
    return VEM.Args(**json.loads((path / "args.json").read_text()))


def test_rewards_and_actions_are_aligned(tmp_path, monkeypatch):
    """The posterior sees at x_t the reward that came with it and the action before it: a counter tells which."""
    seen, infer, perceive = [], VEM.Agent.infer_latents, VEM.Agent.perceive

    def watched_infer(agent, rows, weight):
        window = infer(agent, rows, weight)
        percept = window["percept"] * agent.percepts.std + agent.percepts.mean
        seen.append((percept, window["last_action"], window["weight"]))
        return window

    def watched_perceive(agent, obs, latent, action, reward, last_obs, deterministic=False):
        count, last_count = obs[..., :1] % 100, last_obs[..., :1] % 100
        assert torch.equal(count - last_count, (count > 0).float())
        seen.append((torch.cat([obs, reward], -1), action, torch.ones_like(reward)))
        return perceive(agent, obs, latent, action, reward, last_obs, deterministic)

    monkeypatch.setattr(VEM.Agent, "infer_latents", watched_infer)
    monkeypatch.setattr(VEM.Agent, "perceive", watched_perceive)
    run(tmp_path / "run", env_id="tiny_envs:Counter-v0", trials=2, eval_every=1000, total_steps=39)
    firsts = 0
    for percepts, actions, weight in seen[: 39 + 20 + 2]:  # before the evaluation at the end
        count, received, reward = percepts[weight[..., 0] > 0].double().unbind(-1)
        action, count = actions[weight[..., 0] > 0][:, 0], count.round() % 100
        expected = tiny_envs.LOW + (action + 1) / 2 * (tiny_envs.HIGH - tiny_envs.LOW)
        assert torch.allclose(reward.float(), count.float(), atol=1e-2)
        assert torch.allclose(received[count > 0].float(), expected[count > 0], atol=2e-2)
        assert not action[count == 0].any()
        firsts += (count == 0).sum()
    assert firsts > 40


@pytest.mark.parametrize("length, capacity, window", [(9, 50, 6), (9, 1000, 20), (70, 1000, 20), (1, 50, 4)])
def test_windows_stay_in_their_episode_and_all_steps_weigh_the_same(length, capacity, window):
    agent, draws = build(), 1500
    buffer, steps = fill(agent, steps=70, length=length, capacity=capacity), torch.arange(70)
    kept = steps >= 70 - capacity
    weights, first_weights = torch.zeros(70), torch.zeros(70)
    for _ in range(draws):
        rows, place, weight = buffer.sample(20, window)
        time, ok = rows[0, ..., -1], weight[0, ..., 0] > 0
        assert ok[0].all() and torch.allclose(weight.sum(1), torch.ones(1, 20, 1))
        assert torch.equal(time[1:][ok[1:]], (time[:-1] + 1)[ok[1:]])  # one step after another
        assert not (ok[1:] & ~ok[:-1]).any()  # padding is at the end
        assert torch.equal(rows[0, 1:, :, :2][ok[1:]], rows[0, :-1, :, 4:6][ok[1:]])  # obs is the last next_obs
        assert torch.equal(buffer.storage[0, place[0]], rows[0])
        step = place[0] if capacity > 70 else (place[0] - 70 % capacity) % capacity + 70 - capacity
        assert torch.equal(step[ok] % length, time[ok].long())
        weights.index_add_(0, step[ok], weight[0, ..., 0][ok])
        first_weights.index_add_(0, step[0], weight[0, 0, :, 0] * (time[0] == 0))
    assert weights[~kept].sum() == 0
    expected = draws * 20 / kept.sum().item()
    assert ((weights[kept] / expected - 1).abs() < 0.2).all()
    begins = kept & (steps % length == 0)  # the observation before an episode's first step counts as much as the others
    assert ((first_weights[begins] / expected - 1).abs() < 0.2).all() and first_weights[~begins].sum() == 0
    early = kept & (steps % length < 3)
    assert weights[early].mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("length", [9, 1000])
def test_all_fresh_latent_states_are_kept(length):
    """z inferred at a row is where a window that begins there starts from; nothing else is touched."""
    agent = build()
    buffer = fill(agent, length=length)
    before, (rows, place, weight) = buffer.storage.clone(), buffer.sample(32, 20)
    assert length > 100 or weight.min() == 0
    covered = torch.zeros(60, dtype=torch.bool)
    covered[place[0][weight[0, ..., 0] > 0]] = True
    buffer.refresh(place, weight, torch.full((1, 20, 32, 4), 7.0))
    assert (buffer.storage[0, :60, buffer.latent][covered] == 7).all()
    assert torch.equal(buffer.storage[0, :60][~covered], before[0, :60][~covered])
    buffer.storage[..., buffer.latent] = before[..., buffer.latent]
    assert torch.equal(buffer.storage, before)


def test_learning_keeps_the_latent_state_inferred_before_each_step():
    agent = build(windows=1)
    buffer = fill(agent, length=30)
    drawn = _, place, weight = buffer.sample(1, 5)
    buffer.sample = lambda *_: drawn
    marks = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 1, 4)  # before each of five steps, and after the last
    agent.update = lambda rows, weight: (marks, {})
    agent.learn(buffer)
    kept, counts = buffer.storage[0, place[0, :, 0], buffer.latent][:, 0], weight[0, :, 0, 0] > 0
    assert torch.equal(kept[counts], torch.arange(5.0)[counts])


def test_windows_start_from_what_was_inferred_there():
    """Within an episode from the row's latent state; at its beginning from the first one, with gradient."""
    agent = build()
    buffer = fill(agent, length=30)
    rows, _, weight = buffer.sample(40, 6)
    window, begins = agent.infer_latents(rows, weight), rows[0, 0, :, -1] == 0
    first = window["latent"][0, :40]
    assert 0 < begins.sum() < 40
    assert torch.equal(first[~begins], rows[0, 0, :, buffer.latent][~begins])
    assert not torch.equal(first[begins], rows[0, 0, :, buffer.latent][begins])
    assert torch.equal(window["weight"][0, :40, 0] > 0, begins)
    window["latent"][0, :40][begins].sum().backward()
    assert agent.first_latent.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", AGENTS)
def test_truncation_bootstraps_and_termination_does_not(kind):
    """The critic's target is r/σ + γ V(z') where an episode was cut off and r/σ where it terminated."""
    agent = build(agent=kind)
    buffer, seen = fill(agent), []
    agent.soft_value = lambda latent, critic: torch.full_like(latent[..., :1], 10.0)
    critic_loss = agent.critic_loss
    agent.critic_loss = lambda *columns: seen.append(columns) or critic_loss(*columns)
    for _ in range(10):
        rows, _, weight = buffer.sample(8, 5)
        agent.update(rows, weight)
        target, mask = seen[-1][2], seen[-1][3]
        reward, terminated, time = (rows[..., i].flatten(1, 2)[..., None] for i in (3, 6, -1))
        scale = agent.percepts.std[..., -1:]
        torch.testing.assert_close(target, reward / scale + 9.9 * (1 - terminated))
        ends = (time == 8) & (mask > 0)
        assert torch.equal(mask, weight.flatten(1, 2))
        if (ends & (terminated == 0)).any() and (ends & (terminated == 1)).any():
            break
    else:
        pytest.fail("no window held both kinds of end")


def test_the_last_observation_of_an_episode_is_modelled():
    """A window has one percept more than valid steps; the end is told to the model where it happened."""
    agent, seen = build(), []
    buffer, model_loss = fill(agent), agent.model_loss
    agent.model_loss = lambda **window: seen.append(window) or model_loss(**window)
    rows, _, weight = buffer.sample(40, 6)
    agent.update(rows, weight)
    percepts, ended, mask = (seen[0][key].unflatten(1, (7, 40)) for key in ("percept", "ended", "weight"))
    expected = agent.percepts(rows[..., [4, 5, 3]].flatten(1, 2)).unflatten(1, (6, 40))
    assert weight.min() == 0 and torch.equal(mask[:, 1:], weight)
    assert torch.equal(percepts[:, 1:], expected) and torch.equal(ended[:, 1:], rows[..., 6:7])
    assert (ended * mask).sum() == (rows[..., 6:7] * weight).sum() > 0


@pytest.mark.parametrize("kind", AGENTS)
def test_padding_does_not_teach(kind):
    """What stands in padded rows leaves every gradient as it was."""
    agents = []
    for poison in (0.0, 5.0):
        torch.manual_seed(0)
        agent = build(agent=kind, marginal_weight=0.3)
        buffer = fill(agent)
        rows, _, weight = buffer.sample(40, 6)
        assert weight.min() == 0
        torch.manual_seed(1)
        agent.update(torch.where(weight == 0, rows + poison, rows), weight)
        agents.append(agent)
    for (key, one), other in zip(agents[0].named_parameters(), agents[1].parameters()):
        torch.testing.assert_close(one, other, msg=key)


# --- trials


@pytest.mark.parametrize("kind", AGENTS)
def test_trials_do_not_feel_each_other(kind):
    """Changing the second trial's data leaves every bit of the first trial's parameters as it was."""
    agents = []
    for changed in (False, True):
        torch.manual_seed(0)
        agent = build(agent=kind, trials=2, marginal_weight=0.5, info_weight=0.5)
        buffer = fill(agent)
        if changed:
            buffer.storage[1, :, :-1] = buffer.storage[1, :, :-1] * 3 + 1
            agent.fit_scales(buffer)
        for _ in range(3):
            agent.learn(buffer)
        agents.append(agent)
    for (key, one), (_, other) in zip(agents[0].named_parameters(), agents[1].named_parameters()):
        assert torch.equal(one.select(-3, 0), other.select(-3, 0)), key
        assert not torch.equal(one.select(-3, 1), other.select(-3, 1)), key


def test_the_loss_of_the_model_is_a_sum_over_trials(monkeypatch):
    agent, total = build(trials=2), 0
    rows, _, weight = fill(agent).sample(6, 5)
    monkeypatch.setattr(VEM, "sample", lambda mean, log_std, *count: mean)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(size))
    for trial in range(2):
        one = slice(trial, trial + 1)
        pick = lambda name, x: x[:, one] if "critic" in name else x[one] if x.ndim else x
        alone = build()
        alone.load_state_dict({name: pick(name, x) for name, x in agent.state_dict().items()})
        total += alone.model_loss(**alone.infer_latents(rows[one], weight[one]))[0].item()
    assert agent.model_loss(**agent.infer_latents(rows, weight))[0].item() == pytest.approx(total, rel=1e-5)


def test_rates():
    """Deviation 9: one rate for critic and z where nothing else shapes z, a higher one where there is a model; it falls."""
    assert (build().max_grad_norm, build(agent="discriminative").max_grad_norm) == (10, 0.3)
    rates = lambda agent: [float(opt.param_groups[0]["lr"]) for opt in agent.opts.values()]
    assert rates(build()) == pytest.approx([1e-3, 3e-3])
    assert rates(build(agent="discriminative")) == pytest.approx([1e-3, 1e-3])
    agent = build(agent="discriminative", model_learning_rate=0.5)
    agent.updates.fill_(3 * VEM.RATE_HOLD)
    agent.learn(fill(agent))
    assert rates(agent) == pytest.approx([1e-3, 0.25])


def test_gradients_of_the_model_are_cut_per_trial_and_those_of_the_critic_are_not():
    agent = build(trials=2, max_grad_norm=0.5)
    (agent.first_latent * torch.tensor([3.0, 0.01]).view(2, 1, 1)).sum().backward()
    bias = agent.critic.layers[-1].bias  # (2, trials, 1, 1)
    loss = (bias * torch.tensor([3.0, 0.01]).view(2, 1, 1)).sum()
    (loss + sum(0 * parameter.sum() for parameter in agent.model)).backward()
    agent.clip_gradient()
    assert agent.first_latent.grad[:, 0].norm(dim=1).tolist() == pytest.approx([0.5, 0.01 * math.sqrt(4)])
    assert bias.grad.flatten().tolist() == pytest.approx([3.0, 0.01, 3.0, 0.01])


@pytest.mark.parametrize("kind", AGENTS)
def test_an_update_cuts_the_gradient_of_the_model(kind):
    agent = build(agent=kind, max_grad_norm=1e-3)
    rows, _, weight = fill(agent).sample(6, 5)
    for opt in agent.opts.values():
        opt.step = opt.zero_grad = lambda: None
    agent.update(rows, weight)
    assert torch.cat([p.grad.flatten() for p in agent.model]).norm().item() == pytest.approx(1e-3, rel=1e-3)


# --- environments


def episodes(policy, count=1000):
    """Mean return of policy(env, observation, time) on the double integrator."""
    env, total = TASKS.DoubleIntegrator(), 0.0
    for i in range(count):
        obs = env.reset(seed=i)[0]
        for t in range(50):
            obs, reward, *_ = env.step(np.array([policy(env, obs, t)]))
            total += reward
    return total / count


def riccati():
    """Gains of the linear-quadratic regulator for 50 steps."""
    a, b = np.array([[1, 0.2], [0, 1]]), np.array([[0.08], [0.8]])
    value, gains = np.zeros((2, 2)), []
    for _ in range(50):
        gain = np.linalg.solve(0.05 + b.T @ value @ b, b.T @ value @ a)
        value = a.T @ value @ a - a.T @ value @ b @ gain + np.diag([1, 0.1])
        gains.append(gain[0])
    return a, b, gains[::-1]


def test_double_integrator_has_the_known_returns():
    """Linear-quadratic control of the state and of its Kalman estimate, no action, random actions."""
    a, b, gains = riccati()
    state = SimpleNamespace()

    def filtered(env, obs, t):
        if t == 0:
            state.mean, state.cov = np.zeros(2), np.diag([1, 0.25])
        gain = state.cov[:, 0] / (state.cov[0, 0] + env.noise**2)
        state.mean, state.cov = state.mean + gain * (obs[0] - state.mean[0]), state.cov - np.outer(gain, state.cov[0])
        action = np.clip(-gains[t] @ state.mean, -1, 1)
        state.mean, state.cov = a @ state.mean + b[:, 0] * action, a @ state.cov @ a.T
        return action

    rng = np.random.default_rng(0)
    assert episodes(lambda env, obs, t: -gains[t] @ [env.position, env.velocity]) == pytest.approx(-3.7, abs=0.25)
    assert episodes(filtered) == pytest.approx(-3.85, abs=0.25)
    assert episodes(lambda *_: 0.0) == pytest.approx(-322, abs=35)
    assert episodes(lambda *_: rng.uniform(-1, 1)) == pytest.approx(-499, abs=35)


@pytest.mark.parametrize("flags, parts", [
    ("--plan-horizon -1", ("--plan-horizon -1",)), ("--marginal-samples 0", ("--marginal-samples 0",)),
    ("--marginal-weight -1", ("--marginal-weight -1",)), ("--info-weight nan", ("--info-weight nan",)),
    ("--prior-mix 1.5", ("--prior-mix 1.5",)), ("--alpha 0", ("--alpha",)), ("--max-grad-norm 0", ("--max-grad-norm 0",)),
    ("--alpha nan", ("--alpha nan",)), ("--agent discriminative --info-weight 2", ("--info-weight", "generative")),
    ("--agent discriminative --marginal-weight 1", ("--marginal-weight", "generative")),
    ("--alpha 1 --kl-target 1", ("--kl-target",)), ("--info-weight 1 --plan-horizon 0", ("--info-weight", "no effect")),
    ("--agent discriminative --info-samples 2", ("--info-samples", "generative")),
    ("--agent discriminative --plan-horizon 5", ("--plan-horizon", "generative")),
    ("--marginal-weight 1.5", ("--marginal-weight 1.5", "to 1")),
])
def test_refused(flags, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        VEM.parse_args(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and all(part in line for part in parts), line


def test_a_checkpoint_does_not_set_the_rate():
    """The model's rate follows from the number of updates, and is a tensor on the device, as a CUDA graph needs it."""
    agent, old = build(), build()
    old.learn(fill(old))
    agent.opts["model"].load_state_dict(old.opts["model"].state_dict())
    agent.updates.fill_(3 * VEM.RATE_HOLD)
    agent.learn(fill(agent))
    rate = agent.opts["model"].param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor) and rate.device == agent.updates.device
    assert rate.item() == pytest.approx(3e-3 / 2)


# --- whole runs


@pytest.mark.parametrize("windows, length", [(1, 2), (2, 5)])
def test_a_window_in_which_no_action_counts(windows, length, tmp_path):
    """It begins within an episode, or holds the end alone: the update that draws it teaches q(a) nothing, and no nan."""
    assert run(tmp_path / "run", env_id="InvertedPendulum-v4", windows=windows, window_length=length, total_steps=60)


def test_evaluation_follows_the_filter(tmp_path, capsys):
    """Both policies, against a plain loop over one environment at a time; --evaluate prints them."""
    args = run(tmp_path / "run", env_id="PositionsPendulum-v1", trials=2, eval_episodes=3)
    agent = VEM.Agent(args, 2, 1)
    VEM.load(args, agent)
    envs, state = VEM.make_envs(args, 6), torch.get_rng_state()
    found = VEM.evaluate(agent, envs, args)
    assert torch.equal(state, torch.get_rng_state())  # how often is evaluated changes nothing else
    capsys.readouterr()
    VEM.main(["--evaluate", str(tmp_path / "run")])
    printed = capsys.readouterr().out.splitlines()
    for suffix, net in (("", agent.actor), ("_prior", agent.prior_actor)):
        returns = found[f"eval/return{suffix}"]
        for i in range(6):
            env, trial = gym.make("Pendulum-v1"), i // 3
            obs = env.reset(seed=1 + 10**9 + i)[0]
            latent, action, reward, total, discounted = agent.first_latent, torch.zeros(2, 1, 1), 0.0, 0.0, 0.0
            last_obs = obs
            for t in range(200):
                percept = agent.percepts(torch.tensor([*obs[:2], reward]).float().expand(2, 1, 3))
                change = agent.changes(torch.tensor((obs - last_obs)[:2]).expand(2, 1, 2))
                with torch.no_grad():
                    latent = agent.latent_posterior(latent, action, percept, change)[0]
                    action = net(latent)[0].tanh()
                last_obs = obs
                obs, reward, *_ = env.step(2 * action[trial, 0].numpy())
                total, discounted = total + reward, discounted + 0.99**t * reward
            assert returns[trial, i % 3] == pytest.approx(total, rel=1e-3)
            assert found[f"eval/discounted_return{suffix}"][trial, i % 3] == pytest.approx(discounted, rel=1e-3)
        lines = [line for line in printed if f"eval/return{suffix} " in line]
        for line, mean in zip(lines, returns.mean(1), strict=True):
            assert f" {mean:.1f} ±" in line and "3 episodes" in line and "step 40" in line
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        logged = {(row["metric"], int(row["trial"])) for row in csv.DictReader(file)}
    assert {(f"eval/{name}", trial) for name in ("return", "return_prior", "length") for trial in (0, 1)} <= logged


@pytest.mark.parametrize("flags", [
    {"agent": "discriminative"}, {"action_prior": "uniform"},
    {"plan_horizon": 0}, {"info_weight": 0.1, "info_samples": 2}, {"marginal_weight": 1, "marginal_samples": 2},
    {"prior_mix": 0}, {"alpha": 0.01, "updates_per_step": 2}], ids=str)
def test_every_variant_runs_and_learns_finite_numbers(flags, tmp_path):
    run(tmp_path / "run", env_id="InvertedPendulum-v5", total_steps=24, **flags)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert all(value.isfinite().all() for value in state.values())


def test_the_double_integrator_begins_to_be_learned():
    """Some hundred updates on one buffer of random episodes raise the bound by a nat."""
    torch.manual_seed(0)
    agent = build(1, 1, windows=16, window_length=10, latent_dim=4, model_dim=32, model_learning_rate=1e-2)
    buffer = VEM.EpisodeBuffer(1, 2000, agent.widths, "cpu")
    env = TASKS.DoubleIntegrator()
    column = lambda x: torch.as_tensor(x, dtype=torch.float32).view(1, 1, -1)
    for episode in range(20):
        obs = env.reset(seed=episode)[0]
        for t in range(50):
            action = torch.rand(1, 1, 1) * 2 - 1
            next_obs, reward, *_ = env.step(action.flatten().numpy())
            latent = agent.first_latent.detach()
            buffer.add(column(obs), action, column(reward), column(next_obs), column(0.0), latent, column(float(t)))
            obs = next_obs
    agent.fit_scales(buffer)
    bounds = []
    for _ in range(400):
        metrics = agent.learn(buffer)
        bounds.append((metrics["model/log_likelihood"] - metrics["model/kl"]).item())
    assert np.mean(bounds[-20:]) > np.mean(bounds[:20]) + 1
