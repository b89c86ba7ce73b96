"""SAC with iterative amortized inference: a learned optimizer infers the policy of each state, in one file.

After Marino, Piché and Yue, "On the Design of Variational RL Algorithms", whose equation numbers are used. Actions are
latent variables and being optimal is what was observed: with p(O=1|τ) ∝ exp(R(τ)/α), the policy π is the approximate
posterior of the action given a prior p_θ, and reinforcement learning is variational EM on

    J(π,θ) = E_π[R(τ)] − α KL(π(τ|O) ‖ p(τ))                                                            (6)
           = E_π[Σ r − α log π(a|s,O)/p_θ(a|s)]                                                         (7)
    Q_π(s,a) = r + E[V_π(s')]                                                                           (8, 9)
    V_π(s) = E_π[Q_π(s,a)] − α KL(π(a|s,O) ‖ p_θ(a|s))                                                  (10)
    π^B(a|s,O) ∝ p_θ(a|s) exp(Q_π(s,a)/α), the optimum over all π                                       (11)

Algorithm 1: the E-step infers π(a|s,O) at each state met and acts with it; the M-step fits the prior, which is constant
here. The E-step is amortized: λ = (μ, σ) comes from a network, in one guess λ = f_φ(s) (`--inference direct`, SAC), or
from the prior in K gated updates that see the gradient of the objective (`--inference iterative`).

    u ~ N(μ, diag σ²), a = tanh u                                                                       (13, 14)
    μ ← ω_φ ⊙ μ + (1 − ω_φ) ⊙ f_φ(s, ∇_μ J̃), and the same for σ                                         (15)
    J̃ = E_π[Q_ψ(s,a)] − α KL(π(a|s,O) ‖ p_θ(a|s))                                                       (16)

Deviations from the paper, each with the flag that goes back to its letter where there is one:
 1. f_φ and ω_φ also see μ and log σ, as the paper's count of 4|A| more inputs has it. `--inputs grads`: (15).
 2. Updates and gradients are those of log σ. Its proposal is bounded, so that a gate of 1 keeps it exactly.
 3. Gradients are scaled per state to a root mean square of 1, since Q's scale drifts. `--input-norm none`: as they are;
    `layer`: λ and gradients standardised over the action's dimensions, as in the author's code.
 4. The paper does not say which J̃ trains φ: their mean over iterations, each through its own step. `--loss last`.
 5. Q is the minimum of twin critics, as in SAC. `--pessimism 0`: their mean; other values: the authors' paper of 2021.
 6. 10 action samples instead of 200 where there is no GPU. `--action-samples 200`.
 7. Evaluation draws nothing: tanh μ, with the gradients' noise at the same quantiles of the normal in every state.

    python sac_iterative.py --env-id HalfCheetah-v4
    python sac_iterative.py --inference direct --prior uniform --action-samples 1    # is SAC
    python sac_iterative.py --evaluate runs/HalfCheetah-v4/RUN --capture-video
"""

import ctypes
import dataclasses
import difflib
import importlib.util
import json
import math
import platform
import signal
import sys
import time
import warnings
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
if platform.libc_ver()[0] == "glibc":  # keep freed memory: to map it anew costs up to a quarter of an update
    ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**25)  # thresholds of trimming and of mmap
warnings.filterwarnings("ignore", message=".*(is out of date|precision lowered).*")  # the papers' tasks are -v4


