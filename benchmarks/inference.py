"""What inference by iteration brings: the experiments on sac_iterative.py, one sub-command each.

    python benchmarks/inference.py improvement --run RUN                            # Figure 2; RUN trained with K = 10
    python benchmarks/inference.py gap --total-steps 5000 --flags="--env-id Pendulum-v1 --trials 3"

Figures and equations are those of Marino, Piché and Yue, "On the Design of Variational RL Algorithms". Each command
writes benchmarks/results/NAME.csv and benchmarks/figures/NAME.png, where NAME is --out or inference_EXPERIMENT_ENV.

J̃ is always the script's own objective (16), with the run's prior, pessimism, α and online critics. It is estimated
with common random numbers: one fixed draw per state, the same for every λ, which the inference itself never sees. In
the tables a column NAME beside NAME_std is the mean over a trial's states (or episodes). Shapes: J̃ (..., trials, n),
λ = (μ, log σ) = params (trials, n, 2, action_dim), noise (trials, samples, n, action_dim).
"""

import dataclasses
import itertools
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from common import ROOT, at_least, band, curve, fail, group, load_script, open_run, publish, run_args

SAC = load_script("sac_iterative")
ROWS = 2**15  # actions that the critics judge at a time in `estimate`: bounds the memory, not the result


# J̃ and its inference


