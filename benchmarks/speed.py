"""What updates, fits, environment steps and memory cost here, and beside other people's: one command per table.

    python benchmarks/speed.py --table sac           # an update of SAC / Stable-Baselines3's; 2 threads, 5 trials
    python benchmarks/speed.py --table fit           # a minibatch of an ensemble's fit / one in mbpo_pytorch's form
    python benchmarks/speed.py --table inference     # an update of iterative inference / Stable-Baselines3's SAC
    python benchmarks/speed.py --table steps         # environment steps of the model-based scripts at their defaults
    python benchmarks/speed.py --table latent        # an update of active_vem.py's agents
    python benchmarks/speed.py --table memory        # peak memory at full buffers

writes benchmarks/results/speed_TABLE.csv. Each contestant, alone in its process, runs a block when told to: A B A B
…, never two at once. A ratio is that of two neighbouring blocks, per trial; shown are its median, least and most over
`--blocks` pairs. Peers come at their own defaults, and once more (`same_`) with float32 products as precise as ours.
A block is `--updates` updates, or a fit of 100 minibatches with all it does beside them, or the environment steps
from one fit to the next, the fit among them; evaluation and checkpoints are not in it. Stable-Baselines3 is optional.
"""

import dataclasses
import importlib.util
import platform
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import at_least, build, commit, fail, load_script, say_row, write
from torch import nn

TASK = "HalfCheetah-v4"  # 17 observations, 6 actions
SAC = {"inference": "direct", "prior": "uniform", "action_samples": 1, "batch_size": 256}  # which is SAC
FULL = {"env_id": "Walker2d-v4", "fit_every": 1,  # memory does not ask for more minibatches
        "min_first_batches": 5, "min_batches": 5, "max_batches": 5}
HUNDRED = {"min_first_batches": 100, "min_batches": 100, "max_batches": 100}  # minibatches of a fit


@dataclasses.dataclass
class Args:
    table: Literal["sac", "fit", "inference", "steps", "latent", "memory"] = "sac"  # what is measured
    blocks: int = 12  # pairs of neighbouring blocks, or blocks of a contestant without a peer
    updates: int = 50  # per block; of minibatches 100
    matmul_precision: Literal["default", "highest", "high", "medium"] = "default"  # ours; default: each script's own
    device: Literal["cpu", "cuda"] = "cpu"  # where it is measured
    cuda_graph: bool = False  # replay our own updates and minibatches as CUDA graphs
    only: str = ""  # only the rows with this text in their name
    out: str = ""  # name of the csv; default: speed_TABLE


@dataclasses.dataclass
class Contestant:
    kind: str  # of KINDS
    script: str = ""  # of ours
    flags: dict = dataclasses.field(default_factory=dict)  # of the script, beside its defaults
    rows: int = 10_000  # transitions in the buffer per trial; 0: as many as it holds
    threads: int = 1  # of torch
    calls: int = 0  # per block; 0: --updates
    parts: int = 1  # a call's time is divided by so many: trials, minibatches
    precision: str = "default"  # of float32 products; default: the script's, and PyTorch's for peers
    device: str = "cpu"


def rows_of(table):
    """Name of a row -> our contestant, and the peer's or None."""
    if table == "sac":
        for trials, threads in ((1, 1), (1, 2), (5, 1)):
            name = f"SAC update, {trials} trial(s), {threads} thread(s)"
            own = Contestant("update", "sac_iterative", SAC | {"trials": trials}, threads=threads, parts=trials)
            yield name, own, Contestant("sb3", threads=threads)
    if table == "fit":
        own = Contestant("fit", "mbpo", HUNDRED, calls=1, parts=100)
        yield "minibatch of a fit", own, Contestant("mbpo_pytorch", calls=100)
    if table == "inference":
        flags = {"inference_iters": 2, "action_samples": 10, "batch_size": 128}
        yield "iterative, K = 2, 10 samples", Contestant("update", "sac_iterative", flags), Contestant("sb3")
    if table == "steps":
        for rows, trials in ((10_000, 1), (10_000, 3), (100_000, 1)):
            own = Contestant("steps", "beta_vmbpo", {"trials": trials}, rows, calls=250, parts=trials)
            yield f"beta_vmbpo, {rows:,} rows, {trials} trial(s)", own, None
    if table == "latent":
        for agent in ("generative", "discriminative"):
            flags = {"agent": agent, "env_id": "benchmarks.tasks:PositionsPendulum-v1"}
            yield agent, Contestant("update", "active_vem", flags, rows=1_000), None
    if table == "memory":
        yield "sac_iterative, full buffer", Contestant("steps", "sac_iterative", rows=0, calls=4), None
        for script in ("mbpo", "vmbpo", "beta_vmbpo"):
            yield f"{script}, full buffers", Contestant("steps", script, FULL, rows=0, calls=4), None


# Ours


