# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Active VEM: an agent that infers its hidden state and its actions under one variational bound, in one file.

After Marino & Yue, "An Inference Perspective on Model-Based Reinforcement Learning" (2019), whose equation numbers are
used. The environment shows observations x and rewards r, never its state. The agent keeps a latent state z, inferred by
q(z_t|z_{t-1},a_{t-1},x_t,r_t), acts by q(a_t|z_t), and learns the priors p that both are compared with.

    L = E[Σ_t r_t − log q(z_t)/p(z_t|z_{t-1},a_{t-1},x_t,r_t) − log q(a_t)/p(a_t|z_t)]     discriminative agent  (6)
    p(z_t|z_{t-1},a_{t-1},x_t,r_t) = p(x_t,r_t|z_t) p(z_t|z_{t-1},a_{t-1}) / p(x_t,r_t|z_{t-1},a_{t-1})          (7)
    L = E[Σ_t r_t + log p(x_t,r_t|z_t)/p(x_t,r_t|z_{t-1},a_{t-1}) − log q(z_t)/p(z_t|z_{t-1},a_{t-1})
                − log q(a_t)/p(a_t|z_t)]                                                   generative agent      (8)
    Ê = E_p[Σ_{k≤H} γ^{k-1} (r_k + α w_i log p(x_k,r_k|z_k)/p(x_k,r_k|z_{k-1},a_{k-1})) + γ^H V(z_H)]           (10)
    Algorithm 1: E-step, q(z) climbs L and q(a) climbs Ê − α KL(q(a)‖p(a)); M-step, the rest climbs L

The denominator in (8), the marginal term, is what a world model's objective lacks. By (7) the terms of z_t and x_t in
(8) are −KL(q(z_t) ‖ p(z_t|z_{t-1},a_{t-1},x_t,r_t)): at most 0, and 0 for *every* model whose q is exact. So nothing
presses the model to fit the data. With a weight w of the term and an exact q the objective is (1 − w) log p(x_t,r_t|
z_{t-1},a_{t-1}). What the term is good for is the paper's open question; a sweep over w asks it.

Deviations from the paper, with the flag, if any, that goes back to its letter. docs/active_vem.md has more.
 1. w = 0, for the reason above. `--marginal-weight 1` is (8).
 2. Inference is amortized: q(z) and q(a) are networks, learned on replayed windows. The model's learning rate falls.
 3. q(z) climbs the terms of z in (8), its own and a window's later ones, not rewards or KLs of actions, or it would
    believe itself in good states. It also sees x_t − x_{t-1}.
 4. Tasks are long: γ discounts (`--gamma 1`: not), and the V of a twin critic, of rewards and KLs of q(a) alone, stands
    for what lies beyond H steps. Rewards are divided by their standard deviation. A discriminative agent has H = 0.
 5. Episodes end. That one does is predicted from z ~ p, as in plans: z ~ q has already seen the last reward.
 6. α, the price of a nat in units of scaled reward, is tuned to a budget of KL(q(a)‖p(a)). `--alpha`: fixed.
 7. The information term of (10) is off: where it was tried it made no difference. `--info-weight 1`.
 8. p(a) is fitted to q(a) with a share ε of uniform actions, or both narrow together (`--prior-mix 0`). On Hopper-v4
    they still do. `--action-prior uniform` is maximum entropy; p(a) then only rolls out and acts.
 9. The discriminative q(z), having no model, learns from the critic's error and α KL(q(z)‖p(z)), at a lower rate, its
    gradient cut shorter.

    python active_vem.py --env-id benchmarks.tasks:DoubleIntegrator-v0 --total-steps 4000 --eval-every 250
    python active_vem.py --env-id benchmarks.tasks:PositionsPendulum-v1
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
MEAN_MAX = 10.0  # bound on the means of z and of atanh(a)
RATE_HOLD = 1000  # the model's rate falls as one over the root of 1 + updates / this
POLICY_EVERY = 2  # q(a) and p(a) learn from every other column: where --windows is even, from every other window
UNIFORM_VAR = math.pi**2 / 12  # variance of atanh(a) for a uniform in [-1, 1]

Count = Annotated[int, (1, 1e9)]  # a flag's type, its least and its greatest value
Rows = Annotated[int, (10, 2**24)]  # sampling tells no more apart
Fraction = Annotated[float, (0, 1)]
Positive = Annotated[float, (1e-12, 1e9)]
Chosen = Annotated[float | None, (1e-12, 1e9)]


