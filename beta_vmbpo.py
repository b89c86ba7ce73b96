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

Deviations from the paper, each with the flag that goes back to its letter where there is one:
 1. γ and a learned probability of termination enter (11) and (12), which have neither. `--termination-fn`: known rule.
 2. Every fit starts q at p (parameters, Adam moments), shows both the same minibatches and lets their learning rate
    fall to zero: KL(q‖p) is then the tilt and vanishes as 1/β². Two independent ensembles differ before any tilt, and
    so do two that Adam leaves at a constant rate: with that floor above ε no β meets it, β runs to its clamp and the
    method silently is MBPO. `--posterior-init own`: q keeps its own; `--no-model-lr-decay`: a constant rate.
 3. The exponent of (11) is clamped to ±4 after the division by β. Weights have mean 1, which keeps the minimiser.
 4. KL(q‖p) of two ensembles: closed form between the moment-matched Gaussians, summed over the dimensions of the state,
    averaged over replayed states and the policy's actions. `--kl-estimator matched`: mean over pairs of members.
 5. log β += lr · clip(log(KL/ε)/8, ±1) has the sign and the fixed point of gradient descent on (9). The KL falls about
    as 1/β² and scatters over orders of magnitude from fit to fit: steps in its logarithm settle, where a step of KL − ε
    swings β by a factor of two at each fit. `--dual-step adam`: Adam on (9).
 6. Critics hold βQ (Appendix C.3); the log-ratio of (12) is left out, as in C.1. `--log-ratio-in-critic`: added.
 7. Actor and critic have an entropy bonus with tuned α. `--entropy critic`: Appendix C.1, where dying early is optimal;
    `--entropy none`: nothing keeps the policy's standard deviation from falling to its floor.
 8. (13) prints the target critic; the actor climbs the online one, as in SAC, on which C.1 builds. With κ ← ω after
    each update the KL in (13) has gradient zero: it is computed only when `--prior-interval` is above 1.
 9. Real rows in every batch (`--real-ratio 0`: none), imagined states clipped to the data's range, at least 400
    minibatches in the first fit, 100 to 800 in later ones, and MBPO's learning rate 1e-3 for the dynamics, not 3e-4.

    python beta_vmbpo.py --env-id Walker2d-v4
    python beta_vmbpo.py --evaluate runs/Walker2d-v4/RUN --capture-video
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
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
HOLD_OUT_EVERY, HOLD_OUT_MAX = 5, 2000  # every fifth row is never trained on; errors are measured on at most so many
EXPONENT_MAX = 4.0  # Appendix C.1
BETA_MIN, BETA_MAX = 1e-2, 1e7  # Appendix C.4
torch.distributions.Distribution.set_default_validate_args(False)  # main names what is not finite
if platform.libc_ver()[0] == "glibc":  # keep freed memory: to map it anew costs up to a quarter of an update
    ctypes.CDLL(None).mallopt(-1, 2**30), ctypes.CDLL(None).mallopt(-3, 2**25)  # thresholds of trimming and of mmap
warnings.filterwarnings("ignore", message=".*(is out of date|precision lowered).*")  # the papers' tasks are -v4


