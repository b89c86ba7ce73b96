"""The mathematics of sac_iterative.py, against computations that share no code with it."""

import copy
import json
import math

import pytest
import torch
from conftest import load_script
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

SAC = load_script("sac_iterative")
OBS, ACT = 3, 2
both = pytest.mark.parametrize("inference", ["iterative", "direct"])
priors = pytest.mark.parametrize("prior", ["gaussian", "uniform"])


def build(obs_dim=OBS, action_dim=ACT, **flags):
    """A small agent in float64 on the CPU, whose temperature is not 1."""
    small = {"hidden_dim": 16, "batch_size": 8, "action_samples": 5, "device": "cpu",
             "matmul_precision": "highest"}
    agent = SAC.Agent(SAC.Args(**small | flags), obs_dim, action_dim).double()
    agent.log_alpha.data.uniform_(-2, -1)
    return agent


def states(n=6, trials=1, obs_dim=OBS):
    return torch.randn(trials, n, obs_dim, dtype=torch.float64)


def policies(n=6, trials=1, action_dim=ACT):
    mean, log_std = torch.randn(2, trials, n, action_dim, dtype=torch.float64)
    return torch.stack([mean, 0.5 * log_std - 0.5], -2)


def perceptron(net, *index):
    """Ordinary layers with the weights of one member of a stack."""
    layers = []
    for layer in net.layers:
        linear = nn.Linear(*layer.weight.shape[-2:]).double()
        linear.weight.data.copy_(layer.weight[index].T)
        linear.bias.data.copy_(layer.bias[index][0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tanh_gaussian(mean, std):
    return TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform(cache_size=1)])


def j_tilde(agent, trial, obs, mean, log_std, noise):
    """J̃ (n,) of one trial by torch.distributions and ordinary layers; noise (samples, n, action_dim)."""
    base = Normal(mean, log_std.exp())
    action = torch.tanh(mean + log_std.exp() * noise)
    twins = [perceptron(agent.critic, i, trial) for i in (0, 1)]
    x = torch.cat([obs.expand(len(noise), -1, -1), action], -1)
    q = torch.stack([net(x) for net in twins]).amin(0)[..., 0].mean(0)
    if agent.args.prior == "gaussian":
        kl = kl_divergence(base, Normal(0.0, agent.args.prior_std)).sum(-1)
    else:
        kl = tanh_gaussian(mean, log_std.exp()).log_prob(action).mean(0)
    return q - agent.log_alpha.exp()[trial].item() * kl


def updated(agent, obs, params, grad):
    """The next λ by equation 15."""
    proposal, gate = agent.actor(obs, params, grad)
    return gate * params + (1 - gate) * proposal


def fix_noise(agent, monkeypatch):
    """Every draw of standard normals from now on; returned as a list that fills."""
    drawn, noise = [], agent.noise

    def record(obs, samples):
        drawn.append(noise(obs, samples))
        return drawn[-1]

    monkeypatch.setattr(agent, "noise", record)
    return drawn


# The objective and its gradient


@priors
def test_gradient_equals_finite_differences(prior):
    agent, obs, params = build(prior=prior, prior_std=1.7, trials=2), states(4, 2), policies(4, 2)
    noise = torch.randn(2, 5, 4, ACT, dtype=torch.float64)
    grad, objective, _ = agent.gradient(obs, params, noise)
    for trial in range(2):
        j = lambda x: j_tilde(agent, trial, obs[trial], x[:, 0], x[:, 1], noise[trial])
        torch.testing.assert_close(objective[trial, :, 0], j(params[trial]))
        for index in ((0, 0), (0, 1), (1, 0), (1, 1)):  # (μ or log σ, dimension), of all states at once
            step = torch.zeros(2, ACT, dtype=torch.float64)
            step[index] = 1e-6
            slope = (j(params[trial] + step) - j(params[trial] - step)) / 2e-6
            torch.testing.assert_close(grad[trial, :, *index], slope, rtol=1e-5, atol=1e-7)


