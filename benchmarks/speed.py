"""Whole updates against other people's, and against the matrix products alone: paired, interleaved, on one machine.

    python benchmarks/speed.py --compare sac          # one update of SAC: this one, Stable-Baselines3's, CleanRL-style
    python benchmarks/speed.py --compare fit          # one minibatch of a dynamics ensemble: this one, mbpo_pytorch-style
    python benchmarks/speed.py --compare inference    # iterative against direct inference with the same action samples

Each of `--blocks` blocks runs every contestant for `--updates` updates, in an order drawn anew; a ratio is the median over
the blocks of (contestant's time / first contestant's time in the same block). The floor is the update's matrix products,
forward and backward, and nothing else, at the same sizes. Stable-Baselines3 takes part where it is installed
(`pip install stable-baselines3==2.9.2`); the other two forms are written here after their descriptions: separate networks,
Adam as PyTorch comes, a second policy forward for α. Writes benchmarks/results/speed_COMPARE.csv.
"""

import csv
import dataclasses
import importlib.util
import platform
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

HERE = Path(__file__).resolve().parent
OBS_DIM, ACTION_DIM = 17, 6  # HalfCheetah's and Walker2d's
ROWS = 10_000  # transitions in every buffer


@dataclasses.dataclass
class Args:
    compare: Literal["sac", "fit", "inference"] = "sac"  # what is compared
    threads: tuple[int, ...] = (1,)  # of torch, one table each
    blocks: int = 12  # paired measurements
    updates: int = 20  # updates per contestant and block
    batch_size: int = 256  # rows per update
    hidden_dim: int = 256  # width of actor and critics
    trials: int = 1  # independent agents side by side; the other forms train one
    device: str = "cpu"  # cpu, cuda


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


def own_sac(args, **flags):
    script = load("sac_iterative")
    flags = {"inference": "direct", "prior": "uniform", "action_samples": 1} | flags
    agent = script.Agent(script.Args(batch_size=args.batch_size, hidden_dim=args.hidden_dim, trials=args.trials,
                                     device=args.device, **flags), OBS_DIM, ACTION_DIM)
    buffer = script.ReplayBuffer(args.trials, ROWS, OBS_DIM, ACTION_DIM, args.device)
    buffer.add(*(column.to(args.device) for column in random_rows(ROWS, (args.trials,))))
    return lambda: agent.learn(buffer)


def own_fit(args):
    """One minibatch of baselines/mbpo.py's ensemble; a fit of so many, less the fit of none, in equal parts."""
    script = load("baselines/mbpo")
    agent = script.Agent(script.Args(batch_size=args.batch_size, trials=args.trials, device=args.device), OBS_DIM, ACTION_DIM)
    buffer = script.ReplayBuffer(args.trials, ROWS, OBS_DIM, ACTION_DIM, args.device)
    buffer.add(*(column.to(args.device) for column in random_rows(ROWS, (args.trials,))))
    shape = (agent.args.ensemble_size, args.trials, args.batch_size)
    bootstrap = torch.randint(ROWS, (*shape[:2], ROWS), dtype=torch.int32, device=args.device)

    def minibatch():
        rows = bootstrap.gather(-1, torch.randint(ROWS, shape, device=args.device))
        loss = agent.model_loss(buffer.storage[buffer.trial, rows].split(buffer.widths, -1))
        agent.opts["model"].zero_grad()
        loss.backward()
        agent.opts["model"].step()

    return minibatch


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


def floor(args):
    """A function that multiplies matrices of the shapes of one update, into memory that is there already."""
    hidden = (args.hidden_dim, args.hidden_dim)
    policy, critic = (OBS_DIM, *hidden, 2 * ACTION_DIM), (OBS_DIM + ACTION_DIM, *hidden, 1)
    n, batch = args.trials, args.batch_size
    if args.compare == "fit":
        shapes = products(7 * n, batch, (OBS_DIM + ACTION_DIM, *[200] * 4, 2 * (OBS_DIM + 1)))
    else:
        samples = batch * (10 if args.compare == "inference" else 1)
        shapes = [*products(n, batch, policy, False, False), *products(2 * n, batch, critic, False, False),  # target
                  *products(2 * n, batch, critic),  # critics
                  *products(n, batch, policy), *products(2 * n, samples, critic, weights=False, last_input=True)]  # actor
    pairs = [(torch.randn(s, m, k, device=args.device), torch.randn(s, k, o, device=args.device)) for s, m, k, o in shapes]
    outs = [a @ b for a, b in pairs]

    def multiply():
        for (a, b), out in zip(pairs, outs):
            torch.bmm(a, b, out=out)

    return multiply


# --- the measurement


def contestants(args):
    """name -> function that makes one update; the first one is what the others are divided by."""
    if args.compare == "sac":
        found = {"sac_iterative.py": own_sac(args), "Stable-Baselines3": stable_baselines_sac(args),
                 "CleanRL-style": separate_sac(args)}
    elif args.compare == "fit":
        found = {"baselines/mbpo.py": own_fit(args), "mbpo_pytorch-style": batched_fit(args)}
    else:
        found = {f"{inference}, K={k}, 10 samples": own_sac(args, inference=inference, inference_iters=k, action_samples=10,
                                                            prior="gaussian")
                 for inference, k in (("direct", 1), ("iterative", 1), ("iterative", 2), ("iterative", 5))}
    return {name: update for name, update in found.items() if update} | {"floor": floor(args)}


def measure(args, updates):
    """Milliseconds per update of each contestant in each block: name -> list."""
    clock, found = random.Random(0), {name: [] for name in updates}
    for block in range(-1, args.blocks):  # the first one warms up
        for name in clock.sample([*updates], len(updates)):
            before = time.perf_counter()
            for _ in range(args.updates):
                updates[name]()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if block >= 0:
                found[name].append(1000 * (time.perf_counter() - before) / args.updates)
    return found


def main(args):
    if min(args.threads) < 1 or min(args.blocks, args.updates, args.batch_size, args.hidden_dim, args.trials) < 1:
        print("speed.py: error: --threads, --blocks, --updates, --batch-size, --hidden-dim and --trials count from 1", file=sys.stderr)
        return 2
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found = measure(args, contestants(args))
        first = next(iter(found))
        for name, ms in found.items():
            ratios = sorted(x / y for x, y in zip(ms, found[first]))
            rows.append({"compare": args.compare, "contestant": name, "threads": threads, "device": args.device,
                         "batch_size": args.batch_size, "hidden_dim": args.hidden_dim, "trials": args.trials,
                         "ms_per_update": f"{statistics.median(ms):.4g}", "ratio_to_first": f"{statistics.median(ratios):.3g}",
                         "ratio_low": f"{ratios[len(ratios) // 10]:.3g}", "ratio_high": f"{ratios[-1 - len(ratios) // 10]:.3g}",
                         "blocks": args.blocks, "torch": torch.__version__, "machine": platform.machine()})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with (HERE / "results" / f"speed_{args.compare}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
