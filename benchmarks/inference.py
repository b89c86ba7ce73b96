"""What inference by iteration brings: the experiments on sac_iterative.py, one sub-command each.

    python benchmarks/inference.py improvement --run RUN                            # Figure 2; RUN trained with K = 10
    python benchmarks/inference.py gap --total-steps 5000 --flags="--env-id Pendulum-v1 --trials 3"
    python benchmarks/inference.py landscape --run RUN --dims 0 1
    python benchmarks/inference.py optimizers --run RUN

Figures and equations are those of Marino, Piché and Yue, "On the Design of Variational RL Algorithms". Each command
writes benchmarks/results/NAME.csv and benchmarks/figures/NAME.png, where NAME is --out or inference_EXPERIMENT_ENV;
`--from-csv --out NAME` draws the figure again without the runs.

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
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import common
import numpy as np
import torch
import tyro
from common import ROOT, at_least, band, fail, group, load_script, publish, run_args

SAC = load_script("sac_iterative")
ROWS = 2**15  # actions that the critics judge at a time: bounds the memory, not the result


# J̃ and its optimizers


def common_noise(obs, samples, action_dim, seed):
    """Standard normal (trials, samples, n, action_dim) of a stream apart from the one that inference draws from."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 16)).generate_state(1)[0]))
    shape = (obs.shape[0], samples, obs.shape[1], action_dim)
    return torch.randn(shape, generator=generator, dtype=obs.dtype).to(obs.device)