def fill(buffer, n):
    """n random transitions per trial, none of which ends its episode; active_vem.py's are in episodes of 200."""
    for place in torch.arange(n).split(10_000):  # full buffers leave no room for copies
        columns = [torch.randn(len(buffer.storage), len(place), width) for width in buffer.widths]
        columns[1].tanh_()
        for column in columns[4:]:
            column.zero_()
        if len(columns) == 7:
            columns[6] += (place % 200)[:, None]
        buffer.storage[:, place] = torch.cat(columns, -1).to(buffer.storage.device)
    buffer.added += n


def prepare(contestant):
    """Flags, environments, agent and buffers of one of our scripts."""
    flags = {"env_id": TASK, "device": contestant.device} | contestant.flags
    script, args, envs, agent, buffer = build(contestant.script, **flags)
    fill(buffer, contestant.rows or args.buffer_size)
    if not hasattr(agent, "imagine"):
        return args, envs, agent, [buffer]
    sizes = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    return args, envs, agent, [buffer, script.ReplayBuffer(args.trials, args.model_buffer_size, *sizes, args.device)]


def own_call(contestant):
    """A fit, or an update; sac_iterative.py and active_vem.py update as often per step as --updates-per-step says."""
    _, _, agent, buffers = prepare(contestant)
    return lambda: agent.fit_model(buffers[0]) if contestant.kind == "fit" else agent.learn(*buffers)


def own_step(contestant):
    """An environment step of the script's own loop, beginning with a fit that is not the first."""
    args, envs, agent, buffers = prepare(contestant)
    column = lambda x: torch.as_tensor(x, dtype=torch.float32, device=args.device).view(args.trials, 1, -1)
    obs, count, model_based = column(envs.reset(seed=0)[0]), 0, hasattr(agent, "imagine")
    if model_based:
        agent.fit_model(buffers[0])

    def step():
        nonlocal obs, count
        if model_based and count % args.fit_every == 0:
            agent.fit_model(buffers[0])
            agent.imagine(*buffers, 0)
        action = agent.act(obs)
        next_obs, reward, terminated, *_ = envs.step(action[:, 0].cpu().numpy())
        next_obs = column(next_obs)
        buffers[0].add(obs, action, column(reward), next_obs, column(terminated))
        agent.learn(*buffers)
        if hasattr(agent, "update_beta"):
            agent.update_beta()
        obs, count = next_obs, count + 1

    return step


# Theirs


def sb3(contestant):
    """Stable-Baselines3's SAC.train at its defaults."""
    import gymnasium as gym
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC("MlpPolicy", gym.make(TASK), buffer_size=contestant.rows, device=contestant.device)
    model.set_logger(Logger(None, []))
    noise, zero = np.random.default_rng(0), np.zeros(1)
    for _ in range(contestant.rows):
        obs, next_obs = noise.normal(size=(2, 1, 17))
        model.replay_buffer.add(obs, next_obs, noise.uniform(-1, 1, (1, 6)), noise.normal(size=1), zero, [{}])
    return lambda: model.train(1, model.batch_size)


class BatchedEnsemble(nn.Module):
    """The ensemble as mbpo_pytorch has it: one `baddbmm` per layer, decay as a term of the loss, shared bounds."""

    def __init__(self, obs_dim, action_dim, members=7, width=200):
        super().__init__()
        dims = (obs_dim + action_dim, *[width] * 4, 2 * (obs_dim + 1))
        self.weights = nn.ParameterList(torch.randn(members, *pair) / 2 / pair[0] ** 0.5 for pair in pairwise(dims))
        self.biases = nn.ParameterList(torch.zeros(members, 1, dim) for dim in dims[1:])
        self.max_log_var = nn.Parameter(torch.full((1, obs_dim + 1), 0.5))
        self.min_log_var = nn.Parameter(torch.full((1, obs_dim + 1), -10.0))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            x = x * x.sigmoid() if i < 4 else x
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)


