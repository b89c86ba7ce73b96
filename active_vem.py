"""Active VEM: an agent that infers its hidden state and its actions under one variational bound, in one file.

After Marino & Yue, "An Inference Perspective on Model-Based Reinforcement Learning" (2019), whose equation numbers are
used. The environment shows observations x and rewards r, never its state. The agent keeps a latent state z, inferred by
q(z_t|z_{t-1},a_{t-1},x_t,r_t), acts by q(a_t|z_t), and learns the priors that both are compared with.

    p_a = Π_t p(a_t|z_t) p(z_t|z_{t-1},a_{t-1},x_t,r_t)                      the discriminative agent          (2)
    L = E[Σ_t r_t − log q(z_t)/p(z_t|z_{t-1},a_{t-1},x_t,r_t) − log q(a_t)/p(a_t|z_t)]                         (6)
    L = E[Σ_t r_t + log p(x_t,r_t|z_t)/p(x_t,r_t|z_{t-1},a_{t-1}) − log q(z_t)/p(z_t|z_{t-1},a_{t-1})
                − log q(a_t)/p(a_t|z_t)]                                     the generative agent              (8)
    Ê = E_p[Σ_{k≤H} γ^{k-1} (r_k + α w_i log p(x_k,r_k|z_k)/p(x_k,r_k|z_{k-1},a_{k-1})) + γ^H V(z_H)]          (10)
    Algorithm 1: E-step, q(z) climbs L and q(a) climbs Ê − α KL(q(a)‖p(a)); M-step, the rest climbs L

The marginal term, the denominator log p(x_t,r_t|z_{t-1},a_{t-1}) in (8), is what sets this objective apart from a
world model's. It is estimated by importance weights, log 1/K Σ_k p(x_t,r_t|z^k) p(z^k|·) / q(z^k|·) with z^k ~ q(z_t).
By Bayes' rule the terms of z_t and x_t in (8) are −KL(q(z_t) ‖ p(z_t|z_{t-1},a_{t-1},x_t,r_t)): at most 0, and 0 for
*every* model whose q is exact. At its full weight nothing presses the model to fit the data. So it has a weight w: with
an exact q the objective is (1 − w) log p(x_t,r_t|z_{t-1},a_{t-1}), a likelihood whose pull fades while that on q stays.
What the term is good for is the paper's open question, and a sweep over w the way to ask it.

Deviations from the paper, each with the flag that goes back to its letter where there is one:
 1. w = 0, for the reason above. `--marginal-weight 1` is (8); `--marginal-anneal-steps` lets w grow.
 2. Inference is amortized: q(z) and q(a) are networks that take one gradient step per update, on the same windows as
    the M-step. `--plan-iters 3`: q(a) is also refined at every step of acting.
 3. q(z_t) climbs the terms of (8) at t, not the future ones: under the agent's own model these are highest where it
    believes to be in a good state, whatever it saw. All distributions are diagonal Gaussians, Markov in z; windows of
    replayed episodes start from the z inferred when they were last seen.
 4. Rewards are discounted and divided by their standard deviation; what lies beyond H steps is a twin critic Q(z,a).
    `--plan-horizon 0`: nothing but the critic, which is all that a discriminative agent can have.
 5. α, the price of a nat in units of scaled reward, is tuned to a budget of KL(q(a)‖p(a)). `--alpha`: fixed.
 6. The information term of (10) is off. `--info-weight 1`: its lower estimate, which is at most log(K + 1) and so
    cannot be driven up without end by errors of the model.
 7. A share ε of the action prior is uniform, in what it is fitted to and in the KL: otherwise both narrow together and
    exploration ends. `--prior-mix 0`. `--action-prior uniform`: maximum entropy; p(a) then only rolls out and acts.
 8. The discriminative agent's q(z) learns from the critic's error: it has no model to send it the return's gradient.
    That gradient is cut at 0.3, and z learns no faster than the critic: at the others' 10 (`--max-grad-norm`) it drives
    z to its bounds in some trials, at 3e-3 (`--model-learning-rate`) what has been learned is lost again in some.

    python active_vem.py --env-id DoubleIntegrator-v0 --total-steps 4000 --eval-every 250
    python active_vem.py --env-id Pendulum-v1 --mask velocity
    python active_vem.py --evaluate runs/Pendulum-v1/RUN --capture-video
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
MEAN_MAX = 10.0  # of z and of atanh(a)
UNIFORM_VAR = math.pi**2 / 12  # variance of atanh(a) for a uniform in [-1, 1]
# Tasks whose observation is so many positions (sines and cosines too) followed by velocities and forces.
POSITIONS = {"Pendulum": 2, "MountainCarContinuous": 1, "InvertedPendulum": 2, "InvertedDoublePendulum": 5, "Hopper": 5,
             "Walker2d": 8, "HalfCheetah": 8, "Swimmer": 3, "Ant": 13}
if platform.libc_ver()[0] == "glibc":  # keep freed memory: to map it anew costs up to a quarter of an update
    ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**25)  # thresholds of trimming and of mmap
warnings.filterwarnings("ignore", message=".*(is out of date|precision lowered).*")  # the papers' tasks are -v4


@dataclasses.dataclass
class Args:
    env_id: str = "Pendulum-v1"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: int = 1  # trial i uses environment seed + i
    trials: int = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    compile: bool = False  # torch.compile the loss functions; on a CPU it does not pay, SAC takes twice as long
    cuda_graph: bool = False  # replay the updates of a step, and each minibatch of a fit, as one CUDA graph
    total_steps: int = 30_000  # environment steps per trial
    learning_starts: int = 500  # uniformly random steps before the first update
    explore_hold: int = 1  # environment steps for which each of those random actions is held
    log_every: int = 250  # environment steps between rows of training metrics
    eval_every: int = 1_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes per trial and evaluation
    save_every: int = 10_000  # environment steps between checkpoints; episodes restart there, so that resuming is exact
    wandb: Literal["disabled", "offline", "online"] = "disabled"  # Weights & Biases; offline needs no account
    wandb_project: str = "rl-as-inference"  # Weights & Biases project
    capture_video: bool = False  # with --evaluate: write an mp4 of the first episode
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/SCRIPT_sSEED_DATE-TIME
    resume: str = ""  # run directory to continue; only the total, the intervals, device and wandb may change
    evaluate: str = ""  # run directory whose saved agent is evaluated instead of training

    agent: Literal["generative", "discriminative", "memoryless"] = "generative"  # with a model, without, without z
    mask: Literal["none", "velocity", "position"] = "none"  # what is hidden of the observation, on tasks known by name
    noise: float = 0.0  # standard deviation of Gaussian noise added to the observation
    act: Literal["posterior", "prior"] = "posterior"  # which of q(a) and p(a) acts while learning; both are evaluated
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critic towards the critic
    hidden_dim: int = 128  # width of the two hidden layers of actor and critics
    learning_rate: float = 1e-3  # Adam's, of actor, critics and α
    updates_per_step: int = 1  # updates of everything per environment step
    first_updates: int = 500  # further updates when learning starts: an untrained model plans badly
    buffer_size: int = 1_000_000  # real transitions kept per trial
    windows: int = 32  # windows per update
    window_length: int = 20  # steps of a window, within one episode
    scale_every: int = 250  # environment steps between fits of the scales of observation and reward
    latent_dim: int = 8  # dimensions of z
    model_dim: int = 64  # width of the dynamics' hidden layers
    model_learning_rate: float | None = None  # of the dynamics; default: 3e-3, discriminative 1e-3, as small steps need
    max_grad_norm: float | None = None  # length that a network's gradient is cut to; default: 10, discriminative 0.3
    variance_weight: float = 0.0  # a prediction counts by its variance to this power; 0.5 to 1 where rewards are rare
    marginal_weight: float = 0.0  # w: weight of the marginal term of (8)
    marginal_samples: int = 8  # importance samples K of the marginal term
    marginal_anneal_steps: int = 0  # updates in which w grows linearly to its value
    marginal_proposal: Literal["posterior", "prior"] = "posterior"  # where they are drawn; from the prior, it diverges
    plan_horizon: int = 3  # imagined steps H of the planned bound (10)
    rollout_policy: Literal["prior", "posterior"] = "prior"  # which of p(a) and q(a) acts in the imagined steps
    plan_iters: int = 0  # refinements of q(a) when acting
    plan_samples: int = 64  # actions per refinement
    info_weight: float = 0.0  # w_i: weight of the information term of (10)
    info_samples: int = 8  # contrastive samples K of the information term
    action_prior: Literal["learned", "uniform"] = "learned"  # what the KL of the action is measured from
    prior_mix: float = 0.05  # ε: share of uniformly random actions in what the action prior is fitted to
    alpha: float | None = None  # price of a nat in units of scaled reward; default: tuned to the KL target
    kl_target: float | None = None  # KL(q(a)‖p(a)) that α is tuned to; default: 0.5 (uniform: 1.2) per action dimension


RANGE = {"seed": (0, 2**31), "learning_starts": (10, math.inf), "buffer_size": (10, math.inf), "gamma": (0, 1),
         "tau": (0, 1), "noise": (0, math.inf), "first_updates": (0, math.inf), "variance_weight": (0, 1),
         "marginal_weight": (0, math.inf), "marginal_anneal_steps": (0, math.inf), "plan_horizon": (0, math.inf),
         "plan_iters": (0, math.inf), "plan_samples": (2, math.inf), "info_weight": (-math.inf, math.inf),
         "prior_mix": (0, 1)}  # else counts from 1, numbers above 0
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
        ("mask", args.mask != "none" and task_name(args.env_id) not in POSITIONS, f"only on {', '.join(POSITIONS)}"),
        *((name, getattr(args, name) is not None and not getattr(args, name) > 0, "must be above 0")
          for name in ("alpha", "max_grad_norm", "model_learning_rate")),
        *((name, getattr(args, name) and args.agent != "generative", "needs --agent generative, which has a model")
          for name in ("marginal_weight", "info_weight", "plan_iters")),
        ("variance_weight", args.variance_weight and args.agent == "memoryless", "needs an agent with a latent state"),
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
        space = make_tasks(args, 1).single_action_space
    except Exception as error:  # whatever making a device, a function or an environment of the user's raises
        fail(f"{flag} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    if args.cuda_graph and device == "cpu":
        fail("--cuda-graph: needs --device cuda")
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
        fail(f"--env-id {args.env_id}: its actions must be a bounded Box, not {space}")
    name = f"runs/{args.env_id.replace(':', '_')}/{SCRIPT}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    return dataclasses.replace(args, device=device, run_dir=args.run_dir or name)


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


class DoubleIntegrator(gym.Env):
    """A mass on a line between two walls, pushed towards 0; only its position is seen, with noise."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    dt, force, noise, start, wall = 0.2, 4.0, 0.05, (1.0, 0.5), 5.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.normal(0, self.start)
        return self.observe(), {}

    def observe(self):
        return np.array([self.position + self.noise * self.np_random.normal()], np.float32)

    def step(self, action):
        force = self.force * float(np.clip(action[0], -1, 1))
        reward = -(self.position**2 + 0.1 * self.velocity**2 + 0.05 * (force / self.force) ** 2)
        self.position += self.dt * self.velocity + 0.5 * self.dt**2 * force
        self.velocity += self.dt * force
        if abs(self.position) > self.wall:
            self.position, self.velocity = math.copysign(self.wall, self.position), 0.0
        return self.observe(), reward, False, False, {}


