"""Whole updates against other people's, and against the matrix products alone: paired, interleaved, on one machine.

    python benchmarks/speed.py --compare sac         # one update of SAC: this one, Stable-Baselines3's, CleanRL-style
    python benchmarks/speed.py --compare fit         # one minibatch of an ensemble: this one, mbpo_pytorch-style
    python benchmarks/speed.py --compare inference   # iterative against direct inference, the same action samples
    python benchmarks/speed.py --compare scripts     # each script's update, fit, environment step and memory
    python benchmarks/speed.py --compare growth      # by trials, batch, width, buffer; --from-csv: the figure again

Each of `--blocks` blocks runs every contestant for `--updates` updates, in an order drawn anew; a ratio is the median
over the blocks of (contestant's time / first contestant's time in the same block). The floor is the update's matrix
products, forward and backward, and nothing else, at the same sizes. Stable-Baselines3 takes part where it is installed
(`pip install stable-baselines3==2.9.2`); the other two forms are written here after their descriptions: separate
networks, Adam as PyTorch comes, a second policy forward for α. Writes benchmarks/results/speed_COMPARE.csv. Importing
sac_iterative.py, or another script that calls mallopt as it does, makes malloc keep freed memory in the whole process.
The forms beside it profit, which by themselves would not: a conservative choice. `--processes` gives every contestant a
process of its own, still one at a time and in turn: what each costs who uses it alone. Writes speed_COMPARE_processes.csv.
`--cuda-graph` replays the scripts' own updates and minibatches as the flag of that name does; speed_COMPARE_graph.csv.

`scripts` gives each script and number of trials a process of its own, for its peak memory. A step, of all trials at
once, costs environment + updates_per_step updates + (fit + roll-outs) / fit_every, as in cost.py: the part of the
environment includes acting and storing, and a fit is one to 10,000 rows that is not the first. The buffers have their
default sizes and hold 10,000 rows; evaluation is in nothing. floor_share is the floor of an update over its time, empty
for active_vem.py. Memory is the process's on the CPU, PyTorch itself included, and on CUDA that of tensors alone.

`growth` varies one number at a time, the others being --trials, --batch-size, --hidden-dim and 10,000 rows: the update
of sac_iterative.py as SAC, and the fit's minibatch of baselines/mbpo.py, whose width is 200 throughout. Writes
results/speed_growth_{trials,batch,width,buffer}.csv and figures/speed_growth.png: medians, and 10 % and 90 %
quantiles over the blocks.
"""

import csv
import dataclasses
import importlib.util
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import nn

HERE = Path(__file__).resolve().parent
OBS_DIM, ACTION_DIM = 17, 6  # HalfCheetah's and Walker2d's
ROWS = 10_000  # transitions in every buffer
SAC = {"inference": "direct", "prior": "uniform", "action_samples": 1}  # flags that make sac_iterative.py SAC
SCRIPTS = {  # name -> script, its flags beside the defaults, what they make of it
    "sac": ("sac_iterative", SAC | {"batch_size": 256}, "direct, uniform, 1 sample"),
    "iterative": ("sac_iterative", {"action_samples": 10}, "iterative, 10 samples"),
    "mbpo": ("baselines/mbpo", {}, ""), "vmbpo": ("vmbpo", {}, ""), "beta_vmbpo": ("beta_vmbpo", {}, ""),
    "active_vem": ("active_vem", {}, ""),
}
GROWTH = {"trials": (1, 2, 5, 10), "batch": (64, 128, 256, 512, 1024), "width": (256, 512, 1024),
          "buffer": (10_000, 100_000, 1_000_000)}
COLUMN = {"trials": "trials", "batch": "batch_size", "width": "hidden_dim", "buffer": "rows"}  # what grows
QUICK = {"blocks": 2, "updates": 2, "batch_size": 16, "hidden_dim": 16}  # at most
QUICK_GROWTH = {"trials": (1, 2), "batch": (8, 16), "width": (8, 16), "buffer": (100, 1_000)}
QUICK_SCRIPT = {"batch_size": 16, "hidden_dim": 16, "model_dim": 16, "buffer_size": ROWS, "model_buffer_size": 1_000,
                "rollouts": 100, "windows": 4, "window_length": 5}  # where a script has such a flag