@dataclasses.dataclass
class Args:
    env_id: str = "Pendulum-v1"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: Annotated[int, (0, 2**31)] = 1  # trial i uses environment seed + i
    trials: Count = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # medium: actor, critics, half a fit in bfloat16
    cuda_graph: bool = False  # replay the updates of a step, and the minibatches of fits if any, as CUDA graphs
    total_steps: Count = 30_000  # environment steps per trial
    learning_starts: Rows = 500  # uniformly random steps before the first update
    explore_hold: Count = 1  # environment steps for which each of those random actions is held
    log_every: Count = 250  # environment steps between rows of training metrics
    eval_every: Count = 1_000  # environment steps between evaluations
    eval_episodes: Count = 10  # episodes per trial and evaluation
    max_eval_steps: Count = 10_000  # steps after which an evaluation's episode is cut off
    save_every: Count = 10_000  # environment steps between checkpoints; episodes restart there
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases; offline needs no account
    wandb_project: str = "rl-as-inference"  # Weights & Biases project
    capture_video: bool = False  # with --evaluate: write an mp4 of the first episode
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/SCRIPT_sSEED_DATE-TIME
    resume: str = ""  # run directory to continue; only how it runs, logs and evaluates may change
    evaluate: str = ""  # run directory whose saved agent is evaluated instead of training

    agent: Literal["generative", "discriminative"] = "generative"  # with a model of what it sees, or without
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.02  # step of the target critic towards the critic
    hidden_dim: Count = 128  # width of the two hidden layers of actor and critics
    learning_rate: Positive = 1e-3  # Adam's, of actor, critics and α
    updates_per_step: Count = 1  # updates of everything per environment step
    buffer_size: Rows = 1_000_000  # real transitions kept per trial
    windows: Count = 32  # windows per update
    window_length: Annotated[int, (2, 1e9)] = 20  # steps of a window, within one episode
    scale_every: Count = 250  # environment steps between fits of the scales of observation and reward
    latent_dim: Count = 8  # dimensions of z
    model_dim: Count = 64  # width of the dynamics' hidden layers
    model_learning_rate: Chosen = None  # Adam's, of the dynamics; default: 3e-3, discriminative 1e-3
    max_grad_norm: Chosen = None  # length that the model's gradient is cut to; default: 10, discriminative 0.3
    marginal_weight: Fraction = 0.0  # w: weight of the marginal term of (8); above 1 bad predictions would pay
    marginal_samples: Count = 8  # importance samples K of the marginal term
    plan_horizon: Annotated[int, (0, 1000)] = 3  # imagined steps H of the planned bound (10)
    info_weight: Annotated[float, (-1e9, 1e9)] = 0.0  # w_i: weight of the information term of (10)
    info_samples: Count = 8  # contrastive samples K of the information term
    action_prior: Literal["learned", "uniform"] = "learned"  # what the KL of the action is measured from
    prior_mix: Fraction = 0.05  # ε: share of uniformly random actions in what the action prior is fitted to
    alpha: Chosen = None  # price of a nat in units of scaled reward; default: tuned to the KL target
    kl_target: Chosen = None  # KL(q(a)‖p(a)) that α is tuned to; default: 0.5 (uniform: 1.2) per action dimension

    def conflicts(self):
        """(flag, rule) of every combination of the algorithm's flags that cannot work."""
        for flag in ("marginal_weight", "marginal_samples", "plan_horizon", "info_weight", "info_samples"):
            if getattr(self, flag) != getattr(Args, flag) and self.agent != "generative":
                yield flag, "needs --agent generative, which has a model"
        if self.info_weight and not self.plan_horizon:
            yield "info_weight", "has no effect with --plan-horizon 0"
        if self.alpha and self.kl_target:
            yield "kl_target", "has no effect beside --alpha"

    def floats(self, obs_dim, action_dim):
        """About how many numbers a run keeps: its rows, networks with their gradients and moments, activations."""
        rows = (self.buffer_size + self.windows * self.window_length) * (2 * obs_dim + action_dim + self.latent_dim + 3)
        batch = self.windows * (self.window_length + 1) * (1 + self.plan_horizon)
        samples = 1 + self.marginal_samples + self.info_samples
        policy = 24 * self.hidden_dim * (self.hidden_dim + batch)
        model = 24 * self.model_dim * (self.model_dim + batch * samples)
        return self.trials * (rows + policy + model)


class EpisodeBuffer:
    """Ring of rows per trial, one per step, sampled as windows within an episode. Step i lies at place i % capacity.

    One row holds obs, action, reward, next_obs, terminated, the latent state inferred at obs, the time in the episode.
    """

    def __init__(self, trials, capacity, widths, device):
        self.widths, self.capacity = widths, capacity
        self.latent = slice(-1 - widths[-2], -1)  # where the latent state stands in a row
        # (trials, capacity + 1, row); the row behind the ring takes what refresh() must not keep, and is never read
        self.storage = torch.zeros(trials, capacity + 1, sum(widths), device=device)
        self.added = torch.zeros((), dtype=torch.long, device=device)  # a tensor: CUDA graphs see it change
        self.trial = torch.arange(trials, device=device)[:, None, None]

    def rows(self):
        """All rows there are: (trials, count, row)."""
        return self.storage[:, : min(int(self.added), self.capacity)]

    def add(self, *columns):
        """columns: tensors (trials, 1, width) in the order of a row."""
        self.storage[:, self.added % self.capacity] = torch.cat(columns, -1)[:, 0]
        self.added += 1

    def sample(self, n, length):
        """n windows per trial: rows (trials, length, n, row), their places in the ring, their weights (…, 1).

        A step is drawn uniformly and a window laid over it at random. In front the window is cut to the step's episode;
        what it reaches of the next one is padding, of weight 0. A window that keeps m steps is drawn m times as often
        as one that keeps a single step: with weights 1/m all steps count the same.
        """
        shape, device = (len(self.trial), 1, n), self.storage.device
        oldest = (self.added - self.capacity).clamp(min=0)
        drawn = oldest + (torch.rand(shape, device=device) * (self.added - oldest)).long()
        start = drawn - torch.randint(length, shape, device=device)
        began = drawn - self.storage[self.trial, drawn % self.capacity, -1].long()  # its episode's first step
        first = torch.maximum(start, began).maximum(oldest)
        step = first + torch.arange(length, device=device)[:, None]  # (trials, length, n)
        place = step % self.capacity
        rows = self.storage[self.trial, place]
        same_episode = rows[..., -1] == step - began
        valid = (same_episode & (step < start + length) & (step < self.added)).unsqueeze(-1)
        return rows, place, valid / valid.sum(1, keepdim=True)

    def refresh(self, place, weight, latents):
        """Keep the latent states (trials, length, n, latent_dim) just inferred, for windows to start from."""
        place = torch.where(weight[..., 0] > 0, place, self.capacity)
        self.storage[self.trial, place, self.latent] = latents


class StackedLinear(nn.Module):
    """A stack of independent linear layers: x (*stack, batch, in) -> (*stack, batch, out)."""

    def __init__(self, stack, in_dim, out_dim):
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(*stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if weight.shape[-1] == 1:  # batched products with a single column are slow on CPUs
            return (x * weight.mT).sum(-1, keepdim=True).add_(bias)
        if x.ndim == weight.ndim == 3:  # one operation instead of seven
            return torch.baddbmm(bias, x, weight)
        return (x @ weight).add_(bias)


class StackedMLP(nn.Module):
    """A stack of independent perceptrons, whose hidden layers may be normalised and computed in another dtype."""

    def __init__(self, stack, dims, activation=torch.relu_, dtype=None, norm=False):  # relu_ makes no copy
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(stack, *pair) for pair in zip(dims, dims[1:]))
        self.activation, self.dtype, self.norm = activation, dtype, norm

    def forward(self, x):
        exact = x.dtype
        for layer in self.layers[:-1]:
            x = layer(x.to(self.dtype or exact))
            x = self.activation(F.layer_norm(x, x.shape[-1:]) if self.norm else x)
        return self.layers[-1](x.to(exact))


class Gaussian(StackedMLP):
    """A conditional Gaussian: columns (trials, batch, ·) -> mean and log_std (trials, batch, out).

    The mean is bounded: nothing else would keep a recurrent z from growing without end when no decoder holds it.
    """

    def __init__(self, trials, in_dim, hidden_dim, out_dim, dtype=None):
        super().__init__((trials,), (in_dim, hidden_dim, hidden_dim, 2 * out_dim), F.silu, dtype)

    def forward(self, *columns):
        mean, log_std = super().forward(torch.cat(columns, -1)).chunk(2, -1)
        return MEAN_MAX * (mean / MEAN_MAX).tanh(), log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class Normalizer(nn.Module):
    """Mean and standard deviation per trial of rows (trials, n, dim); constant columns are only centred."""

    def __init__(self, trials, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(trials, 1, dim))
        self.register_buffer("std", torch.ones(trials, 1, dim))

    def fit(self, x):
        std, mean = torch.std_mean(x, 1, keepdim=True)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))

    def forward(self, x):
        return (x - self.mean) / self.std