def parts(obs, samples):
    """Slices of the states, of about ROWS actions each."""
    size = max(1, ROWS // (obs.shape[0] * samples))
    return [slice(start, start + size) for start in range(0, obs.shape[1], size)]


@torch.no_grad()
def estimate(agent, obs, params, noise):
    """J̃ (trials, n) at λ, eq. (16)."""
    value = lambda part: agent.objective(agent.critic, obs[:, part], params[:, part], noise[:, :, part])[0]
    return torch.cat([value(part) for part in parts(obs, noise.shape[1])], 1)[..., 0]


def gradient(agent, obs, params, noise=None):
    """∇J̃ shaped like params, and J̃ (trials, n); on fresh noise, as in training, unless it is given."""
    if noise is None:
        noise = agent.noise(obs, agent.args.action_samples)
    at = lambda part: agent.gradient(obs[:, part], params[:, part], noise[:, :, part])
    grads, values, _ = zip(*(at(part) for part in parts(obs, noise.shape[1])))
    return torch.cat(grads, 1), torch.cat(values, 1)[..., 0]


@torch.no_grad()
def learned(agent, obs, iters, start=None):
    """λ_0 = start (by default the prior), ..., λ_K of the network: (iters + 1, trials, n, 2, action_dim)."""
    trace = [agent.prior.expand(*obs.shape[:2], -1, -1) if start is None else start]
    for _ in range(iters):
        grad = gradient(agent, obs, trace[-1])[0] if agent.iterative else None
        trace.append(agent.actor(obs, trace[-1], grad)[0])  # eq. (15)
    return torch.stack(trace)


def adam(agent, obs, start, steps, rate, noise=None):
    """λ_0, ..., λ_steps (as `learned`) of Adam on the λ of each state, and J̃ on the noise it climbed."""
    params, trace, values = start.clone(), [], []
    opt = torch.optim.Adam([params], rate)
    for _ in range(steps + 1):
        grad, value = gradient(agent, obs, params, noise)
        trace.append(params.clone())
        values.append(value)
        params.grad = -grad
        opt.step()
        params[..., 1, :].clamp_(SAC.LOG_STD_MIN, SAC.LOG_STD_MAX)  # as the network's proposals
    return torch.stack(trace), torch.stack(values)


def best(trace, values):
    """Per state, the best λ of a trace (steps, trials, n, 2, action_dim) and its J̃ (trials, n)."""
    value, index = values.max(0)
    return trace.gather(0, index[None, ..., None, None].expand(1, *trace.shape[1:]))[0], value


@torch.no_grad()
def cem(agent, obs, start, steps, population, elites, noise=None):
    """Mean λ_0, ..., λ_steps (as `learned`) of the cross-entropy method on the λ of each state, from spread 1."""
    mean, std, trace = start, torch.ones_like(start), [start]
    for _ in range(steps):
        shape = (obs.shape[0], population, *start.shape[1:])  # (trials, population, n, 2, action_dim)
        candidates = mean.unsqueeze(1) + std.unsqueeze(1) * torch.randn(shape, dtype=obs.dtype, device=obs.device)
        candidates[..., 1, :].clamp_(SAC.LOG_STD_MIN, SAC.LOG_STD_MAX)
        drawn = agent.noise(obs, agent.args.action_samples) if noise is None else noise  # one for all candidates
        flat = obs.repeat(1, population, 1), candidates.flatten(1, 2), drawn.repeat(1, 1, population, 1)
        index = estimate(agent, *flat).unflatten(1, shape[1:3]).topk(elites, 1).indices  # (trials, elites, n)
        chosen = candidates.gather(1, index[..., None, None].expand(-1, -1, -1, *start.shape[2:]))
        mean, std = chosen.mean(1), chosen.std(1)
        trace.append(mean)
    return torch.stack(trace)


def distinct_modes(actions, values, distance):
    """Greedily from the best J̃ (n,): the ends that lie further than `distance` from every mode before them in some
    dimension of tanh μ (n, action_dim). Returns their indices, each with the number of ends nearest to it."""
    found = []
    for i in values.argsort(descending=True).tolist():
        if all((actions[i] - actions[j]).abs().max() > distance for j in found):
            found.append(i)
    nearest = (actions[:, None] - actions[found]).abs().amax(-1).argmin(1)  # (n,)
    return dict(zip(found, torch.bincount(nearest, minlength=len(found)).tolist()))


# Runs


def open_run(run, device, seed):
    """Agent, flags and replay buffer of a run of the script."""
    return common.open_run(run, "--run", "sac_iterative", device, seed)[:3]


def buffer_states(buffer, n, seed):
    """n states per trial (trials, n, obs_dim), uniform over the replay buffer, the same on every device."""
    rows, generator = buffer.rows(), torch.Generator().manual_seed(seed)
    index = torch.randint(rows.shape[1], (len(rows), n), generator=generator)
    return rows[buffer.trial, index.to(rows.device), : buffer.widths[0]]


def only_trial(agent, trial):
    """Keep one trial of the agent; the twin critics are stacked before the trials."""
    for name, parameter in agent.named_parameters():
        parameter.data = parameter.data.narrow(int(name.startswith("critic")), trial, 1)


def roll_out(agent, args, episodes, iters):
    """The script's evaluation with K = iters: returns (trials, episodes), the states met (trials, steps, episodes,
    obs_dim), and at which of them the episode was not over yet (trials, steps, episodes)."""
    states = []

    def act(obs, **flags):
        states.append(obs)
        return agent.act(obs, iters=iters, **flags)

    found = SAC.evaluate(SimpleNamespace(act=act), SAC.make_envs(args, args.trials * episodes), args)
    running = np.arange(len(states))[:, None] < found["eval/length"][:, None]
    return found["eval/return"], torch.stack(states, 1), running


# Tables


def moments(name, values):
    """Columns of the mean and standard deviation of what one trial measured."""
    values = torch.as_tensor(values)
    return {name: values.mean().item(), f"{name}_std": values.std(correction=0).item()}


def pooled(rows, by, name, within=True):
    """The distinct values of `by` in the rows (one per trial); mean and standard deviation of `name` over all states
    and trials, or, without the spread within the trials, over the trials."""
    found = defaultdict(list)
    for row in rows:
        found[float(row[by])].append((float(row[name]), float(row.get(f"{name}_std", 0)) * within))
    tables = [np.array(found[x]) for x in sorted(found)]  # (trials, 2) each
    spread = [(table[:, 0].var() + (table[:, 1] ** 2).mean()) ** 0.5 for table in tables]
    return np.array(sorted(found)), np.array([table[:, 0].mean() for table in tables]), np.array(spread)


def line(axis, rows, by, name, within=True, **style):
    """A line of `name` against `by`, mean ± one standard deviation, as `pooled`; returns the three."""
    x, mean, std = pooled(rows, by, name, within)
    band(axis, x, mean, mean - std, mean + std, **style)
    return x, mean, std


# Experiments


@dataclasses.dataclass
class Experiment:
    out: str = ""  # name of the csv and the png; default inference_EXPERIMENT_ENV
    from_csv: bool = False  # draw --out again from its csv
    size = 10, 3.6  # of the figure


@dataclasses.dataclass
class OnRun(Experiment):
    run: str = ""  # run directory of sac_iterative.py
    device: str = "cpu"  # cpu, cuda
    seed: int = 0  # of the states, of the common noise and of inference
    samples: int = 200  # actions of the common noise

    def env_id(self):
        return run_args(self.run, "--run", "sac_iterative")[1].env_id


@dataclasses.dataclass
class Improvement(OnRun):
    """Figure 2: J̃(λ_k) in the states of episodes, less J̃(λ_0) (a), that in % of |J̃(λ_0)| (b), and less J̃(λ_1); and
    the evaluation return with k iterations at test time."""

    iters: int = 10  # K
    episodes: int = 5  # per trial
    states: int = 1_000  # at most so many per trial, evenly spaced over the episodes
    name = "fig2"
    size = 13, 3.6

    def measure(self):
        agent, saved, _ = open_run(self.run, self.device, self.seed)
        if not agent.iterative:
            fail(f"--run {self.run}: its inference is direct, there is nothing to iterate")
        _, states, running = roll_out(agent, saved, self.episodes, self.iters)
        met = running.sum((1, 2))  # (trials,)
        places = np.linspace(0, met - 1, min(self.states, met.min())).round().astype(int).T  # (trials, n)
        obs = [state[torch.as_tensor(on)][place] for state, on, place in zip(states, running, places)]
        obs = torch.stack(obs)  # (trials, n, obs_dim)
        noise = common_noise(obs, self.samples, agent.prior.shape[-1], self.seed)
        value = torch.stack([estimate(agent, obs, params, noise) for params in learned(agent, obs, self.iters)])
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
        for axis, (name, title) in zip(figure.subplots(1, 4), titles.items()):
            shown = [row for row in rows if name != "from_first" or int(row["k"])]
            k, mean, std = line(axis, shown, "k", name, marker=".")
            axis.set(title=title, xlabel=f"iteration k (trained with {rows[0]['trained_iters']})")
            yield f"{title} at k = {k[-1]:.0f}: {mean[-1]:.4g} ± {std[-1]:.4g} over states (episodes) and trials"


@dataclasses.dataclass
class Gap(Experiment):
    """Amortization gap along training: the best J̃ that Adam finds for each state, less J̃(λ_K) of the network. Trains
    one run per mode in equal pieces, and measures the gap after each, on states of its replay buffer."""

    modes: tuple[Literal["direct", "iterative"], ...] = ("direct", "iterative")  # each trained with the same flags
    flags: str = ""  # more flags of sac_iterative.py: --flags="--env-id Pendulum-v1 --trials 3"
    total_steps: int = 50_000  # of each mode
    pieces: int = 5  # measurements
    run_dir: str = ""  # folder of the runs; default runs/ENV_ID/gap_DATE-TIME
    states: int = 64  # per trial
    samples: int = 100  # actions of the common noise
    adam_steps: int = 100  # from λ_K and from λ_0 each
    adam_rate: float = 0.05  # learning rate
    device: str = "cpu"  # where the gap is measured; training has its own, in --flags
    seed: int = 0  # of the states and of the common noise
    name = "gap"

    def env_id(self):
        words = shlex.split(self.flags)
        for own in ("--inference", "--total-steps", "--run-dir", "--resume", "--evaluate"):
            if own in self.flags.replace("_", "-"):
                fail(f"--flags: {own} is not for the script alone; the experiment sets it")
        if not self.modes or self.run_dir and Path(self.run_dir).exists():
            fail(f"--run-dir {self.run_dir}: exists already" if self.modes else "--modes: name at least one")
        saved = SAC.parse_args(["--total-steps", str(self.total_steps), *words])
        if self.total_steps < self.pieces * saved.learning_starts:
            fail(f"--pieces {self.pieces}: a piece must not be shorter than --learning-starts {saved.learning_starts}")
        self.run_dir = self.run_dir or str(Path(saved.run_dir).with_name(f"gap_{time.strftime('%Y%m%d-%H%M%S')}"))
        return saved.env_id

    def measure(self):
        for mode, piece in itertools.product(self.modes, range(1, self.pieces + 1)):
            run, steps = f"{self.run_dir}/{mode}", self.total_steps * piece // self.pieces
            begin = ["--run-dir", run, "--inference", mode, *shlex.split(self.flags)]
            flags = ["--total-steps", str(steps), *(begin if piece == 1 else ["--resume", run])]
            if code := subprocess.run([sys.executable, str(ROOT / "sac_iterative.py"), *flags]).returncode:
                sys.exit(code)  # the script has said why
            agent, saved, buffer = open_run(run, self.device, self.seed)
            measured = self.at(agent, buffer_states(buffer, self.states, self.seed))
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
        ends = learned(agent, obs, agent.iters)[[0, -1]]  # Adam starts at both
        climbed = [adam(agent, obs, start, self.adam_steps, self.adam_rate, noise) for start in ends]
        found, top = best(*(torch.cat(each) for each in zip(*climbed)))
        prior, network = (values[0] for _, values in climbed)
        measured = {"prior": prior, "network": network, "best": top, "gap": top - network}
        prior, network, top = (estimate(agent, obs, params, fresh) for params in (*ends, found))
        fresh = {"prior": prior, "network": network, "best": top, "gap": top - network}
        return measured | {f"{name}_fresh": value for name, value in fresh.items()}

    def draw(self, rows, figure):
        axes = figure.subplots(1, 2)
        titles = {"gap": "J̃(Adam's best) − J̃(λ_K)", "share": "… as a share of what λ_0 misses"}
        for axis, (name, title) in zip(axes, titles.items()):
            for mode, lines in group(rows, "mode").items():
                steps, mean, std = line(axis, lines, "step", name, within=False, marker=".", label=mode)
                fresh = pooled(lines, "step", f"{name}_fresh", within=False)[1]
                axis.plot(steps, fresh, ":", color=axis.lines[-1].get_color())
                yield (f"{mode}: {name} at step {steps[-1]:.0f}: {mean[-1]:.4g} ± {std[-1]:.4g} over trials, "
                       f"{fresh[-1]:.4g} on fresh noise")
            axis.set(title=f"{title}; dotted: fresh noise", xlabel="environment steps per trial")
        axes[0].legend(fontsize=8)


@dataclasses.dataclass
class Landscape(OnRun):
    """J̃ over two dimensions of λ for one state of the replay buffer, the others at λ_K from the prior; λ_0, ..., λ_K
    from the prior and from random means, projected on the two; and the distinct modes where the network and Adam end
    from these starts, of which the network has met only the prior in training."""

    dims: tuple[int, int] = (0, 1)  # axes: action means counted from 0; beyond them log σ, so that 0 1 suits one action
    trial: int = 0  # whose agent
    state: int = 0  # which of the states drawn from the replay buffer
    iters: int = 10  # K
    starts: int = 32  # the prior and random means, uniform in (-0.95, 0.95) after the tanh
    paths: int = 6  # starts whose trajectories are drawn
    grid: int = 41  # points per axis
    adam_steps: int = 200
    adam_rate: float = 0.05
    distance: float = 0.1  # of tanh μ, in some dimension, between distinct modes
    name = "landscape"
    size = 6, 5

    def measure(self):
        agent, saved, buffer = open_run(self.run, self.device, self.seed)
        size = agent.prior.shape[-1]
        if self.dims[0] == self.dims[1] or max(self.dims) >= 2 * size:
            fail(f"--dims {self.dims[0]} {self.dims[1]}: two different ones below {2 * size}")
        if self.trial >= saved.trials:
            fail(f"--trial {self.trial}: the run's trials are 0 to {saved.trials - 1}")
        only_trial(agent, self.trial)
        obs = buffer_states(buffer, self.state + 1, self.seed)[self.trial, self.state].view(1, 1, -1)
        noise = common_noise(obs, self.samples, size, self.seed)
        start = agent.prior.repeat(1, self.starts, 1, 1)
        uniform = torch.rand(self.starts - 1, size, generator=torch.Generator().manual_seed(self.seed))
        start[0, 1:, 0] = (0.95 * (2 * uniform - 1)).atanh().to(obs)
        many = obs.expand(-1, self.starts, -1), noise.expand(-1, -1, self.starts, -1)  # the same state, the same draw
        trace = learned(agent, many[0], self.iters, start)
        value = torch.stack([estimate(agent, many[0], params, many[1]) for params in trace])

        def rows(kind, start, k, params, value):
            """One row per λ (n, 2, action_dim) with its J̃ (n,)."""
            flat = params.flatten(-2)
            x, y = (flat[:, d].tanh() if d < size else flat[:, d] for d in self.dims)
            names = [f"tanh μ_{d}" if d < size else f"log σ_{d - size}" for d in self.dims]
            for row in zip(start, k, x.tolist(), y.tolist(), value.tolist()):
                yield {"kind": kind, "x_axis": names[0], "y_axis": names[1],
                       **dict(zip(("start", "k", "x", "y", "objective"), row))}

        limits = [(-0.99, 0.99) if d < size else (SAC.LOG_STD_MIN, SAC.LOG_STD_MAX) for d in self.dims]
        places = torch.meshgrid(*(torch.linspace(*limit, self.grid) for limit in limits), indexing="ij")
        n = self.grid**2
        points = trace[-1, 0, :1].flatten(-2).repeat(n, 1)  # (n, 2 * action_dim)
        for d, place in zip(self.dims, places):
            points[:, d] = (place.atanh() if d < size else place).flatten().to(points)
        points = points.view(1, n, 2, size)
        over = estimate(agent, obs.expand(-1, n, -1), points, noise.expand(-1, -1, n, -1))[0]
        yield from rows("grid", itertools.repeat(0), itertools.repeat(0), points[0], over)
        for i in range(min(self.paths, self.starts)):
            yield from rows("path", itertools.repeat(i), itertools.count(), trace[:, 0, i], value[:, 0, i])
        climbed = adam(agent, many[0], start, self.adam_steps, self.adam_rate, many[1])
        for kind, (params, top) in {"network": (trace[-1], value[-1]), "adam": best(*climbed)}.items():
            modes = distinct_modes(params[0, :, 0].tanh(), top[0], self.distance)
            yield from rows(kind, modes, modes.values(), params[0, [*modes]], top[0, [*modes]])  # k: ends nearby

    def draw(self, rows, figure):
        kinds, axis = group(rows, "kind"), figure.subplots()
        columns = lambda rows, *names: [np.array([float(row[name]) for row in rows]) for name in names]
        x, y, z = columns(kinds["grid"], "x", "y", "objective")
        shape = round(len(x) ** 0.5), -1
        figure.colorbar(axis.contourf(x.reshape(shape), y.reshape(shape), z.reshape(shape), levels=40), label="J̃")
        for start, path in group(kinds["path"], "start").items():
            axis.plot(*columns(path, "x", "y"), ".-", color="white" if start == "0" else f"C{start}", linewidth=1)
        styles = {"network": {"facecolors": "none", "edgecolors": "red"}, "adam": {"marker": "x", "color": "red"}}
        for kind, style in styles.items():
            modes = kinds[kind]
            axis.scatter(*columns(modes, "x", "y"), s=60, zorder=3, label=f"{kind}: {len(modes)} mode(s)", **style)
            found = ", ".join(f"{float(row['objective']):.4g} (nearest to {row['k']} starts)" for row in modes[:8])
            yield f"{kind}: {len(modes)} distinct mode(s), J̃ {found}" + ", ..." * (len(modes) > 8)
        axis.set(xlabel=rows[0]["x_axis"], ylabel=rows[0]["y_axis"], title="λ_0 to λ_K (white: from the prior)")
        axis.legend(fontsize=8)


@dataclasses.dataclass
class Optimizers(OnRun):
    """J̃ of the learned optimizer, of Adam and of CEM on the same states, all from the prior and with fresh noise of as
    many actions as in training at each iteration. A gradient counts as two judged actions, for its pass back."""

    iters: int = 20  # K
    states: int = 200  # per trial
    adam_rates: tuple[float, ...] = (0.03, 0.1, 0.3)  # one curve each
    population: int = 64  # of CEM
    elites: int = 8  # of CEM
    name = "optimizers"

    def measure(self):
        if self.elites > self.population:
            fail(f"--elites {self.elites}: must be at most --population {self.population}")
        agent, saved, buffer = open_run(self.run, self.device, self.seed)
        obs = buffer_states(buffer, self.states, self.seed)
        start, gradients = agent.prior.repeat(*obs.shape[:2], 1, 1), 2 * agent.args.action_samples
        noise = common_noise(obs, self.samples, agent.prior.shape[-1], self.seed)
        first = estimate(agent, obs, start, noise)

        def rows(name, cost, trace):
            for k, params in enumerate(trace):
                value = estimate(agent, obs, params, noise)
                for trial in range(saved.trials):
                    yield {"optimizer": name, "k": k, "trial": trial, "judged_actions": cost * k,
                           **moments("objective", value[trial]), **moments("improvement", (value - first)[trial])}

        yield from rows("learned", gradients * agent.iterative, learned(agent, obs, self.iters))
        for rate in self.adam_rates:
            yield from rows(f"Adam {rate:g}", gradients, adam(agent, obs, start, self.iters, rate)[0])
        means = cem(agent, obs, start, self.iters, self.population, self.elites)
        yield from rows("CEM", self.population * agent.args.action_samples, means)

    def draw(self, rows, figure):
        axes = figure.subplots(1, 2, sharey=True)
        for name, lines in group(rows, "optimizer").items():
            k, mean, std = pooled(lines, "k", "improvement")
            axes[0].plot(k, mean, marker=".", label=name)
            axes[1].plot(pooled(lines, "k", "judged_actions")[1], mean, marker=".")
            yield f"{name}: J̃(λ_{k[-1]:.0f}) − J̃(λ_0) {mean[-1]:.4g} ± {std[-1]:.4g} over states and trials"
        axes[0].set(xlabel="iteration", ylabel="J̃(λ_k) − J̃(λ_0), mean over states and trials")
        axes[1].set(xlabel="judged actions per state", xscale="symlog")
        axes[0].legend(fontsize=8)


LEAST = {"iters": 1, "episodes": 1, "states": 1, "samples": 1, "total_steps": 1, "pieces": 1, "adam_steps": 1,
         "starts": 1, "grid": 2, "population": 2, "elites": 2, "adam_rate": 1e-9, "adam_rates": 1e-9, "distance": 0,
         "seed": 0, "dims": 0, "trial": 0, "state": 0, "paths": 0}


def main(args):
    at_least(args, **{name: least for name, least in LEAST.items() if hasattr(args, name)})
    if args.from_csv:
        return publish(args.out, None, args.draw, args.size)
    try:
        torch.zeros(1, device=getattr(args, "device", "cpu"))
    except Exception:  # whatever a device that is not there raises
        fail(f"--device {args.device}: not there; use cpu")
    env_id = args.env_id()
    name = args.out or f"inference_{args.name}_{env_id.replace('/', '_').replace(':', '_')}"
    return publish(name, args.measure(), args.draw, args.size)


if __name__ == "__main__":
    commands = Improvement | Gap | Landscape | Optimizers
    sys.exit(main(tyro.cli(commands, description=__doc__.splitlines()[0])))