@dataclasses.dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: int = 1  # trial i uses environment seed + i
    trials: int = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    compile: bool = False  # torch.compile the loss functions; on a CPU it does not pay, SAC takes twice as long
    cuda_graph: bool = False  # replay the updates of a step, and each minibatch of a fit, as one CUDA graph
    total_steps: int = 1_000_000  # environment steps per trial
    learning_starts: int = 5_000  # uniformly random steps before the first update
    explore_hold: int = 1  # environment steps for which each of those random actions is held
    log_every: int = 1_000  # environment steps between rows of training metrics
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # episodes per trial and evaluation
    save_every: int = 10_000  # environment steps between checkpoints; episodes restart there, so that resuming is exact
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases; offline needs no account
    wandb_project: str = "rl-as-inference"  # Weights & Biases project
    capture_video: bool = False  # with --evaluate: write an mp4 of the first episode
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/SCRIPT_sSEED_DATE-TIME
    resume: str = ""  # run directory to continue; only the total, the intervals, device and wandb may change
    evaluate: str = ""  # run directory whose saved agent is evaluated instead of training

    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critic towards the critic
    batch_size: int = 128  # rows per update
    hidden_dim: int = 256  # width of the two hidden layers of actor and critics
    learning_rate: float = 3e-4  # Adam's, of actor, critics and α
    updates_per_step: int = 1  # actor-critic updates per environment step
    target_entropy: float | None = None  # entropy that α is tuned to, in nats; default −(action dimensions)
    alpha_target: Literal["entropy", "kl"] = "entropy"  # tune α to the target entropy, or to the KL it has to uniform
    buffer_size: int = 1_000_000  # real transitions kept per trial
    inference: Literal["iterative", "direct"] = "iterative"  # how the policy comes about: K gated updates, or one guess
    inference_iters: int = 2  # K: iterations of iterative inference
    action_samples: int = 0  # actions that estimate the policy objective J̃; 0: 200 on CUDA, 10 on the CPU
    prior: Literal["gaussian", "uniform"] = "gaussian"  # prior of the action: tanh of N(0, prior_std²), or uniform
    prior_std: float = 1.0  # standard deviation of the Gaussian prior, where inference starts under either prior
    inputs: Literal["params_grads", "grads"] = "params_grads"  # inference network sees state, λ and ∇J̃, or no λ
    input_norm: Literal["rms", "layer", "none"] = "rms"  # ∇J̃ per state to unit size; or standardised, as is λ; or raw
    loss: Literal["mean", "last"] = "mean"  # iterations whose J̃ trains the inference network: all alike, or the last
    pessimism: float = 0.5**0.5  # c of mean − c·std over the twin critics; √½ is their minimum


RANGE = {"seed": (0, 2**31), "learning_starts": (10, math.inf), "buffer_size": (10, math.inf), "gamma": (0, 1),
         "tau": (0, 1), "action_samples": (0, math.inf), "prior_std": (0.01, 100),
         "pessimism": (0, 100)}  # else counts from 1, numbers above 0
RESUMABLE = {"total_steps", "device", "compile", "cuda_graph", "log_every", "eval_every", "eval_episodes", "wandb",
             "wandb_project", "resume", "evaluate", "capture_video"}