def sample(mean, log_std, *count):
    """Reparameterised samples (*count, *mean.shape)."""
    return mean + log_std.exp() * torch.randn_like(mean.expand(*count, *mean.shape))


def log_density(x, mean, log_std):
    """log N(x; mean, std²) summed over the last axis: (..., 1)."""
    noise = (x - mean) * (-log_std).exp()
    return (-0.5 * (noise.square() + math.log(2 * math.pi)) - log_std).sum(-1, keepdim=True)


def divergence(mean, log_std, prior_mean, prior_log_std):
    """KL of two Gaussians summed over the last axis: (..., 1)."""
    ratio = (2 * (log_std - prior_log_std)).exp()
    shift = ((mean - prior_mean) * (-prior_log_std).exp()).square()
    return (prior_log_std - log_std + 0.5 * (ratio + shift - 1)).sum(-1, keepdim=True)


def log_mean_exp(x):
    """log of the mean of exp(x) over the first axis."""
    return x.logsumexp(0) - math.log(len(x))


def weighted_mean(x, weight):
    """Mean per trial of columns (..., trials, n, 1) with weights (trials, n, 1): (..., trials)."""
    return (x * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=1e-12)  # it may be that no step counts


class Agent(nn.Module):
    """Networks, optimizers, and the steps of Algorithm 1: infer and act online, learn from windows of episodes."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, self.action_dim, self.latent_dim, trials = args, action_dim, args.latent_dim, args.trials
        self.generative = args.agent == "generative"
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1, self.latent_dim, 1)  # of a row of EpisodeBuffer
        self.percepts = Normalizer(trials, obs_dim + 1)  # a percept is an observation and the reward that came with it
        self.changes = Normalizer(trials, obs_dim)  # of an observation since the one before

        low = torch.bfloat16 if args.matmul_precision == "medium" else None
        self.actor = Gaussian(trials, self.latent_dim, args.hidden_dim, action_dim, low)  # q(a)
        self.prior_actor = Gaussian(trials, self.latent_dim, args.hidden_dim, action_dim, low)  # p(a)
        dims = (self.latent_dim + action_dim, args.hidden_dim, args.hidden_dim, 1)
        self.critic = StackedMLP((2, trials), dims, dtype=low)
        self.critic_target = StackedMLP((2, trials), dims, dtype=low)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.full((trials, 1, 1), math.log(args.alpha or 0.1)))

        self.first_latent = nn.Parameter(torch.zeros(trials, 1, self.latent_dim))  # before an episode's first step
        before = self.latent_dim + action_dim  # what p(z) sees: z and a before
        full = before + 2 * obs_dim + 1  # and what sight() returns; q(z) sees it all, a discriminative p(z) too
        self.percept_columns = slice(before, before + obs_dim + 1)  # where a first layer reads the percept
        self.latent_posterior = Gaussian(trials, full, args.model_dim, self.latent_dim)  # q(z)
        self.latent_prior = Gaussian(trials, before if self.generative else full, args.model_dim, self.latent_dim)
        # "model" is what learns from percepts: of a discriminative agent q(z) and p(z) alone
        self.model = [self.first_latent, *self.latent_posterior.parameters(), *self.latent_prior.parameters()]
        if self.generative:  # p(x,r|z), and whether the episode ends
            self.decoder = StackedMLP((trials,), (self.latent_dim, args.model_dim, args.model_dim, obs_dim + 2), F.silu)
            self.log_scale = nn.Parameter(torch.zeros(trials, 1, obs_dim + 1))
            self.model += [*self.decoder.parameters(), self.log_scale]
        self.register_buffer("ever_ended", torch.zeros(trials, 1, 1))  # 1 once an end was seen: plans then have ends
        self.register_buffer("updates", torch.zeros(()))
        self.to(args.device)

        self.horizon = args.plan_horizon if self.generative else 0  # without a model there is no plan
        self.kl_target = args.kl_target or action_dim * (0.5 if args.action_prior == "learned" else 1.2)
        self.max_grad_norm = args.max_grad_norm or (10.0 if self.generative else 0.3)  # see deviation 9
        self.initial_rate = args.model_learning_rate or (3e-3 if self.generative else 1e-3)
        self.policy = [*self.actor.parameters()] + ([] if args.alpha else [self.log_alpha])  # what E-steps of q(a) move
        others = [*self.critic.parameters(), *self.policy, *self.prior_actor.parameters()]
        self.opts = {"policies": torch.optim.Adam(others, args.learning_rate, fused=True, capturable=True),
                     "model": torch.optim.Adam(self.model, self.initial_rate, fused=True, capturable=True)}
        self.learn = captured(self.learn, args)  # a CUDA graph with --cuda-graph

    # What is inferred online

    def sight(self, obs, reward, last_obs):
        """What q(z) sees, scaled: the percept (obs and the reward that came with it), then the change of obs."""
        return torch.cat([self.percepts(torch.cat([obs, reward], -1)), self.changes(obs - last_obs)], -1)

    @torch.no_grad()
    def begin(self, obs):
        """For an episode's first obs (trials, n, obs_dim): last_latent, last_action, reward, last_obs of perceive()."""
        nothing = torch.zeros_like(obs[..., :1])
        return self.first_latent.expand(-1, obs.shape[1], -1), nothing.expand(-1, -1, self.action_dim), nothing, obs

    @torch.no_grad()
    def perceive(self, obs, last_latent, last_action, reward, last_obs, deterministic=False):
        """z_t ~ q(z_t|z_{t-1},a_{t-1},x_t,r_t,x_{t-1}), or its mean for evaluation: (trials, n, latent_dim)."""
        mean, log_std = self.latent_posterior(last_latent, last_action, self.sight(obs, reward, last_obs))
        return mean if deterministic else sample(mean, log_std)

    @torch.no_grad()
    def act(self, latent, policy="posterior", deterministic=False):
        """Actions (trials, n, action_dim) of q(a|z) or p(a|z), or for evaluation the tanh of their mean."""
        mean, log_std = self.prior_actor(latent) if policy == "prior" else self.actor(latent)
        return (mean if deterministic else sample(mean, log_std)).tanh()

    # The distributions of the agent, in columns (trials, batch, ·)

    def decode(self, latent):
        """Mean and log_std of the percept (trials, n, obs_dim + 1), logit (trials, n, 1) that the episode ends."""
        out = self.decoder(latent)
        return out[..., :-1], self.log_scale.clamp(LOG_STD_MIN, LOG_STD_MAX), out[..., -1:]

    def log_marginal(self, last_latent, last_action, percept, posterior):
        """log p(x,r|z_{t-1},a_{t-1}), by K importance samples z^k ~ q(z): (trials, n, 1).

        It is the log of 1/K Σ_k p(x,r|z^k) p(z^k|z_{t-1},a_{t-1}) / q(z^k), which by (7) is exact where q is, and else
        too low on average, so that (8) is too high.
        """
        posterior = [x.detach() for x in posterior]  # q would raise the bound by being a bad proposal
        z = sample(*posterior, self.args.marginal_samples)  # (K, trials, n, latent_dim)
        log_likelihood = log_density(percept, *self.decode(z)[:2])
        log_prior = log_density(z, *self.latent_prior(last_latent, last_action))
        return log_mean_exp(log_likelihood + log_prior - log_density(z, *posterior))  # eq. (7)

    def information(self, latent, prior):
        """Estimates, low and high, of the information in nats that a percept at z has about z: (trials, n, 1) each."""
        mean, log_std, _ = self.decode(latent)
        percept = sample(mean, log_std)
        own = log_density(percept, mean, log_std)
        z = sample(*prior, self.args.info_samples)  # (K, trials, n, latent_dim)
        others = log_density(percept, *self.decode(z)[:2])
        lower = own - log_mean_exp(torch.cat([own[None], others]))  # z's own among them: at most log(K + 1)
        return lower, own - log_mean_exp(others)

    def draw_action(self, policy, prior):
        """a ~ policy, KL(policy‖prior) and log policy(a), each (trials, n, ·)."""
        u = sample(*policy)  # atanh(a)
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # of the tanh, in a stable form
        log_prob = log_density(u, *policy) - log_det.sum(-1, keepdim=True)
        if self.args.action_prior == "uniform":
            return u.tanh(), log_prob + self.action_dim * math.log(2), log_prob
        return u.tanh(), divergence(*policy, *prior), log_prob  # the same KL before and after the tanh

    def soft_value(self, latent, critic):
        """V(z) = E[min Q(z, a)] − α KL(q(a)‖p(a)) with one sampled action: (trials, n, 1)."""
        action, kl, _ = self.draw_action(self.actor(latent), self.prior_actor(latent))
        return critic(torch.cat([latent, action], -1)).amin(0) - self.log_alpha.exp().detach() * kl

    def planned_bound(self, latent, action):
        """Ê for taking an action at z: rewards and information of H imagined steps, then V; (trials, n, 1)."""
        if self.horizon == 0:
            return self.critic(torch.cat([latent, action], -1)).amin(0)
        bound, discount = 0, 1
        offset = (self.percepts.mean / self.percepts.std)[..., -1:]  # rewards in a bound are scaled, not centred
        alpha = self.log_alpha.exp().detach()
        for k in range(self.horizon):
            if k > 0:
                prior_action = self.prior_actor(latent)
                action, kl, _ = self.draw_action(prior_action, prior_action)  # kl is 0, but with a uniform p(a)
                bound = bound - discount * alpha * kl
            prior = self.latent_prior(latent, action)
            latent = sample(*prior)
            percept, _, end_logit = self.decode(latent)
            bound = bound + discount * (percept[..., -1:] + offset)
            if self.args.info_weight:
                bound = bound + discount * (alpha * self.args.info_weight) * self.information(latent, prior)[0]
            discount = discount * self.args.gamma * (1 - end_logit.sigmoid() * self.ever_ended)
        return bound + discount * self.soft_value(latent, self.critic)  # eq. (10)

    # What is learned from windows

    def infer_latents(self, rows, weight):
        """Latent states along windows, and what leads to them: columns (trials, (length + 1) · n, ·), n of each time.

        A window has one percept before its first step and one after each step. The first counts where the episode
        begins with it. Elsewhere it belongs to the step before the window, and z there is the stored one.
        """
        n = rows.shape[2]
        obs, action, reward, next_obs, terminated, *_ = rows.flatten(1, 2).split(self.widths, -1)
        first_obs, *_, stored, time = rows[:, 0].split(self.widths, -1)  # (trials, n, ·)
        nothing = (0, 0, n, 0)  # F.pad's: at the first percept no action, no reward and no end
        last_action = F.pad(action, nothing)
        sight = self.sight(torch.cat([first_obs, next_obs], 1), F.pad(reward, nothing), torch.cat([first_obs, obs], 1))
        noise = torch.randn(*sight.shape[:2], self.latent_dim, device=rows.device)
        latent = before = self.first_latent.expand(-1, n, -1)
        inferred = []
        for a, x, eps in zip(last_action.split(n, 1), sight.split(n, 1), noise.split(n, 1)):
            mean, log_std = self.latent_posterior(latent, a, x)
            latent = mean + log_std.exp() * eps
            if not inferred:
                latent = torch.where(time == 0, latent, stored)
            inferred.append((latent, mean, log_std))
        latent, mean, log_std = (torch.cat(parts, 1) for parts in zip(*inferred))
        weight = torch.cat([weight[:, 0] * (time == 0), weight.flatten(1, 2)], 1)
        return {"last_latent": torch.cat([before, latent[:, :-n]], 1), "latent": latent, "posterior": [mean, log_std],
                "last_action": last_action, "percept": sight[..., : obs.shape[-1] + 1], "sight": sight,
                "ended": F.pad(terminated, nothing), "weight": weight}

    def model_loss(self, last_latent, latent, posterior, last_action, percept, sight, ended, weight):
        """Minus the terms of z, x and ends in (8), or α KL of (6), summed over trials; the terms, each (trials,)."""
        if not self.generative:
            kl = weighted_mean(divergence(*posterior, *self.latent_prior(last_latent, last_action, sight)), weight)
            return (self.log_alpha.exp().detach().flatten() * kl).sum(), {"model/kl": kl}  # eq. (6)
        prior = self.latent_prior(last_latent, last_action)
        end_logit = self.decode(sample(*prior))[2]  # of z ~ p: see deviation 5
        kl = weighted_mean(divergence(*posterior, *prior), weight)
        log_likelihood = weighted_mean(log_density(percept, *self.decode(latent)[:2]), weight)
        log_end = weighted_mean(-F.binary_cross_entropy_with_logits(end_logit, ended, reduction="none"), weight)
        loss = kl - log_likelihood - log_end  # eq. (8)
        if self.args.marginal_weight:
            log_marginal = weighted_mean(self.log_marginal(last_latent, last_action, percept, posterior), weight)
            loss = loss + self.args.marginal_weight * log_marginal  # eq. (8)
        return loss.sum(), {"model/kl": kl, "model/log_likelihood": log_likelihood, "model/log_end": log_end}

    def critic_loss(self, latent, action, target, weight):
        """Squared error of both critics; and metrics, each (trials,)."""
        q = self.critic(torch.cat([latent, action], -1))  # (2, trials, n, 1)
        loss = weighted_mean((q - target).square(), weight)  # (2, trials)
        value = weighted_mean(q, weight).mean(0) * self.percepts.std[:, 0, -1]
        return loss.sum(), {"loss/critic": loss.mean(0), "value/q": value}

    def policy_losses(self, latent, weight):
        """E-step of q(a), with α's own loss, and M-step of p(a); and metrics, each (trials,)."""
        posterior, prior = self.actor(latent), self.prior_actor(latent)
        action, kl, log_prob = self.draw_action(posterior, prior)
        alpha = self.log_alpha.exp()
        loss = alpha.detach() * kl - self.planned_bound(latent, action)  # eq. (8, 10)
        loss = loss + alpha * (self.kl_target - kl.detach())

        # p(a) maximizes E[log p(u)] over a mixture of q(a) and uniform actions, of which E[(u − prior_mean)²] is needed
        mean, log_std = (x.detach() for x in posterior)
        prior_mean, prior_log_std = prior
        of_posterior = (2 * log_std).exp() + (mean - prior_mean).square()
        of_uniform = UNIFORM_VAR + prior_mean.square()
        of_mixture = of_posterior.lerp(of_uniform, self.args.prior_mix)
        prior_loss = (prior_log_std + 0.5 * of_mixture * (-2 * prior_log_std).exp()).sum(-1, keepdim=True)  # eq. (8)
        metrics = {"policy/kl": weighted_mean(kl, weight), "policy/alpha": alpha.flatten(),
                   "policy/entropy": -weighted_mean(log_prob, weight)}
        return weighted_mean(loss, weight).sum(), weighted_mean(prior_loss, weight).sum(), metrics

    def clip_gradient(self):
        """Cut the model's gradient, per trial. The critic's is left: its rare large ones are the ends of episodes."""
        grads = [parameter.grad for parameter in self.model]
        norms = torch.stack([torch.linalg.vector_norm(grad, dim=(-2, -1)) for grad in grads])
        scale = (self.max_grad_norm / norms.norm(dim=0)).clamp(max=1).view(-1, 1, 1)
        torch._foreach_mul_(grads, [scale] * len(grads))

    def update(self, rows, weight):
        """One E-step and one M-step on windows (trials, length, n, ·); returns latent states and metrics."""
        n = rows.shape[2]  # columns of one time: [:, n:] is a step later than [:, :-n]
        window = self.infer_latents(rows, weight)
        latent = window["latent"]
        _, action, reward, _, terminated, *_ = rows.flatten(1, 2).split(self.widths, -1)
        with torch.no_grad():
            next_value = self.soft_value(latent[:, n:], self.critic_target)
            target = reward / self.percepts.std[..., -1:] + self.args.gamma * (1 - terminated) * next_value
        critic_latent = (latent.detach() if self.generative else latent)[:, :-n]  # see deviation 9
        critic_loss, metrics = self.critic_loss(critic_latent, action, target, weight.flatten(1, 2))
        model_loss, model_metrics = self.model_loss(**window)
        (critic_loss + model_loss).backward()  # critic; E-step of q(z), M-step of the model
        acting = (window["weight"] * (1 - window["ended"]))[:, ::POLICY_EVERY]  # no action follows the end
        policy_loss, prior_loss, policy_metrics = self.policy_losses(latent.detach()[:, ::POLICY_EVERY], acting)
        policy_loss.backward(inputs=self.policy)  # E-step of q(a): critics and model get no gradient from it
        prior_loss.backward()  # M-step of p(a)
        self.clip_gradient()
        self.opts["model"].param_groups[0]["lr"] = self.initial_rate * (1 + self.updates / RATE_HOLD).rsqrt()
        for opt in self.opts.values():
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
            self.updates += 1
        metrics |= model_metrics | policy_metrics
        return latent.detach().unflatten(1, (-1, n)), {name: value.detach() for name, value in metrics.items()}

    def learn(self, buffer):
        """Updates on replayed windows, whose latent states the buffer keeps; returns metrics, each (trials,)."""
        for _ in range(self.args.updates_per_step):
            rows, place, weight = buffer.sample(self.args.windows, self.args.window_length)
            latents, metrics = self.update(rows, weight)
            buffer.refresh(place, weight, latents[:, :-1])
        return metrics

    @torch.no_grad()
    def assess(self, buffer):
        """Terms of (8) and (10) that no update needs, in nats; each (trials,). Training is the same without it."""
        if not self.generative:
            return {}
        with torch.random.fork_rng([self.args.device] * self.args.device.startswith("cuda")):
            rows, _, weight = buffer.sample(self.args.windows, self.args.window_length)
            window = self.infer_latents(rows, weight)
            last = window["last_latent"], window["last_action"]
            marginal = self.log_marginal(*last, window["percept"], window["posterior"])
            prior = self.latent_prior(*last)
            lower, upper = self.information(sample(*prior), prior)
        terms = {"model/log_marginal": marginal, "model/information": lower, "model/information_upper": upper}
        return {name: weighted_mean(term, window["weight"]) for name, term in terms.items()}

    @torch.no_grad()
    def fit_scales(self, buffer):
        """Mean and standard deviation of what has been seen; of changes, only at the first fit.

        A later fit changes no output in the task's units: whatever reads or predicts percepts, and whatever counts in
        scaled reward, is rescaled with them. Else it would throw a precise model off by many nats.
        """
        obs, _, reward, next_obs, *_ = buffer.rows().split(self.widths, -1)
        mean, std = self.percepts.mean.clone(), self.percepts.std.clone()
        self.percepts.fit(torch.cat([next_obs, reward], -1))
        if self.updates == 0:
            self.changes.fit(next_obs - obs)
            return
        ratio, shift = self.percepts.std / std, (self.percepts.mean - mean) / std  # old = ratio * new + shift
        readers = [self.latent_posterior] if self.generative else [self.latent_posterior, self.latent_prior]
        for net in readers:
            layer = net.layers[0]
            layer.bias += shift @ layer.weight[:, self.percept_columns]
            layer.weight[:, self.percept_columns] *= ratio.mT
        if self.generative:
            out = self.decoder.layers[-1]
            out.weight[..., :-1] /= ratio
            out.bias[..., :-1] = (out.bias[..., :-1] - shift) / ratio
            self.log_scale.sub_(ratio.log()).clamp_(LOG_STD_MIN, LOG_STD_MAX)
        for parameter in (*self.critic.layers[-1].parameters(), *self.critic_target.layers[-1].parameters()):
            parameter /= ratio[..., -1:]
        if not self.args.alpha:
            self.log_alpha -= ratio[..., -1:].log()