@dataclasses.dataclass
class Args:
    env_id: str = "Walker2d-v4"  # gymnasium task with Box actions; module:EnvId: your own; dm_control/walker-walk-v0
    seed: int = 1  # trial i uses environment seed + i
    trials: int = 1  # independent agents trained side by side
    device: str = "auto"  # auto (CUDA when there is one), cpu, cuda, cuda:1, ...
    compile: bool = False  # torch.compile the loss functions; on a CPU it does not pay, SAC takes twice as long
    cuda_graph: bool = False  # replay the updates of a step, and each minibatch of a fit, as one CUDA graph
    total_steps: int = 300_000  # environment steps per trial
    learning_starts: int = 5_000  # uniformly random steps before the first update
    explore_hold: int = 1  # environment steps for which each of those random actions is held
    log_every: int = 250  # environment steps between rows of training metrics
    eval_every: int = 1_000  # environment steps between evaluations
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
    batch_size: int = 256  # rows per update
    hidden_dim: int = 256  # width of the two hidden layers of actor and critics
    learning_rate: float = 3e-4  # Adam's, of actor, critics and α
    updates_per_step: int = 20  # actor-critic updates per environment step
    target_entropy: float | None = None  # entropy that α is tuned to, in nats; default −(action dimensions)/2
    entropy: Literal["both", "critic", "none"] = "both"  # where the entropy bonus enters, actor and critic or less
    real_ratio: float = 0.05  # share of real transitions in each batch
    buffer_size: int = 1_000_000  # real transitions kept per trial
    model_buffer_size: int = 400_000  # imagined transitions kept per trial
    ensemble_size: int = 7  # members of the dynamics ensemble
    num_elites: int = 5  # members with the lowest hold-out error, used to imagine
    model_dim: int = 200  # width of the dynamics' hidden layers
    model_layers: int = 4  # hidden layers of the dynamics
    model_learning_rate: float = 1e-3  # Adam's, of the dynamics
    model_lr_decay: bool = True  # let that rate fall to zero within each fit, linearly
    variance_weight: float = 0.0  # a prediction counts by its variance to this power; 0.5 to 1 where rewards are rare
    fit_every: int = 250  # environment steps between fits
    epochs: int = 5  # passes over the data per fit
    min_first_batches: int = 400  # minibatches of the first fit at least: five passes over a small buffer are too few
    min_batches: int = 100  # minibatches of any later fit at least
    max_batches: int = 800  # minibatches of a fit at most: beyond 51,000 rows a fit makes fewer than five passes
    rollouts: int = 100_000  # states from which transitions are imagined after each fit
    horizon: int = 1  # imagined steps per roll-out at first
    max_horizon: int = 1  # imagined steps per roll-out in the end
    horizon_from: int = 20_000  # environment step at which the horizon begins to grow
    horizon_until: int = 150_000  # environment step at which it has grown, linearly, to max_horizon
    termination_fn: str = ""  # module:function(obs, action, next_obs) -> ended or not; default: learned
    beta: float = 100.0  # risk parameter at the start, in units of reward: small is optimistic, ∞ is MBPO
    posterior_init: Literal["prior", "own"] = "prior"  # where q starts at each fit: at p, or where it ended
    kl_estimator: Literal["mixture", "matched"] = "mixture"  # KL of moment-matched ensembles, or mean over members
    log_ratio_in_critic: bool = False  # subtract β log q/p from the critic's target
    prior_interval: int = 1  # updates between copies of the actor into the prior policy
    kl_budget: float = 0.1  # ε: nats per transition by which q may differ from p
    beta_lr: float = 0.003  # step of log β per environment step, at most
    dual_step: Literal["log", "adam"] = "log"  # how β descends (9): in proportion to log(KL/ε), or by Adam