def test_gradient_of_a_state_does_not_depend_on_the_others():
    agent, obs, params, noise = build(), states(), policies(), torch.randn(1, 5, 6, ACT, dtype=torch.float64)
    whole = agent.gradient(obs, params, noise)[0]
    alone = agent.gradient(obs[:, 2:3], params[:, 2:3], noise[:, :, 2:3])[0]
    torch.testing.assert_close(whole[:, 2:3], alone)
    obs[:, 3:], params[:, 3:] = 100.0, -3.0
    torch.testing.assert_close(agent.gradient(obs, params, noise)[0][:, :3], whole[:, :3])


def test_kl_of_the_squashed_is_that_of_the_bases_and_of_samples():
    agent, params = build(prior_std=1.3), policies(1)
    mean, log_std = params[0, 0]
    kl = agent.kl(params, None).item()
    assert kl == pytest.approx(kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.3)).sum().item())
    policy, prior = tanh_gaussian(mean, log_std.exp()), tanh_gaussian(torch.zeros_like(mean), torch.full_like(mean, 1.3))
    action = policy.sample((400_000,))
    ratio = policy.log_prob(action) - prior.log_prob(action)
    assert ratio[ratio.isfinite()].mean().item() == pytest.approx(kl, abs=0.01)


def test_log_prob_and_kl_to_uniform_by_integration():
    """∫π log π over the square of actions, and KL(π ‖ uniform) = ∫π log π + |A| ln 2, as the metrics report it."""
    agent, params = build(prior="uniform"), policies(1)
    mean, log_std = params[0, 0]
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 - 1
    each = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform()]).log_prob(grid[:, None])  # (grid, ACT)
    negentropy = (each.exp() * each).sum().item() / 1000
    sampled = agent.log_prob(params, torch.randn(1, 400_000, 1, ACT, dtype=torch.float64))
    assert sampled.item() == pytest.approx(negentropy, abs=0.01)
    _, metrics = agent.actor_loss(states())
    torch.testing.assert_close(metrics["policy/kl"], ACT * math.log(2) - metrics["policy/entropy"])


def test_prior_has_no_kl_and_no_gradient_of_it():
    agent = build(prior_std=0.6)
    params = agent.infer(states())[0][0].clone().requires_grad_()
    kl = agent.kl(params, None)
    (grad,) = torch.autograd.grad(kl.sum(), params)
    assert kl.abs().max() < 1e-15 and grad.abs().max() < 1e-15


@pytest.mark.parametrize("pessimism", [0.0, 0.5**0.5, 2.5])
def test_pessimism_is_mean_minus_standard_deviations(pessimism):
    agent, obs, params = build(pessimism=pessimism, prior="uniform"), states(), policies()
    noise = torch.zeros(1, 1, 6, ACT, dtype=torch.float64)
    x = torch.cat([obs[0], params[0, :, 0].tanh()], -1)
    q = torch.cat([perceptron(agent.critic, i, 0)(x) for i in (0, 1)], -1)
    objective, kl = agent.objective(agent.critic, obs, params, noise)
    lower = (objective + agent.log_alpha.exp() * kl)[0, :, 0]
    torch.testing.assert_close(lower, q.mean(-1) - pessimism * q.std(-1))
    if pessimism == SAC.Args.pessimism:
        torch.testing.assert_close(lower, q.amin(-1))


def test_gradient_is_finite_where_the_twins_are_equal():
    agent, obs, params = build(pessimism=1.0), states(), policies()
    for parameter in agent.critic.parameters():
        parameter.data[1] = parameter.data[0]
    noise = agent.noise(obs, 5)
    grad = agent.gradient(obs, params, noise)[0]
    agent.args.pessimism = 0.0
    torch.testing.assert_close(grad, agent.gradient(obs, params, noise)[0])


# Inference