def train(args):
    """Algorithm 1, amortized: every step of acting is followed by an update on windows of what has been seen."""
    envs = make_envs(args, args.trials)
    agent = Agent(args, envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    buffer = EpisodeBuffer(args.trials, args.buffer_size, agent.widths, args.device)
    run, metrics = Run(args, agent, envs, [buffer]), {}
    last = agent.begin(run.obs)  # what perceive() takes beside the present observation
    for step in run.steps():
        # infer, act: at random at first; an episode's first observation has nothing before it
        time = run.column(run.envs.episode_lengths)
        last = [torch.where(time == 0, first, value) for first, value in zip(agent.begin(run.obs), last)]
        latent = agent.perceive(run.obs, *last)
        action = agent.act(latent) if step > args.learning_starts else run.random_action()

        # remember: a time limit is not a termination, and an episode's last state is not the next one's first
        obs, reward, next_obs, terminated = run.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, latent, time)
        agent.ever_ended.clamp_(min=terminated)
        last = latent, action, reward, obs

        # learn
        if step >= args.learning_starts:
            if (step - args.learning_starts) % args.scale_every == 0:
                agent.fit_scales(buffer)
            metrics = agent.learn(buffer)
            if step % args.log_every == 0:
                metrics |= agent.assess(buffer)

        # evaluate, log, save
        run.finish(metrics)