def fail(message):
    """Print one line and exit with code 2."""
    print(f"{SCRIPT}.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    """Read the command line and refuse what cannot work; a saved run brings the flags it was begun with."""
    args = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    if source := args.resume or args.evaluate:
        try:
            saved = json.loads((Path(source) / "args.json").read_text())
            (Path(source) / "checkpoint.pt").stat()
            saved |= {"run_dir": source, "resume": "", "evaluate": ""}
            args = tyro.cli(Args, args=argv, default=Args(**saved))
        except (OSError, ValueError, TypeError):
            flag = "--resume" if args.resume else "--evaluate"
            fail(f"{flag} {source}: no args.json and checkpoint.pt of {SCRIPT}.py there")
        changed = {k for k in saved if getattr(args, k) != saved[k]} - RESUMABLE
        if changed:
            fail(f"--{min(changed).replace('_', '-')}: differs from the saved run's, {saved[min(changed)]}")
    for name, kind in Args.__annotations__.items():
        value, (low, high) = getattr(args, name), RANGE.get(name, (1 if kind is int else 1e-12, math.inf))
        if value != value or kind in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: allowed are values from {low} to {high}")
    video = args.evaluate and importlib.util.find_spec("moviepy")
    for name, refused, rule in (
        ("total_steps", args.total_steps < args.learning_starts, "must be at least --learning-starts"),
        ("capture_video", args.capture_video and not video, "needs --evaluate RUN_DIR and the package moviepy"),
        ("wandb", args.wandb != "disabled" and not importlib.util.find_spec("wandb"), "needs the package wandb"),
        ("run_dir", not source and args.run_dir and Path(args.run_dir).exists(), "exists already"),
    ):
        if refused:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")
    try:
        flag = f"--device {args.device}: not there; use auto or cpu"
        device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        torch.zeros(1, device=device)
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3)
        flag = f"--env-id {args.env_id}: cannot be made" + (f"; near matches: {', '.join(near)}" if near else "")
        space = make_envs(args.env_id, 1).single_action_space
    except Exception as error:  # whatever making a device or an environment of the user's raises
        fail(f"{flag} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    if args.cuda_graph and device == "cpu":
        fail("--cuda-graph: needs --device cuda")
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
        fail(f"--env-id {args.env_id}: its actions must be a bounded Box, not {space}")
    name = f"runs/{args.env_id.replace(':', '_')}/{SCRIPT}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    samples = args.action_samples or (10 if device == "cpu" else 200)
    return dataclasses.replace(args, device=device, run_dir=args.run_dir or name, action_samples=samples)


def make_envs(env_id, num_envs, **kwargs):
    """Vector environment with flat observations and actions in [-1, 1]; an ended episode restarts in the same step."""
    if env_id.startswith("dm_control/"):
        gym.register_envs(importlib.import_module("shimmy"))

    def wrap(env):
        env = gym.wrappers.FlattenObservation(env)
        bounded = isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded()
        return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if bounded else env

    return gym.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", wrappers=[wrap],
                        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}, **kwargs)


class ReplayBuffer:
    """Ring of transitions per trial; one row holds obs, action, reward, next_obs, terminated."""

    def __init__(self, trials, capacity, obs_dim, action_dim, device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.storage = torch.zeros(trials, capacity, sum(self.widths), device=device)  # (trials, capacity, row)
        self.added = torch.zeros((), dtype=torch.long, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.trial = torch.arange(trials, device=device)[:, None]

    def add(self, *columns):
        """columns: tensors (trials, n, width) in the order of a row; n at most the capacity."""
        rows = torch.cat(columns, -1)
        self.storage[:, (self.added + torch.arange(rows.shape[1], device=rows.device)) % self.storage.shape[1]] = rows
        self.added += rows.shape[1]
        self.count.copy_(self.added.clamp(max=self.storage.shape[1]))

    def sample(self, n):
        """n rows per trial, uniform with replacement: (trials, n, row)."""
        index = (torch.rand(len(self.trial), n, device=self.storage.device) * self.count).long()
        return self.storage[self.trial, index]

    def state_dict(self):
        return {"storage": self.storage[:, : int(self.count)].clone(), "added": self.added}

    def load_state_dict(self, state):
        self.storage[:, : state["storage"].shape[1]] = state["storage"]
        self.added.copy_(state["added"])
        self.count.copy_(self.added.clamp(max=self.storage.shape[1]))


class StackedLinear(nn.Module):
    """A stack of independent linear layers: x (*stack, batch, in) -> (*stack, batch, out)."""

    def __init__(self, stack, in_dim, out_dim):
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(*stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x, members=None):
        if members is None:  # an index, even of everything, is an operation of its own, and so is its gradient
            return (x @ self.weight).add_(self.bias)
        return (x @ self.weight[members]).add_(self.bias[members])


class StackedMLP(nn.Module):
    """A stack of independent perceptrons; `members` indexes the stack, to run only some of them."""

    def __init__(self, stack, dims, activation=torch.relu_):  # in place: they are an update's largest tensors
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(stack, *pair) for pair in pairwise(dims))
        self.activation = activation

    def forward(self, x, members=None):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x, members))
        return self.layers[-1](x, members)


class InferenceNetwork(StackedMLP):
    """λ = (μ, log σ) guessed from the state (direct), or updated from λ and the gradient of J̃ there (iterative)."""

    def __init__(self, args, obs_dim, action_dim):
        blocks = {"grads": 2, "params_grads": 4}[args.inputs] if args.inference == "iterative" else 0
        out_dim = (4 if args.inference == "iterative" else 2) * action_dim
        super().__init__((args.trials,), (obs_dim + blocks * action_dim, args.hidden_dim, args.hidden_dim, out_dim))
        self.blocks, self.norm = blocks, args.input_norm

    def scaled(self, params, grad):
        """The inputs beside the state, scaled per state: (trials, n, 2, action_dim) each."""
        if self.norm == "rms":
            grad = grad * (grad.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
        elif self.norm == "layer" and grad.shape[-1] > 1:  # one number has no spread to divide by
            params, grad = (F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in (params, grad))
        return (params, grad) if self.blocks == 4 else (grad,)

    def forward(self, obs, params, grad):
        """The next λ (trials, n, 2, action_dim) and the gate, None where there is none."""
        inputs = [x.flatten(-2) for x in self.scaled(params, grad)] if self.blocks else []
        out = super().forward(torch.cat([obs, *inputs], -1)).unflatten(-1, (-1, *params.shape[-2:]))
        mean, log_std = out[..., 0, :, :].unbind(-2)
        proposal = torch.stack([mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)], -2)
        if not self.blocks:
            return proposal, None
        gate = out[..., 1, :, :].sigmoid()
        return gate * params + (1 - gate) * proposal, gate  # eq. (15)


def captured(function, args):
    """The function; with --cuda-graph as one CUDA graph, which its third call captures and from then on replays.

    What varies between calls must lie in tensors that keep their places; a result is overwritten by the next call.
    """
    if not args.cuda_graph:
        return function
    graph, stream, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(args.device), 0, None

    def replay(*inputs):
        nonlocal calls, result
        calls, current = calls + 1, torch.cuda.current_stream(args.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if calls == 3:  # the first calls allocate what the later ones use
                with torch.cuda.graph(graph, stream=stream):
                    result = function(*inputs)
            if calls < 3:
                result = function(*inputs)
            else:
                graph.replay()
        current.wait_stream(stream)
        return result

    return replay


class Agent(nn.Module):
    """Networks, optimizers, and act, infer, learn; params are λ = (mean, log_std): (trials, n, 2, action_dim)."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, self.obs_dim, trials, hidden = args, obs_dim, args.trials, (args.hidden_dim, args.hidden_dim)
        self.actor = InferenceNetwork(args, obs_dim, action_dim)
        self.critic = StackedMLP((2, trials), (obs_dim + action_dim, *hidden, 1))
        self.critic_target = StackedMLP((2, trials), (obs_dim + action_dim, *hidden, 1))
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(trials, 1, 1))
        self.target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        self.uniform_kl = action_dim * math.log(2)  # KL(π ‖ uniform) is this less the entropy
        self.iterative = args.inference == "iterative"
        self.iters = args.inference_iters if self.iterative else 1

        prior = torch.tensor([0.0, math.log(args.prior_std)])
        # The noise of deterministic actions: quantiles of the normal, in another order in each dimension.
        quantiles = torch.special.ndtri((torch.arange(args.action_samples) + 0.5) / args.action_samples)
        order = torch.rand(args.action_samples, action_dim, generator=torch.Generator().manual_seed(0)).argsort(0)
        self.register_buffer("prior", prior.view(1, 1, 2, 1).expand(1, 1, 2, action_dim).clone())
        self.register_buffer("quantiles", quantiles[order][None, :, None])  # (1, samples, 1, action_dim)
        self.to(args.device)

        adam = lambda parameters, rate: torch.optim.Adam(parameters, rate, fused=True, capturable=True)
        self.opts = {"actor": adam([*self.actor.parameters(), self.log_alpha], args.learning_rate),
                     "critic": adam(self.critic.parameters(), args.learning_rate)}
        if args.compile:
            for name in ("critic_loss", "objective"):
                setattr(self, name, torch.compile(getattr(self, name)))
        self.learn = captured(self.learn, args)

    @torch.no_grad()
    def act(self, obs, deterministic=False, iters=None):
        """Actions (trials, n, action_dim) sampled from the policy of any number of iterations, or its mean action."""
        mean, log_std = self.infer(obs, iters, self.quantiles if deterministic else None)[0][-1].unbind(-2)
        return (mean if deterministic else mean + log_std.exp() * torch.randn_like(mean)).tanh()

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
        """KL(π ‖ p) to the prior (trials, n, 1); to a uniform one by the samples, without its constant |A| ln 2."""
        if self.args.prior == "uniform":
            return self.log_prob(params, noise)
        mean, log_std = (params - self.prior).unbind(-2)
        mean = mean / self.args.prior_std  # both are squashed by the same tanh, which leaves the KL as it was
        return (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).sum(-1, keepdim=True)

    def objective(self, critic, obs, params, noise):
        """J̃ and its KL (trials, n, 1) at the actions that the noise (trials, samples, n, action_dim) brings about."""
        mean, log_std = params.unsqueeze(1).unbind(-2)  # (trials, 1, n, action_dim)
        action = (mean + log_std.exp() * noise).tanh()  # (trials, samples, n, action_dim), eq. (13, 14)
        states = obs.unsqueeze(1).expand(-1, action.shape[1], -1, -1)
        q = critic(torch.cat([states, action], -1).flatten(1, 2))  # (2, trials, samples * n, 1)
        q = q.mean(0) - self.args.pessimism / math.sqrt(2) * (q[0] - q[1]).abs()
        kl = self.kl(params, noise)
        return q.unflatten(1, action.shape[1:3]).mean(1) - self.log_alpha.exp() * kl, kl  # eq. (16)

    def gradient(self, obs, params, noise=None):
        """∇J̃ with respect to (μ, log σ) of each state, shaped like params; J̃; KL. Fresh noise unless it is given."""
        noise = self.noise(obs, self.args.action_samples) if noise is None else noise
        with torch.enable_grad():  # acting and targets come here without
            params = params.detach().requires_grad_()
            objective, kl = self.objective(self.critic, obs, params, noise)
            (grad,) = torch.autograd.grad(objective.sum(), params)  # states are independent; Q's weights get none
        return grad, objective.detach(), kl.detach()

    def infer(self, obs, iters=None, noise=None):
        """E-step: λ_0 = prior, ..., λ_K; what was measured at each; gates. A step is differentiable, a chain is not."""
        trace, measured, gates = [self.prior.expand(*obs.shape[:2], -1, -1)], [], []
        for _ in range(self.iters if iters is None else iters):
            measured.append(self.gradient(obs, trace[-1], noise) if self.iterative else (None,))
            params, gate = self.actor(obs, trace[-1].detach(), measured[-1][0])  # direct: sees obs alone
            trace, gates = [*trace, params], [*gates, gate]
        return trace, measured, gates

    @torch.no_grad()
    def value(self, obs):
        """V'(s) with one action of the inferred policy: (trials, n, 1). Inference climbs the online critics."""
        params = self.infer(obs)[0][-1]
        return self.objective(self.critic_target, obs, params, self.noise(obs, 1))[0]  # eq. (10)

    def critic_loss(self, obs, action, target):
        q = self.critic(torch.cat([obs, action], -1))  # (2, trials, n, 1)
        return (q - target).square().mean((-2, -1)).sum(), q

    def actor_loss(self, obs):
        """Losses of the inference network and of α, and metrics. Gradients that served as inputs serve again."""
        trace, measured, gates = self.infer(obs)
        noise = self.noise(obs, self.args.action_samples)
        measured.append(self.gradient(obs, trace[-1], noise))  # at λ_K
        _, objective, kl = measured[-1]
        # λ·∇J̃ with ∇J̃ held constant has the gradient of J̃(λ), at the cost of the inference network alone.
        used = [*zip(trace, measured)][1 if self.args.loss == "mean" else -1 :]
        loss = -sum((params * grad).sum((-2, -1)).mean(-1).sum() for params, (grad, *_) in used) / len(used)

        gaussian = self.args.prior == "gaussian"
        log_prob = self.log_prob(trace[-1].detach(), noise) if gaussian else kl
        excess = log_prob + self.target_entropy
        if self.args.alpha_target == "kl":  # as far from the prior as the target entropy is from uniform
            excess = kl + self.target_entropy - self.uniform_kl * gaussian
        loss = loss - (self.log_alpha.exp() * excess).mean((-2, -1)).sum()
        metrics = {"policy/entropy": -log_prob, "policy/kl": kl + self.uniform_kl * (not gaussian)}
        if self.iterative:
            metrics |= {"policy/objective_prior": measured[0][1], "policy/objective_first": measured[1][1],
                        "policy/gate": torch.stack(gates).detach().mean(0).flatten(-2)}
        return loss, metrics | {"policy/objective_last": objective}

    def update(self, batch):
        """One step of critics, inference network and α on columns (trials, n, ·); returns metrics, (trials, n, ·)."""
        obs, action, reward, next_obs, terminated = batch
        target = reward + self.args.gamma * (1 - terminated) * self.value(next_obs)  # eq. (8, 9)
        loss, q = self.critic_loss(obs, action, target)
        self.opts["critic"].zero_grad()
        loss.backward()
        self.opts["critic"].step()

        loss, metrics = self.actor_loss(obs)
        self.opts["actor"].zero_grad()
        loss.backward()
        self.opts["actor"].step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
        return metrics | {"loss/critic": (q.detach() - target).square().mean(0), "value/q": q.detach().mean(0)}

    def learn(self, buffer):
        """All updates of one environment step; returns metrics of the last one, each (trials,)."""
        args = self.args
        rows = buffer.sample(args.updates_per_step * args.batch_size).unflatten(1, (args.updates_per_step, -1))
        for batch in rows.unbind(1):  # (trials, n, row)
            metrics = self.update(batch.split(buffer.widths, -1))
        metrics = {name: value.mean((-2, -1)) for name, value in metrics.items()}
        return metrics | {"policy/alpha": self.log_alpha.detach().exp().flatten()}