@dataclasses.dataclass
class Args:
    compare: Literal["sac", "fit", "inference", "scripts", "growth"] = "sac"  # what is compared
    threads: tuple[int, ...] = (1,)  # of torch, one table each
    blocks: int = 12  # paired measurements
    updates: int = 20  # updates per contestant and block
    batch_size: int = 256  # rows per update; in scripts, the script's own
    hidden_dim: int = 256  # width of actor and critics; in scripts, the script's own
    trials: int = 1  # independent agents side by side; the other forms train one; in scripts, --script-trials
    device: str = "cpu"  # cpu, cuda, or one table each: cpu,cuda
    cuda_graph: bool = False  # the collection's own updates and minibatches as CUDA graphs; needs --device cuda
    processes: bool = False  # a process for each contestant of sac, fit and inference; default: one for all
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # rows of --compare scripts
    script_trials: tuple[int, ...] = (1, 5)  # numbers of trials of --compare scripts, one row each
    out_dir: str = ""  # where results/ and figures/ are; default: benchmarks
    quick: bool = False  # tiny sizes and few blocks, to see that everything works; needs --out-dir
    from_csv: bool = False  # draw the figure of --compare growth again


def load(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), HERE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def random_rows(n, trials=()):
    """obs, action, reward, next_obs, terminated of n random transitions: (*trials, n, width) each."""
    make = lambda width: torch.randn(*trials, n, width)
    return make(OBS_DIM), make(ACTION_DIM).tanh(), make(1), make(OBS_DIM), torch.zeros(*trials, n, 1)


# --- the collection's own


def fill(buffer, n):
    """n random transitions per trial, none of which ends its episode; for active_vem.py, in episodes of 200 steps."""
    columns = [torch.randn(len(buffer.trial), n, width) for width in buffer.widths]
    columns[1].tanh_(), columns[4].zero_()
    if len(columns) == 9:  # its rows end in the time since the episode began
        columns[-1] = (torch.arange(n) % 200.0).view(1, n, 1).expand_as(columns[-1])
    buffer.load_state_dict({"storage": torch.cat(columns, -1), "added": torch.tensor(n)})
    return buffer


def own_sac(args, **flags):
    script = load("sac_iterative")
    agent = script.Agent(script.Args(batch_size=args.batch_size, hidden_dim=args.hidden_dim, trials=args.trials,
                                     device=args.device, cuda_graph=args.cuda_graph, **SAC | flags), OBS_DIM, ACTION_DIM)
    buffer = fill(script.ReplayBuffer(args.trials, ROWS, OBS_DIM, ACTION_DIM, args.device), ROWS)
    return lambda: agent.learn(buffer)


def own_buffer(args, rows):
    script = load("baselines/mbpo")
    return fill(script.ReplayBuffer(args.trials, rows, OBS_DIM, ACTION_DIM, args.device), rows)


def own_fit(args, buffer=None):
    """One minibatch of baselines/mbpo.py's ensemble."""
    script = load("baselines/mbpo")
    flags = script.Args(batch_size=args.batch_size, trials=args.trials, device=args.device, cuda_graph=args.cuda_graph)
    agent = script.Agent(flags, OBS_DIM, ACTION_DIM)
    return minibatch(agent, buffer or own_buffer(args, ROWS))


def minibatch(agent, buffer):
    """What fit_model repeats, in any of the model-based scripts."""
    args, count = agent.args, int(buffer.count)
    shape = (args.ensemble_size, args.trials, args.batch_size)
    bootstrap = torch.randint(count, (*shape[:2], count), dtype=torch.int32, device=args.device)
    columns = buffer.storage[:, :count].split(buffer.widths, -1)
    weights = [agent.transition_weights(columns)] if hasattr(agent, "transition_weights") else []

    def step():
        rows = bootstrap.gather(-1, torch.randint(count, shape, device=args.device))
        batch = buffer.storage[buffer.trial, rows].split(buffer.widths, -1)
        loss = agent.model_loss(batch, *(weight[buffer.trial, rows] for weight in weights))
        agent.opts["model"].zero_grad()
        loss.backward()
        agent.opts["model"].step()

    return sys.modules[type(agent).__module__].captured(step, args)