@torch.no_grad()
def evaluate(agent, envs, args, stop=()):
    """Metric -> (trials, episodes), for q(a) and then p(a): the means of q(z) and of the actions, on fixed seeds."""
    metrics = {}
    for policy, suffix in (("posterior", ""), ("prior", "_prior")):
        obs, _ = envs.reset(seed=args.seed + 10**9)  # never training's, which are seed + step
        returns, discounted, lengths = np.zeros((3, envs.num_envs))
        alive = np.ones(envs.num_envs, bool)
        last = None
        while alive.any() and lengths.max() < args.max_eval_steps and not stop:
            seen = torch.as_tensor(obs, dtype=torch.float32, device=args.device).unflatten(0, (args.trials, -1))
            last = last or agent.begin(seen)
            latent = agent.perceive(seen, *last, deterministic=True)
            action = agent.act(latent, policy, deterministic=True)
            obs, reward, terminated, truncated, _ = envs.step(action.flatten(0, 1).cpu().numpy())
            last = latent, action, seen.new_tensor(reward).view(args.trials, -1, 1), seen
            returns += alive * reward
            discounted += alive * reward * args.gamma**lengths
            lengths += alive
            alive &= ~(terminated | truncated)
        sums = {"eval/return": returns, "eval/length": lengths, "eval/discounted_return": discounted}
        metrics |= {f"{name}{suffix}": values.reshape(args.trials, -1) for name, values in sums.items()}
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Below: the same in every script. Environments, a run and its files, the command line.