@torch.no_grad()
def evaluate(agent, envs, args):
    """Returns and lengths (trials, episodes) of an episode per environment: deterministic actions, fixed seeds."""
    obs, _ = envs.reset(seed=[args.seed + 10_000 + i for i in range(envs.num_envs)])
    returns, lengths, alive = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while alive.any():
        obs = torch.as_tensor(obs, dtype=torch.float32, device=args.device).unflatten(0, (args.trials, -1))
        action = agent.act(obs, deterministic=True).flatten(0, 1)
        obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        returns, lengths, alive = returns + alive * reward, lengths + alive, alive & ~(terminated | truncated)
    return returns.reshape(args.trials, -1), lengths.reshape(args.trials, -1)


class Logger:
    """metrics.csv in long form (trial -1: shared by all), optionally Weights & Biases, and curve.png."""

    def __init__(self, args, step):
        self.path, lines = Path(args.run_dir) / "metrics.csv", []
        if self.path.exists():  # a resumed run logs anew whatever came after its checkpoint
            lines = [line for line in self.path.read_text().splitlines()[1:] if line.count(",") == 3]
        lines = ["step,trial,metric,value", *(line for line in lines if int(line.split(",")[0]) <= step), ""]
        self.path.with_suffix(".tmp").write_text("\n".join(lines))
        self.path.with_suffix(".tmp").replace(self.path)
        self.file = open(self.path, "a", buffering=1)
        self.wandb = importlib.import_module("wandb") if args.wandb != "disabled" else None
        if self.wandb:
            self.wandb.init(project=args.wandb_project, dir=args.run_dir, mode=args.wandb, config=vars(args))

    def log(self, step, metrics, trials=None):
        """metrics: name -> number, or value per trial (only those in `trials` count); here values leave the device."""
        for name, values in metrics.items():
            values = values.tolist() if hasattr(values, "tolist") else values
            rows = dict(enumerate(values)) if isinstance(values, list) else {-1: values}
            rows = {trial: rows[trial] for trial in (rows if trials is None else trials)}
            self.file.writelines(f"{step},{trial},{name},{value:.6g}\n" for trial, value in rows.items())
            if self.wandb:
                each = {f"{name}/trial_{trial}": value for trial, value in rows.items()}
                self.wandb.log({name: sum(rows.values()) / len(rows)} | each, step=step)

    def draw(self, title):
        """curve.png: mean and one standard deviation of the evaluation return over the trials."""
        from matplotlib.figure import Figure

        curve, figure = defaultdict(list), Figure(figsize=(5, 3.5), layout="constrained")
        for step, _, metric, value in (line.split(",") for line in self.path.read_text().splitlines()):
            if metric == "eval/return":
                curve[int(step)].append(float(value))
        if not curve:
            return
        mean, std = np.mean([*curve.values()], 1), np.std([*curve.values()], 1)
        axes = figure.add_subplot(title=title, xlabel="environment steps per trial", ylabel="evaluation return")
        axes.plot([*curve], mean)
        axes.fill_between([*curve], mean - std, mean + std, alpha=0.3)
        figure.savefig(self.path.with_name("curve.png"), dpi=150)


