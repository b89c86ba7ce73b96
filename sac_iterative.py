# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""SAC with iterative amortized inference: a learned optimizer infers the policy of each state, in one file.

After Marino, Piché and Yue, "On the Design of Variational RL Algorithms", whose equation numbers are used. Actions are
latent, and being optimal is what was observed: p(O=1|τ) ∝ exp(R(τ)/α). The policy π(a|s,O) is the approximate posterior
of the action, p_θ(a|s) is its prior, and reinforcement learning is variational EM on

    J(π,θ) = E_π[R(τ)] − α KL(π(τ|O) ‖ p(τ)) = E_π[Σ r − α log π(a|s,O)/p_θ(a|s)]                       (6, 7)
    Q_π(s,a) = r + γ E[V_π(s')]                                                                         (8, 9)
    V_π(s) = E_π[Q_π(s,a)] − α KL(π(a|s,O) ‖ p_θ(a|s)),  and J̃ with a critic Q_ψ as Q_π                (10, 16)
    u ~ N(μ, diag σ²), a = tanh u                                                                       (13, 14)
    μ ← ω_φ ⊙ μ + (1 − ω_φ) ⊙ f_φ(s, ∇_μ J̃), and the same for σ                                         (15)

The E-step infers λ = (μ, σ) of π in each state: by one guess of a network from the state (direct inference, as in SAC),
or, starting at the prior, by K updates (15), for which the network also sees ∇J̃. f_φ is what it proposes, ω_φ the
share of the old λ that stays. The network learns to raise J̃, critics learn (8, 9). The M-step fits the prior, here a
constant.

Deviations from the paper, each with the flag that goes back where there is one; docs/sac_iterative.md says why:
 1. f_φ and ω_φ also see μ and log σ. `--inputs grads`: (15).
 2. λ holds log σ, not σ: gradients and updates are those of log σ. The proposed log σ is bounded.
 3. ∇J̃ is scaled to a root mean square of 1. `--input-norm none`: as it is; `layer`: as in the authors' code.
 4. φ climbs the mean of J̃(λ_1), ..., J̃(λ_K), each through the last update alone. The paper does not say which J̃.
 5. Q is the minimum of twin critics, as in SAC. `--pessimism 0`: their mean.
 6. 10 action samples instead of 200 where there is no GPU. `--action-samples 200`.
 7. Evaluation draws nothing: it acts with tanh μ, and the noise in ∇J̃ is fixed.
 8. α is tuned by SAC's rule, but to a KL from the prior, not to an entropy. σ of the prior is 1, and λ_0 is the prior;
    the paper gives neither.

    python sac_iterative.py --env-id HalfCheetah-v4
    python sac_iterative.py --inference direct --prior uniform --action-samples 1    # is SAC
    python sac_iterative.py --evaluate runs/HalfCheetah-v4/RUN --capture-video
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

Count = Annotated[int, (1, 1e9)]  # a flag's type, its least and its greatest value
Rows = Annotated[int, (10, 2**24)]  # sampling tells no more apart
Fraction = Annotated[float, (0, 1)]
Positive = Annotated[float, (1e-12, 1e9)]
Number = Annotated[float | None, (-1e9, 1e9)]


@dataclasses.dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: Annotated[int, (0, 2**31)] = 1  # trial i uses environment seed + i
    trials: Count = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    matmul_precision: Literal["highest", "high", "medium"] = "medium"  # medium: actor, critics, half a fit in bfloat16
    cuda_graph: bool = False  # replay the updates of a step, and the minibatches of fits if any, as CUDA graphs
    total_steps: Count = 1_000_000  # environment steps per trial
    learning_starts: Rows = 5_000  # uniformly random steps before the first update
    explore_hold: Count = 1  # environment steps for which each of those random actions is held
    log_every: Count = 1_000  # environment steps between rows of training metrics
    eval_every: Count = 10_000  # environment steps between evaluations
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
    batch_size: Count = 128  # rows per update
    hidden_dim: Count = 256  # width of the two hidden layers of actor and critics
    critic_norm: bool = False  # layer norm in the critics: bounds values where there is no data
    learning_rate: Positive = 3e-4  # Adam's, of actor, critics and α
    updates_per_step: Count = 1  # actor-critic updates per environment step
    target_entropy: Number = None  # H: α is tuned to a KL of |A| ln 2 − H, SAC's rule for a uniform prior; default −|A|
    buffer_size: Rows = 1_000_000  # real transitions kept per trial
    inference: Literal["iterative", "direct"] = "iterative"  # how the policy comes about: K gated updates, or one guess
    inference_iters: Count = 2  # K: iterations of iterative inference
    action_samples: Annotated[int, (0, 1e6)] = 0  # actions that estimate J̃ of a state; 0: 200 on CUDA, 10 on the CPU
    prior: Literal["gaussian", "uniform"] = "gaussian"  # prior of the action: tanh of N(0, prior_std²), or uniform
    prior_std: Annotated[float, (0.01, 50)] = 1.0  # σ of the Gaussian prior, and of λ_0 under either prior
    inputs: Literal["params_grads", "grads"] = "params_grads"  # inference network sees state, λ and ∇J̃, or no λ
    input_norm: Literal["rms", "layer", "none"] = "rms"  # ∇J̃ over its rms; λ and ∇J̃ standardised; both as they are
    pessimism: Annotated[float, (0, 100)] = 0.5**0.5  # c of mean − c·std over the twin critics; √½ is their minimum

    def conflicts(self):
        """(flag, rule) of every flag of the algorithm that has no effect."""
        of_prior = ["prior_std"] if self.prior == "uniform" else []
        for name in ["inference_iters", "inputs", "input_norm", *of_prior]:
            if self.inference == "direct" and getattr(self, name) != getattr(Args, name):
                yield name, f"has no effect with --inference direct --prior {self.prior}"

    def floats(self, obs_dim, action_dim):
        """About how many numbers a run keeps: its rows, networks with their gradients and moments, activations."""
        rows = self.buffer_size + self.updates_per_step * self.batch_size
        samples = self.action_samples or (200 if self.device.startswith("cuda") else 10)
        policy = 24 * self.hidden_dim * (self.hidden_dim + self.batch_size * samples)
        return self.trials * (rows * (2 * obs_dim + action_dim + 2) + policy)


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


class InferenceNetwork(StackedMLP):
    """Proposes λ = (μ, log σ) of each state, from the state alone (direct) or also from ∇J̃ (iterative, with gates)."""

    def __init__(self, args, obs_dim, action_dim, dtype):
        direct = args.inference == "direct"
        inputs = 0 if direct else {"grads": 2, "params_grads": 4}[args.inputs]  # per action dimension, beside the state
        outputs = 2 if direct else 4  # a proposal for μ and log σ; and their gates
        dims = (obs_dim + inputs * action_dim, args.hidden_dim, args.hidden_dim, outputs * action_dim)
        super().__init__((args.trials,), dims, dtype=dtype)
        self.args = args

    def encode(self, params, grad):
        """λ and its ∇J̃, (trials, n, 2, action_dim) each, as the network sees them: (trials, n, ·)."""
        if self.args.input_norm == "rms":
            grad = F.rms_norm(grad, grad.shape[-1:], eps=1e-12)
        seen = torch.cat([params, grad], -2) if self.args.inputs == "params_grads" else grad
        if self.args.input_norm == "layer" and seen.shape[-1] > 1:  # one number has no spread to divide by
            seen = F.layer_norm(seen, seen.shape[-1:], eps=1e-12)
        return seen.flatten(-2)

    def forward(self, obs, params, grad):
        """A proposal for λ, and the share of the old λ that stays: (trials, n, 2, action_dim) each; direct: 0."""
        inputs = obs if grad is None else torch.cat([obs, self.encode(params, grad)], -1)  # None: direct inference
        mean, log_std, *gates = super().forward(inputs).split(params.shape[-1], -1)  # (trials, n, action_dim) each
        proposal = torch.stack([mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)], -2)  # f_φ
        return proposal, torch.stack(gates, -2).sigmoid() if gates else 0.0  # ω_φ


class Agent(nn.Module):
    """Networks, optimizers, and act, infer, learn; λ is called params: (trials, n, 2, action_dim), mean and log_std."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, trials = args, args.trials
        low = torch.bfloat16 if args.matmul_precision == "medium" else None
        self.actor = InferenceNetwork(args, obs_dim, action_dim, low)
        dims = (obs_dim + action_dim, args.hidden_dim, args.hidden_dim, 1)
        self.critic = StackedMLP((2, trials), dims, dtype=low, norm=args.critic_norm)
        self.critic_target = StackedMLP((2, trials), dims, dtype=low, norm=args.critic_norm)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(trials, 1, 1))
        self.kl_constant = action_dim * math.log(2) if args.prior == "uniform" else 0.0  # kl() leaves it out
        target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.kl_target = action_dim * math.log(2) - target_entropy  # with a uniform prior this is SAC's rule
        if self.kl_target <= 0:
            fail(f"--target-entropy {args.target_entropy}: must be below {action_dim * math.log(2):.3g}, |A| ln 2")
        self.iterative = args.inference == "iterative"
        self.iters = args.inference_iters if self.iterative else 1

        args.action_samples = args.action_samples or (200 if args.device.startswith("cuda") else 10)  # args.json has it
        self.register_buffer("prior", torch.zeros(1, 1, 2, action_dim))  # λ_0; if the prior is Gaussian, its λ
        self.prior[..., 1, :] = math.log(args.prior_std)
        # The noise of evaluation: quantiles of the normal, in another order in each dimension.
        quantiles = torch.special.ndtri(torch.arange(0.5, args.action_samples) / args.action_samples)
        order = torch.rand(args.action_samples, action_dim, generator=torch.Generator().manual_seed(0)).argsort(0)
        self.register_buffer("quantiles", quantiles[order][None, :, None])  # (1, samples, 1, action_dim)
        self.to(args.device)

        adam = {"fused": True, "capturable": True}
        self.opts = {
            "actor": torch.optim.Adam([*self.actor.parameters(), self.log_alpha], args.learning_rate, **adam),
            "critic": torch.optim.Adam(self.critic.parameters(), args.learning_rate, **adam),
        }
        self.learn = captured(self.learn, args)  # a CUDA graph with --cuda-graph

    def noise(self, obs, samples):
        """Standard normal (trials, samples, n, action_dim) for the states (trials, n, obs_dim)."""
        return obs.new_empty(obs.shape[0], samples, obs.shape[1], self.prior.shape[-1]).normal_()

    def log_prob(self, params, noise):
        """log π(a|s) averaged over the sampled actions: (trials, n, 1)."""
        mean, log_std = params.unsqueeze(1).unbind(-2)  # (trials, 1, n, action_dim)
        u = mean + log_std.exp() * noise  # (trials, samples, n, action_dim)
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # of the tanh, in a stable form
        log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std - log_det
        return log_prob.sum(-1, keepdim=True).mean(1)

    def kl(self, params, noise):
        """KL(π ‖ p) (trials, n, 1), which the tanh does not change. To a uniform prior: E[log π], without |A| ln 2."""
        if self.args.prior == "uniform":
            return self.log_prob(params, noise)  # eq. (12): minus the entropy
        shift, log_ratio = (params - self.prior).unbind(-2)  # μ − μ_0, log σ/σ_0
        kl = 0.5 * ((shift / self.args.prior_std).square() + (2 * log_ratio).exp() - 1) - log_ratio
        return kl.sum(-1, keepdim=True)

    def objective(self, critic, obs, params, noise):
        """J̃ and its KL, (trials, n, 1) each, by the actions of the noise (trials, samples, n, action_dim)."""
        mean, log_std = params.unsqueeze(1).unbind(-2)  # (trials, 1, n, action_dim)
        action = (mean + log_std.exp() * noise).tanh()  # eq. (13, 14)
        states = obs.unsqueeze(1).expand(-1, action.shape[1], -1, -1)
        twins = critic(torch.cat([states, action], -1).flatten(1, 2))  # (2, trials, samples * n, 1)
        # the standard deviation of two numbers is |difference| / √2; std() has the gradient nan where they are equal
        q = twins.mean(0) - self.args.pessimism / math.sqrt(2) * (twins[0] - twins[1]).abs()
        kl = self.kl(params, noise)
        return q.unflatten(1, action.shape[1:3]).mean(1) - self.log_alpha.exp() * kl, kl  # eq. (16)

    @torch.enable_grad()  # also for acting and targets, which need no other gradients
    def gradient(self, obs, params, noise=None):
        """∇J̃ with respect to λ of each state, shaped like params; J̃; KL. Fresh noise unless it is given."""
        noise = self.noise(obs, self.args.action_samples) if noise is None else noise
        params = params.detach().requires_grad_()
        objective, kl = self.objective(self.critic, obs, params, noise)
        (grad,) = torch.autograd.grad(objective.sum(), params)  # states are independent; Q's weights get none
        return grad, objective.detach(), kl.detach()

    def infer(self, obs, noise=None):
        """E-step. λ_0, ..., λ_K; ∇J̃ and J̃ at all but λ_K (direct: None); the K gates (direct: 0)."""
        trace, found = [self.prior.expand(*obs.shape[:2], -1, -1)], []
        for _ in range(self.iters):
            params = trace[-1].detach()  # the network learns each update by itself
            grad, objective, _ = self.gradient(obs, params, noise) if self.iterative else (None, None, None)
            proposal, gate = self.actor(obs, params, grad)
            trace.append(gate * params + (1 - gate) * proposal)  # eq. (15)
            found.append((grad, objective, gate))
        return trace, *zip(*found)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Actions (trials, n, action_dim) sampled from the inferred policy, or its mean action for evaluation."""
        trace, *_ = self.infer(obs, self.quantiles if deterministic else None)
        mean, log_std = trace[-1].unbind(-2)
        return (mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)).tanh()

    @torch.no_grad()
    def value(self, obs):
        """V(s) by the target critics and one action of π: (trials, n, 1). Inference climbs the online critics."""
        trace, *_ = self.infer(obs)
        return self.objective(self.critic_target, obs, trace[-1], self.noise(obs, 1))[0]  # eq. (10)

    def descend(self, name, loss):
        """One step of an optimizer, with gradients of its own parameters alone."""
        opt = self.opts[name]
        opt.zero_grad()
        loss.backward(inputs=[parameter for group in opt.param_groups for parameter in group["params"]])
        opt.step()

    def actor_loss(self, obs):
        """Loss of the inference network and of α, and metrics."""
        trace, grads, objectives, gates = self.infer(obs)
        noise = self.noise(obs, self.args.action_samples)
        grad, objective, kl = self.gradient(obs, trace[-1], noise)  # at λ_K
        grads, objectives = [*grads, grad], [*objectives, objective]  # at λ_0, ..., λ_K
        # λ_k·∇J̃(λ_k), with ∇J̃ held constant, has the gradient of J̃(λ_k)
        gain = torch.stack(trace[1:]) * torch.stack(grads[1:])  # (K, trials, n, 2, action_dim)
        log_prob = self.log_prob(trace[-1].detach(), noise)
        kl = kl + self.kl_constant
        alpha_loss = self.log_alpha.exp() * (self.kl_target - kl)
        metrics = {"policy/entropy": -log_prob, "policy/kl": kl, "policy/objective_last": objective}
        if self.iterative:
            metrics |= {"policy/objective_prior": objectives[0], "policy/objective_first": objectives[1],
                        "policy/gate": torch.stack(gates).detach().mean(0).flatten(-2)}
        return alpha_loss.mean((-2, -1)).sum() - gain.sum((-2, -1)).mean((0, -1)).sum(), metrics

    def update(self, batch):
        """One step of critics, inference network and α on columns (trials, n, ·); returns metrics, (trials, n, ·)."""
        obs, action, reward, next_obs, terminated = batch
        target = reward + self.args.gamma * (1 - terminated) * self.value(next_obs)  # eq. (8, 9)
        q = self.critic(torch.cat([obs, action], -1))  # (2, trials, n, 1)
        critic_loss = (q - target).square()
        self.descend("critic", critic_loss.mean((-2, -1)).sum())
        actor_loss, metrics = self.actor_loss(obs)
        self.descend("actor", actor_loss)
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
        return metrics | {"loss/critic": critic_loss.detach().mean(0), "value/q": q.detach().mean(0)}

    def learn(self, buffer):
        """All updates of one environment step; returns metrics of the last one, each (trials,)."""
        rows = buffer.sample(self.args.updates_per_step * self.args.batch_size)
        for batch in rows.split(self.args.batch_size, 1):  # (trials, n, row)
            metrics = self.update(batch.split(buffer.widths, -1))
        metrics = {name: value.mean((-2, -1)) for name, value in metrics.items()}
        return metrics | {"policy/alpha": self.log_alpha.detach().exp().flatten()}


def train(args):
    """Algorithm 1 on replayed transitions; the M-step has nothing to fit."""
    envs = make_envs(args, args.trials)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(args, obs_dim, action_dim)
    buffer = ReplayBuffer(args.trials, args.buffer_size, obs_dim, action_dim, args.device)
    run, metrics = Run(args, agent, envs, [buffer]), {}
    for step in run.steps():
        # act: at random at first
        action = agent.act(run.obs) if step > args.learning_starts else run.random_action()

        # remember: a time limit is not a termination, and an episode's last state is not the next one's first
        obs, reward, next_obs, terminated = run.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)

        # learn
        if step >= args.learning_starts:
            metrics = agent.learn(buffer)

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