SCRIPT = Path(__file__).stem
RESUMABLE = {"total_steps", "device", "matmul_precision", "cuda_graph", "log_every", "eval_every", "eval_episodes",
             "max_eval_steps", "wandb", "wandb_project", "resume", "evaluate", "capture_video"}
warnings.filterwarnings("ignore", message=".*(is out of date|precision lowered).*")  # the papers' tasks are -v4
if hasattr(ctypes.CDLL(None), "mallopt"):  # keep freed memory: mapping it anew costs up to a quarter of an update
    ctypes.CDLL(None).mallopt(-1, 2**30)  # threshold of trimming
    ctypes.CDLL(None).mallopt(-3, 2**25)  # threshold of mmap


def make_envs(args, n):
    """n environments with flat observations and actions in [-1, 1]; an ended episode restarts in the same step."""
    if args.env_id.startswith("dm_control/"):
        importlib.import_module("shimmy")  # registers them
    render = {"render_mode": "rgb_array"} if args.capture_video else {}
    envs = gym.make_vec(args.env_id, n, "sync", vector_kwargs={"autoreset_mode": "SameStep"},
                        wrappers=[gym.wrappers.FlattenObservation], **render)
    space = envs.single_action_space
    vector = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and len(space.shape) == 1 and space.shape[0]
    if not (vector and space.is_bounded() and np.all(space.low < space.high)):
        raise ValueError(f"actions must be a vector of floats between bounds, not {space}")
    return gym.wrappers.vector.RescaleAction(envs, np.float32(-1), np.float32(1))