class PartlyObserved(gym.ObservationWrapper):
    """Hides the velocities or the positions of a task in POSITIONS and adds noise to what is left."""

    def __init__(self, env, mask, noise):
        super().__init__(gym.wrappers.FlattenObservation(env))
        self.noise, count = noise, POSITIONS.get(task_name(env.spec.id))
        self.shown = {"none": slice(None), "velocity": slice(count), "position": slice(count, None)}[mask]
        low, high = (bound[self.shown] for bound in (self.env.observation_space.low, self.env.observation_space.high))
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation):
        shown = observation[self.shown]
        return (shown + self.noise * self.np_random.normal(size=shown.shape)).astype(np.float32)


def task_name(env_id):
    """module:Pendulum-v1 -> Pendulum."""
    return env_id.split(":")[-1].rpartition("-v")[0]


gym.register("DoubleIntegrator-v0", DoubleIntegrator, max_episode_steps=50)
gym.register("PartlyObserved-v0", lambda task, mask, noise, **kw: PartlyObserved(gym.make(task, **kw), mask, noise))


def make_tasks(args, num_envs, **kwargs):
    """make_envs, with the observations that the agent is allowed."""
    if args.mask == "none" and args.noise == 0:
        return make_envs(args.env_id, num_envs, **kwargs)
    return make_envs("PartlyObserved-v0", num_envs, task=args.env_id, mask=args.mask, noise=args.noise, **kwargs)