@pytest.mark.parametrize("iters", [1, 2, 5, 20])
@pytest.mark.parametrize("bias", [50.0, -50.0])
def test_gate_keeps_or_replaces(iters, bias):
    """A gate of 1 keeps λ to the last bit, even a σ beyond the proposals' bound; one of 0 gives the bounded proposal."""
    agent = build(prior_std=50.0).float()
    last = agent.actor.layers[-1]
    last.weight.data.zero_()
    last.bias.data[..., : 2 * ACT] = torch.tensor([0.3, -4.0, 9.0, -9.0])
    last.bias.data[..., 2 * ACT :] = bias
    agent.iters = iters
    params = agent.infer(states().float())[0][-1]
    start = torch.tensor([[0.0, 0.0], [math.log(50.0)] * 2])
    expected = start if bias > 0 else torch.tensor([[0.3, -4.0], [SAC.LOG_STD_MAX, SAC.LOG_STD_MIN]])
    assert torch.equal(params, expected.expand(1, 6, 2, ACT))


@pytest.mark.parametrize("inputs", ["params_grads", "grads"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_update_against_ordinary_layers(norm, inputs):
    """Equation 15 with the inputs in full, or only those that it names."""
    agent, obs, params, grad = build(inputs=inputs, input_norm=norm), states(), policies(), policies() * 1e3
    blocks = [*params[0].unbind(1), *grad[0].unbind(1)]  # μ, log σ and their gradients, each (n, action_dim)
    scale = {"rms": lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(), "none": lambda x: x,
             "layer": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)}[norm]
    scaled = [scale(x) if i > 1 or norm == "layer" else x for i, x in enumerate(blocks)]
    out = perceptron(agent.actor, 0)(torch.cat([obs[0], *(scaled if inputs == "params_grads" else scaled[2:])], -1))
    proposal_mean, proposal_log_std, gate_mean, gate_log_std = out.chunk(4, -1)
    proposal_log_std = proposal_log_std.clamp(SAC.LOG_STD_MIN, SAC.LOG_STD_MAX)
    agent.prior, agent.iters, agent.gradient = params, 1, lambda *_: (grad, None, None)
    found = agent.infer(obs)[0][-1]
    for i, (proposal, gate) in enumerate([(proposal_mean, gate_mean), (proposal_log_std, gate_log_std)]):
        gate = 1 / (1 + torch.exp(-gate))
        torch.testing.assert_close(found[0, :, i], gate * blocks[i] + (1 - gate) * proposal)


def test_network_gradient_is_that_of_the_objective_of_each_step(monkeypatch):
    """−J̃ differentiated through critics and actions in the ordinary way, each step's inputs held constant."""
    agent, obs = build(inference_iters=3), states()
    drawn = fix_noise(agent, monkeypatch)
    loss, metrics = agent.actor_loss(obs)
    loss.backward()
    assert len(drawn) == 4 and all(parameter.grad is None for parameter in agent.critic.parameters())
    params, before, total = torch.zeros(1, 6, 2, ACT, dtype=torch.float64), [], []
    for k in range(3):
        leaf = params.detach().clone().requires_grad_()
        j = j_tilde(agent, 0, obs[0], leaf[0, :, 0], leaf[0, :, 1], drawn[k][0])
        before.append(j.detach())
        params = updated(agent, obs, params.detach(), torch.autograd.grad(j.sum(), leaf)[0])
        total.append(j_tilde(agent, 0, obs[0], params[0, :, 0], params[0, :, 1], drawn[k + 1][0]).mean())
    expected = torch.autograd.grad(-sum(total) / 3, [*agent.actor.parameters()])
    for parameter, grad in zip(agent.actor.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad)
    torch.testing.assert_close(metrics["policy/objective_prior"][0, :, 0], before[0])
    torch.testing.assert_close(metrics["policy/objective_first"][0, :, 0], before[1])
    torch.testing.assert_close(metrics["policy/objective_last"].mean(), total[-1].detach())


def test_every_estimate_of_a_gradient_has_all_samples(monkeypatch):
    agent = build(inference_iters=3)
    drawn = fix_noise(agent, monkeypatch)
    agent.actor_loss(states())
    assert [noise.shape[1] for noise in drawn] == [agent.args.action_samples] * 4


@both
def test_no_iterations_return_the_prior(inference):
    agent, obs = build(inference=inference, prior_std=0.5, prior="uniform"), states(2000)
    agent.iters = 0
    (params,), *others = agent.infer(obs)
    assert not others
    assert torch.equal(params, torch.tensor([[0.0] * ACT, [math.log(0.5)] * ACT]).double().expand(1, 2000, 2, ACT))
    assert not agent.act(obs, deterministic=True).any()
    u = agent.act(obs).atanh()
    assert u.mean().item() == pytest.approx(0, abs=0.03) and u.std().item() == pytest.approx(0.5, abs=0.03)


@both
@torch.no_grad()
def test_acting_needs_no_gradients_and_any_number_of_iterations(inference):
    """The deterministic action is a function of the state, and leaves the random numbers of a run as they are."""
    agent, obs = build(inference=inference), states()
    random, actions = torch.get_rng_state(), []
    default = agent.act(obs, deterministic=True)
    for k in (1, 2, 20, 5):
        agent.iters = k
        actions.append(agent.act(obs, deterministic=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(action.shape == (1, 6, ACT) and not action.requires_grad and action.abs().max() < 1 for action in actions)
    assert (torch.equal(actions[0], actions[2])) == (inference == "direct")
    assert torch.equal(default, actions[1])
    torch.testing.assert_close(agent.act(obs[:, 4:5], deterministic=True), actions[3][:, 4:5])
    assert not torch.equal(agent.act(obs), agent.act(obs))


@pytest.mark.parametrize("samples", [4, 10, 200])
def test_noise_of_evaluation(samples):
    """In each dimension the middles of equally likely parts of the normal, in an order that the others do not share."""
    quantiles = build(action_dim=6, action_samples=samples).quantiles[0, :, 0]  # (samples, action_dim)
    levels = (torch.arange(samples) + 0.5) / samples
    expected = Normal(0.0, 1.0).icdf(levels)[:, None].expand(-1, 6).double()
    torch.testing.assert_close(quantiles.sort(0).values, expected, atol=1e-5, rtol=1e-5)
    assert len({tuple(order) for order in quantiles.argsort(0).T.tolist()}) > 3
    if samples > 10:
        assert (torch.corrcoef(quantiles.T) - torch.eye(6)).abs().max() < 0.3


def test_policy_parameters_for_half_cheetah():
    """The paper's 4|A| more inputs, and the direct network's two blocks of outputs become four."""
    for count, flags in ((73_484, {"inference": "direct"}), (82_712, {}), (79_640, {"inputs": "grads"})):
        agent = build(17, 6, hidden_dim=SAC.Args.hidden_dim, **flags)
        assert sum(parameter.numel() for parameter in agent.actor.parameters()) == count


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("inputs", ["params_grads", "grads"])
def test_one_action_dimension(norm, inputs):
    agent, obs = build(action_dim=1, input_norm=norm, inputs=inputs), states()
    loss, metrics = agent.actor_loss(obs)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite().all() for value in metrics.values())
    assert all(p.grad.isfinite().all() and p.grad.any() for p in agent.actor.parameters())
    zero = torch.zeros(1, 6, 2, 1, dtype=torch.float64)
    assert all(value.isfinite().all() for value in agent.actor(obs, zero, zero))  # a gradient of 0 has no scale
    agent.iters = 20
    assert agent.act(obs).isfinite().all()


class Valley(nn.Module):
    """Twin critics −8 (a − 0.8 sin s)², a different valley for every state."""

    def forward(self, x):
        obs, action = x.split((OBS, ACT), -1)
        return -8 * (action - 0.8 * obs[..., :ACT].sin()).square().sum(-1, keepdim=True).expand(2, *x.shape[:-1], 1)


@both
def test_inference_finds_the_optimum_of_a_known_critic(inference):
    """J̃ per state against Adam on λ of each state, with the same noise; the prior is far below both."""
    agent = build(inference=inference, hidden_dim=64, batch_size=128, action_samples=10).float()
    agent.critic, obs = Valley(), states(200).float()
    adam = torch.optim.Adam(agent.actor.parameters(), 3e-3)
    for _ in range(400):
        adam.zero_grad()
        agent.actor_loss(torch.randn(1, 128, OBS))[0].backward()
        adam.step()
    noise = torch.randn(1, 500, 200, ACT)
    value = lambda params: agent.objective(agent.critic, obs, params, noise)[0].mean().item()
    leaf = agent.infer(obs)[0][0].clone().requires_grad_()
    prior, inferred, adam = value(leaf), value(agent.infer(obs)[0][-1]), torch.optim.Adam([leaf], 0.03)
    for _ in range(300):
        (-agent.objective(agent.critic, obs, leaf, noise)[0].sum()).backward(inputs=[leaf])
        adam.step()
        adam.zero_grad()
    assert value(leaf) - inferred < 0.05 * (value(leaf) - prior)


# Updates


def transitions(n, trials=1, seed=0):
    """Columns (trials, n, ·): obs, action, reward, next_obs, terminated."""
    torch.manual_seed(seed)
    shape = lambda width: torch.randn(trials, n, width, dtype=torch.float64)
    return [shape(OBS), shape(ACT).tanh(), shape(1), shape(OBS), (shape(1) > 1).double()]


def plain_sac(agent, trial):
    """Soft actor-critic with ordinary modules and optimizers: a function that makes one update, and what it moves."""
    actor, log_alpha = perceptron(agent.actor, trial), agent.log_alpha[trial, 0, 0].detach().clone().requires_grad_()
    twins = [perceptron(agent.critic, i, trial) for i in (0, 1)]
    targets, rate = copy.deepcopy(twins), agent.args.learning_rate
    actor_opt, alpha_opt = torch.optim.Adam(actor.parameters(), rate), torch.optim.Adam([log_alpha], rate)
    critic_opt = torch.optim.Adam([*twins[0].parameters(), *twins[1].parameters()], rate)

    def act(obs, noise):
        mean, log_std = actor(obs).chunk(2, -1)
        std = log_std.clamp(SAC.LOG_STD_MIN, SAC.LOG_STD_MAX).exp()
        action = (mean + std * noise).tanh()
        return action, tanh_gaussian(mean, std).log_prob(action)[:, None]

    def update(obs, action, reward, next_obs, terminated, next_noise, noise):
        q = lambda nets, s, a: torch.stack([net(torch.cat([s, a], -1)) for net in nets])
        with torch.no_grad():
            next_action, next_log_prob = act(next_obs, next_noise)
            next_value = q(targets, next_obs, next_action).amin(0) - log_alpha.exp() * next_log_prob
            target = reward + agent.args.gamma * (1 - terminated) * next_value
        critic_opt.zero_grad()
        values = q(twins, obs, action)
        error = (values - target) ** 2
        (error[0].mean() + error[1].mean()).backward()
        critic_opt.step()
        new_action, log_prob = act(obs, noise)
        actor_opt.zero_grad()
        (log_alpha.exp().detach() * log_prob - q(twins, obs, new_action).amin(0)).mean().backward()
        actor_opt.step()
        alpha_opt.zero_grad()
        (-log_alpha.exp() * (log_prob.detach() - ACT).mean()).backward()
        alpha_opt.step()
        for net, slow in zip(twins, targets):
            for new, old in zip(net.parameters(), slow.parameters()):
                old.data += agent.args.tau * (new.data - old.data)
        means = {"loss/critic": error, "value/q": values, "policy/entropy": -log_prob}
        return {name: value.mean().item() for name, value in means.items()}

    return update, actor, twins, targets, log_alpha


def test_direct_uniform_one_sample_is_soft_actor_critic(monkeypatch):
    agent = build(inference="direct", prior="uniform", action_samples=1, trials=2, learning_rate=3e-2, tau=0.1)
    drawn, references = fix_noise(agent, monkeypatch), [plain_sac(agent, trial) for trial in range(2)]
    start = copy.deepcopy(agent.state_dict())
    for i in range(3):
        batch = transitions(8, 2, seed=i)
        metrics = agent.update(batch)
        next_noise, noise = drawn[-2:]
        for trial, (update, *_) in enumerate(references):
            expected = update(*(column[trial] for column in batch), next_noise[trial, 0], noise[trial, 0])
            assert {name: metrics[name][trial].mean().item() for name in expected} == pytest.approx(expected)
    for trial, (_, actor, twins, targets, log_alpha) in enumerate(references):
        pairs = [(agent.actor, actor, (trial,))]
        pairs += [(agent.critic, twins[i], (i, trial)) for i in (0, 1)]
        pairs += [(agent.critic_target, targets[i], (i, trial)) for i in (0, 1)]
        for stacked, plain, index in pairs:
            for mine, theirs in zip(perceptron(stacked, *index).parameters(), plain.parameters()):
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(agent.log_alpha[trial, 0, 0], log_alpha, rtol=1e-9, atol=0)
    assert all((value - start[key]).abs().max() > 0.01 for key, value in agent.named_parameters())


@priors
def test_critic_target_takes_the_inferred_action(prior, monkeypatch):
    """V'(s) = Q'(s,a) − α KL with a from K steps on the online critics; with a uniform prior its log-probability."""
    agent, obs = build(prior=prior, inference_iters=3), states()
    for parameter in agent.critic_target.parameters():
        parameter.data.normal_(0, 0.3)
    drawn = fix_noise(agent, monkeypatch)
    value = agent.value(obs)
    params = agent.prior.expand(1, 6, -1, -1)
    for k in range(3):
        params = updated(agent, obs, params, agent.gradient(obs, params, drawn[k])[0])
    slow = copy.copy(agent)
    slow.critic = agent.critic_target
    expected = j_tilde(slow, 0, obs[0], params[0, :, 0], params[0, :, 1], drawn[3][0])
    assert len(drawn) == 4 and drawn[3].shape == (1, 1, 6, ACT) and not value.requires_grad
    torch.testing.assert_close(value[0, :, 0], expected)


@pytest.mark.parametrize("pessimism", [0.0, 2.5])
def test_critic_target_is_as_pessimistic(pessimism, monkeypatch):
    agent, obs = build(pessimism=pessimism, inference="direct", prior="uniform"), states()
    for parameter in agent.critic_target.parameters():
        parameter.data.normal_(0, 0.3)
    drawn = fix_noise(agent, monkeypatch)
    value = agent.value(obs)[0, :, 0]
    mean, log_std = agent.infer(obs)[0][-1][0].unbind(1)
    action = (mean + log_std.exp() * drawn[-1][0, 0]).tanh()
    x = torch.cat([obs[0], action], -1)
    q = torch.cat([perceptron(agent.critic_target, i, 0)(x) for i in (0, 1)], -1)
    log_prob = tanh_gaussian(mean, log_std.exp()).log_prob(action)
    torch.testing.assert_close(value, q.mean(-1) - pessimism * q.std(-1) - agent.log_alpha.exp().item() * log_prob)


@priors
def test_alpha_meets_its_target(prior, monkeypatch):
    """∂/∂log α = α (target − KL), with the KL at which an entropy of −ACT lies under a uniform prior."""
    agent, obs = build(prior=prior), states()
    drawn = fix_noise(agent, monkeypatch)
    loss, metrics = agent.actor_loss(obs)
    loss.backward()
    params = agent.prior.expand(1, 6, -1, -1)
    for k in range(2):
        params = updated(agent, obs, params, agent.gradient(obs, params, drawn[k])[0]).detach()
    mean, std = params[0, :, 0], params[0, :, 1].exp()
    entropy = -tanh_gaussian(mean, std).log_prob((mean + std * drawn[2][0]).tanh()).mean()
    kl = ACT * math.log(2) - entropy
    if prior == "gaussian":
        kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(-1).mean()
    expected = agent.log_alpha.exp() * (ACT * math.log(2) + ACT - kl)
    torch.testing.assert_close(agent.log_alpha.grad, expected.detach())
    torch.testing.assert_close(metrics["policy/entropy"].mean(), entropy)
    torch.testing.assert_close(metrics["policy/kl"].mean(), kl)


@both
def test_trials_do_not_feel_each_other(inference):
    """Change the data of trial 1: nothing of trials 0 and 2 changes, to the last bit; all of trial 1 does."""
    results = []
    for changed in (False, True):
        torch.manual_seed(0)
        agent = build(inference=inference, trials=3)
        for i in range(3):
            batch = transitions(8, 3, seed=i)
            for column in batch[:4]:
                column[1] = column[1] * 0.5 + 0.3 if changed else column[1]
            agent.update(batch)
        results.append(dict(agent.named_parameters()))
    for key, value in results[0].items():
        same = [torch.equal(value.select(-3, i), results[1][key].select(-3, i)) for i in range(3)]
        assert same == [True, False, True], key


def test_a_trial_learns_as_it_would_alone(monkeypatch):
    agent = build(trials=2)
    alone = build(trials=1)
    index = lambda key, value: value[:, 1:] if "critic" in key else value[1:] if value.shape[0] == 2 else value
    alone.load_state_dict({key: index(key, value) for key, value in agent.state_dict().items()})
    drawn = fix_noise(agent, monkeypatch)
    batch = transitions(8, 2)
    agent.update(batch)
    again = iter(drawn)
    monkeypatch.setattr(alone, "noise", lambda *_: next(again)[1:])
    alone.update([column[1:] for column in batch])
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(index(key, value), alone.state_dict()[key], rtol=1e-9, atol=1e-12)


def test_learn_makes_each_update_on_its_own_rows(monkeypatch):
    agent = build(updates_per_step=3, trials=2).float()
    buffer, seen = SAC.ReplayBuffer(2, 50, OBS, ACT, "cpu"), []
    buffer.add(*(column.float() for column in transitions(40, 2)))
    update = agent.update
    monkeypatch.setattr(agent, "update", lambda batch: [seen.append(batch), update(batch)][1])
    metrics = agent.learn(buffer)
    assert len(seen) == 3 and all(column.shape[:2] == (2, 8) for batch in seen for column in batch)
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][0], seen[2][0])
    assert {*metrics} == {"loss/critic", "value/q", "policy/entropy", "policy/kl", "policy/alpha", "policy/gate",
                          "policy/objective_prior", "policy/objective_first", "policy/objective_last"}
    assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())