# --- the forms they are compared with


class SquashedGaussian(nn.Module):
    def __init__(self, hidden_dim):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(OBS_DIM, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU())
        self.mean, self.log_std = nn.Linear(hidden_dim, ACTION_DIM), nn.Linear(hidden_dim, ACTION_DIM)

    def forward(self, obs):
        x = self.trunk(obs)
        normal = torch.distributions.Normal(self.mean(x), (-5 + 3.5 * (self.log_std(x).tanh() + 1)).exp())
        u = normal.rsample()
        action = u.tanh()
        log_prob = normal.log_prob(u) - torch.log(1 - action.square() + 1e-6)
        return action, log_prob.sum(1, keepdim=True)


def separate_sac(args):
    """SAC as single-file collections have it: separate twins, Adam as it comes, policy updated once per critic update."""
    critic = lambda: nn.Sequential(nn.Linear(OBS_DIM + ACTION_DIM, args.hidden_dim), nn.ReLU(),
                                   nn.Linear(args.hidden_dim, args.hidden_dim), nn.ReLU(), nn.Linear(args.hidden_dim, 1))
    actor, critics, targets = SquashedGaussian(args.hidden_dim), [critic(), critic()], [critic(), critic()]
    log_alpha = torch.zeros(1, requires_grad=True, device=args.device)
    for net in (actor, *critics, *targets):
        net.to(args.device)
    critic_opt = torch.optim.Adam([p for net in critics for p in net.parameters()], 3e-4)
    actor_opt, alpha_opt = torch.optim.Adam(actor.parameters(), 3e-4), torch.optim.Adam([log_alpha], 3e-4)
    arrays = [column.numpy() for column in random_rows(ROWS)]

    def update():
        index = np.random.randint(ROWS, size=args.batch_size)
        obs, action, reward, next_obs, terminated = (torch.as_tensor(x[index], device=args.device) for x in arrays)
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            next_action, log_prob = actor(next_obs)
            next_q = torch.min(*(net(torch.cat([next_obs, next_action], 1)) for net in targets)) - alpha * log_prob
            target = reward + (1 - terminated) * 0.99 * next_q
        loss = sum(F.mse_loss(net(torch.cat([obs, action], 1)), target) for net in critics)
        critic_opt.zero_grad()
        loss.backward()
        critic_opt.step()

        policy_action, log_prob = actor(obs)
        q = torch.min(*(net(torch.cat([obs, policy_action], 1)) for net in critics))
        loss = (alpha * log_prob - q).mean()
        actor_opt.zero_grad()
        loss.backward()
        actor_opt.step()
        with torch.no_grad():
            _, log_prob = actor(obs)
        loss = (-log_alpha.exp() * (log_prob - ACTION_DIM)).mean()
        alpha_opt.zero_grad()
        loss.backward()
        alpha_opt.step()
        for net, slow in zip(critics, targets):
            for p, p_slow in zip(net.parameters(), slow.parameters()):
                p_slow.data.copy_(0.005 * p.data + 0.995 * p_slow.data)

    return update


def stable_baselines_sac(args):
    """Stable-Baselines3's SAC.train, or None where it is not installed."""
    if not importlib.util.find_spec("stable_baselines3"):
        return None
    import gymnasium as gym
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC("MlpPolicy", gym.make("HalfCheetah-v5"), batch_size=args.batch_size, buffer_size=ROWS, device=args.device,
                policy_kwargs={"net_arch": [args.hidden_dim] * 2})
    model.set_logger(Logger(None, []))
    for obs, action, reward, next_obs, terminated in zip(*(column.numpy() for column in random_rows(ROWS))):
        model.replay_buffer.add(obs[None], next_obs[None], action[None], reward, terminated, [{}])
    return lambda: model.train(1, args.batch_size)


