# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "numpy==2.4.6",
#                 "scikit-learn==1.9.1", "tyro==1.0.17", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""β-VMBPO: model-based RL as variational inference with an adaptive risk parameter β, in one file.

After "Risk-Sensitive Variational Model-Based Policy Optimization", whose equation numbers are used. Dynamics
p_θ(s',r|s,a) are learned from data. The variational dynamics q_φ(s'|s,a) are their posterior given optimality: p tilted
towards states of high value, the more the smaller the risk parameter β. Actor and critic learn inside q; β keeps q
within ε nats of p.

    max_q E_q[Σ r] − β KL(q(τ) ‖ p_π(τ))                                                                (7)
    J(β) = β ε − β KL(q_φ(s'|s,a) ‖ p_θ(s'|s,a))                                                        (9)
    J(θ) = −E_env[log p_θ(s',r|s,a)]                                                                    (10)
    J(φ) = −E_env[exp((r + γ V'(s') − Q(s,a)) / β) log q_φ(s'|s,a)]                                     (11)
    J(ψ) = E_model[(Q_ψ(s,a) − r − γ V'(s') + β log q_φ(s'|s,a)/p_θ(s'|s,a))²]                          (12)
    J(ω) = E_model[E_{a~q_ω}[β log q_ω(a|s) − β log π_κ(a|s) − Q(s,a)]],  then κ ← ω                    (13, 14)

E_env is over replayed transitions, E_model over imagined ones; q_ω is the policy, π_κ its prior; Q' are target critics.
Deviations from the paper, each with the flag that goes back where there is one; docs/beta_vmbpo.md says more:
 1. γ and termination enter (11) and (12). A decision tree learns when episodes end. `--termination-fn`: a known rule.
 2. In a fit p learns alone, then q starts at p and both learn. The rate rises from 0 to eightfold and falls to 0: the
    KL is the tilt alone. Adam's β₂ is 0.95: with more memory a fit can undo the last. `--fit-rule constant`: neither.
 3. The exponent of (11) is clamped to ±4 after the division by β; its Q is the target critic's. Weights have mean 1.
 4. KL(q‖p) of two ensembles is that of the moment-matched Gaussians of s'. `--kl-estimator members`: pairs of members.
 5. Critics hold βQ (Appendix C.3); the log-ratio of (12) is left out, as in C.1. `--log-ratio-in-critic`: kept.
 6. Actor and critic have an entropy bonus with tuned α: V'(s') = E[min Q'(s',a') − α log q_ω(a'|s')]. In Appendix C.1
    β-VMBPO has it in the critic alone (`--entropy critic`, with a fixed α), VMBPO not at all (`--entropy none`).
 7. The actor climbs the online critic, not the target. As κ ← ω follows each update, (13)'s KL has mean gradient 0.
 8. Real rows in every batch (`--real-ratio 0`: none), imagined states clipped to the data's range, bounds on a
    fit's minibatches, standardised targets; dynamics with MBPO's rate 1e-3 (not 3e-4), SiLU (not ReLU), weight decay.
 9. log β moves by --beta-lr · log(KL/ε) / 4, at most by --beta-lr, as the KL scatters over orders of magnitude.
    `--dual-step adam`: Adam on (9), in log β. ε is 0.001 nats, as q starts at p. `--kl-budget 0.1`: Table 1.

    python beta_vmbpo.py --env-id Walker2d-v4
    python beta_vmbpo.py --evaluate runs/Walker2d-v4/RUN --capture-video
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import math
import os
import pkgutil
import signal
import sys
import time
import warnings
import zipfile
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.tree import DecisionTreeRegressor
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from tqdm import tqdm

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
FIT_SHARES = (0, 0.25, 0.5, 0.75, 1)  # points in a fit, as shares of its minibatches; the next three are by --fit-rule
FIT_RATE = {"two_phase": (0, 8, 2, 0.5, 0), "constant": (1, 1, 1, 1, 1)}  # factors on the rate there, linear between
SECOND_PHASE = {"two_phase": 0.5, "constant": 0}  # share of a fit after which q, if any, learns, and all is float32
FIT_BETAS = {"two_phase": (0.9, 0.95), "constant": (0.9, 0.999)}  # Adam's
TREE_DEPTH, TREE_ROWS = 8, 50_000  # of the decision tree that learns when episodes end
HOLD_OUT_EVERY, HOLD_OUT_MAX = 5, 2000  # every fifth row never trains the dynamics; at most HOLD_OUT_MAX measure errors
EXPONENT_MAX = 4.0  # Appendix C.1
BETA_MIN, BETA_MAX = 1e-2, 1e7  # the greatest: Appendix C.4
torch.distributions.Distribution.set_default_validate_args(False)  # the checks would wait for the device

Count = Annotated[int, (1, 1e9)]  # a flag's type, its least and its greatest value
Rows = Annotated[int, (10, 2**24)]  # sampling tells no more apart
Fraction = Annotated[float, (0, 1)]
Positive = Annotated[float, (1e-12, 1e9)]
Number = Annotated[float | None, (-1e9, 1e9)]


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: Annotated[int, (0, 2**31)] = 1  # trial i uses environment seed + i
    trials: Count = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    matmul_precision: Literal["highest", "high", "medium"] = "medium"  # medium: actor, critics, half a fit in bfloat16
    cuda_graph: bool = False  # replay the updates of a step, and the minibatches of fits if any, as CUDA graphs
    total_steps: Count = 300_000  # environment steps per trial
    learning_starts: Rows = 5_000  # uniformly random steps before the first update
    explore_hold: Count = 1  # environment steps for which each of those random actions is held
    log_every: Count = 250  # environment steps between rows of training metrics
    eval_every: Count = 1_000  # environment steps between evaluations
    eval_episodes: Count = 5  # episodes per trial and evaluation
    max_eval_steps: Count = 10_000  # steps after which an evaluation's episode is cut off
    save_every: Count = 10_000  # environment steps between checkpoints; episodes restart there
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases; offline needs no account
    wandb_project: str = "rl-as-inference"  # Weights & Biases project
    capture_video: bool = False  # with --evaluate: write an mp4 of the first episode
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/SCRIPT_sSEED_DATE-TIME
    resume: str = ""  # run directory to continue; only how it runs, logs and evaluates may change
    evaluate: str = ""  # run directory whose saved agent is evaluated instead of training

    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.005  # step of the target critic towards the critic
    batch_size: Count = 256  # rows per update
    hidden_dim: Count = 256  # width of the two hidden layers of actor and critics
    critic_norm: bool = False  # layer norm in the critics: bounds values where there is no data
    learning_rate: Positive = 3e-4  # Adam's, of actor, critics and α
    updates_per_step: Count = 20  # actor-critic updates per environment step
    target_entropy: Number = None  # entropy that α is tuned to, in nats; default −(action dimensions)/2
    entropy: Literal["both", "critic", "none"] = "both"  # where the entropy bonus enters; both: actor and critic
    real_ratio: Fraction = 0.05  # share of real transitions in each batch, rounded to whole rows
    buffer_size: Rows = 1_000_000  # real transitions kept per trial
    model_buffer_size: Rows = 400_000  # imagined transitions kept per trial
    ensemble_size: Count = 7  # members of the dynamics ensemble
    num_elites: Count = 5  # members with the lowest hold-out error, used to imagine
    model_dim: Count = 200  # width of the dynamics' hidden layers
    model_layers: Count = 4  # hidden layers of the dynamics
    model_learning_rate: Positive = 1e-3  # Adam's, of the dynamics; a fit varies it (deviation 2)
    fit_rule: Literal["two_phase", "constant"] = "two_phase"  # how a fit proceeds (deviation 2)
    variance_weight: Fraction = 0.0  # errors count by predicted variance to this power; 0.5 to 1 for rare rewards
    fit_every: Count = 250  # environment steps between fits
    epochs: Count = 5  # passes over the data per fit
    min_first_batches: Count = 400  # least minibatches of the first fit: five passes over a small buffer are too few
    min_batches: Count = 200  # least minibatches of a later fit
    max_batches: Count = 800  # most minibatches of any fit: beyond 51,000 rows it makes fewer than five passes
    rollouts: Count = 100_000  # states from which transitions are imagined at a time
    imagine_every: Count = 250  # environment steps between these times
    horizon: Count = 1  # imagined steps per roll-out; above 1 they follow the policy away from replayed states
    horizon_from: Count = 1  # environment step at which roll-outs begin to grow from 1
    horizon_until: Count = 1  # environment step at which they have grown, linearly, to --horizon
    termination_fn: str = ""  # module:function(obs, action, next_obs) -> ended or not; default: a tree learns it
    beta: Annotated[float, (BETA_MIN, math.inf)] = 100.0  # at first, in units of reward: small is optimistic, ∞ neutral
    kl_estimator: Literal["mixture", "members"] = "mixture"  # KL of moment-matched ensembles, or mean over members
    log_ratio_in_critic: bool = False  # subtract β log q/p, with the β of that time, from imagined rewards, for (12)
    kl_budget: Positive = 0.001  # ε: nats per transition by which q may differ from p
    beta_lr: Positive = 0.003  # step of log β per environment step, at most; above 4 / --fit-every β swings
    dual_step: Literal["log", "adam"] = "log"  # how β descends (9): in proportion to log(KL/ε), or by Adam

    def conflicts(self):
        """(flag, rule) of every combination of the algorithm's flags that cannot work."""
        if self.num_elites > min(self.ensemble_size, self.rollouts):
            yield "num_elites", "must be at most --ensemble-size and --rollouts"
        if self.rollouts * self.horizon > self.model_buffer_size:
            yield "rollouts", "times --horizon must be at most --model-buffer-size"
        if self.horizon_until < self.horizon_from:
            yield "horizon_until", "must be at least --horizon-from"
        if self.horizon_until != Args.horizon_until and self.horizon == 1:
            yield "horizon_until", "has no effect with --horizon 1"
        if self.target_entropy is not None and self.entropy != "both":
            yield "target_entropy", "has no effect without --entropy both"
        if math.isinf(self.beta) and self.log_ratio_in_critic:
            yield "beta", "must not be infinite with --log-ratio-in-critic"

    def floats(self, obs_dim, action_dim):
        """About how many numbers a run keeps: its rows, networks with their gradients and moments, activations."""
        rows = self.buffer_size + self.model_buffer_size + self.rollouts + self.updates_per_step * self.batch_size
        policy = 24 * self.hidden_dim * (self.hidden_dim + self.batch_size)
        model = 8 * self.ensemble_size * self.model_layers * self.model_dim * (self.model_dim + self.batch_size)
        return self.trials * (rows * (2 * obs_dim + action_dim + 2) + policy + model)


class ReplayBuffer:
    """Ring of transitions per trial: obs, action, reward, next_obs, terminated or its probability."""

    def __init__(self, trials, capacity, obs_dim, action_dim, device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.storage = torch.zeros(trials, capacity, sum(self.widths), device=device)  # (trials, capacity, row)
        self.added = torch.zeros((), dtype=torch.long, device=device)  # a tensor: CUDA graphs see it change
        self.trial = torch.arange(trials, device=device)[:, None]  # a trial reads its own rows

    def rows(self):
        """All rows there are: (trials, count, row)."""
        return self.storage[:, : int(self.added)]  # of a full ring the slice is all

    def add(self, *columns):
        """columns: tensors (trials, n, width) in the order of a row; n at most the capacity."""
        rows = torch.cat(columns, -1)
        index = self.added + torch.arange(rows.shape[1], device=rows.device)
        self.storage[:, index % self.storage.shape[1]] = rows
        self.added += rows.shape[1]

    def sample(self, n):
        """n rows per trial, uniform with replacement: (trials, n, row)."""
        count = self.added.clamp(max=self.storage.shape[1])
        index = (torch.rand(len(self.trial), n, device=self.storage.device) * count).long()
        return self.storage[self.trial, index]


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


class Actor(StackedMLP):
    """Tanh-squashed Gaussian policy: obs (trials, batch, obs_dim) -> mean and log_std before the tanh."""

    def forward(self, obs):
        mean, log_std = super().forward(obs).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def sample(self, obs):
        """Reparameterised action and its log-probability (trials, batch, 1), the tanh's Jacobian in a stable form."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std - log_det
        return u.tanh(), log_prob.sum(-1, keepdim=True)


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

    def inverse(self, x):
        return x * self.std + self.mean


class Dynamics(StackedMLP):
    """Ensemble of Gaussians over normalised (Δobs, reward): x (*stack, batch, in) -> mean, bounded log_var."""

    def __init__(self, stack, in_dim, out_dim, hidden_dims):
        super().__init__(stack, (in_dim, *hidden_dims, 2 * out_dim), F.silu)
        self.max_log_var = nn.Parameter(torch.full((*stack, 1, out_dim), 0.5))
        self.min_log_var = nn.Parameter(torch.full((*stack, 1, out_dim), -10.0))

    def forward(self, x):
        mean, log_var = super().forward(x).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def groups(self):
        """Parameter groups with MBPO's weight decay, by layer."""
        rates = [2.5e-5, 5e-5, *[7.5e-5] * (len(self.layers) - 3), 1e-4][-len(self.layers) :]
        groups = [{"params": layer.weight, "weight_decay": rate} for layer, rate in zip(self.layers, rates)]
        return [*groups, {"params": [parameter for name, parameter in self.named_parameters() if "weight" not in name]}]


class Terminator(nn.Module):
    """Probability per trial that a state ends its episode: a decision tree, as ends are few and their bounds sharp.

    A node's columns: the next node if feature ≤ threshold, the next node otherwise, feature, threshold, share of ends.
    """

    def __init__(self, trials):
        super().__init__()
        self.register_buffer("nodes", torch.zeros(trials, 2 ** (TREE_DEPTH + 1), 5).double())  # (trials, node, column)

    def fit(self, obs, ended):
        """obs (trials, n, obs_dim), ended (trials, n, 1)."""
        for nodes, x, y in zip(self.nodes, obs.cpu().numpy(), ended.cpu().numpy()):
            every = math.ceil(len(y) / TREE_ROWS)
            kept = (y[:, 0] > 0) | (np.arange(len(y)) % every == 0)  # all ends, and at most TREE_ROWS others
            weight = np.where(y[kept, 0] > 0, 1, every)
            tree = DecisionTreeRegressor(max_depth=TREE_DEPTH, random_state=0).fit(x[kept], y[kept], weight).tree_
            columns = (tree.children_left, tree.children_right, tree.feature, tree.threshold, tree.value[:, 0, 0])
            nodes[: tree.node_count] = torch.as_tensor(np.stack(columns, -1))

    def forward(self, obs):
        """obs (trials, n, obs_dim) -> (trials, n, 1)."""
        node = torch.zeros_like(obs[..., :1])
        for _ in range(TREE_DEPTH + 1):
            columns = self.nodes.gather(1, node.long().expand(-1, -1, self.nodes.shape[-1]))
            below, above, feature, threshold, share = columns.split(1, -1)
            child = torch.where(obs.gather(-1, feature.long().clamp(min=0)) <= threshold, below, above)
            node = torch.where(child < 0, node, child)  # a leaf has no children
        return share.to(obs.dtype)


class Agent(nn.Module):
    """Networks, optimizers and the steps of Algorithm 1: act, fit_model, imagine, learn, update_beta."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, self.obs_dim, trials = args, obs_dim, args.trials
        hidden = (args.hidden_dim, args.hidden_dim)
        self.low = torch.bfloat16 if args.matmul_precision == "medium" else None  # for the dynamics see fit_model
        self.actor = Actor((trials,), (obs_dim, *hidden, 2 * action_dim), dtype=self.low)
        dims = (obs_dim + action_dim, *hidden, 1)
        self.critic = StackedMLP((2, trials), dims, dtype=self.low, norm=args.critic_norm)
        self.critic_target = StackedMLP((2, trials), dims, dtype=self.low, norm=args.critic_norm)
        self.critic_target.load_state_dict(self.critic.state_dict())
        log_alpha = 0.0 if args.entropy == "both" else math.log(0.2)  # else fixed, as in the code behind β-VMBPO
        self.log_alpha = nn.Parameter(torch.full((trials, 1, 1), log_alpha))
        self.target_entropy = -action_dim / 2 if args.target_entropy is None else args.target_entropy
        if self.target_entropy >= action_dim * math.log(2):
            fail(f"--target-entropy {args.target_entropy}: must be below {action_dim * math.log(2):.3g}, |A| ln 2")

        ensemble, model_dims = (args.ensemble_size, trials), (args.model_dim,) * args.model_layers
        self.model = Dynamics(ensemble, obs_dim + action_dim, obs_dim + 1, model_dims)
        self.posterior_model = Dynamics(ensemble, obs_dim + action_dim, obs_dim + 1, model_dims)
        self.terminator = Terminator(trials)
        self.inputs, self.targets = Normalizer(trials, obs_dim + action_dim), Normalizer(trials, obs_dim + 1)
        self.register_buffer("state_range", torch.zeros(2, trials, 1, obs_dim))  # least, greatest
        self.register_buffer("elites", torch.zeros(args.num_elites, trials, dtype=torch.long))
        self.log_beta = nn.Parameter(torch.full((trials, 1, 1), math.log(min(args.beta, BETA_MAX))))
        self.register_buffer("kl", torch.zeros(trials))
        self.to(args.device)

        adam, groups = {"fused": True, "capturable": True}, [*self.model.groups(), *self.posterior_model.groups()]
        self.opts = {
            "actor": torch.optim.Adam([*self.actor.parameters(), self.log_alpha], args.learning_rate, **adam),
            "critic": torch.optim.Adam(self.critic.parameters(), args.learning_rate, **adam),
            "models": torch.optim.Adam(groups, args.model_learning_rate, FIT_BETAS[args.fit_rule], **adam),
            "beta": torch.optim.Adam([self.log_beta], args.beta_lr, **adam),
        }
        self.learn = captured(self.learn, args)  # a CUDA graph with --cuda-graph
        with refusing(f"--termination-fn {args.termination_fn}"):  # tried once, before any work
            obs = torch.zeros(trials, 2, obs_dim, device=args.device)
            self.termination(obs, obs.new_zeros(trials, 2, action_dim), obs)

    @property
    def beta(self):
        return self.log_beta.detach().exp()  # (trials, 1, 1)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Actions (trials, n, action_dim) sampled from the policy, or its mean action for evaluation."""
        return self.actor(obs)[0].tanh() if deterministic else self.actor.sample(obs)[0]

    @torch.no_grad()
    def value(self, obs):
        """V'(s) with one sampled action and, unless it is off, the entropy bonus: (trials, n, 1)."""
        action, log_prob = self.actor.sample(obs)
        value = self.critic_target(torch.cat([obs, action], -1)).amin(0)
        return value if self.args.entropy == "none" else value - self.log_alpha.exp() * log_prob

    def termination(self, obs, action, next_obs):
        """Probability (trials, n, 1) that the episode ends at next_obs."""
        if self.args.termination_fn:
            known = pkgutil.resolve_name(self.args.termination_fn)
            return known(obs, action, next_obs).reshape(*obs.shape[:-1], 1).float()
        return self.terminator(next_obs)

    def moments(self, model, obs, action, members=...):
        """Mean and log-variance of normalised (Δobs, reward): (ensemble, trials, n, out), or of members at an index."""
        chosen = {name: parameter[members] for name, parameter in model.named_parameters()}
        return functional_call(model, chosen, self.inputs(torch.cat([obs, action], -1)))

    def descend(self, name, loss):
        """One step of an optimizer, with gradients of its own parameters alone."""
        opt = self.opts[name]
        opt.zero_grad()
        loss.backward(inputs=[parameter for group in opt.param_groups for parameter in group["params"]])
        opt.step()

    @torch.no_grad()
    def transition_weights(self, buffer):
        """exp(δ/β), δ the TD error, of every replayed transition, scaled to mean 1 per trial: (trials, n, 1)."""
        deltas = []
        for rows in buffer.rows().split(2_000, 1):  # for smaller temporaries
            obs, action, reward, next_obs, terminated = rows.split(buffer.widths, -1)
            q = self.critic_target(torch.cat([obs, action], -1)).amin(0)
            deltas.append(reward + self.args.gamma * (1 - terminated) * self.value(next_obs) - q)
        weights = (torch.cat(deltas, 1) / self.beta).clamp(-EXPONENT_MAX, EXPONENT_MAX).exp()  # eq. (11)
        return weights / weights.mean(1, keepdim=True)

    def model_loss(self, model, batch, weights=1.0):
        """Gaussian loss of minibatches (ensemble, trials, n, ·), rows weighted; summed over members and trials."""
        obs, action, reward, next_obs, _ = batch
        target = self.targets(torch.cat([next_obs - obs, reward], -1))
        mean, log_var = self.moments(model, obs, action)
        nll = (target - mean).square() * (-log_var).exp() + log_var
        nll *= (self.args.variance_weight * log_var.detach()).exp()  # at 0 plain; else β-NLL (Seitzer et al., 2022)
        bounds = 0.01 / self.args.ensemble_size * (model.max_log_var - model.min_log_var)  # draws them together
        return (weights * nll).mean((-2, -1)).sum() + bounds.sum()  # eq. (10), (11), but for a factor and a constant

    def fit_statistics(self, buffer):
        """Fit what needs no gradient: means, deviations, ranges, ends of episodes; returns metrics, each (trials,)."""
        obs, action, reward, next_obs, terminated = buffer.rows().split(buffer.widths, -1)
        new = torch.arange(int(buffer.added))[-self.args.fit_every :] % obs.shape[1]  # the ring may be full
        foreseen = self.termination(obs[:, new], action[:, new], next_obs[:, new])  # by the last fit
        self.inputs.fit(buffer.rows()[..., : self.obs_dim + action.shape[-1]])
        target = torch.cat([next_obs, reward], -1)
        target[..., : self.obs_dim] -= obs  # in place: a copy would be the largest temporary of a run
        self.targets.fit(target)
        self.state_range[0] = torch.minimum(obs.amin(1, keepdim=True), next_obs.amin(1, keepdim=True))
        self.state_range[1] = torch.maximum(obs.amax(1, keepdim=True), next_obs.amax(1, keepdim=True))
        if not self.args.termination_fn:
            self.terminator.fit(next_obs, terminated)
        return {"model/end_error": (foreseen - terminated[:, new]).abs().mean((-2, -1))}

    def start_posterior(self):
        """Let q begin at p, with p's Adam moments."""
        self.posterior_model.load_state_dict(self.model.state_dict())
        adam_state = self.opts["models"].state
        for prior, posterior in zip(self.model.parameters(), self.posterior_model.parameters()):
            adam_state[posterior] = {name: x.clone() for name, x in adam_state[prior].items()}

    @torch.no_grad()
    def divergence(self, obs):
        """KL(q_φ ‖ p_θ) of the next state, averaged over states and the policy's actions: (trials,)."""
        action, gaussians = self.act(obs), []
        for model in (self.posterior_model, self.model):
            mean, log_var = self.moments(model, obs, action, (self.elites, range(len(obs))))  # (elites, trials, n, out)
            var = log_var.exp()
            if self.args.kl_estimator == "mixture":
                var = (var + (mean - mean.mean(0)).square()).mean(0, keepdim=True)
                mean = mean.mean(0, keepdim=True)
            gaussians.append(Normal(mean, var.sqrt()))
        return kl_divergence(*gaussians)[..., : self.obs_dim].sum(-1).mean((0, -1))

    @torch.no_grad()
    def predict(self, obs, action):
        """s' ~ q_φ, r ~ p_θ and P(end at s'): (trials, n, ·) each; rows are dealt to the elites in equal chunks."""
        chunks, elites = [], self.elites.repeat(4, 1)  # four chunks each, for smaller temporaries
        for elite, o, a in zip(elites, obs.chunk(len(elites), 1), action.chunk(len(elites), 1)):
            members = (elite, range(len(o)))  # each trial's own
            both = [self.moments(model, o, a, members) for model in (self.model, self.posterior_model)]
            prior, posterior = [Normal(mean, (0.5 * log_var).exp()) for mean, log_var in both]  # (trials, n, out)
            sample = posterior.sample()
            next_obs = o + self.targets.inverse(sample)[..., : self.obs_dim]
            reward = self.targets.inverse(prior.sample())[..., self.obs_dim :]
            if self.args.log_ratio_in_critic:
                log_ratio = posterior.log_prob(sample) - prior.log_prob(sample)
                reward = reward - self.beta * log_ratio[..., : self.obs_dim].sum(-1, keepdim=True)  # eq. (12)
            # the end is judged before clipping: a known rule may lie beyond the data
            chunks.append((next_obs.clamp(*self.state_range), reward, self.termination(o, a, next_obs)))
        return [torch.cat(column, 1) for column in zip(*chunks)]

    @torch.no_grad()
    def assess(self, buffer, weights):
        """Choose the elites, measure the KL and what else the fit has done; returns metrics, each (trials,)."""
        held_out = buffer.rows()[:, ::HOLD_OUT_EVERY]
        held_out = held_out[:, :: math.ceil(held_out.shape[1] / HOLD_OUT_MAX)]
        obs, action, reward, next_obs, _ = held_out.split(buffer.widths, -1)
        target = self.targets(torch.cat([next_obs - obs, reward], -1))
        prior_error = (self.moments(self.model, obs, action)[0] - target).square().mean((-2, -1))  # (ensemble, trials)
        posterior_error = (self.moments(self.posterior_model, obs, action)[0] - target).square().mean((-2, -1))
        self.elites.copy_(prior_error.topk(len(self.elites), dim=0, largest=False).indices)
        obs, action, _, next_obs, terminated = buffer.sample(1000).split(buffer.widths, -1)  # of all rows
        self.kl.copy_(self.divergence(obs))
        imagined_obs, _, imagined_end = self.predict(obs, action)
        gap = (1 - imagined_end) * self.value(imagined_obs) - (1 - terminated) * self.value(next_obs)
        in_use = 1 / weights.square().mean((-2, -1))  # effective sample size, as a share of the rows
        return {"model/prior_error": prior_error.mean(0), "model/posterior_error": posterior_error.mean(0),
                "model/optimism_gap": gap.mean((-2, -1)), "model/effective_sample_size": in_use,
                "model/kl": self.kl, "model/beta": self.beta.flatten()}

    def fit_model(self, buffer):
        """Fit p_θ, q_φ and the ends of episodes to the replayed transitions; returns metrics, each (trials,)."""
        args, shape = self.args, (self.args.ensemble_size, self.args.trials)
        metrics = self.fit_statistics(buffer)
        weights = self.transition_weights(buffer)
        num_train = buffer.rows().shape[1] * (HOLD_OUT_EVERY - 1) // HOLD_OUT_EVERY
        bootstrap = torch.randint(num_train, (*shape, num_train), dtype=torch.int32, device=args.device)
        least = args.min_batches if self.opts["models"].state else args.min_first_batches  # no state: the first fit
        batches = min(max(args.epochs * num_train // args.batch_size, least), args.max_batches)
        rate = torch.tensor(args.model_learning_rate, device=args.device)  # a tensor: CUDA graphs see it change
        for group in self.opts["models"].param_groups:
            group["lr"] = rate

        def minibatch(second):
            self.model.dtype = None if second else self.low  # None after a fit
            index = bootstrap.gather(-1, torch.randint(num_train, (*shape, args.batch_size), device=args.device))
            index += index // (HOLD_OUT_EVERY - 1) + 1  # of all rows: step over 0, 5, 10, ..., which are held out
            batch = buffer.storage[buffer.trial, index].split(buffer.widths, -1)  # (ensemble, trials, n, ·) each
            loss = self.model_loss(self.model, batch)
            if second:  # else q has no gradient, and Adam leaves it as it is
                loss = loss + self.model_loss(self.posterior_model, batch, weights[buffer.trial, index])
            self.descend("models", loss)

        steps = [captured(partial(minibatch, second), args) for second in (False, True)]
        start = int(SECOND_PHASE[args.fit_rule] * batches)
        for i in range(batches):
            rate.fill_(args.model_learning_rate * np.interp((i + 0.5) / batches, FIT_SHARES, FIT_RATE[args.fit_rule]))
            if i == start and args.fit_rule == "two_phase":
                self.start_posterior()
            steps[i >= start]()
        return metrics | self.assess(buffer, weights)

    @torch.no_grad()
    def imagine(self, buffer, model_buffer, step):
        """Branch `rollouts` short roll-outs in the dynamics from replayed states."""
        horizon = round(np.interp(step, (self.args.horizon_from, self.args.horizon_until), (1, self.args.horizon)))
        obs = buffer.sample(self.args.rollouts)[..., : self.obs_dim]
        for _ in range(horizon):
            action = torch.cat([self.act(o) for o in obs.split(10_000, 1)], 1)  # for smaller temporaries
            next_obs, reward, end_prob = self.predict(obs, action)
            model_buffer.add(obs, action, reward, next_obs, end_prob)
            if horizon > 1:  # a branch that ended starts again from a replayed state
                fresh = buffer.sample(self.args.rollouts)[..., : self.obs_dim]
                obs = torch.where(torch.rand_like(end_prob) < end_prob, fresh, next_obs)

    def update(self, batch):
        """One step of critics, actor and α on columns (trials, n, ·); returns q, its target and log-probabilities."""
        obs, action, reward, next_obs, terminated = batch
        target = reward + self.args.gamma * (1 - terminated) * self.value(next_obs)  # eq. (12)
        q = self.critic(torch.cat([obs, action], -1))  # (2, trials, n, 1)
        self.descend("critic", (q - target).square().mean((-2, -1)).sum())  # eq. (12)
        policy_action, log_prob = self.actor.sample(obs)
        actor_loss = -self.critic(torch.cat([obs, policy_action], -1)).amin(0)  # eq. (13)
        if self.args.entropy == "both":  # an α that the actor does not feel cannot be tuned
            alpha = self.log_alpha.exp()
            actor_loss = actor_loss + alpha.detach() * log_prob - alpha * (log_prob.detach() + self.target_entropy)
        self.descend("actor", actor_loss.mean((-2, -1)).sum())
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
        return q.detach(), target, log_prob.detach()

    def learn(self, buffer, model_buffer):
        """All updates of one environment step, on real and imagined rows in the ratio asked for; returns metrics."""
        updates, num_real = self.args.updates_per_step, round(self.args.real_ratio * self.args.batch_size)
        real = buffer.sample(updates * num_real).unflatten(1, (updates, -1))  # (trials, updates, n, row)
        imagined = model_buffer.sample(updates * (self.args.batch_size - num_real)).unflatten(1, (updates, -1))
        for batch in torch.cat([real, imagined], 2).unbind(1):
            q, target, log_prob = self.update(batch.split(buffer.widths, -1))
        return {"loss/critic": (q - target).square().mean((0, -2, -1)), "value/q": q.mean((0, -2, -1)),
                "policy/entropy": -log_prob.mean((-2, -1)), "policy/alpha": self.log_alpha.detach().exp().flatten()}

    @torch.no_grad()
    def update_beta(self):
        """Dual descent on log β: it rises, which draws q to p, while the last fit's KL > ε, and falls below ε."""
        kl, budget = self.kl.view(-1, 1, 1), self.args.kl_budget
        if self.args.dual_step == "adam":
            self.log_beta.grad = self.beta * (budget - kl)  # eq. (9), with respect to log β
            self.opts["beta"].step()
        else:
            self.log_beta += self.args.beta_lr * ((kl / budget).clamp(min=1e-12).log() / 4).clamp(-1, 1)  # deviation 9
        self.log_beta.clamp_(math.log(BETA_MIN), math.log(BETA_MAX))


def train(args):
    """Algorithm 1."""
    envs = make_envs(args, args.trials)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(args, obs_dim, action_dim)
    buffer = ReplayBuffer(args.trials, args.buffer_size, obs_dim, action_dim, args.device)
    model_buffer = ReplayBuffer(args.trials, args.model_buffer_size, obs_dim, action_dim, args.device)
    run, metrics = Run(args, agent, envs, [buffer, model_buffer]), {}
    for step in run.steps():
        # act: at random at first
        action = agent.act(run.obs) if step > args.learning_starts else run.random_action()

        # remember: a time limit is not a termination, and an episode's last state is not the next one's first
        obs, reward, next_obs, terminated = run.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)

        # learn
        if step >= args.learning_starts:
            if (step - args.learning_starts) % args.fit_every == 0:
                run.log(agent.fit_model(buffer))
            if (step - args.learning_starts) % args.imagine_every == 0:
                agent.imagine(buffer, model_buffer, step)
            metrics = agent.learn(buffer, model_buffer)
            agent.update_beta()

        # evaluate, log, save
        run.finish(metrics)


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


@torch.no_grad()
def evaluate(agent, envs, args, stop=()):
    """Metric -> (trials, episodes) of one episode per environment: deterministic actions, fixed seeds."""
    obs, _ = envs.reset(seed=args.seed + 10**9)  # never training's, which are seed + step
    returns, discounted, lengths = np.zeros((3, envs.num_envs))
    alive = np.ones(envs.num_envs, bool)
    while alive.any() and lengths.max() < args.max_eval_steps and not stop:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=args.device).unflatten(0, (args.trials, -1))
        action = agent.act(obs, deterministic=True).flatten(0, 1)
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        returns += alive * reward
        discounted += alive * reward * args.gamma**lengths
        lengths += alive
        alive &= ~(terminated | truncated)
    sums = {"eval/return": returns, "eval/length": lengths, "eval/discounted_return": discounted}
    return {name: values.reshape(args.trials, -1) for name, values in sums.items()}


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