class Run:
    """What surrounds the algorithm: steps and episodes, as columns (trials, 1, ·), signals, metrics, checkpoints."""

    def __init__(self, args, agent, envs, buffers):
        self.args, self.agent, self.buffers, self.dir = args, agent, buffers, Path(args.run_dir)
        self.envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
        self.eval_envs = make_envs(args, args.trials * args.eval_episodes)
        self.now = load(args, agent, buffers) if args.resume else 0
        if self.now >= args.total_steps:
            fail(f"--total-steps {args.total_steps}: the run is at step {self.now} already")
        old = read_metrics(args)
        with refusing(f"--wandb {args.wandb}"):
            self.wandb = args.wandb != "disabled" and importlib.import_module("wandb").init(
                project=args.wandb_project, dir=self.dir, mode=args.wandb, config=vars(args))
        self.dir.mkdir(parents=True, exist_ok=bool(args.resume or self.wandb))
        with replacing(self.dir / "metrics.csv") as path:  # what came after the checkpoint comes again
            np.savetxt(path, old[old["step"] <= self.now], "%d,%d,%s,%g", header="step,trial,metric,value", comments="")
        with replacing(self.dir / "args.json") as path:
            path.write_text(json.dumps(dataclasses.asdict(args), indent=2))
        self.csv = open(self.dir / "metrics.csv", "a", buffering=1)
        say(f"{self.dir}: {args.env_id}, {args.trials} trial(s) on {args.device}, from step {self.now:,}")
        self.bar = tqdm(total=args.total_steps, initial=self.now, disable=None if sys.stderr else True, smoothing=0.01)
        self.over, self.stop, self.result = False, [], "not evaluated"
        self.timed = self.now, time.perf_counter()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup wants the run to go on
                signal.signal(signum, lambda number, _: self.stop.append(number))
        self.reset()

    def reset(self):
        """Begin new episodes, as a resumed run does."""
        obs, _ = self.envs.reset(seed=self.args.seed + self.now)  # of trial i: seed + now + i
        self.obs, self.restart = self.column(obs), self.now

    def column(self, x):
        return torch.as_tensor(x, dtype=torch.float32, device=self.args.device).view(self.args.trials, 1, -1)

    def steps(self):
        """The environment steps that are left; a signal ends them, and then the process."""
        while not self.over:
            self.now += 1
            yield self.now
        say(f"{self.dir}: {self.result} at step {self.now:,}")
        if self.stop:
            sys.exit(128 + self.stop[0])

    def random_action(self):
        """Uniform, held for --explore-hold steps; at one seed all methods draw the same, whatever else they draw."""
        first = self.now - (self.now - self.restart - 1) % self.args.explore_hold
        draws = [np.random.default_rng((self.args.seed + i, first)) for i in range(self.args.trials)]
        return self.column(np.array([draw.uniform(-1, 1, self.envs.single_action_space.shape) for draw in draws]))

    def step(self, action):
        """Act in all trials; returns obs, reward, next_obs (an episode's last where one ended) and terminated."""
        obs, action = self.obs, action[:, 0].cpu().numpy()
        obs_after, reward, terminated, truncated, infos = self.envs.step(action)
        next_obs, ended = obs_after.copy(), np.flatnonzero(terminated | truncated)
        if len(ended):
            next_obs[ended] = np.stack(infos["final_obs"][ended])
            self.log({"train/return": infos["episode"]["r"], "train/length": infos["episode"]["l"]}, ended)
        for name, x in {"action": action, "observation": [obs_after, next_obs], "reward": reward}.items():
            if not np.all(np.abs(x) <= np.finfo(np.float32).max):
                fail(f"step {self.now}: the {name} is not a finite float32; the last checkpoint stays", code=1)
        self.obs = self.column(obs_after)
        return obs, self.column(reward), self.column(next_obs), self.column(terminated)

    def log(self, metrics, trials=None):
        """metrics: name -> values per trial, of which those of `trials` are logged; -1 stands for all together."""
        for name, values in metrics.items():
            values = dict(enumerate(values.tolist())) if trials is None else {i: float(values[i]) for i in trials}
            self.csv.writelines(f"{self.now},{trial},{name},{value:.6g}\n" for trial, value in values.items())
            if self.wandb:
                each = {f"{name}/trial_{trial}": value for trial, value in values.items()}
                self.wandb.log({name: sum(values.values()) / len(values)} | each, step=self.now)

    def finish(self, metrics):
        """The end of a step: evaluate, log and save where it is due."""
        args, last = self.args, self.now == self.args.total_steps
        if self.now >= args.learning_starts and (self.now % args.eval_every == 0 or last):
            results = evaluate(self.agent, self.eval_envs, args, self.stop)
            if not self.stop:  # a signal cuts the episodes off
                self.log({name: values.mean(1) for name, values in results.items()})
                self.result = f"return {results['eval/return'].mean():.1f}"
        if self.now % args.log_every == 0:
            (step, before), self.timed = self.timed, (self.now, time.perf_counter())
            self.log(metrics)
            self.log({"time/sps": np.array([(self.now - step) / (self.timed[1] - before)])}, [-1])
        self.over = last or bool(self.stop)  # asked once, so that a run that ends is always saved
        if self.now % args.save_every == 0 or self.over:
            for name, parameter in self.agent.named_parameters():
                if not parameter.isfinite().all():
                    fail(f"step {self.now}: {name} is not finite; the last checkpoint stays", code=1)
            save(args, self.now, self.agent, self.buffers)
            with contextlib.suppress(Exception, SystemExit):  # no picture is worth a run
                draw(args)
            self.reset()
        self.bar.set_postfix_str(self.result, refresh=False)
        self.bar.update()


def set_precision(args):
    """At medium float32 products stay exact. PyTorch's medium, faster elsewhere, rounds them on GPUs and with AMX."""
    if not args.device.startswith("cuda") and not torch.cpu.get_capabilities().get("avx512_bf16"):
        args.matmul_precision = "highest"  # bfloat16 would be slower than float32
    rounded = args.device.startswith("cuda") or torch.cpu.get_capabilities().get("amx_bf16")
    precision = "highest" if rounded and args.matmul_precision == "medium" else args.matmul_precision
    torch.set_float32_matmul_precision(precision)


def captured(function, args):
    """The function; with --cuda-graph as one CUDA graph, recorded at the second call and replayed from then on."""
    return importlib.import_module("tensordict.nn").CudaGraphModule(function) if args.cuda_graph else function