class BatchedEnsemble(nn.Module):
    """The ensemble as mbpo_pytorch has it: one `baddbmm` per layer, decay as a term of the loss, shared bounds."""

    def __init__(self, members=7, width=200):
        super().__init__()
        dims = (OBS_DIM + ACTION_DIM, *[width] * 4, 2 * (OBS_DIM + 1))
        self.weights = nn.ParameterList(torch.randn(members, *pair) / 2 / pair[0] ** 0.5 for pair in pairwise(dims))
        self.biases = nn.ParameterList(torch.zeros(members, 1, dim) for dim in dims[1:])
        self.max_log_var = nn.Parameter(torch.full((1, OBS_DIM + 1), 0.5))
        self.min_log_var = nn.Parameter(torch.full((1, OBS_DIM + 1), -10.0))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            x = x * x.sigmoid() if i < 4 else x
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)


def batched_fit(args):
    model, decay = BatchedEnsemble().to(args.device), (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    obs, action, reward, next_obs, _ = (column.numpy() for column in random_rows(ROWS))
    inputs, targets = np.concatenate([obs, action], 1), np.concatenate([next_obs - obs, reward], 1)

    def minibatch():
        index = np.random.randint(ROWS, size=(7, args.batch_size))
        x, y = (torch.as_tensor(array[index], device=args.device) for array in (inputs, targets))
        mean, log_var = model(x)
        loss = (((mean - y).square() * (-log_var).exp()).mean((1, 2)) + log_var.mean((1, 2))).sum()
        loss = loss + 0.01 * (model.max_log_var.sum() - model.min_log_var.sum())
        loss = loss + sum(rate * weight.square().sum() / 2 for rate, weight in zip(decay, model.weights))
        opt.zero_grad()
        loss.backward()
        opt.step()

    return minibatch


# --- the floor


def products(stack, batch, dims, weights=True, inputs=True, last_input=False):
    """(stack, m, k, n) of the matrix products of a perceptron's forward pass, weight gradients and input gradients."""
    shapes = [(stack, batch, *pair) for pair in pairwise(dims)]
    backward_weights = [(stack, k, batch, n) for k, n in pairwise(dims)] if weights else []
    backward_inputs = [(stack, batch, n, k) for i, (k, n) in enumerate(pairwise(dims)) if i or last_input] if inputs else []
    return shapes + backward_weights + backward_inputs


def floor(args, iters=0, samples=0):
    """A function that multiplies matrices of the shapes of one update, into memory that is there already.

    iters: of iterative inference, each with the critics' gradient at `samples` actions per row; 0: direct inference.
    """
    hidden, lambdas = (args.hidden_dim, args.hidden_dim), 4 * ACTION_DIM  # λ and its gradient; λ and the gate
    policy = (OBS_DIM + lambdas, *hidden, lambdas) if iters else (OBS_DIM, *hidden, 2 * ACTION_DIM)
    critic, n, batch = (OBS_DIM + ACTION_DIM, *hidden, 1), args.trials, args.batch_size
    samples = samples or (10 if args.compare == "inference" else 1)
    if args.compare == "fit":
        shapes = products(7 * n, batch, (OBS_DIM + ACTION_DIM, *[200] * 4, 2 * (OBS_DIM + 1)))
    else:
        climb, steps = products(2 * n, samples * batch, critic, weights=False, last_input=True), max(iters, 1)
        shapes = [*iters * climb, *steps * products(n, batch, policy, False, False),
                  *products(2 * n, batch, critic, False, False),  # target
                  *products(2 * n, batch, critic),  # critics
                  *steps * products(n, batch, policy), *(iters + 1) * climb]  # actor
    pairs = [(torch.randn(s, m, k, device=args.device), torch.randn(s, k, o, device=args.device)) for s, m, k, o in shapes]
    outs = [a @ b for a, b in pairs]

    def multiply():
        for (a, b), out in zip(pairs, outs):
            torch.bmm(a, b, out=out)

    return multiply


# --- the measurement


def contestants(args):
    """name -> what makes a function of one update, or None; the first one is what the others are divided by."""
    found = {"floor": lambda: floor(args)}
    if args.compare == "sac":
        return {"sac_iterative.py": lambda: own_sac(args), "Stable-Baselines3": lambda: stable_baselines_sac(args),
                "CleanRL-style": lambda: separate_sac(args)} | found
    if args.compare == "fit":
        return {"baselines/mbpo.py": lambda: own_fit(args), "mbpo_pytorch-style": lambda: batched_fit(args)} | found
    make = lambda inference, k: own_sac(args, inference=inference, inference_iters=k, action_samples=10, prior="gaussian")
    return {f"{inference}, K={k}, 10 samples": lambda inference=inference, k=k: make(inference, k)
            for inference, k in (("direct", 1), ("iterative", 1), ("iterative", 2), ("iterative", 5))} | found


def milliseconds(update, count, device):
    """Per call, of so many calls."""
    before = time.perf_counter()
    for _ in range(count):
        update()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - before) / count