def common_noise(obs, samples, action_dim, seed):
    """Standard normal (trials, samples, n, action_dim) of a stream apart from the one that inference draws from."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 16)).generate_state(1)[0]))
    shape = (obs.shape[0], samples, obs.shape[1], action_dim)
    return torch.randn(shape, generator=generator, dtype=obs.dtype)


@torch.no_grad()
def estimate(agent, obs, params, noise):
    """J̃ (trials, n) at λ, eq. (16)."""
    size, values = max(1, ROWS // (obs.shape[0] * noise.shape[1])), []
    for start in range(0, obs.shape[1], size):
        part = slice(start, start + size)
        values.append(agent.objective(agent.critic, obs[:, part], params[:, part], noise[:, :, part])[0])
    return torch.cat(values, 1)[..., 0]


def adam(agent, obs, start, steps, rate, noise):
    """λ_0, ..., λ_steps (steps + 1, trials, n, 2, action_dim) of Adam on the λ of each state, and their J̃."""
    params, trace, values = start.clone(), [], []
    opt = torch.optim.Adam([params], rate)
    for _ in range(steps + 1):
        grad, value, _ = agent.gradient(obs, params, noise)
        trace.append(params.clone())
        values.append(value[..., 0])
        params.grad = -grad
        opt.step()
        params[..., 1, :].clamp_(SAC.LOG_STD_MIN, SAC.LOG_STD_MAX)  # as the network's proposals
    return torch.stack(trace), torch.stack(values)


def best(trace, values):
    """Per state, the best λ of a trace (steps, trials, n, 2, action_dim) and its J̃ (trials, n)."""
    value, index = values.max(0)
    return trace.gather(0, index[None, ..., None, None].expand(1, *trace.shape[1:]))[0], value


def roll_out(agent, args, episodes, iters):
    """The script's evaluation with K = iters, which the agent keeps: returns (trials, episodes), the states met
    (trials, steps, episodes, obs_dim), and at which of them the episode was not over yet (trials, steps, episodes)."""
    agent.iters = iters
    states = []

    def act(obs, **flags):
        states.append(obs)
        return agent.act(obs, **flags)

    found = SAC.evaluate(SimpleNamespace(act=act), SAC.make_envs(args, args.trials * episodes), args)
    running = np.arange(len(states))[:, None] < found["eval/length"][:, None]
    return found["eval/return"], torch.stack(states, 1), running


# Tables


def moments(name, values):
    """Columns of the mean and standard deviation of what one trial measured."""
    values = torch.as_tensor(values)
    return {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}


def line(axis, rows, by, name, **style):
    """A line of `name` against `by` over the rows (one per trial), mean ± one standard deviation; returns the three."""
    x, values = curve(rows, by, name)
    mean, std = values.mean(1), values.std(1)
    band(axis, x, mean, mean - std, mean + std, **style)
    axis.set_ylabel(f"mean ± one standard deviation, {values.shape[1]} trial(s)", fontsize=7)
    return x, mean, std


# Experiments


@dataclasses.dataclass
class Experiment:
    out: str = ""  # name of the csv and the png; default inference_EXPERIMENT_ENV
    from_csv: bool = False  # draw --out again from its csv
    size = 10, 3.6  # of the figure


@dataclasses.dataclass
class Improvement(Experiment):
    """Figure 2: J̃(λ_k) in the states of episodes, less J̃(λ_0) (a), that in % of |J̃(λ_0)| (b), and less J̃(λ_1); and
    the evaluation return with k iterations at test time."""

    run: str = ""  # run directory of sac_iterative.py
    iters: int = 10  # K
    episodes: int = 5  # per trial
    states: int = 1_000  # at most so many per trial, evenly spaced over the episodes
    samples: int = 200  # actions of the common noise
    seed: int = 0  # of the states, of the common noise and of inference
    name = "fig2"
    size = 13, 3.6

    def env_id(self):
        return run_args(self.run, "--run", "sac_iterative")[1].env_id

    def measure(self):
        agent, saved, *_ = open_run(self.run, "--run", "sac_iterative", seed=self.seed)
        if not agent.iterative:
            fail(f"--run {self.run}: its inference is direct, there is nothing to iterate")
        _, states, running = roll_out(agent, saved, self.episodes, self.iters)
        met = running.sum((1, 2))  # (trials,)
        places = np.linspace(0, met - 1, min(self.states, met.min())).round().astype(int).T  # (trials, n)
        obs = [state[torch.as_tensor(on)][place] for state, on, place in zip(states, running, places)]
        obs = torch.stack(obs)  # (trials, n, obs_dim)
        noise = common_noise(obs, self.samples, agent.prior.shape[-1], self.seed)
        value = torch.stack([estimate(agent, obs, params, noise) for params in agent.infer(obs)[0]])
        for k in range(self.iters + 1):
            returns = roll_out(agent, saved, self.episodes, k)[0]
            for trial in range(saved.trials):
                now, prior, first = value[k, trial], value[0, trial], value[1, trial]  # (n,)
                relative = 100 * (now - prior) / prior.abs()
                yield {"trial": trial, "k": k, "trained_iters": saved.inference_iters,
                       **moments("return", returns[trial]), **moments("objective", now),
                       **moments("absolute", now - prior), **moments("relative", relative),
                       "relative_median": relative.median().item(), **moments("from_first", now - first)}

    def draw(self, rows, figure):
        titles = {"absolute": "J̃(λ_k) − J̃(λ_0)", "relative": "… in % of |J̃(λ_0)|", "from_first": "J̃(λ_k) − J̃(λ_1)",
                  "return": "evaluation return"}
        titles = {name: title for name, title in titles.items() if name in rows[0]}  # older tables have no return
        for axis, (name, title) in zip(figure.subplots(1, len(titles)), titles.items()):
            shown = [row for row in rows if name != "from_first" or int(row["k"])]
            k, mean, std = line(axis, shown, "k", name, marker=".")
            axis.set(title=title, xlabel=f"iteration k (trained with {rows[0]['trained_iters']})")
            yield f"{title} at k = {k[-1]:.0f}: {mean[-1]:.4g} ± {std[-1]:.4g} over trials"


@dataclasses.dataclass
class Gap(Experiment):
    """Amortization gap along training: the best J̃ that Adam finds for each state, less J̃(λ_K) of the network. Trains
    one run per mode in equal pieces, and measures the gap after each, on states of its replay buffer."""

    modes: tuple[Literal["direct", "iterative"], ...] = ("direct", "iterative")  # each trained with the same flags
    flags: str = ""  # more flags of sac_iterative.py: --flags="--env-id Pendulum-v1 --trials 3"
    total_steps: int = 50_000  # of each mode
    pieces: int = 5  # measurements
    run_dir: str = ""  # folder of the runs; default as for a single run
    states: int = 64  # per trial
    samples: int = 100  # actions of the common noise
    adam_steps: int = 100  # from λ_K and from λ_0 each
    adam_rate: float = 0.05  # learning rate
    seed: int = 0  # of the states and of the common noise
    name = "gap"

    def env_id(self):
        given = [word.split("=")[0].replace("_", "-") for word in shlex.split(self.flags)]
        for own in ("--inference", "--total-steps", "--run-dir", "--resume", "--evaluate"):
            if own in given:
                fail(f"--flags: {own} is not for the script alone; the experiment sets it")
        if not self.modes or self.run_dir and Path(self.run_dir).exists():
            fail(f"--run-dir {self.run_dir}: exists already" if self.modes else "--modes: name at least one")
        saved = SAC.parse_args(["--total-steps", str(self.total_steps), *shlex.split(self.flags)])
        if self.total_steps < self.pieces * saved.learning_starts:
            fail(f"--pieces {self.pieces}: a piece must not be shorter than --learning-starts {saved.learning_starts}")
        self.run_dir = self.run_dir or saved.run_dir
        return saved.env_id

    def measure(self):
        for mode, piece in itertools.product(self.modes, range(1, self.pieces + 1)):
            run, steps = f"{self.run_dir}/{mode}", self.total_steps * piece // self.pieces
            begin = ["--run-dir", run, "--inference", mode, *shlex.split(self.flags)]
            flags = ["--total-steps", str(steps), *(begin if piece == 1 else ["--resume", run])]
            if code := subprocess.run([sys.executable, str(ROOT / "sac_iterative.py"), *flags]).returncode:
                sys.exit(code)  # the script has said why
            agent, saved, buffer, _ = open_run(run, "--run-dir", "sac_iterative", seed=self.seed)
            measured = self.at(agent, buffer.sample(self.states)[..., : buffer.widths[0]])
            for trial in range(saved.trials):
                now = {name: value[trial] for name, value in measured.items()}  # (n,) each
                # At most 1, where the network is no better than λ_0: early on there is little to gain.
                possible = max((now["best"] - now["prior"]).mean().item(), now["gap"].mean().item(), 1e-9)
                yield {"mode": mode, "step": steps, "trial": trial, "alpha": agent.log_alpha[trial].exp().item(),
                       **{key: value for name in now for key, value in moments(name, now[name]).items()},
                       **{f"share{on}": now[f"gap{on}"].mean().item() / possible for on in ("", "_fresh")}}

    def at(self, agent, obs):
        """J̃ at λ_0, at λ_K and at Adam's best, and the gap, (trials, n) each: on the noise that Adam climbs, where the
        gap cannot be negative, and on fresh noise, where Adam has no advantage from having seen the draw."""
        noise, fresh = common_noise(obs, 2 * self.samples, agent.prior.shape[-1], self.seed).chunk(2, 1)
        ends = torch.stack(agent.infer(obs)[0]).detach()[[0, -1]]  # Adam starts at both
        climbed = [adam(agent, obs, start, self.adam_steps, self.adam_rate, noise) for start in ends]
        found, top = best(*(torch.cat(each) for each in zip(*climbed)))
        prior, network = (values[0] for _, values in climbed)
        measured = {"prior": prior, "network": network, "best": top, "gap": top - network}
        prior, network, top = (estimate(agent, obs, params, fresh) for params in (*ends, found))
        fresh = {"prior": prior, "network": network, "best": top, "gap": top - network}
        return measured | {f"{name}_fresh": value for name, value in fresh.items()}

    def draw(self, rows, figure):
        axes = figure.subplots(1, 2)
        titles = {"gap_fresh": "J̃(Adam's best) − J̃(λ_K)", "share_fresh": "… as a share of what λ_0 misses"}
        for axis, (name, title) in zip(axes, titles.items()):
            for mode, lines in group(rows, "mode").items():
                steps, mean, std = line(axis, lines, "step", name, marker=".", label=mode)
                yield f"{mode}: {name} at step {steps[-1]:.0f}: {mean[-1]:.4g} ± {std[-1]:.4g} over trials"
            axis.set(title=title, xlabel="environment steps per trial")
        axes[0].legend(fontsize=8)


LEAST = {"iters": 1, "episodes": 1, "states": 1, "samples": 1, "total_steps": 1, "pieces": 1, "adam_steps": 1,
         "adam_rate": 1e-9, "seed": 0}


def main(args):
    at_least(args, **{name: least for name, least in LEAST.items() if hasattr(args, name)})
    if args.from_csv:
        return publish(args.out, None, args.draw, args.size)
    env_id = args.env_id()
    name = args.out or f"inference_{args.name}_{env_id.replace('/', '_').replace(':', '_')}"
    return publish(name, args.measure(), args.draw, args.size)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Improvement | Gap, description=__doc__.splitlines()[0])))