class EpisodeBuffer:
    """Ring of steps per trial, sampled as windows within an episode.

    One row holds obs, action, reward, next_obs, terminated, and what the latent state of obs was inferred from: the
    latent state, action and reward before it and the time since the episode began.
    """

    def __init__(self, trials, capacity, obs_dim, action_dim, latent_dim, device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1, latent_dim, action_dim, 1, 1)
        self.latent = slice(sum(self.widths[:5]), sum(self.widths[:6]))
        self.storage = torch.zeros(trials, capacity, sum(self.widths), device=device)  # (trials, capacity, row)
        self.added = torch.zeros((), dtype=torch.long, device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.trial = torch.arange(trials, device=device)[:, None]

    def add(self, *columns):
        """columns: tensors (trials, 1, width) in the order of a row."""
        self.storage[:, self.added % self.storage.shape[1]] = torch.cat(columns, -1)[:, 0]
        self.added += 1
        self.count.copy_(self.added.clamp(max=self.storage.shape[1]))

    def sample(self, n, length):
        """n windows per trial: rows (trials, length, n, row), their places in the ring, and 1 where a row is valid.

        A window covers a row drawn uniformly and does not begin before its episode; rows past the end of the episode
        are padding. An episode's first and last steps are seen about half as often as the others.
        """
        shape, device = (len(self.trial), 1, n), self.storage.device
        oldest, capacity = self.added - self.count, self.storage.shape[1]
        covered = (torch.rand(shape, device=device) * self.count).long()
        time = self.storage[self.trial[:, None], (oldest + covered) % capacity, -1].long()
        back = torch.minimum(torch.randint(length, shape, device=device), torch.minimum(time, covered))
        age = covered - back + torch.arange(length, device=device)[:, None]  # (trials, length, n)
        place = (oldest + age) % capacity
        rows = self.storage[self.trial[:, None], place]
        valid = (age < self.count) & (rows[..., -1].long() == (time - back) + age - age[:, :1])
        return rows, place, valid[..., None].float()

    def refresh(self, place, rows, valid, latents):
        """Keep the latent states (trials, length, n, latent_dim) just inferred, for windows to start from."""
        new, old = latents[:, :-1], rows[:, 1:, :, self.latent]
        usable = (valid[:, 1:] > 0) & new.isfinite().all(-1, keepdim=True)
        self.storage[self.trial[:, None], place[:, 1:], self.latent] = torch.where(usable, new, old)

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


class Gaussian(StackedMLP):
    """A conditional Gaussian: columns (trials, batch, ·) -> mean and log_std (trials, batch, out).

    The mean is bounded: nothing else would keep a recurrent z from growing without end when no decoder holds it.
    """

    def __init__(self, trials, in_dim, hidden_dim, out_dim):
        super().__init__((trials,), (in_dim, hidden_dim, hidden_dim, 2 * out_dim), F.silu)

    def forward(self, *columns):
        mean, log_std = super().forward(torch.cat(columns, -1)).chunk(2, -1)
        return MEAN_MAX * (mean / MEAN_MAX).tanh(), log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class Normalizer(nn.Module):
    """Mean and standard deviation per trial of columns (trials, n, dim); constant columns are only centred."""

    def __init__(self, trials, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(trials, 1, dim))
        self.register_buffer("std", torch.ones(trials, 1, dim))

    def fit(self, *columns):
        moments = (torch.std_mean(column, 1, keepdim=True) for column in columns)
        std, mean = (torch.cat(parts, -1) for parts in zip(*moments))
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-6, 1.0, std))

    def forward(self, x):
        return (x - self.mean) / self.std

    def inverse(self, x):
        return x * self.std + self.mean


def sample(mean, log_std):
    """A reparameterised sample."""
    return mean + log_std.exp() * torch.randn_like(mean)


def log_density(x, mean, log_std):
    """log N(x; mean, std²) summed over the last axis: (..., 1)."""
    noise = (x - mean) * (-log_std).exp()
    return (-0.5 * (noise.square() + math.log(2 * math.pi)) - log_std).sum(-1, keepdim=True)


def divergence(mean, log_std, prior_mean, prior_log_std):
    """KL of two Gaussians summed over the last axis: (..., 1)."""
    ratio, shift = (2 * (log_std - prior_log_std)).exp(), ((mean - prior_mean) * (-prior_log_std).exp()).square()
    return (prior_log_std - log_std + 0.5 * (ratio + shift - 1)).sum(-1, keepdim=True)