RANGE = {"seed": (0, 2**31), "learning_starts": (10, math.inf), "buffer_size": (10, math.inf), "gamma": (0, 1),
         "tau": (0, 1), "real_ratio": (0, 1), "variance_weight": (0, 1),
         "beta": (BETA_MIN, math.inf)}  # else counts from 1, numbers above 0
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
        ("num_elites", args.num_elites > args.ensemble_size, "must be at most --ensemble-size"),
        ("rollouts", args.rollouts > args.model_buffer_size, "must be at most --model-buffer-size"),
        ("max_horizon", args.max_horizon < args.horizon, "must be at least --horizon"),
        ("horizon_until", args.horizon_until <= args.horizon_from, "must be above --horizon-from"),
        ("capture_video", args.capture_video and not video, "needs --evaluate RUN_DIR and the package moviepy"),
        ("wandb", args.wandb != "disabled" and not importlib.util.find_spec("wandb"), "needs the package wandb"),
        ("prior_interval", args.cuda_graph and args.updates_per_step % args.prior_interval,
         "must divide --updates-per-step with --cuda-graph"),
        ("run_dir", not source and args.run_dir and Path(args.run_dir).exists(), "exists already"),
    ):
        if refused:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")
    try:
        flag = f"--device {args.device}: not there; use auto or cpu"
        device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        torch.zeros(1, device=device)
        flag = f"--termination-fn {args.termination_fn}: must be an importable module:function"
        assert not args.termination_fn or callable(load_function(args.termination_fn)), "not a function"
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3)
        flag = f"--env-id {args.env_id}: cannot be made" + (f"; near matches: {', '.join(near)}" if near else "")
        space = make_envs(args.env_id, 1).single_action_space
    except Exception as error:  # whatever making a device, a function or an environment of the user's raises
        fail(f"{flag} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    if args.cuda_graph and device == "cpu":
        fail("--cuda-graph: needs --device cuda")
    if not isinstance(space, gym.spaces.Box) or not space.is_bounded():
        fail(f"--env-id {args.env_id}: its actions must be a bounded Box, not {space}")
    name = f"runs/{args.env_id.replace(':', '_')}/{SCRIPT}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    return dataclasses.replace(args, device=device, run_dir=args.run_dir or name)


def load_function(path):
    """module:function -> that function; the empty string -> None."""
    return getattr(importlib.import_module(path.split(":")[0]), path.split(":")[1]) if path else None


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
    """Ring of transitions per trial; one row holds obs, action, reward, next_obs, terminated, log_ratio."""

    def __init__(self, trials, capacity, obs_dim, action_dim, device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1, 1)
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


class Dynamics(StackedMLP):
    """Ensemble of Gaussians over the normalised (Δobs, reward), with log-variances between learned bounds."""

    def __init__(self, stack, in_dim, out_dim, hidden_dims):
        super().__init__(stack, (in_dim, *hidden_dims, 2 * out_dim), F.silu)
        self.max_log_var = nn.Parameter(torch.full((*stack, 1, out_dim), 0.5))
        self.min_log_var = nn.Parameter(torch.full((*stack, 1, out_dim), -10.0))

    def forward(self, x, members=...):
        mean, log_var = super().forward(x, members).chunk(2, -1)
        high, low = self.max_log_var[members], self.min_log_var[members]
        return mean, low + F.softplus(high - F.softplus(high - log_var) - low)


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
    """Networks, optimizers and the steps of Algorithm 1: act, fit_model, imagine, learn, update_beta."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.args, self.obs_dim, trials, hidden = args, obs_dim, args.trials, (args.hidden_dim, args.hidden_dim)
        self.actor = Actor((trials,), (obs_dim, *hidden, 2 * action_dim))
        self.prior_actor = Actor((trials,), (obs_dim, *hidden, 2 * action_dim))
        self.critic = StackedMLP((2, trials), (obs_dim + action_dim, *hidden, 1))
        self.critic_target = StackedMLP((2, trials), (obs_dim + action_dim, *hidden, 1))
        self.prior_actor.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(trials, 1, 1))
        self.target_entropy = -action_dim / 2 if args.target_entropy is None else args.target_entropy

        # The first axis of the model's stack is (p_θ, q_φ): one forward pass serves both.
        model_dims = (args.model_dim,) * args.model_layers
        self.model = Dynamics((2, args.ensemble_size, trials), obs_dim + action_dim, obs_dim + 1, model_dims)
        self.terminator = StackedMLP((trials,), (obs_dim, 64, 64, 1))
        self.known_termination = load_function(args.termination_fn)
        self.inputs, self.targets = Normalizer(trials, obs_dim + action_dim), Normalizer(trials, obs_dim + 1)
        self.states = Normalizer(trials, obs_dim)
        self.register_buffer("state_range", torch.zeros(2, trials, 1, obs_dim))
        self.register_buffer("ever_ended", torch.zeros(trials, 1, 1))
        self.register_buffer("elites", torch.zeros(args.num_elites, trials, dtype=torch.long))
        self.log_beta = nn.Parameter(torch.full((trials, 1, 1), math.log(min(args.beta, BETA_MAX))))
        self.register_buffer("kl", torch.zeros(trials))
        self.to(args.device)

        decay = [2.5e-5, 5e-5, *[7.5e-5] * (args.model_layers - 2), 1e-4][-args.model_layers - 1 :]  # MBPO's, by layer
        groups = [{"params": layer.weight, "weight_decay": rate} for layer, rate in zip(self.model.layers, decay)]
        others = [p for name, p in self.model.named_parameters() if "weight" not in name]
        adam = lambda parameters, rate: torch.optim.Adam(parameters, rate, fused=True, capturable=True)
        self.opts = {
            "actor": adam([*self.actor.parameters(), self.log_alpha], args.learning_rate),
            "critic": adam(self.critic.parameters(), args.learning_rate),
            "model": adam([*groups, {"params": [*others, *self.terminator.parameters()]}], args.model_learning_rate),
            "beta": adam([self.log_beta], args.beta_lr),
        }
        if args.compile:
            for name in ("critic_loss", "actor_loss", "model_loss"):
                setattr(self, name, torch.compile(getattr(self, name)))
        self.learn = captured(self.learn, args)

    @property
    def beta(self):
        return self.log_beta.detach().exp()  # (trials, 1, 1)

    @torch.no_grad()
    def act(self, obs, deterministic=False):
        """Actions (trials, n, action_dim) of the prior policy π_κ, or the mean action of q_ω for evaluation."""
        return self.actor(obs)[0].tanh() if deterministic else self.prior_actor.sample(obs)[0]

    @torch.no_grad()
    def value(self, obs):
        """V'(s) with one sampled action and, unless it is off, the entropy bonus: (trials, n, 1)."""
        action, log_prob = self.actor.sample(obs)
        value = self.critic_target(torch.cat([obs, action], -1)).amin(0)
        return value if self.args.entropy == "none" else value - self.log_alpha.exp() * log_prob

    def termination(self, obs, action, next_obs):
        """Probability (trials, n, 1) that the episode ends at next_obs; 0 where none has ended yet."""
        if self.known_termination:
            return self.known_termination(obs, action, next_obs).reshape(*obs.shape[:-1], 1).float()
        return self.terminator(self.states(next_obs)).sigmoid() * self.ever_ended

    def moments(self, obs, action, members=...):
        """Mean and log-variance of p and q over normalised (Δobs, reward): (2, *members, trials, n, obs_dim + 1)."""
        return self.model(self.inputs(torch.cat([obs, action], -1)), members)

    @torch.no_grad()
    def transition_weights(self, data):
        """exp(δ/β) of every replayed transition, scaled to mean 1 per trial: (trials, n, 1)."""
        weights = torch.empty_like(data[2])
        chunks = zip(*(column.split(10_000, 1) for column in (*data, weights)))
        for obs, action, reward, next_obs, terminated, _, weight in chunks:
            q = self.critic(torch.cat([obs, action], -1)).amin(0)
            delta = reward + self.args.gamma * (1 - terminated) * self.value(next_obs) - q
            weight.copy_((delta / self.beta).clamp(-EXPONENT_MAX, EXPONENT_MAX).exp())  # eq. (11)
        return weights * (weights.shape[1] / weights.sum(1, keepdim=True))

    def model_loss(self, batch, weights):
        """Losses of p, q and termination on one minibatch per member: (ensemble, trials, n, ·), weights (…, n, 1)."""
        obs, action, reward, next_obs, terminated, _ = batch
        target = self.targets(torch.cat([next_obs - obs, reward], -1))
        mean, log_var = self.moments(obs, action)  # (2, ensemble, trials, n, out)
        nll = (target - mean).square() * (-log_var).exp() + log_var
        if self.args.variance_weight:  # β-NLL of Seitzer et al. (2022); at 0 the rows of small variance rule
            nll = nll * (self.args.variance_weight * log_var.detach()).exp()
        prior_nll, posterior_nll = nll.unbind(0)
        loss = prior_nll.mean((-2, -1)).sum()  # eq. (10)
        loss = loss + (weights * posterior_nll).mean((-2, -1)).sum()  # eq. (11)
        loss = loss + 0.01 / self.args.ensemble_size * (self.model.max_log_var - self.model.min_log_var).sum()
        logit = self.terminator(self.states(next_obs[0]))
        return loss + F.binary_cross_entropy_with_logits(logit, terminated[0], reduction="none").mean((-2, -1)).sum()

    def fit_model(self, buffer):
        """Fit p_θ, q_φ and the termination probability to the replayed transitions; returns metrics, each (trials,)."""
        args, count, shape = self.args, int(buffer.count), (self.args.ensemble_size, self.args.trials)
        data = obs, action, reward, next_obs, terminated, _ = buffer.storage[:, :count].split(buffer.widths, -1)
        self.inputs.fit(obs, action)
        self.targets.fit(next_obs - obs, reward)
        self.states.fit(next_obs)
        self.state_range[0] = torch.minimum(obs.amin(1, keepdim=True), next_obs.amin(1, keepdim=True))
        self.state_range[1] = torch.maximum(obs.amax(1, keepdim=True), next_obs.amax(1, keepdim=True))
        self.ever_ended.copy_(terminated.amax(1, keepdim=True))
        weights, first_fit = self.transition_weights(data), not self.opts["model"].state
        if args.posterior_init == "prior":  # q starts at p, with p's Adam moments
            for parameter in self.model.parameters():
                for tensor in (parameter.data, *self.opts["model"].state.get(parameter, {}).values()):
                    if tensor.ndim:
                        tensor[1] = tensor[0]
        num_train = count - math.ceil(count / HOLD_OUT_EVERY)
        bootstrap = torch.randint(num_train, (*shape, num_train), dtype=torch.int32, device=args.device)
        least = args.min_first_batches if first_fit else args.min_batches
        batches = min(max(args.epochs * num_train // args.batch_size, least), args.max_batches)
        rate = torch.tensor(args.model_learning_rate, device=args.device)
        for group in self.opts["model"].param_groups:
            group["lr"] = rate

        def step():
            rows = bootstrap.gather(-1, torch.randint(num_train, (*shape, args.batch_size), device=args.device))
            rows += rows // (HOLD_OUT_EVERY - 1) + 1  # step over rows 0, 5, 10, ..., which are held out
            batch = buffer.storage[buffer.trial, rows].split(buffer.widths, -1)
            loss = self.model_loss(batch, weights[buffer.trial, rows])
            self.opts["model"].zero_grad()
            loss.backward()
            self.opts["model"].step()

        step = captured(step, args)
        for i in range(batches):
            rate.fill_(args.model_learning_rate * (1 - i / batches if args.model_lr_decay else 1))
            step()
        return self.assess(buffer, weights)

    def hold_out_errors(self, buffer):
        """Squared errors of p and q in units of the targets' variance: (2, ensemble, trials)."""
        held_out = buffer.storage[:, : int(buffer.count) : HOLD_OUT_EVERY]
        held_out = held_out[:, :: math.ceil(held_out.shape[1] / HOLD_OUT_MAX)]
        obs, action, reward, next_obs, *_ = held_out.split(buffer.widths, -1)
        target = self.targets(torch.cat([next_obs - obs, reward], -1))
        return (self.moments(obs, action)[0] - target).square().mean((-2, -1))

    @torch.no_grad()
    def assess(self, buffer, weights):
        """Choose the elites and measure what the fit has done; returns metrics, each (trials,)."""
        prior_error, posterior_error = self.hold_out_errors(buffer)
        self.elites.copy_(prior_error.topk(len(self.elites), dim=0, largest=False).indices)
        obs, action, _, next_obs, terminated, _ = buffer.sample(1000).split(buffer.widths, -1)
        self.kl.copy_(self.divergence(obs))
        imagined_obs, _, imagined_end, _ = self.predict(obs, action)
        gap = (1 - imagined_end) * self.value(imagined_obs) - (1 - terminated) * self.value(next_obs)
        sample_size = 1 / weights.square().mean((-2, -1))
        if ((self.kl > self.args.kl_budget) & (sample_size > 0.99)).any():
            tqdm.write(f"warning: KL {self.kl.max():.3g} exceeds --kl-budget with hardly any tilt: no β can meet it")
        return {"model/prior_error": prior_error.mean(0), "model/posterior_error": posterior_error.mean(0),
                "model/optimism_gap": gap.mean((-2, -1)), "model/effective_sample_size": sample_size,
                "model/kl": self.kl, "model/beta": self.beta.flatten()}

    @torch.no_grad()
    def divergence(self, obs):
        """KL(q_φ ‖ p_θ) of the next state, averaged over states and the policy's actions: (trials,)."""
        mean, log_var = self.moments(obs, self.actor.sample(obs)[0], (slice(None), self.elites, range(len(obs))))
        if self.args.kl_estimator == "mixture":  # over the axis of the elites: (2, elites, trials, n, out)
            var = (log_var.exp() + (mean - mean.mean(1, keepdim=True)).square()).mean(1, keepdim=True)
            mean, log_var = mean.mean(1, keepdim=True), var.log()
        prior, posterior = (Normal(mean[i], (0.5 * log_var[i]).exp()) for i in (0, 1))
        return kl_divergence(posterior, prior)[..., : self.obs_dim].sum(-1).mean((0, -1))

    @torch.no_grad()
    def predict(self, obs, action):
        """s' ~ q_φ, r ~ p_θ, P(end at s') and log q_φ/p_θ of s'; rows are dealt to the elites in equal chunks."""
        columns, elites = [], self.elites.repeat(4, 1)  # four chunks each, for smaller temporaries
        for elite, o, a in zip(elites, obs.chunk(len(elites), 1), action.chunk(len(elites), 1)):
            mean, log_var = self.moments(o, a, (slice(None), elite, range(len(o))))  # (2, trials, n, out)
            prior, posterior = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
            reward = self.targets.inverse(prior)[..., self.obs_dim :]
            next_obs = (o + self.targets.inverse(posterior)[..., : self.obs_dim]).clamp(*self.state_range)
            log_density = -0.5 * ((posterior - mean).square() * (-log_var).exp() + log_var)[..., : self.obs_dim]
            log_ratio = (log_density[1] - log_density[0]).sum(-1, keepdim=True)
            columns.append((next_obs, reward, self.termination(o, a, next_obs), log_ratio))
        return [torch.cat(column, 1) for column in zip(*columns)]

    @torch.no_grad()
    def imagine(self, buffer, model_buffer, step):
        """Branch `rollouts` short roll-outs of the variational dynamics from replayed states (Algorithm 1)."""
        args = self.args
        horizon = round(np.interp(step, (args.horizon_from, args.horizon_until), (args.horizon, args.max_horizon)))
        obs = buffer.sample(args.rollouts)[..., : self.obs_dim]
        for _ in range(horizon):
            action = torch.cat([self.actor.sample(o)[0] for o in obs.split(10_000, 1)], 1)  # for smaller temporaries
            next_obs, reward, terminated, log_ratio = self.predict(obs, action)
            model_buffer.add(obs, action, reward, next_obs, terminated, log_ratio)
            if horizon > 1:  # a branch that ended starts again from a replayed state
                fresh = buffer.sample(args.rollouts)[..., : self.obs_dim]
                obs = torch.where(torch.rand_like(terminated) < terminated, fresh, next_obs)

    def critic_loss(self, obs, action, target):
        q = self.critic(torch.cat([obs, action], -1))  # (2, trials, n, 1)
        return (q - target).square().mean((-2, -1)).sum(), q  # eq. (12)

    def actor_loss(self, obs):
        action, log_prob = self.actor.sample(obs)
        q, alpha = self.critic(torch.cat([obs, action], -1)).amin(0), self.log_alpha.exp()
        loss = alpha.detach() * log_prob - q if self.args.entropy == "both" else -q  # eq. (13)
        if self.args.prior_interval > 1:
            (mean, log_std), (prior_mean, prior_log_std) = self.actor(obs), self.prior_actor(obs)
            kl = kl_divergence(Normal(mean, log_std.exp()), Normal(prior_mean, prior_log_std.exp()))
            loss = loss + self.beta * kl.sum(-1, keepdim=True)  # eq. (13)
        alpha_loss = -alpha * (log_prob.detach() + self.target_entropy)
        return (loss + alpha_loss).mean((-2, -1)).sum(), log_prob

    def update(self, batch):
        """One step of critics, actor and α on columns (trials, n, ·); returns q, its target and log-probabilities."""
        obs, action, reward, next_obs, terminated, log_ratio = batch
        target = reward + self.args.gamma * (1 - terminated) * self.value(next_obs)  # eq. (12)
        if self.args.log_ratio_in_critic:
            target = target - self.beta * log_ratio  # eq. (12)
        loss, q = self.critic_loss(obs, action, target)
        self.opts["critic"].zero_grad()
        loss.backward()
        self.opts["critic"].step()

        loss, log_prob = self.actor_loss(obs)
        self.opts["actor"].zero_grad()
        loss.backward(inputs=[*self.actor.parameters(), self.log_alpha])  # the critics need no gradients here
        self.opts["actor"].step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
        return q.detach(), target, log_prob.detach()

    def learn(self, buffer, model_buffer, step):
        """All updates of one environment step, on real and imagined rows in the ratio asked for; returns metrics."""
        args, num_real = self.args, round(self.args.real_ratio * self.args.batch_size)
        rows = [source.sample(args.updates_per_step * n).unflatten(1, (args.updates_per_step, n))
                for source, n in ((buffer, num_real), (model_buffer, args.batch_size - num_real)) if n]
        for i, batch in enumerate(torch.cat(rows, 2).unbind(1)):  # (trials, updates, batch, row)
            q, target, log_prob = self.update(batch.split(buffer.widths, -1))
            if (step * args.updates_per_step + i) % args.prior_interval == 0:
                self.prior_actor.load_state_dict(self.actor.state_dict())  # eq. (14)
        return {"loss/critic": (q - target).square().mean((0, -2, -1)), "value/q": q.mean((0, -2, -1)),
                "policy/entropy": -log_prob.mean((-2, -1)), "policy/alpha": self.log_alpha.detach().exp().flatten()}

    def update_beta(self):
        """Dual descent on log β: it rises, towards p, while KL > ε, and falls while there is budget left."""
        kl, budget = self.kl.view(-1, 1, 1), self.args.kl_budget
        if self.args.dual_step == "adam":
            self.log_beta.grad = -self.beta * (kl - budget)  # eq. (9)
            self.opts["beta"].step()
        with torch.no_grad():
            if self.args.dual_step == "log":
                self.log_beta += self.args.beta_lr * ((kl / budget).clamp(min=1e-12).log() / 8).clamp(-1, 1)  # eq. (9)
            self.log_beta.clamp_(math.log(BETA_MIN), math.log(BETA_MAX))


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
    model_buffer = ReplayBuffer(args.trials, args.model_buffer_size, obs_dim, action_dim, args.device)
    start = load(run_dir / "checkpoint.pt", args, agent, (buffer, model_buffer)) if args.resume else 0
    if start >= args.total_steps:
        fail(f"--total-steps {args.total_steps}: the run is at step {start} already")
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    size = sum(parameter.numel() for parameter in agent.parameters())
    print(f"{run_dir}: {args.env_id} (observation {obs_dim}, action {action_dim}), {args.trials} trial(s) on "
          f"{args.device}, {size:,} parameters, steps {start:,} to {args.total_steps:,}", flush=True)

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
        log_ratio = torch.zeros(args.trials, 1, 1, device=args.device)  # real transitions come from p
        buffer.add(column(obs), action, column(reward), column(last_obs), column(terminated), log_ratio)
        bad = None if np.isfinite([obs, next_obs, last_obs]).all() else "observation"
        bad = bad or (None if np.isfinite(reward).all() else "reward")
        obs, returns, lengths = next_obs, returns + reward, lengths + 1
        if ended.any():
            logger.log(step, {"train/return": returns, "train/length": lengths}, np.flatnonzero(ended))
        returns, lengths = returns * ~ended, lengths * ~ended
        lap("buffer")

        # learn
        if step >= args.learning_starts and not bad:
            if (step - args.learning_starts) % args.fit_every == 0:
                logger.log(step, agent.fit_model(buffer))
                lap("fit")
                agent.imagine(buffer, model_buffer, step)
                lap("imagine")
            metrics = agent.learn(buffer, model_buffer, step)
            agent.update_beta()
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
                tqdm.write(f"about {hours:.2f} hours to go, more as fits grow with the data")
            seconds.clear()
        if bad:
            save(run_dir / "nonfinite.pt", args, step, agent, (buffer, model_buffer))
            text = f"{SCRIPT}.py: error: step {step}: {bad} is not finite; state saved in {run_dir}/nonfinite.pt"
            tqdm.write(text, sys.stderr)
            return 1
        if saves:
            save(run_dir / "checkpoint.pt", args, step, agent, (buffer, model_buffer))
            restart, (obs, _) = step, envs.reset(seed=[args.seed + i + step for i in range(args.trials)])  # as resumed
            returns, lengths = np.zeros(args.trials), np.zeros(args.trials)
            logger.draw(args.env_id)
            lap("save")
        if stop:
            return 128 + stop[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