def mbpo_pytorch(contestant):
    model, decay = BatchedEnsemble(17, 6).to(contestant.device), (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    opt, noise = torch.optim.Adam(model.parameters(), 1e-3), np.random.default_rng(0)
    inputs, targets = (noise.normal(size=(contestant.rows, width)).astype(np.float32) for width in (17 + 6, 17 + 1))

    def minibatch():
        index = noise.integers(contestant.rows, size=(7, 256))
        x, y = (torch.as_tensor(array[index], device=contestant.device) for array in (inputs, targets))
        mean, log_var = model(x)
        loss = (((mean - y).square() * (-log_var).exp()).mean((1, 2)) + log_var.mean((1, 2))).sum()
        loss = loss + 0.01 * (model.max_log_var.sum() - model.min_log_var.sum())
        loss = loss + sum(rate * weight.square().sum() / 2 for rate, weight in zip(decay, model.weights))
        opt.zero_grad()
        loss.backward()
        opt.step()

    return minibatch


# The measurement

KINDS = {"update": own_call, "fit": own_call, "steps": own_step, "sb3": sb3, "mbpo_pytorch": mbpo_pytorch}
CALLS = []  # in a contestant's process: its call


def begin(contestant):
    """In its process: make a contestant; returns the precision of its products."""
    torch.set_num_threads(contestant.threads)
    torch.manual_seed(0)
    CALLS.append(KINDS[contestant.kind](contestant))
    if contestant.precision != "default":
        torch.set_float32_matmul_precision(contestant.precision)
    if contestant.script:
        return contestant.flags.get("matmul_precision", load_script(contestant.script).Args.matmul_precision)
    return torch.get_float32_matmul_precision()


def run_block(contestant, updates):
    """In its process: milliseconds per part of a call, and the process's peak memory in MB."""
    before, calls = time.perf_counter(), contestant.calls or updates
    for _ in range(calls):
        CALLS[0]()
    if contestant.device != "cpu":
        torch.cuda.synchronize()
    ms = 1000 * (time.perf_counter() - before) / calls / contestant.parts
    # The peak is at least that of the process that started this one, which is smaller: it has made nothing.
    return ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Process:
    """A contestant that waits, alone in its process, to be told to run a block."""

    def __init__(self, contestant, stack):
        self.contestant, self.peak = contestant, 0
        self.pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        self.precision = self.ask(begin, contestant)

    def ask(self, function, *arguments):
        try:
            return self.pool.submit(function, *arguments).result()
        except Exception as error:  # whatever ended it
            fail(f"{self.contestant.kind} {self.contestant.script}: {type(error).__name__}: {error}", code=1)

    def block(self, updates):
        """Milliseconds per part of a call."""
        time.sleep(0.1)  # the threads of the one before come to rest
        ms, self.peak = self.ask(run_block, self.contestant, updates)
        return ms


def spread(values, name):
    middle, low, high = statistics.median(values), min(values), max(values)
    return {name: f"{middle:.4g}", f"{name}_low": f"{low:.4g}", f"{name}_high": f"{high:.4g}"}


def measure(args, own, peer):
    """Columns of one row."""
    columns = "peer_ms", "ratio", "ratio_low", "ratio_high"
    found = dict.fromkeys((*columns, *(f"same_{column}" for column in columns)), "")
    with ExitStack() as stack:
        process, times, variants = Process(own, stack), [], ()
        if own.kind != "steps":  # which begin with a fit, and are long
            process.block(args.updates)  # warms up
        if peer and (peer.kind != "sb3" or importlib.util.find_spec("stable_baselines3")):
            variants = ("", "highest"), ("same_", process.precision)
        else:
            times = [process.block(args.updates) for _ in range(args.blocks)]
        for name, precision in variants:
            other = Process(dataclasses.replace(peer, precision=precision), stack)
            other.block(args.updates)
            pairs = [(process.block(args.updates), other.block(args.updates)) for _ in range(args.blocks)]
            times += [mine for mine, _ in pairs]
            found[f"{name}peer_ms"] = f"{statistics.median(theirs for _, theirs in pairs):.4g}"
            found |= spread([mine / theirs for mine, theirs in pairs], f"{name}ratio")
        return {**spread(times, "ms"), "per_second": f"{1000 / statistics.median(times):.4g}", **found,
                "peak_mb": f"{process.peak:.0f}", "precision": process.precision}


def place(device):
    """Columns that say where, when and at which commit a row was measured."""
    cpu = Path("/proc/cpuinfo").exists() and re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name(device) if device != "cpu" else cpu[1] if cpu else platform.machine()
    return {"device": device, "torch": torch.__version__, "machine": name, "date": time.strftime("%Y-%m-%d"),
            "commit": commit()}


def measure_table(args):
    """Rows of the table, printed as they come."""
    for name, own, peer in rows_of(args.table):
        if args.only not in name:
            continue
        own.flags = own.flags | {"cuda_graph": args.cuda_graph}
        if args.matmul_precision != "default":
            own.flags = own.flags | {"matmul_precision": args.matmul_precision}
        for contestant in filter(None, (own, peer)):
            contestant.device = args.device
        row = {"table": args.table, "row": name, "threads": own.threads, "blocks": args.blocks}
        row |= measure(args, own, peer) | place(args.device)
        say_row(row)
        yield row


def main(args):
    at_least(args, blocks=1, updates=1)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: not there; use cpu")
    if args.cuda_graph and args.device != "cuda":
        fail("--cuda-graph: needs --device cuda")
    if not any(args.only in name for name, *_ in rows_of(args.table)):
        fail(f"--only {args.only}: the rows are {'; '.join(name for name, *_ in rows_of(args.table))}")
    write(args.out or f"speed_{args.table}", measure_table(args))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