# As a user runs it


def command(**flags):
    small = {"env_id": "Pendulum-v1", "hidden_dim": 16, "batch_size": 16, "learning_starts": 20, "total_steps": 60,
             "eval_every": 30, "eval_episodes": 1, "log_every": 10, "device": "cpu", "run_dir": "run"}
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in (small | flags).items())
    return [text for pair in pairs for text in pair]


@both
def test_short_run_moves_every_parameter(inference, monkeypatch):
    built, agent = [], SAC.Agent

    def record(*args):
        built.append(agent(*args))
        built.append(copy.deepcopy(built[0].state_dict()))
        return built[0]

    monkeypatch.setattr(SAC, "Agent", record)
    assert SAC.main(command(inference=inference, trials=2)) is None
    for key, value in built[0].named_parameters():
        moved = (value != built[1][key]).flatten(0, -3).flatten(1).any(1)  # one entry per slice of the stack
        assert len(moved) == (4 if "critic" in key else 2) and moved.all() and value.isfinite().all(), key


def test_automatic_action_samples():
    """Resolved once, saved, and kept by a run that is resumed where there is a GPU."""
    SAC.main(command(total_steps=20))
    with open("run/args.json") as file:
        assert json.load(file)["action_samples"] == 10
    assert SAC.parse_args(["--resume", "run", "--total-steps", "30"]).action_samples == 10
    assert build(action_samples=7).quantiles.shape[1] == 7


@pytest.mark.parametrize("text", ["--inference-iters 0", "--action-samples -1", "--prior-std 0", "--prior-std inf",
                                  "--prior-std 51", "--pessimism -1", "--pessimism nan", "--target-entropy nan",
                                  "--inference-iters 3 --inference direct", "--inputs grads --inference direct",
                                  "--input-norm none --inference direct",
                                  "--prior-std 2.0 --inference direct --prior uniform"])
def test_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        SAC.parse_args(text.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and text.partition(" --inf")[0] in line


@pytest.mark.parametrize("flag", ["inference", "prior", "inputs", "input-norm"])
def test_unknown_choices_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        SAC.parse_args([f"--{flag}", "other"])
    assert stop.value.code == 2 and f"--{flag}" in capsys.readouterr().err