def log_jacobian(u):
    """log |da/du| of a = tanh(u), summed over the last axis, in a stable form: (..., 1)."""
    return (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1, keepdim=True)


def log_mean_exp(x):
    """log of the mean of exp(x) over the first axis."""
    return x.logsumexp(0) - math.log(len(x))


def information_bounds(own, others):
    """Estimates, low and high, of the information of x in z, from log p(x|z) and log p(x|z^k) of K others (K, ...)."""
    lower = own - log_mean_exp(torch.cat([own[None], others]))  # with z among the samples: at most log(K + 1)
    return lower, own - log_mean_exp(others)


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
    """Networks, optimizers, and the steps of Algorithm 1: infer and act online, learn from windows of episodes."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, trials, z, a, x = args, args.trials, args.latent_dim, action_dim, obs_dim + 1
        self.generative, self.memoryless = args.agent == "generative", args.agent == "memoryless"
        self.latent_dim, self.action_dim, self.horizon = z, a, args.plan_horizon if self.generative else 0
        self.percepts = Normalizer(trials, x)  # a percept is an observation and the reward received with it
        if self.memoryless:
            self.latent_dim = z = obs_dim
        else:
            self.first_latent = nn.Parameter(torch.zeros(trials, 1, z))  # before the first step
            self.latent_posterior = Gaussian(trials, z + a + x, args.model_dim, z)
            self.latent_prior = Gaussian(trials, z + a + (0 if self.generative else x), args.model_dim, z)
        if self.generative:
            self.decoder = StackedMLP((trials,), (z, args.model_dim, args.model_dim, x + 1), F.silu)
            self.log_scale = nn.Parameter(torch.zeros(trials, 1, x))
        self.actor = Gaussian(trials, z, args.hidden_dim, a)
        self.prior_actor = Gaussian(trials, z, args.hidden_dim, a)
        self.critic = StackedMLP((2, trials), (z + a, args.hidden_dim, args.hidden_dim, 1))
        self.critic_target = StackedMLP((2, trials), (z + a, args.hidden_dim, args.hidden_dim, 1))
        self.critic_target.load_state_dict(self.critic.state_dict())
        seen_by = [self.actor, self.prior_actor, self.critic, self.critic_target] if self.memoryless else (
            [self.latent_posterior] if self.generative else [self.latent_posterior, self.latent_prior])
        self.readers = [(net, slice(None, z) if self.memoryless else slice(z + a, None)) for net in seen_by]
        self.log_alpha = nn.Parameter(torch.full((trials, 1, 1), math.log(args.alpha or 0.1)))
        per_dimension, self.mix = (0.5, args.prior_mix) if args.action_prior == "learned" else (1.2, 1.0)
        self.kl_target = per_dimension * a if args.kl_target is None else args.kl_target
        # The critic's error, which alone shapes a discriminative z, at times grows on its way back through a window.
        self.max_grad_norm = args.max_grad_norm or (0.3 if args.agent == "discriminative" else 10.0)
        self.register_buffer("ever_ended", torch.zeros(trials, 1, 1))
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("skipped", torch.zeros(trials))
        self.to(args.device)

        policy = [*self.actor.parameters(), *([] if args.alpha else [self.log_alpha])]
        policies = {"actor", "prior_actor", "critic", "critic_target", "log_alpha"}
        model = [p for name, p in self.named_parameters() if name.split(".")[0] not in {*policies, "log_scale"}]
        # Adam moves a parameter by its rate at most: the scale has further to go than any weight.
        rate = args.model_learning_rate or (1e-3 if args.agent == "discriminative" else 3e-3)
        scale = [{"params": [self.log_scale], "lr": 3 * rate}] if self.generative else []
        groups = {"actor": policy, "prior_actor": self.prior_actor.parameters(), "critic": self.critic.parameters()}
        adam = lambda parameters, rate: torch.optim.Adam(parameters, rate, fused=True, capturable=True)
        self.opts = {name: adam(group, args.learning_rate) for name, group in groups.items()}
        if model:
            self.opts["model"] = adam([{"params": model}, *scale], rate)
        if args.compile:
            for name in ("model_loss", "critic_loss", "actor_loss", "prior_loss"):
                setattr(self, name, torch.compile(getattr(self, name)))
        self.rehearse = captured(self.rehearse, args)

    # What is inferred online

    @torch.no_grad()
    def begin(self, n):
        """Latent state, action and reward before the first step: (trials, n, ·)."""
        zeros = torch.zeros(self.args.trials, n, self.latent_dim + self.action_dim + 1, device=self.log_alpha.device)
        latent, action, reward = zeros.split((self.latent_dim, self.action_dim, 1), -1)
        return latent if self.memoryless else latent + self.first_latent, action, reward

    @torch.no_grad()
    def perceive(self, latent, action, obs, reward, noise=None):
        """z_t given what came before it and what is seen now; the mean of q where noise is 0."""
        percept = self.percepts(torch.cat([obs, reward], -1))
        noise = torch.randn(*obs.shape[:-1], self.latent_dim, device=obs.device) if noise is None else noise
        return self.unroll(latent, action[:, None], percept[:, None], noise[:, None])[0][:, 0]

    @torch.no_grad()
    def act(self, latent, policy="posterior", deterministic=False):
        """Actions (trials, n, action_dim) of q(a|z) or p(a|z), or their mean action for evaluation."""
        mean, log_std = self.prior_actor(latent) if policy == "prior" else self.refine(latent)
        return (mean if deterministic else sample(mean, log_std)).tanh()

    def refine(self, latent):
        """q(a|z) moved towards p(a|z) exp(Ê(z, a) / α), the maximiser of the bound, by weighted samples of itself."""
        (mean, log_std), samples = self.actor(latent), self.args.plan_samples
        prior = [x.repeat_interleave(samples, 1) for x in self.prior_actor(latent)]
        latents = latent.repeat_interleave(samples, 1)
        for _ in range(self.args.plan_iters):
            proposal = [x.repeat_interleave(samples, 1) for x in (mean, log_std)]
            u = sample(*proposal)
            log_prior = (1 - self.mix) * log_density(u, *prior) + self.mix * log_jacobian(u)
            log_weight = self.planned_bound(latents, u.tanh()) / self.log_alpha.exp() + log_prior  # eq. (10)
            log_weight = log_weight - log_density(u, *proposal)
            weight, u = (x.unflatten(1, (-1, samples)) for x in (log_weight, u))  # (trials, n, samples, ·)
            weight = weight.softmax(2)
            mean = (weight * u).sum(2)
            variance = (weight * (u - mean[:, :, None]).square()).sum(2)
            log_std = (0.5 * variance.log()).clamp(LOG_STD_MIN, LOG_STD_MAX)
        return mean, log_std

    # The distributions of the agent

    def unroll(self, latent, actions, percepts, noise):
        """z_t ~ q(z_t|z_{t-1},a_{t-1},x_t,r_t) along axis 1, and the moments: (trials, time, n, latent_dim)."""
        if self.memoryless:
            return percepts[..., :-1], None
        latents, means, log_stds = [], [], []
        for action, percept, eps in zip(actions.unbind(1), percepts.unbind(1), noise.unbind(1)):
            mean, log_std = self.latent_posterior(latent, action, percept)
            latent = mean + log_std.exp() * eps
            for values, value in zip((latents, means, log_stds), (latent, mean, log_std)):
                values.append(value)
        return torch.stack(latents, 1), (torch.stack(means, 1), torch.stack(log_stds, 1))

    def decode(self, latent):
        """Mean of the percept (trials, n, obs_dim + 1), and the logit (trials, n, 1) of the episode's end with it."""
        out = self.decoder(latent)
        return out[..., :-1], out[..., -1:]

    @property
    def scale(self):
        return self.log_scale.clamp(LOG_STD_MIN, LOG_STD_MAX)  # (trials, 1, obs_dim + 1)

    def log_likelihood(self, latent, percept):
        """log p(x,r|z): (trials, n, 1)."""
        return log_density(percept, self.decode(latent)[0], self.scale)

    def log_weights(self, latent, action, percept, posterior):
        """log p(x|z) p(z|·) / q(z|·) of K samples of z ~ q, which gets no gradient: (K, trials, n, 1)."""
        prior, shape = self.latent_prior(latent, action), (self.args.marginal_samples, *posterior[0].shape)
        if self.args.marginal_proposal == "prior":
            posterior = prior
        else:  # q would lower the estimate, and so raise the bound, by being a bad proposal
            posterior = [x.detach() for x in posterior]
        z = sample(*(x.expand(shape) for x in posterior))
        return self.log_likelihood(z, percept) + log_density(z, *prior) - log_density(z, *posterior)

    def information(self, latent, prior):
        """Estimates, low and high, of the information in nats that a percept at z has about z: (trials, n, 1) each."""
        percept = sample(self.decode(latent)[0], self.scale)
        others = sample(*(x.expand(self.args.info_samples, *x.shape) for x in prior))  # (K, trials, n, latent_dim)
        return information_bounds(self.log_likelihood(latent, percept), self.log_likelihood(others, percept))

    def posterior_action(self, latent):
        """a ~ q(a|z), its KL from the action prior p^(1−ε) uniform^ε, its log-probability: (trials, n, ·)."""
        mean, log_std = self.actor(latent)
        u = sample(mean, log_std)
        log_prob = log_density(u, mean, log_std) - log_jacobian(u)
        kl = self.mix * (log_prob + self.action_dim * math.log(2))
        if self.mix < 1:
            kl = kl + (1 - self.mix) * divergence(mean, log_std, *self.prior_actor(latent))
        return u.tanh(), kl, log_prob

    def soft_value(self, latent, critic):
        """V(z) = E[min Q(z, a)] − α KL(q(a)‖p(a)) with one sampled action: (trials, n, 1)."""
        action, kl, _ = self.posterior_action(latent)
        return critic(torch.cat([latent, action], -1)).amin(0) - self.log_alpha.exp().detach() * kl

    def planned_bound(self, latent, action):
        """Ê of (10) for taking an action at z: rewards and information of H imagined steps, then V; (trials, n, 1)."""
        if self.horizon == 0:
            return self.critic(torch.cat([latent, action], -1)).amin(0)
        bound, discount, offset = 0, 1, (self.percepts.mean / self.percepts.std)[..., -1:]
        for k in range(self.horizon):
            prior = self.latent_prior(latent, action)
            latent = sample(*prior)
            percept, end_logit = self.decode(latent)
            bound = bound + discount * (percept[..., -1:] + offset)  # eq. (10)
            if self.args.info_weight:
                price = self.log_alpha.exp().detach() * self.args.info_weight
                bound = bound + discount * price * self.information(latent, prior)[0]  # eq. (10)
            discount = discount * self.args.gamma * (1 - end_logit.sigmoid() * self.ever_ended)
            if k + 1 < self.horizon:
                policy = self.prior_actor if self.args.rollout_policy == "prior" else self.actor
                action = sample(*policy(latent)).tanh()
        return bound + discount * self.soft_value(latent, self.critic)  # eq. (10)

    # What is learned from windows

    def bound_terms(self, before, latents, posterior, actions, percepts):
        """The terms of (6) or (8) on z_t: log-likelihood, marginal, KL, each (trials, n, 1)."""
        prior = self.latent_prior(before, actions, *([] if self.generative else [percepts]))
        if self.args.variance_weight:  # β-NLL of Seitzer et al. (2022): only the gradients of p's moments change
            weight = (2 * self.args.variance_weight * prior[1].detach()).exp()
            prior = [x.detach() + weight * (x - x.detach()) for x in prior]
        kl = divergence(*posterior, *prior)  # eq. (6, 8)
        if not self.generative:
            return torch.zeros_like(kl), torch.zeros_like(kl), kl
        log_likelihood = self.log_likelihood(latents, percepts)  # eq. (8)
        if self.args.marginal_weight == 0:
            return log_likelihood, torch.zeros_like(kl), kl
        return log_likelihood, log_mean_exp(self.log_weights(before, actions, percepts, posterior)), kl  # eq. (8)

    def marginal_weight(self):
        """w, which grows with the number of updates."""
        steps = self.args.marginal_anneal_steps
        return self.args.marginal_weight * ((self.updates / steps).clamp(max=1) if steps else 1.0)

    def model_loss(self, before, latents, posterior, actions, percepts, ended, mask):
        """−(8), or α KL of (6) in units of reward, as a mean over valid steps; and the terms in nats."""
        log_likelihood, marginal, kl = terms = self.bound_terms(before, latents, posterior, actions, percepts)
        if not self.generative:
            return self.mean(self.log_alpha.exp().detach() * kl, mask).sum(), terms
        bound = log_likelihood - self.marginal_weight() * marginal - kl  # eq. (8)
        logit = self.decode(latents)[1]
        end_loss = F.binary_cross_entropy_with_logits(logit, ended, reduction="none")
        return self.mean(end_loss - bound, mask).sum(), terms

    def critic_loss(self, latent, action, target, mask):
        q = self.critic(torch.cat([latent, action], -1))  # (2, trials, n, 1)
        return self.mean((q - target).square(), mask).sum(), q

    def actor_loss(self, latent, mask):
        """E-step of the action: −Ê + α KL(q(a)‖p(a)); and α's own loss, which meets the target of the KL."""
        action, kl, log_prob = self.posterior_action(latent)
        alpha = self.log_alpha.exp()
        loss = alpha.detach() * kl - self.planned_bound(latent, action)  # eq. (8, 10)
        loss = loss + alpha * (self.kl_target - kl.detach())
        return self.mean(loss, mask).sum(), kl, log_prob

    def prior_loss(self, latent, mask):
        """M-step of the action prior: cross-entropy from q(a), which gets no gradient, mixed with uniform actions."""
        with torch.no_grad():
            target, log_std = self.actor(latent)
            variance = (2 * log_std).exp()
        mean, log_std = self.prior_actor(latent)
        eps = self.args.prior_mix
        second_moment = (1 - eps) * (variance + (target - mean).square()) + eps * (UNIFORM_VAR + mean.square())
        loss = (log_std + 0.5 * second_moment * (-2 * log_std).exp()).sum(-1, keepdim=True)  # eq. (8)
        return self.mean(loss, mask).sum()

    @staticmethod
    def mean(x, mask):
        """Mean per trial of columns (..., trials, n, 1) over the valid rows of mask (trials, n, 1): (..., trials)."""
        return (x * mask).sum((-2, -1)) / mask.sum((-2, -1))

    def descend(self, loss, *names):
        """Step some optimizers. Where a trial's gradient is not finite its parameters stay, and the skip is counted."""
        params = {name: [p for group in self.opts[name].param_groups for p in group["params"]] for name in names}
        loss.backward(inputs=sum(params.values(), []))
        for name, group in params.items():
            grads = [p.grad for p in group]
            square = sum(grad.square().sum((-2, -1)).view(-1, self.args.trials).sum(0) for grad in grads)
            scale = (self.max_grad_norm * square.rsqrt()).clamp(max=1).view(-1, 1, 1)
            finite, before = square.isfinite().view(-1, 1, 1), [p.detach().clone() for p in group]
            for grad in grads:
                grad.copy_(torch.where(finite, grad * scale, 0.0))
            self.opts[name].step()
            self.opts[name].zero_grad()
            with torch.no_grad():
                for p, old in zip(group, before):
                    p.copy_(torch.where(finite, p, old))
            self.skipped += ~finite.flatten()

    def follow(self, rows, valid):
        """Latent states (trials, length + 1, n, latent_dim) of windows, and model_loss's columns, of as many rows.

        There is one observation more than there are steps: the first comes before the first step.
        """
        columns = rows.split(self.widths, -1)
        obs, action, reward, next_obs, terminated, last_latent, last_action, last_reward, time = columns
        append = lambda first, rest: torch.cat([first[:, :1], rest], 1)
        percepts = torch.cat([append(obs, next_obs), append(last_reward, reward)], -1)
        percepts = self.percepts(percepts.flatten(1, 2)).unflatten(1, percepts.shape[1:3])
        actions, ended = append(last_action, action), append(torch.zeros_like(terminated), terminated)
        seen, start = append(torch.ones_like(valid), valid), last_latent[:, 0]
        if not self.memoryless:
            start = torch.where(time[:, 0] == 0, self.first_latent, start)
        noise = torch.randn(*percepts.shape[:3], self.latent_dim, device=rows.device)
        latents, posterior = self.unroll(start, actions, percepts, noise)
        before, posterior = torch.cat([start[:, None], latents[:, :-1]], 1), [x.flatten(1, 2) for x in posterior or ()]
        before, flat, actions, percepts, ended, seen = (
            x.flatten(1, 2) for x in (before, latents, actions, percepts, ended, seen))
        return latents, (before, flat, posterior, actions, percepts, ended, seen)

    def update(self, rows, valid):
        """One E-step and one M-step on windows (trials, length, n, ·); returns latent states and metrics."""
        latents, columns = self.follow(rows, valid)
        _, action, reward, _, terminated, *_ = rows.flatten(1, 2).split(self.widths, -1)
        valid, ended, seen = valid.flatten(1, 2), *columns[-2:]
        with torch.no_grad():
            next_value = self.soft_value(latents[:, 1:].flatten(1, 2), self.critic_target)
            target = reward / self.percepts.std[..., -1:] + self.args.gamma * (1 - terminated) * next_value
        shaped = latents if self.args.agent == "discriminative" else latents.detach()
        loss, q = self.critic_loss(shaped[:, :-1].flatten(1, 2), action, target, valid)
        metrics = {"loss/critic": self.mean((q - target).square(), valid).mean(0).detach(),
                   "value/q": (self.mean(q, valid).mean(0) * self.percepts.std[:, 0, -1]).detach()}
        if self.memoryless:
            self.descend(loss, "critic")
        else:
            model_loss, terms = self.model_loss(*columns)
            self.descend(loss + model_loss, "critic", "model")  # E-step of q(z), M-step of the model
            metrics |= {"model/log_likelihood": self.mean(terms[0], seen).detach()} if self.generative else {}
            metrics["model/kl"] = self.mean(terms[2], seen).detach()

        latent, going_on = columns[1].detach(), seen * (1 - ended)
        loss, kl, log_prob = self.actor_loss(latent, going_on)
        self.descend(loss, "actor")  # E-step of q(a)
        self.descend(self.prior_loss(latent, going_on), "prior_actor")  # M-step of p(a)
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
            self.updates += 1
        return latents.detach(), metrics | {"policy/kl": self.mean(kl, going_on).detach(),
                                            "policy/entropy": -self.mean(log_prob, going_on).detach()}

    @torch.no_grad()
    def assess(self, buffer):
        """Terms of the bound that need not be computed in every update, in nats: marginal and information."""
        if not self.generative:
            return {}
        with torch.random.fork_rng(devices=[]):  # how often metrics are logged changes nothing else
            rows, _, valid = buffer.sample(self.args.windows, self.args.window_length)
            before, _, posterior, actions, percepts, _, seen = self.follow(rows, valid)[1]
            prior = self.latent_prior(before, actions)
            marginal = log_mean_exp(self.log_weights(before, actions, percepts, posterior))
            lower, upper = self.information(sample(*prior), prior)
        names = ("model/log_marginal", "model/information", "model/information_upper")
        return {name: self.mean(term, seen) for name, term in zip(names, (marginal, lower, upper))}

    @torch.no_grad()
    def fit_scales(self, buffer):
        """Mean and standard deviation of what has been seen, and whether any episode has ended.

        A later fit changes no output in the task's units: whatever reads or predicts percepts, and whatever counts in
        scaled reward, is rescaled with them. Else it would throw a model as precise as (8) makes it off by many nats.
        """
        _, _, reward, next_obs, terminated, *_ = buffer.storage[:, : int(buffer.count)].split(buffer.widths, -1)
        self.ever_ended.copy_(terminated.amax(1, keepdim=True))
        mean, std = self.percepts.mean.clone(), self.percepts.std.clone()
        self.percepts.fit(next_obs, reward)
        if self.updates == 0:
            return
        ratio, shift = self.percepts.std / std, (self.percepts.mean - mean) / std  # old = ratio * new + shift
        for net, columns in self.readers:
            weight = net.layers[0].weight[..., columns, :]  # (*stack, percept or observation, hidden)
            net.layers[0].bias += shift[..., : weight.shape[-2]] @ weight
            weight *= ratio[..., : weight.shape[-2]].mT
        if self.generative:
            out = self.decoder.layers[-1]
            out.weight[..., :-1] /= ratio
            out.bias[..., :-1] = (out.bias[..., :-1] - shift) / ratio
            self.log_scale.sub_(ratio.log()).clamp_(LOG_STD_MIN, LOG_STD_MAX)
        reward_ratio = ratio[..., -1:]
        for critic in (self.critic, self.critic_target):
            critic.layers[-1].weight /= reward_ratio
            critic.layers[-1].bias /= reward_ratio
        if not self.args.alpha:
            self.log_alpha -= reward_ratio.log()

    def rehearse(self, buffer):
        """One update on replayed windows, whose latent states the buffer keeps; returns metrics, each (trials,)."""
        rows, place, valid = buffer.sample(self.args.windows, self.args.window_length)
        latents, metrics = self.update(rows, valid)
        buffer.refresh(place, rows, valid, latents[:, :-1])
        return metrics

    def learn(self, buffer, updates=1):
        """A number of updates; returns metrics of the last one, each (trials,)."""
        self.widths = buffer.widths
        for _ in range(updates):
            metrics = self.rehearse(buffer)
        alpha = self.log_alpha.detach().exp().flatten()
        return metrics | {"policy/alpha": alpha, "train/skipped": self.skipped.clone()}