def measure(args, updates, calls={}, clock=milliseconds):
    """Milliseconds per call of each contestant in each block: name -> list. calls: where they are not --updates."""
    order, found = random.Random(0), {name: [] for name in updates}
    for block in range(-1, args.blocks):  # the first one warms up
        for name in order.sample([*updates], len(updates)):
            ms = clock(updates[name], calls.get(name, args.updates), args.device)
            if block >= 0:
                found[name].append(ms)
    return found


def alone(args, threads, name, count, made={}):
    """milliseconds of one contestant, in its own process; None where what it needs is not installed."""
    if not made:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        made[name] = contestants(args)[name]()
    return made[name] and milliseconds(made[name], count, args.device)


def measure_processes(args, threads):
    """measure, with a process for each contestant."""
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in contestants(args)}
        run = lambda name, count: pools[name].submit(alone, args, threads, name, count).result()
        there = {name: name for name in pools if run(name, 1) is not None}
        return measure(args, there, clock=lambda name, count, device: run(name, count))


def spread(values):
    """Median, and 10 % and 90 % quantiles."""
    values = sorted(values)
    return statistics.median(values), values[len(values) // 10], values[-1 - len(values) // 10]


def place(device):
    """Columns that say where and when a row was measured."""
    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"torch": torch.__version__, "machine": name, "date": time.strftime("%Y-%m-%d")}