@contextlib.contextmanager
def replacing(path):
    """A path to write to, renamed in the end: a writer that fails or is killed leaves the file as it was."""
    beside = path.with_suffix(".tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_metrics(args):
    """metrics.csv as a structured array, without a last line that a killed process has left unfinished."""
    path, kind = Path(args.run_dir, "metrics.csv"), [("step", int), ("trial", int), ("metric", "U99"), ("value", float)]
    with refusing(path):
        lines = path.read_text().split("\n")[1:-1] if path.exists() else []
        return np.loadtxt(lines, kind, delimiter=",", ndmin=1) if lines else np.empty(0, kind)


def draw(args):
    """curve.png: mean and one standard deviation of the evaluation return over the trials."""
    from matplotlib.figure import Figure

    rows = read_metrics(args)
    rows = rows[rows["metric"] == "eval/return"].reshape(-1, args.trials)
    steps, mean, std = rows["step"][:, 0], rows["value"].mean(1), rows["value"].std(1)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(title=args.env_id, xlabel="environment steps per trial", ylabel="evaluation return")
    axes.plot(steps, mean)
    axes.fill_between(steps, mean - std, mean + std, alpha=0.3)
    with replacing(Path(args.run_dir, "curve.png")) as path:
        figure.savefig(path, format="png", dpi=150)


def save(args, step, agent, buffers):
    """Write checkpoint.pt."""
    rows = [{"storage": buffer.rows().clone(), "added": buffer.added} for buffer in buffers]  # of a view all is saved
    state = {"script": SCRIPT, "env_id": args.env_id, "step": step, "agent": agent.state_dict(),
             "opts": {name: opt.state_dict() for name, opt in agent.opts.items()}, "buffers": rows,
             "rng": torch.get_rng_state()}
    path = Path(args.run_dir, "checkpoint.pt")
    with refusing(f"{path} (is the disk full?)", code=1), replacing(path) as beside:  # of which torch says nothing
        torch.save(state, beside)


def load(args, agent, buffers=()):
    """Read checkpoint.pt into the agent and the buffers; returns the environment step it was taken at."""
    path = Path(args.run_dir, "checkpoint.pt")
    with refusing(path):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load checks no checksums
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (state["script"], state["env_id"]) != (SCRIPT, args.env_id):
            raise ValueError(f"a checkpoint of {state['script']}.py on {state['env_id']}")
        agent.load_state_dict(state["agent"])
        for name, opt in agent.opts.items():
            opt.load_state_dict(state["opts"][name])
            if any(adam_state["exp_avg"].shape != parameter.shape for parameter, adam_state in opt.state.items()):
                raise ValueError(f"opts.{name} is of other shapes")
        for buffer, saved in zip(buffers, state["buffers"]):
            buffer.storage[:, : saved["storage"].shape[1]] = saved["storage"]
            buffer.added.copy_(saved["added"])
        torch.cuda.manual_seed_all(args.seed + state["step"])
        torch.set_rng_state(state["rng"])
    return state["step"]


def say(text):
    """Print a line, if anyone still listens."""
    with contextlib.suppress(OSError):
        tqdm.write(text, sys.stderr)


def fail(message, code=2):
    """Print one line and exit."""
    say(f"{SCRIPT}.py: error: {' '.join(message.split())}")
    sys.exit(code)


@contextlib.contextmanager
def refusing(what, code=2):
    """Whatever is wrong inside (a file, a device, a user's environment) becomes one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).splitlines()[:2])  # of wrong keys only the first
        fail(f"{what}: {type(error).__name__}: {reason}", code)


def wrong_values(values):
    """(flag, what it allows) of every value that is not of its flag's type or is beyond its limits."""
    for field in dataclasses.fields(Args):
        value, allowed = values[field.name], get_args(field.type)
        kind, limits = allowed if get_origin(field.type) is Annotated else (type(field.default), None)
        if not isinstance(value, kind):
            yield field.name, f"must be of type {getattr(kind, '__name__', kind)}"
        elif get_origin(field.type) is Literal and value not in allowed:
            yield field.name, f"allowed are {', '.join(allowed)}"
        elif limits and value is not None and not limits[0] <= value <= limits[1]:
            yield field.name, f"allowed are values from {limits[0]:g} to {limits[1]:g}"


def parse_args(argv=None):
    """Read the command line and refuse what cannot work; a saved run brings the flags it was begun with."""
    sys.path.append("")  # modules in the current directory, wherever the script lies
    argv = sys.argv[1:] if argv is None else argv
    if "" in argv:  # as of a shell's unset variable
        fail(f"{argv[argv.index('') - 1]}: its value is empty")
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    if run_dir := args.resume or args.evaluate:
        with refusing(f"{run_dir}/args.json"):
            values = json.loads(Path(run_dir, "args.json").read_text())
            saved = Args(**values | {"run_dir": run_dir, "resume": "", "evaluate": ""})  # refuses unknown names
            for name, rule in wrong_values(values):  # and missing ones
                raise ValueError(f"{name} {values[name]}: {rule}")
        args = tyro.cli(Args, args=argv, default=saved)
        for name in dataclasses.asdict(args).keys() - RESUMABLE:
            if getattr(args, name) != getattr(saved, name):
                fail(f"--{name.replace('_', '-')}: differs from the saved run's, {getattr(saved, name)}")
    for name, rule in (*wrong_values(vars(args)), *args.conflicts()):
        fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")
    if args.total_steps < args.learning_starts:
        fail(f"--total-steps {args.total_steps}: must be at least --learning-starts {args.learning_starts}")
    if not run_dir and args.run_dir and Path(args.run_dir).exists():
        fail(f"--run-dir {args.run_dir}: exists already")
    if args.resume and args.evaluate:
        fail(f"--evaluate {args.evaluate}: not together with --resume")
    if args.capture_video and not args.evaluate:
        fail("--capture-video: needs --evaluate RUN_DIR")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"--device {args.device}" + " --cuda-graph" * args.cuda_graph):
        torch.zeros(1, device=args.device).item()
        if args.cuda_graph:
            torch.cuda.set_device(torch.empty(0, device=args.device).device)  # graphs are recorded on the current one
            importlib.import_module("tensordict")
    with refusing(f"--env-id {args.env_id}" + " --capture-video" * args.capture_video):
        envs = make_envs(args, 1)
        envs.reset(seed=args.seed)
        envs.step(envs.action_space.sample())
        if args.capture_video:
            importlib.import_module("moviepy")
            _, _, _ = envs.render()[0].shape  # a picture has three axes
        need = 4e-9 * args.floats(gym.spaces.flatdim(envs.single_observation_space), envs.single_action_space.shape[0])
    have = 1e-9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.device.startswith("cuda"):
        have = 1e-9 * torch.cuda.mem_get_info(args.device)[1]
    if need > have and not args.evaluate:
        fail(f"--buffer-size, widths and batches: they ask for {need:,.0f} GB, and {args.device} has {have:,.0f}")
    name = f"{SCRIPT}_s{args.seed}_{datetime.now():%Y%m%d-%H%M%S-%f}"
    args.run_dir = args.run_dir or f"runs/{args.env_id.replace(':', '_')}/{name}"
    return args


def main(argv=None):
    try:
        args = parse_args(argv)
        torch.manual_seed(args.seed)
        set_precision(args)
        if not args.evaluate:
            return train(args)
        envs = make_envs(args, args.trials * args.eval_episodes)
        agent = Agent(args, envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
        step = load(args, agent)
        if args.capture_video:
            envs = gym.wrappers.vector.RecordVideo(envs, f"{args.run_dir}/videos", name_prefix=f"step-{step}",
                                                   episode_trigger=lambda episode: episode == 0, record_first_only=True)
        for name, values in evaluate(agent, envs, args).items():
            for trial, x in enumerate(values):
                print(f"{args.env_id}, step {step}, trial {trial}: {name} {x.mean():.1f} ± {x.std():.1f} "
                      f"over {len(x)} episodes")
        envs.close()
    except (OSError, MemoryError, RuntimeError) as error:
        full = "out of memory" in str(error) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not full:
            raise  # a mistake in the code: its trace helps
        fail(f"{type(error).__name__}: {error}", code=1)


if __name__ == "__main__":
    main()