@torch.no_grad()
def evaluate(agent, envs, args, policy):
    """Returns and lengths (trials, episodes) of an episode per environment: deterministic actions, fixed seeds."""
    obs, _ = envs.reset(seed=[args.seed + 10_000 + i for i in range(envs.num_envs)])
    returns, lengths, alive = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    column = lambda x: torch.as_tensor(x, dtype=torch.float32, device=args.device).view(*latent.shape[:2], -1)
    latent, action, reward = agent.begin(args.eval_episodes)
    while alive.any():
        latent = agent.perceive(latent, action, column(obs), reward, noise=torch.zeros_like(latent))
        action = agent.act(latent, policy, deterministic=True)
        obs, reward, terminated, truncated, _ = envs.step(action.flatten(0, 1).cpu().numpy())
        returns, lengths, alive = returns + alive * reward, lengths + alive, alive & ~(terminated | truncated)
        reward = column(reward)
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
    envs = make_tasks(args, args.trials)
    eval_envs = make_tasks(args, args.trials * args.eval_episodes, **render)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent, run_dir = Agent(args, obs_dim, action_dim), Path(args.run_dir)
    if args.evaluate:
        step = load(run_dir / "checkpoint.pt", args, agent)
        if args.capture_video:
            eval_envs = gym.wrappers.vector.RecordVideo(eval_envs, str(run_dir / "videos"), name_prefix=f"step-{step}",
                                                        episode_trigger=lambda n: n == 0, record_first_only=True)
        both = [evaluate(agent, eval_envs, args, policy)[0] for policy in ("posterior", "prior")]
        for trial, (returns, prior_returns) in enumerate(zip(*both)):
            print(f"{args.env_id}, step {step}, trial {trial}: return {returns.mean():.1f} ± {returns.std():.1f} "
                  f"over {len(returns)} episodes; of the prior {prior_returns.mean():.1f} ± {prior_returns.std():.1f}")
        eval_envs.close()
        return 0

    buffer = EpisodeBuffer(args.trials, args.buffer_size, obs_dim, action_dim, agent.latent_dim, args.device)
    start = load(run_dir / "checkpoint.pt", args, agent, (buffer,)) if args.resume else 0
    if start >= args.total_steps:
        fail(f"--total-steps {args.total_steps}: the run is at step {start} already")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    size = sum(parameter.numel() for parameter in agent.parameters())
    print(f"{run_dir}: {args.env_id} (observation {obs_dim}, action {action_dim}), {args.trials} trial(s) on "
          f"{args.device}, {size:,} parameters, steps {start:,} to {args.total_steps:,}", flush=True)
    if args.marginal_weight and args.marginal_proposal == "prior":
        print(f"{SCRIPT}.py: warning: the marginal term estimated from the prior is far too low, and training diverges")

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
    last = agent.begin(1)  # latent state, action and reward before the present observation
    for step in range(start + 1, args.total_steps + 1):
        # infer, act
        latent = agent.perceive(*last[:2], column(obs), last[2])
        if step > args.learning_starts:
            action = agent.act(latent, args.act)
        elif (step - restart - 1) % args.explore_hold == 0:
            action = torch.rand(args.trials, 1, action_dim, device=args.device) * 2 - 1
        next_obs, reward, terminated, truncated, infos = envs.step(action[:, 0].cpu().numpy())
        lap("environment")

        # remember: a time limit is not a termination, and an episode's last state is not the next one's first
        ended, last_obs = terminated | truncated, next_obs.copy()
        for trial in np.flatnonzero(ended):
            last_obs[trial] = infos["final_obs"][trial]
        buffer.add(column(obs), action, column(reward), column(last_obs), column(terminated), *last, column(lengths))
        over = column(ended) > 0
        last = [torch.where(over, x, y) for x, y in zip(agent.begin(1), (latent, action, column(reward)))]
        bad = None if np.isfinite([obs, next_obs, last_obs]).all() else "observation"
        bad = bad or (None if np.isfinite(reward).all() else "reward")
        obs, returns, lengths = next_obs, returns + reward, lengths + 1
        if ended.any():
            logger.log(step, {"train/return": returns, "train/length": lengths}, np.flatnonzero(ended))
        returns, lengths = returns * ~ended, lengths * ~ended
        lap("buffer")

        # learn
        if step >= args.learning_starts and not bad:
            if (step - args.learning_starts) % args.scale_every == 0:
                agent.fit_scales(buffer)
            first = args.first_updates if step == args.learning_starts else 0
            metrics = agent.learn(buffer, args.updates_per_step + first)
            lap("update")

        # evaluate, log, save
        bar.update()
        if step >= args.learning_starts and (step % args.eval_every == 0 or step == args.total_steps):
            eval_returns, eval_lengths = evaluate(agent, eval_envs, args, "posterior")
            prior_returns, _ = evaluate(agent, eval_envs, args, "prior")
            logger.log(step, {"eval/return": eval_returns.mean(1), "eval/length": eval_lengths.mean(1),
                              "eval/return_prior": prior_returns.mean(1)})
            bar.set_postfix_str(f"return {eval_returns.mean():.1f}")
            lap("evaluation")
        saves = step % args.save_every == 0 or step == args.total_steps or stop
        if step % args.log_every == 0 or saves:
            bad = bad or next((name for name, p in agent.named_parameters() if not p.isfinite().all()), None)
        if step % args.log_every == 0:
            speed = min(args.log_every, step - start) / sum(seconds.values())
            metrics |= agent.assess(buffer) if metrics else {}
            logger.log(step, metrics | {"time/sps": speed} | {f"time/{name}": s for name, s in seconds.items()})
            if step // args.log_every == max(args.learning_starts, start) // args.log_every + 1:
                hours = (args.total_steps - step) / speed / 3600
                tqdm.write(f"about {hours:.2f} hours to go, with evaluations")
            seconds.clear()
        if bad:
            save(run_dir / "nonfinite.pt", args, step, agent, (buffer,))
            text = f"{SCRIPT}.py: error: step {step}: {bad} is not finite; state saved in {run_dir}/nonfinite.pt"
            tqdm.write(text, sys.stderr)
            return 1
        if saves:
            save(run_dir / "checkpoint.pt", args, step, agent, (buffer,))
            restart, (obs, _) = step, envs.reset(seed=[args.seed + i + step for i in range(args.trials)])  # as resumed
            returns, lengths, last = np.zeros(args.trials), np.zeros(args.trials), agent.begin(1)
            logger.draw(args.env_id)
            lap("save")
        if stop:
            return 128 + stop[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