def peers(args):
    """Rows of --compare sac, fit and inference."""
    rows = []
    for device, threads in product(args.device.split(","), args.threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        one = dataclasses.replace(args, device=device)
        if args.processes:
            found = measure_processes(one, threads)
        else:
            updates = {name: make() for name, make in contestants(one).items()}
            found = measure(one, {name: update for name, update in updates.items() if update})
        first = next(iter(found))
        for name, ms in found.items():
            ratio, low, high = spread(x / y for x, y in zip(ms, found[first]))
            rows.append({"compare": args.compare, "contestant": name, "threads": threads, "device": device,
                         "batch_size": args.batch_size, "hidden_dim": args.hidden_dim, "trials": args.trials,
                         "ms_per_update": f"{statistics.median(ms):.4g}", "ratio_to_first": f"{ratio:.3g}",
                         "ratio_low": f"{low:.3g}", "ratio_high": f"{high:.3g}",
                         "blocks": args.blocks, **place(device)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


# --- the scripts at their defaults


def script_parts(args, name):
    """The script's flags, and what a step of it consists of: part -> function. args: trials, device, quick."""
    path, own, _ = SCRIPTS[name]
    script, latent = load(path), name == "active_vem"
    sizes = {key: value for key, value in QUICK_SCRIPT.items() if args.quick and hasattr(script.Args, key)}
    flags = script.Args(trials=args.trials, device=args.device, cuda_graph=args.cuda_graph, **own | sizes)
    envs = script.make_envs("Pendulum-v1" if latent else "HalfCheetah-v5", args.trials)
    dims = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = script.Agent(dataclasses.replace(flags), *dims)
    ring = lambda n: script.ReplayBuffer(args.trials, n, *dims, args.device)
    buffer = (script.EpisodeBuffer(args.trials, flags.buffer_size, *dims, agent.latent_dim, args.device) if latent else
              ring(flags.buffer_size))
    fill(buffer, ROWS)
    column = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float32, device=args.device).view(args.trials, 1, -1)
    obs, update_beta = envs.reset(seed=0)[0], getattr(agent, "update_beta", lambda: None)
    last, age = agent.begin(1) if latent else (), 0  # what precedes the observation; steps since the episode began

    def environment():
        nonlocal obs, last, age
        state = agent.perceive(*last[:2], column(obs), last[2]) if latent else column(obs)
        action = agent.act(state)
        next_obs, reward, terminated, truncated, _ = envs.step(action[:, 0].cpu().numpy())
        columns = [column(obs), action, column(reward), column(next_obs), column(terminated)]
        zero = torch.zeros_like(columns[2])
        buffer.add(*columns, *([*last, zero + age] if latent else [zero] * (len(buffer.widths) - 5)))
        obs, age, last = next_obs, age + 1, (state, action, columns[2])
        if latent and truncated.all():  # Pendulum's episodes end in all trials at once
            last, age = agent.begin(1), 0
        update_beta()

    if latent:
        return flags, {"fit": lambda: agent.fit_scales(buffer), "environment": environment,
                       "update": lambda: agent.learn(buffer, flags.updates_per_step)}
    if not hasattr(agent, "fit_model"):
        return flags, {"environment": environment, "update": lambda: agent.learn(buffer)}
    model_buffer, step = ring(flags.model_buffer_size), () if name == "mbpo" else (0,)
    agent.args.max_batches = 0  # what a fit does beside its minibatches, which are a part of their own
    return flags, {"fit": lambda: agent.fit_model(buffer), "minibatch": minibatch(agent, buffer),
                   "rollouts": lambda: agent.imagine(buffer, model_buffer, 0), "environment": environment,
                   "update": lambda: agent.learn(buffer, model_buffer, *step)}


def fit_batches(flags, count):
    """Minibatches of a fit to so many rows that is not the first, by the script's own rule."""
    trained_on = count - math.ceil(count / 5)  # the others are held out
    return min(max(flags.epochs * trained_on // flags.batch_size, flags.min_batches), flags.max_batches)


def measure_script(args):
    """The row of one script, device and number of threads and trials, measured in this process."""
    (name,), (threads,), (trials,) = args.scripts, args.threads, args.script_trials
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    args = dataclasses.replace(args, trials=trials)
    flags, parts = script_parts(args, name)
    for part in 2 * [*parts.values()]:  # once more with the optimizers' moments in place
        part()
    # A process inherits the peak of the one that started it, which is smaller as it has measured nothing.
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if args.device == "cpu" else
            torch.cuda.max_memory_allocated())
    if name != "active_vem":  # after the peak has been read: the floor has matrices of its own
        sizes = {"compare": "sac", "batch_size": flags.batch_size, "hidden_dim": flags.hidden_dim}
        inference = (flags.inference_iters, flags.action_samples) if name == "iterative" else ()
        parts["floor"] = floor(dataclasses.replace(args, **sizes), *inference)
    calls = {"fit": 1, "rollouts": 1, "update": max(1, args.updates // flags.updates_per_step)}
    found = measure(args, parts, calls)
    found["update"] = [ms / flags.updates_per_step for ms in found["update"]]
    (update, low, high), ms = spread(found["update"]), {part: statistics.median(found[part]) for part in found}
    if "minibatch" in ms:
        ms["fit"] += fit_batches(flags, ROWS) * ms["minibatch"]
    if "floor" in ms:
        ms["share"] = statistics.median(x / y for x, y in zip(found["floor"], found["update"]))
    every = flags.scale_every if name == "active_vem" else getattr(flags, "fit_every", 1)  # it fits but its scales
    step = ms["environment"] + flags.updates_per_step * update + (ms.get("fit", 0) + ms.get("rollouts", 0)) / every
    numbers = {"ms_per_update": update, "ms_low": low, "ms_high": high, "ms_per_fit_minibatch": ms.get("minibatch"),
               "ms_per_step": step, "environment_ms": ms["environment"], "fit_ms": ms.get("fit"),
               "rollouts_ms": ms.get("rollouts"), "updates_per_second": 1000 * trials / update,
               "floor_share": ms.get("share"), "peak_mb": peak / 1e6}
    path, _, setting = SCRIPTS[name]
    return {"script": f"{path}.py", "setting": setting, "trials": trials, "device": args.device, "threads": threads,
            **{key: "" if value is None else f"{value:.4g}" for key, value in numbers.items()},
            "updates_per_step": flags.updates_per_step, "blocks": args.blocks, **place(args.device)}


def in_a_process(args):
    """The row of measure_script, by this script in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve())]
        for name, value in vars(dataclasses.replace(args, out_dir=folder)).items():
            flag = f"{'no-' * (value is False)}{name.replace('_', '-')}"
            values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            command += [f"--{flag}", *map(str, values)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # MuJoCo leaves its warnings there
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(1)
        with (Path(folder) / "results" / "speed_scripts.csv").open() as file:
            return next(csv.DictReader(file))


def scripts(args):
    """Rows of --compare scripts, which it prints as they come."""
    shown = {"script": 17, "setting": 25, "trials": 6, "device": 6, "threads": 7, "ms_per_update": 13,
             "ms_per_fit_minibatch": 20, "ms_per_step": 11, "updates_per_second": 18, "floor_share": 11, "peak_mb": 7}
    show = lambda row: print("  ".join(f"{row[key]!s:{'<' if key in ('script', 'setting') else '>'}{width}}"
                                       for key, width in shown.items()), flush=True)
    show({column: column for column in shown})
    jobs, rows = [*product(args.device.split(","), args.threads, args.scripts, args.script_trials)], []
    for device, threads, name, trials in jobs:
        one = dataclasses.replace(args, device=device, threads=(threads,), scripts=(name,), script_trials=(trials,))
        rows.append(measure_script(one) if len(jobs) == 1 else in_a_process(one))
        show(rows[-1])
    return rows


# --- how the cost grows


def growth(args, what):
    """Rows of one csv of --compare growth."""
    rows, values = [], (QUICK_GROWTH if args.quick else GROWTH)[what]
    for device in args.device.split(","):
        torch.set_num_threads(*args.threads)
        torch.manual_seed(0)
        found, sizes = {}, {}
        for value in values:
            one = dataclasses.replace(args, device=device, **{} if what == "buffer" else {COLUMN[what]: value})
            sizes[value] = {"trials": one.trials, "batch_size": one.batch_size, "hidden_dim": one.hidden_dim,
                            "rows": value if what == "buffer" else ROWS}
            if what == "buffer":
                buffer = own_buffer(one, value)
                found["sample", value] = lambda buffer=buffer: buffer.sample(args.batch_size)
                found["fit minibatch", value] = own_fit(one, buffer)
            else:
                found["update", value] = own_sac(one)
            if what in ("trials", "batch"):
                found["fit minibatch", value] = own_fit(one)
        times = measure(one, found)
        for name, value in sorted(times, key=lambda key: key[0]):
            ms, low, high = spread(times[name, value])
            ratio = statistics.median(x / y for x, y in zip(times[name, value], times[name, values[0]]))
            rows.append({"quantity": name, **sizes[value], **({} if name == "update" else {"hidden_dim": ""}),
                         "ms": f"{ms:.4g}", "ms_low": f"{low:.4g}", "ms_high": f"{high:.4g}",
                         "ratio_to_first": f"{ratio:.3g}", "threads": args.threads[0], "device": device,
                         "blocks": args.blocks, **place(device)})
            print(f"{name}, {COLUMN[what]} {value:,}, {device}: {ms:.4g} ms ({low:.4g} to {high:.4g}), "
                  f"{ratio:.3g} times the first", flush=True)
    return rows


def read_growth(folder):
    """name of the csv -> (quantity, device) -> columns x, ms, low, high."""
    tables = {}
    for what, column in COLUMN.items():
        with (folder / f"speed_growth_{what}.csv").open() as file:
            tables[what] = {}
            for row in csv.DictReader(file):
                x, ms, low, high = point = [float(row[name]) for name in (column, "ms", "ms_low", "ms_high")]
                if not (x > 0 and 0 < low <= ms <= high):
                    raise ValueError
                tables[what].setdefault((row["quantity"], row["device"]), []).append(point)
        tables[what] = {line: [*zip(*points)] for line, points in tables[what].items()}
        if not tables[what]:
            raise ValueError
    return tables


def draw(tables, path):
    """A panel per csv, milliseconds against what grows; dotted, what would be in proportion to it."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    devices = {device for lines in tables.values() for _, device in lines}
    labels = {"update": "update of sac_iterative.py, SAC", "fit minibatch": "fit minibatch of baselines/mbpo.py",
              "sample": "sample of a batch"}
    titles = {"trials": "trials side by side", "batch": "rows per update", "width": "width of actor and critics",
              "buffer": "rows in the buffer"}
    for axes, (what, lines) in zip(figure.subplots(1, 4), tables.items()):
        for (name, device), (x, ms, low, high) in lines.items():
            color, style = f"C{[*labels].index(name)}", "-" if device == "cpu" else "--"
            reach = [[m - l for m, l in zip(ms, low)], [h - m for m, h in zip(ms, high)]]
            axes.errorbar(x, ms, reach, marker=".", capsize=3, color=color, ls=style,
                          label=labels[name] + f", {device}" * (len(devices) > 1))
            if what != "buffer":  # of which no part should
                axes.plot(x, [ms[0] * value / x[0] for value in x], ":", color=color, lw=1)
        axes.set(title=titles[what], xscale="log", yscale="log", ylabel="milliseconds" if what == "trials" else None)
        axes.set_xticks(x, [f"{value:,.0f}" for value in x])
        axes.xaxis.minorticks_off()
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


# --- what is written


def refusal(args, out):
    """Why this cannot work, in one line; empty if it can."""
    least = {name: getattr(args, name) for name in ("blocks", "updates", "batch_size", "hidden_dim", "trials")}
    least |= {name: min(getattr(args, name), default=0) for name in ("threads", "script_trials")}
    for name, value in least.items():
        if value < 1:
            return f"--{name.replace('_', '-')} {value}: must be at least 1"
    for device in args.device.split(","):
        if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
            return f"--device {device}: not there; use cpu, cuda or cpu,cuda"
    if args.cuda_graph and (args.device != "cuda" or args.compare == "growth"):
        return "--cuda-graph: needs --device cuda, and another comparison than growth"
    unknown = [name for name in args.scripts if name not in SCRIPTS]
    if unknown or not args.scripts:
        return f"--scripts {' '.join(unknown)}: known are {', '.join(SCRIPTS)}"
    if args.quick and not args.out_dir:
        return "--quick: needs --out-dir, its numbers mean nothing and would replace measured ones"
    if args.from_csv and args.compare != "growth":
        return f"--from-csv: only with --compare growth, not with {args.compare}"
    if args.processes and args.compare in ("scripts", "growth"):
        return f"--processes: with --compare sac, fit or inference, not with {args.compare}"
    if args.compare == "growth" and len(args.threads) > 1:
        return "--threads: one number with --compare growth"
    try:
        if args.from_csv:
            read_growth(out / "results")
    except (OSError, KeyError, ValueError, TypeError):
        return f"--from-csv: not all of speed_growth_{{{','.join(COLUMN)}}}.csv are in {out / 'results'} and in order"
    try:
        for folder in ("results", "figures"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out-dir {args.out_dir}: {error.strerror}"
    return ""


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(args):
    out = Path(args.out_dir or HERE)
    if message := refusal(args, out):
        print(f"speed.py: error: {message}", file=sys.stderr)
        return 2
    if args.quick:
        args = dataclasses.replace(args, **{name: min(getattr(args, name), most) for name, most in QUICK.items()})
    if args.compare != "growth":
        name = f"speed_{args.compare}{'_processes' * args.processes}{'_graph' * args.cuda_graph}.csv"
        write(out / "results" / name, (scripts if args.compare == "scripts" else peers)(args))
        return 0
    for what in [] if args.from_csv else GROWTH:
        write(out / "results" / f"speed_growth_{what}.csv", growth(args, what))
    draw(read_growth(out / "results"), out / "figures" / "speed_growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