def save(path, args, step, agent, buffers):
    """Write a checkpoint beside its place and rename it: a process killed meanwhile leaves the last one whole."""
    state = {"script": SCRIPT, "env_id": args.env_id, "step": step, "agent": agent.state_dict(),
             "opts": {name: opt.state_dict() for name, opt in agent.opts.items()},
             "buffers": [buffer.state_dict() for buffer in buffers], "rng": torch.get_rng_state()}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path, args, agent, buffers=()):
    """Read a checkpoint into the agent and the buffers; returns the environment step it was taken at."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file can be damaged in many ways
        fail(f"{path}: cannot be read as a checkpoint")
    if (state["script"], state["env_id"]) != (SCRIPT, args.env_id):
        fail(f"{path}: a checkpoint of {state['script']}.py on {state['env_id']}")
    agent.load_state_dict(state["agent"])
    for name, opt in agent.opts.items():
        opt.load_state_dict(state["opts"][name])
    for buffer, saved in zip(buffers, state["buffers"]):
        buffer.load_state_dict(saved)
    torch.cuda.manual_seed_all(args.seed + state["step"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def main(args):
    """Train (or, with --evaluate, only evaluate) and return the exit code."""
    torch.manual_seed(args.seed)
    render = {"render_mode": "rgb_array"} if args.capture_video else {}
    envs = make_envs(args.env_id, args.trials)
    eval_envs = make_envs(args.env_id, args.trials * args.eval_episodes, **render)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent, run_dir = Agent(args, obs_dim, action_dim), Path(args.run_dir)
    if args.evaluate:
        step = load(run_dir / "checkpoint.pt", args, agent)
        if args.capture_video:
            eval_envs = gym.wrappers.vector.RecordVideo(eval_envs, str(run_dir / "videos"), name_prefix=f"step-{step}",
                                                        episode_trigger=lambda n: n == 0, record_first_only=True)
        for trial, returns in enumerate(evaluate(agent, eval_envs, args)[0]):
            print(f"{args.env_id}, step {step}, trial {trial}: return {returns.mean():.1f} ± {returns.std():.1f} "
                  f"over {len(returns)} episodes")
        eval_envs.close()
        return 0

    buffer = ReplayBuffer(args.trials, args.buffer_size, obs_dim, action_dim, args.device)
    start = load(run_dir / "checkpoint.pt", args, agent, (buffer,)) if args.resume else 0
    if start >= args.total_steps:
        fail(f"--total-steps {args.total_steps}: the run is at step {start} already")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    size = sum(parameter.numel() for parameter in agent.parameters())
    print(f"{run_dir}: {args.env_id} (observation {obs_dim}, action {action_dim}), {args.trials} trial(s) on "
          f"{args.device}, {size:,} parameters, {args.action_samples} action samples,"
          f" steps {start:,} to {args.total_steps:,}", flush=True)

    logger, bar = Logger(args, start), tqdm(total=args.total_steps, initial=start, disable=None, smoothing=0.01)
    stop, bad, metrics, seconds, clock = [], None, {}, defaultdict(float), time.perf_counter()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: stop.append(signum))

    def lap(paragraph):
        nonlocal clock
        clock, before = time.perf_counter(), clock
        seconds[paragraph] += clock - before

    column = lambda x: torch.as_tensor(x, dtype=torch.float32, device=args.device).view(args.trials, 1, -1)
    restart, (obs, _) = start, envs.reset(seed=[args.seed + i + start for i in range(args.trials)])
    returns, lengths = np.zeros(args.trials), np.zeros(args.trials)
    for step in range(start + 1, args.total_steps + 1):
        # act
        if step > args.learning_starts:
            action = agent.act(column(obs))
        elif (step - restart - 1) % args.explore_hold == 0:
            action = torch.rand(args.trials, 1, action_dim, device=args.device) * 2 - 1
        next_obs, reward, terminated, truncated, infos = envs.step(action[:, 0].cpu().numpy())
        lap("environment")

        # remember: a time limit is not a termination, and an episode's last state is not the next one's first
        ended, last_obs = terminated | truncated, next_obs.copy()
        for trial in np.flatnonzero(ended):
            last_obs[trial] = infos["final_obs"][trial]
        buffer.add(column(obs), action, column(reward), column(last_obs), column(terminated))
        bad = None if np.isfinite([obs, next_obs, last_obs]).all() else "observation"
        bad = bad or (None if np.isfinite(reward).all() else "reward")
        obs, returns, lengths = next_obs, returns + reward, lengths + 1
        if ended.any():
            logger.log(step, {"train/return": returns, "train/length": lengths}, np.flatnonzero(ended))
        returns, lengths = returns * ~ended, lengths * ~ended
        lap("buffer")

        # learn
        if step >= args.learning_starts and not bad:
            metrics = agent.learn(buffer)
            lap("update")

        # evaluate, log, save
        bar.update()
        if step >= args.learning_starts and (step % args.eval_every == 0 or step == args.total_steps):
            eval_returns, eval_lengths = evaluate(agent, eval_envs, args)
            logger.log(step, {"eval/return": eval_returns.mean(1), "eval/length": eval_lengths.mean(1)})
            bar.set_postfix_str(f"return {eval_returns.mean():.1f}")
            lap("evaluation")
        saves = step % args.save_every == 0 or step == args.total_steps or stop
        if step % args.log_every == 0 or saves:
            bad = bad or next((name for name, p in agent.named_parameters() if not p.isfinite().all()), None)
        if step % args.log_every == 0:
            speed = min(args.log_every, step - start) / sum(seconds.values())
            logger.log(step, metrics | {"time/sps": speed} | {f"time/{name}": s for name, s in seconds.items()})
            if step // args.log_every == max(args.learning_starts, start) // args.log_every + 1:
                hours = (args.total_steps - step) / speed / 3600
                tqdm.write(f"about {hours:.2f} hours to go")
            seconds.clear()
        if bad:
            save(run_dir / "nonfinite.pt", args, step, agent, (buffer,))
            text = f"{SCRIPT}.py: error: step {step}: {bad} is not finite; state saved in {run_dir}/nonfinite.pt"
            tqdm.write(text, sys.stderr)
            return 1
        if saves:
            save(run_dir / "checkpoint.pt", args, step, agent, (buffer,))
            restart, (obs, _) = step, envs.reset(seed=[args.seed + i + step for i in range(args.trials)])  # as resumed
            returns, lengths = np.zeros(args.trials), np.zeros(args.trials)
            logger.draw(args.env_id)
            lap("save")
        if stop:
            return 128 + stop[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
