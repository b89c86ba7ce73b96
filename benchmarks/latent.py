"""What active_vem.py's latent state, model and planning bring: learning curves, sweeps, and a look inside an agent.

    python benchmarks/latent.py --experiment double_integrator --jobs 2     # pendulum, harder, mountain_car likewise
    python benchmarks/latent.py --experiment weight --jobs 2                # also information, horizon, rollout, prior
    python benchmarks/latent.py --experiment planning --runs RUN RUN        # also velocity, bound
    python benchmarks/latent.py --experiment speed

Figures, sections and equations are those of Marino & Yue, "An Inference Perspective on Model-Based RL". An experiment
trains what it needs as `python active_vem.py ...`, in run directories under --runs-dir that are named after their task
and flags: experiments share them, a finished one is skipped and an interrupted one resumed. It leaves
benchmarks/results/latent_NAME.csv (label,step,trial,metric,value; trial -1: none in particular) and
benchmarks/figures/latent_NAME.png; `--from-csv` draws the figure again without the runs. NAME is --out, by default the
experiment, with _quick after it under --quick. A line is the mean over the trials, a band reaches from the worst to the
best trial. Nats of the model are those of percepts divided by their standard deviation, as the script's metrics are.
"""

import csv
import dataclasses
import fcntl
import importlib.util
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "active_vem.py"
LIMIT = 200_000  # bytes of a csv
BUDGET_MS = 40  # what an update of the generative agent may cost
QUICK = ("--trials=2 --total-steps=100 --learning-starts=50 --first-updates=5 --log-every=25 --eval-every=100 "
         "--eval-episodes=1 --windows=4 --window-length=5 --hidden-dim=16 --model-dim=16")
DOUBLE = "--env-id=DoubleIntegrator-v0 --trials=5 --total-steps=4000 --eval-every=250"
BASE = {  # else DOUBLE
    "pendulum": "--env-id=Pendulum-v1 --trials=5 --total-steps=30000",
    "harder": "--env-id=InvertedPendulum-v5 --trials=3 --total-steps=30000 --eval-episodes=5",
    # Random actions never reach the goal unless they are held. A step moves the car by a small part of the spread of
    # its positions: at the default rate of 3e-3 the model hardly becomes so exact that it would need a velocity.
    "mountain_car": "--env-id=MountainCarContinuous-v0 --trials=3 --total-steps=20000 --eval-episodes=5 "
                    "--explore-hold=40 --learning-starts=5000 --save-every=5000 --model-learning-rate=1e-3"}
HIDDEN = {"velocity hidden": "--mask=velocity", "fully observed": "--mask=none"}
AGENTS = "generative", "discriminative", "memoryless"
SETTINGS = {  # label of a run -> its flags; what precedes a colon names the panel
    "double_integrator": {agent: f"--agent={agent}" for agent in AGENTS},
    "pendulum": {agent: f"--mask=velocity --agent={agent}" for agent in AGENTS} | {"fully observed": "--mask=none"},
    "harder": {f"InvertedPendulum-v5: {label}": flags for label, flags in HIDDEN.items()},
    "mountain_car": {f"MountainCarContinuous-v0: {label}": flags for label, flags in HIDDEN.items()},
    "weight": {f"w = {w}": f"--marginal-weight={w}" for w in (0, 0.25, 0.5, 0.75, 1)},
    "information": {f"w_i = {w}": f"--info-weight={w}" for w in (-0.3, 0, 0.1, 0.3, 1)},
    "horizon": {f"H = {h}": f"--plan-horizon={h}" for h in (0, 1, 3, 5, 10)},
    "rollout": {f"imagine with {policy}": f"--rollout-policy={policy}" for policy in ("prior", "posterior")},
    "prior": {f"{prior} p(a)": f"--action-prior={prior}" for prior in ("learned", "uniform")},
}
SWEEPS = "weight", "information", "horizon", "rollout", "prior"
CONTESTANTS = {"generative": {}, "… with the marginal": {"marginal_weight": 1.0}, "… information": {"info_weight": 1.0},
               "… both": {"marginal_weight": 1.0, "info_weight": 1.0}, "discriminative": {"agent": "discriminative"},
               "memoryless": {"agent": "memoryless"}}
RETURNS = {"eval/return": "evaluation return", "eval/return_prior": "evaluation return of p(a)"}
TERMS = {"model/log_likelihood": "log p(x,r|z)", "model/log_marginal": "log p(x,r|z',a'), estimate",
         "model/kl": "KL(q(z)‖p(z|z',a'))", "model/bracket": "terms of z in (8) at w = 1",
         "model/information": "information, lower estimate", "model/information_upper": "information, upper estimate",
         "policy/kl": "KL(q(a)‖p(a))", "policy/entropy": "entropy of q(a)"}
TITLES = RETURNS | TERMS | {"velocity/r2": "R² of the decoded velocity"}


@dataclasses.dataclass
class Args:
    experiment: Literal["double_integrator", "pendulum", "harder", "mountain_car", "weight", "information", "horizon",
                        "rollout", "prior", "planning", "velocity", "bound", "speed"]  # what is shown
    runs_dir: str = "runs/latent"  # where the experiment trains
    runs: tuple[str, ...] = ()  # for planning, velocity, bound: run directories; default: a double integrator's
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    out: str = ""  # the csv and the png are called latent_OUT; default: the experiment
    trials: int = 0  # trials of each run; 0: the experiment's own number
    total_steps: int = 0  # environment steps of each run; 0: the experiment's own number
    env_flags: str = ""  # more flags of active_vem.py for all runs: --env-flags="--env-id Pendulum-v1 --mask velocity"
    jobs: int = 1  # runs side by side, on one thread each
    episodes: int = 20  # per trial, in planning and to decode the velocity, of which half serve to fit
    plan_iters: tuple[int, ...] = (1, 3, 5)  # refinements of q(a), in planning
    after: int = 10  # steps that are seen before the open-loop prediction, in velocity
    samples: int = 100  # of the open-loop prediction
    blocks: int = 12  # paired measurements of speed
    updates: int = 20  # per contestant and block of speed
    quick: bool = False  # few steps of small agents, to see that everything works
    from_csv: bool = False  # draw from the csv


def load(path):
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[path.stem]


VEM = load(SCRIPT)
TASKS = "DoubleIntegrator", *VEM.POSITIONS  # whose true velocity can be read


def refuse(message):
    """Print one line and exit with code 2."""
    print(f"latent.py: error: {message}", file=sys.stderr)
    sys.exit(2)


# Runs


def run_name(wanted):
    """The task and the flags that make the run what it is; not how long it is, nor how often it is logged."""
    ignored, default = VEM.RESUMABLE | {"env_id", "run_dir"}, VEM.Args()
    own = [f"{name}={value}" for name, value in vars(wanted).items()
           if name not in ignored and value != getattr(default, name)]
    return "_".join([wanted.env_id.replace("/", "_").replace(":", "_"), *own])


def progress(run):
    """Environment steps at which a run was saved last; 0 where it was not."""
    try:
        return torch.load(Path(run) / "checkpoint.pt", map_location="cpu", mmap=True, weights_only=True)["step"]
    except FileNotFoundError:
        return 0
    except Exception:  # a file can be damaged in many ways
        refuse(f"--runs-dir: {run}/checkpoint.pt cannot be read as a checkpoint")


def launch(flags, log):
    """A process of the script, which prints into a file."""
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def begin(run, flags):
    """Begin or resume a run; None while somebody else trains it. Its log, which the process inherits, is the lock."""
    with open(f"{run}.log", "a") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        step = progress(run)
        print(f"{run}: from step {step:,}", flush=True)
        if not step:  # a run that was killed before it could save begins anew
            shutil.rmtree(run, ignore_errors=True)
        return launch([*flags, f"--resume={run}" if step else f"--run-dir={run}"], log)


def train(args, settings):
    """label -> run directory, all trained to their last step; settings: label -> flags of the script."""
    runs, pending, running = {}, {}, {}
    numbers = [f"--{name.replace('_', '-')}={n}" for name in ("trials", "total_steps") if (n := getattr(args, name))]
    for label, flags in settings.items():
        base = f"{BASE.get(args.experiment, DOUBLE)} {args.env_flags} {flags} {QUICK if args.quick else ''}"
        flags = [*shlex.split(base), *numbers]
        wanted = VEM.parse_args(flags)
        runs[label] = run = str(Path(args.runs_dir) / run_name(wanted))
        pending[run] = wanted.total_steps, flags
        saved = open_args(run, "--runs-dir") if progress(run) else wanted
        for name in vars(saved).keys() - VEM.RESUMABLE - {"run_dir"}:
            if (value := getattr(saved, name)) != getattr(wanted, name):
                refuse(f"--runs-dir: {run} was begun with another --{name.replace('_', '-')}, {value}")
    Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
    handler = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        while pending or running:
            for run, (steps, flags) in [*pending.items()]:
                if len(running) == args.jobs:
                    break
                if progress(run) >= steps:
                    del pending[run]
                elif process := begin(run, flags):
                    del pending[run]
                    running[run] = process
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if code := running.pop(run).returncode:
                    print(f"latent.py: error: the run ended with exit code {code}, see {run}.log", file=sys.stderr)
                    sys.exit(1)
            time.sleep(0.5 * bool(pending or running))
    finally:  # whoever is still running saves and can be resumed
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, handler)
    return runs


def run_labels(args):
    return args.labels or [Path(run).name for run in args.runs]


def given_runs(args):
    """label -> run directory of --runs, or of one generative agent on the double integrator."""
    if not args.runs:
        return train(args, {"generative": ""})
    return dict(zip(run_labels(args), args.runs))


def open_args(run, flag="--runs"):
    """The flags that a run directory was made with."""
    try:
        saved = VEM.Args(**json.loads((Path(run) / "args.json").read_text()))
        (Path(run) / "metrics.csv").stat(), (Path(run) / "checkpoint.pt").stat()
        return saved
    except (OSError, ValueError, TypeError):
        refuse(f"{flag} {run}: no args.json, metrics.csv and checkpoint.pt of {SCRIPT.name} there")


def open_run(run, episodes):
    """Agent, flags and the step of a run directory, on the CPU, to be evaluated with so many episodes per trial."""
    saved = dataclasses.replace(open_args(run), device="cpu", compile=False, eval_episodes=episodes)
    spaces = VEM.make_tasks(saved, 1)
    agent = VEM.Agent(saved, spaces.single_observation_space.shape[0], spaces.single_action_space.shape[0])
    step = VEM.load(Path(run) / "checkpoint.pt", saved, agent)
    torch.manual_seed(0)  # the checkpoint has brought its own random state
    return agent, saved, step


def read(run, label, metrics):
    """Rows of some of the metrics of a run. model/bracket is not logged, it follows from the others: at most 0 but for
    the error of the marginal's estimate, which is low, and for the likelihood being that of other windows."""
    with (Path(run) / "metrics.csv").open() as file:
        lines = [*csv.reader(file)][1:]
    found = {(int(step), int(trial), metric): float(value) for step, trial, metric, value in lines}
    terms = [f"model/{name}" for name in ("log_likelihood", "log_marginal", "kl")]
    for step, trial in [(step, trial) for step, trial, metric in found if metric == "model/log_marginal"]:
        likelihood, marginal, kl = (found[step, trial, term] for term in terms)
        found[step, trial, "model/bracket"] = likelihood - marginal - kl  # eq. (8)
    return [(label, *at, value) for at, value in found.items() if at[-1] in metrics]


# The optimum of the double integrator


def lqg():
    """Gains and expected returns of the optimal controllers of the double integrator, were there no limit to its force
    and no walls: Riccati gains (steps, 1, 2), Kalman gains (steps, 2, 1), E[Σ r] of LQR, E[Σ r] of LQG."""
    env = VEM.DoubleIntegrator
    steps, dt = VEM.gym.spec("DoubleIntegrator-v0").max_episode_steps, env.dt
    a, b = np.array([[1, dt], [0, 1]]), np.array([[dt**2 / 2], [dt]]) * env.force
    cost, price = np.diag([1, 0.1]), 0.05  # of the state and of the action, as in the task's reward
    values, gains = [np.zeros((2, 2))], []  # the state after the last action costs nothing
    for _ in range(steps):
        p = values[0]
        gains.insert(0, np.linalg.solve(price + b.T @ p @ b, b.T @ p @ a))
        values.insert(0, cost + a.T @ p @ a - a.T @ p @ b @ gains[0])
    spread = np.diag(np.square(env.start))
    kalman, lqr = [], -np.trace(values[0] @ spread)
    return_of_lqg = lqr
    for p, gain in zip(values[1:], gains):
        kalman.append(spread[:, :1] / (spread[0, 0] + env.noise**2))
        spread = spread - kalman[-1] @ spread[:1]  # covariance of the state given what has been seen
        return_of_lqg -= np.trace(a.T @ p @ b @ gain @ spread)
        spread = a @ spread @ a.T
    return np.array(gains), np.array(kalman), lqr, return_of_lqg


def simulate(controller, seeds):
    """Returns (seeds,) in the script's task itself, with its walls and its force clipped at its limit."""
    env, returns = VEM.DoubleIntegrator(), []
    gains, kalman = lqg()[:2]
    for seed in seeds:
        obs, _ = env.reset(seed=int(seed))
        mean, total, noise = np.zeros(2), 0.0, np.random.default_rng([seed, 1])  # not the task's own draws
        for gain, filter_gain in zip(gains, kalman):
            mean = mean + filter_gain[:, 0] * (obs[0] - mean[0])
            state = {"LQG": mean, "LQR": np.array([env.position, env.velocity])}.get(controller, np.zeros(2))
            action = np.clip(-gain @ state, -1, 1) if controller != "random" else noise.uniform(-1, 1, 1)
            force = env.force * action[0]
            mean = np.array([mean[0] + env.dt * mean[1] + env.dt**2 / 2 * force, mean[1] + env.dt * force])
            obs, reward, *_ = env.step(action)
            total += reward
        returns.append(total)
    return np.array(returns)


def references(args, run):
    """Rows of the known controllers: their mean over many seeds, and per trial over the episodes of its evaluation."""
    saved, rows = open_args(run), []
    for controller in ("LQR", "LQG", "zero action", "random"):
        count = max(saved.trials * saved.eval_episodes, 20 if args.quick else 2000)
        returns = simulate(controller, saved.seed + 10_000 + np.arange(count))
        same = returns[: saved.trials * saved.eval_episodes].reshape(saved.trials, -1).mean(1)
        rows += [(controller, 0, trial, "reference", value) for trial, value in enumerate(same)]
        rows.append((controller, 0, -1, "reference", returns.mean()))
        rows.append((controller, 0, -1, "error", returns.std() / count**0.5))
    exact = zip(("LQR", "LQG"), lqg()[2:])
    return rows + [(controller, 0, -1, "reference_unlimited", value) for controller, value in exact]


# A look inside an agent


def true_velocity(task):
    """The velocities (v,) that an unwrapped task of TASKS moves with now."""
    if isinstance(task, VEM.DoubleIntegrator):
        return np.array([task.velocity])
    return task.data.qvel.copy() if hasattr(task, "data") else np.array(task.state)[1:]  # after the angle or position


@torch.no_grad()
def record(agent, saved, deterministic=False):
    """Episodes on the seeds of the script's evaluation, with actions drawn from q: name -> (trials, steps, episodes, ·)
    of obs, the reward received with it, the latent state inferred then (its mean, and with noise as in training), the
    action and the true velocity then, and alive, 1 where the episode was not over yet."""
    envs = VEM.make_tasks(saved, saved.trials * saved.eval_episodes)
    obs, _ = envs.reset(seed=[saved.seed + 10_000 + i for i in range(envs.num_envs)])
    column = lambda x: torch.as_tensor(np.array(x), dtype=torch.float32).view(saved.trials, saved.eval_episodes, -1)
    if VEM.task_name(saved.env_id) not in TASKS:
        refuse(f"--runs: the true velocity can be read of {', '.join(TASKS)}, not of {saved.env_id}")
    alive, tape = np.ones(envs.num_envs, bool), defaultdict(list)
    latent, action, reward = agent.begin(saved.eval_episodes)
    noisy = latent
    while alive.any():
        velocity = column([true_velocity(env.unwrapped) for env in envs.envs])
        noisy = agent.perceive(noisy, action, column(obs), reward)
        latent = agent.perceive(latent, action, column(obs), reward, noise=torch.zeros_like(latent))
        action = agent.act(latent, "posterior", deterministic)
        for name, value in (("obs", column(obs)), ("reward", reward), ("latent", latent), ("noisy", noisy),
                            ("action", action), ("velocity", velocity), ("alive", column(alive))):
            tape[name].append(value)
        obs, reward, terminated, truncated, _ = envs.step(action.flatten(0, 1).numpy())
        reward, alive = column(reward), alive & ~(terminated | truncated)
    return {name: torch.stack(values, 1) for name, values in tape.items()}


def readout(x, y, test_x, test_y):
    """Least squares with an intercept, y (n, v) from x (n, d): predicted test_y and its R², the mean over v."""
    widen = lambda x: np.concatenate([x, np.ones((len(x), 1))], 1)
    predicted = widen(test_x) @ np.linalg.lstsq(widen(x), y, rcond=None)[0]
    residual, total = ((test_y - predicted) ** 2).sum(0), ((test_y - test_y.mean(0)) ** 2).sum(0)
    return predicted, (1 - residual / np.maximum(total, 1e-12)).mean()


def decode_velocity(tape, trial, source="latent"):
    """R² of the velocity read out from `source`, on the second half of a trial's episodes; and the readout along each
    of those, a list of (steps, v). The first step is left out: one observation does not show a velocity."""
    alive = tape["alive"][trial, 1:, :, 0].bool().T  # (episodes, steps - 1)
    x, y = ([values[on].double().numpy() for values, on in zip(tape[name][trial, 1:].transpose(0, 1), alive)]
            for name in (source, "velocity"))
    half = len(x) // 2
    predicted, r2 = readout(*(np.concatenate(part) for part in (x[:half], y[:half], x[half:], y[half:])))
    return r2, np.split(predicted, np.cumsum([len(episode) for episode in y[half:]])[:-1])


@torch.no_grad()
def predict(agent, tape, after, samples):
    """Mean and standard deviation (trials, steps - after, episodes, obs_dim) of the observations after the first
    `after` ones, foreseen from these and the actions alone: p(z_t|z_{t-1},a_{t-1}) rolled out from z ~ q."""
    wide = lambda name, t: tape[name][:, t].repeat_interleave(samples, 1)  # (trials, episodes * samples, ·)
    episodes, moments = tape["obs"].shape[2], []
    latent, action, _ = agent.begin(episodes * samples)
    for t in range(tape["obs"].shape[1]):
        if t < after:
            latent = agent.perceive(latent, action, wide("obs", t), wide("reward", t))
        else:
            latent = VEM.sample(*agent.latent_prior(latent, action))
            percept = agent.percepts.inverse(VEM.sample(agent.decode(latent)[0], agent.scale))[..., :-1]
            moments.append(torch.std_mean(percept.unflatten(1, (episodes, samples)), 2))
        action = wide("action", t)
    std, mean = (torch.stack(values, 1) for values in zip(*moments))
    return mean, std


def velocity_rows(args, label, run):
    """R² per trial from the mean of z, from z as training samples it, and from the observation alone. Of the middle
    trial, along the episode in which the velocity varies most: the true and the decoded velocity, and the open-loop
    prediction. Of all episodes: the share of the observations within two standard deviations of the prediction."""
    agent, saved, step = open_run(run, args.episodes)
    tape, alive = record(agent, saved), lambda trial, episode: int(tape["alive"][trial, :, episode].sum())
    sources = {"velocity/r2": "latent", "velocity/r2_sampled": "noisy", "velocity/r2_observation": "obs"}
    rows = [(label, step, trial, metric, decode_velocity(tape, trial, source)[0])
            for trial in range(saved.trials) for metric, source in sources.items()]
    found = [decode_velocity(tape, trial) for trial in range(saved.trials)]
    trial, half = int(np.argsort([r2 for r2, *_ in found])[(saved.trials - 1) // 2]), args.episodes // 2
    spread = [float(tape["velocity"][trial, : alive(trial, i), i].var(0, correction=0).sum())
              for i in range(half, args.episodes)]
    episode = half + int(np.argmax(spread))
    along = lambda values: values[trial, :, episode]
    series = {"velocity/true": (0, along(tape["velocity"])), "velocity/decoded": (1, found[trial][1][episode - half]),
              "prediction/true": (0, along(tape["obs"]))}
    if agent.generative and args.after < tape["obs"].shape[1]:
        mean, std = predict(agent, tape, args.after, args.samples)
        seen, running = tape["obs"][:, args.after :], tape["alive"][:, args.after :].expand_as(mean)
        within = (((seen - mean).abs() <= 2 * std) * running).sum((1, 2, 3)) / running.sum((1, 2, 3))
        rows += [(label, step, i, "prediction/within", float(value)) for i, value in enumerate(within) if value == value]
        series |= {"prediction/mean": (args.after, along(mean)), "prediction/std": (args.after, along(std))}
    for name, (first, values) in series.items():
        for t, row in enumerate(values[: max(0, alive(trial, episode) - first)], first):
            rows += [(label, t, trial, f"{name}_{i}", float(value)) for i, value in enumerate(row)]
    return rows


def acting_time(saved, agent, kinds, repeats):
    """Milliseconds per step of inferring z and acting, of one agent in one environment: kind -> median of the repeats,
    which are interleaved. kinds: label -> policy and refinements of q(a)."""
    sizes = agent.percepts.mean.shape[-1] - 1, agent.action_dim
    agents = {kind: VEM.Agent(dataclasses.replace(saved, trials=1, plan_iters=iters), *sizes)
              for kind, (_, iters) in kinds.items()}
    found, order = defaultdict(list), random.Random(0)
    for repeat in range(-3, repeats):  # the first ones warm up
        for kind in order.sample([*kinds], len(kinds)):
            latent, action, reward = agents[kind].begin(1)
            before = time.perf_counter()
            latent = agents[kind].perceive(latent, action, torch.zeros(1, 1, sizes[0]), reward)
            agents[kind].act(latent, kinds[kind][0], deterministic=True)
            if repeat >= 0:
                found[kind].append(1000 * (time.perf_counter() - before))
    return {kind: float(np.median(found[kind])) for kind in kinds}


# Experiments: each returns rows (label, step, trial, metric, value)


def learning(args):
    """Learning curves; of a sweep also the terms of the bound, and how well the velocity can be decoded in the end."""
    runs, sweep = train(args, SETTINGS[args.experiment]), args.experiment in SWEEPS
    shown = {*RETURNS, *(TERMS if sweep else ["eval/length"])}
    rows = [row for label, run in runs.items() for row in read(run, label, shown)]
    for label, run in runs.items():
        task = VEM.task_name(open_args(run).env_id)
        if sweep and task in TASKS:
            rows += [row for row in velocity_rows(args, label, run) if row[3] == "velocity/r2"]
        elif not sweep and task == "DoubleIntegrator" and label == "generative":
            rows += references(args, run)
    return rows


def planning(args):
    """What planning buys over the habit that it is consolidated into (Section 3.3): return and milliseconds per step of
    acting from p(a), from q(a) and from q(a) refined; and how far p(a) lags behind q(a) in the course of training."""
    rows = []
    for label, run in given_runs(args).items():
        agent, saved, step = open_run(run, args.episodes)
        envs = VEM.make_tasks(saved, saved.trials * saved.eval_episodes)
        kinds = {"p(a)": ("prior", 0), "q(a)": ("posterior", 0)}
        kinds |= {f"q(a) refined × {n}": ("posterior", n) for n in args.plan_iters if agent.generative}
        for kind, (policy, iters) in kinds.items():
            agent.args.plan_iters = iters
            torch.manual_seed(0)
            returns, _ = VEM.evaluate(agent, envs, saved, policy)
            rows += [(f"{label}: {kind}", step, trial, "return", value) for trial, value in enumerate(returns.mean(1))]
        times = acting_time(saved, agent, kinds, 5 if args.quick else 200)
        rows += [(f"{label}: {kind}", step, -1, "ms_per_step", ms) for kind, ms in times.items()]
        both = {(step, trial, metric): value for _, step, trial, metric, value in read(run, label, RETURNS)}
        rows += [(label, step, trial, "gap", value - both[step, trial, "eval/return_prior"])
                 for (step, trial, metric), value in both.items() if metric == "eval/return"]
    return rows


def velocity(args):
    return [row for label, run in given_runs(args).items() for row in velocity_rows(args, label, run)]


def bound(args):
    runs = given_runs(args)
    return [row for label, run in runs.items() for row in read(run, label, {*TERMS, "eval/return"})]


def speed(args):
    """Milliseconds per update on one thread, in `--blocks` blocks, each of which runs every contestant in an order
    drawn anew; step is the block. Sizes are those of Pendulum-v1 with its velocity hidden."""
    agents, order, rows, obs_dim, action_dim = {}, random.Random(0), [], 2, 1
    count, blocks = (2, 2) if args.quick else (args.updates, args.blocks)
    for label, flags in CONTESTANTS.items():
        agent = VEM.Agent(VEM.Args(device="cpu", **flags), obs_dim, action_dim)
        buffer = VEM.EpisodeBuffer(1, 1_000, obs_dim, action_dim, agent.latent_dim, "cpu")
        column = lambda width: torch.randn(1, 1, width)
        for step in range(1_000):
            buffer.add(column(obs_dim), column(action_dim).tanh(), column(1), column(obs_dim), torch.zeros(1, 1, 1),
                       *agent.begin(1), torch.full((1, 1, 1), step % 200.0))
        agent.fit_scales(buffer)
        agents[label] = agent, buffer
    for block in range(-1, blocks):  # the first one warms up
        for label in order.sample([*agents], len(agents)):
            before = time.perf_counter()
            agents[label][0].learn(agents[label][1], count)
            ms = 1000 * (time.perf_counter() - before) / count
            rows += [(label, block, -1, "ms_per_update", ms)] if block >= 0 else []
    return sorted(rows, key=lambda row: [*CONTESTANTS].index(row[0]))


# Tables and figures


def group(rows, *columns):
    """Values of some columns -> rows, in the order of the first appearance."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in columns)].append(row)
    return groups


def thin(rows, limit=LIMIT):
    """Rows of at most `limit` bytes as csv: of each curve as many steps as fit, evenly spaced, the first and the last
    among them always."""
    for most in (200, 100, 50, 25, 12, 6, 3, 2):
        kept = []
        for curve in group(rows, 0, 3).values():
            steps = np.array(sorted({row[1] for row in curve}))
            keep = {*steps[np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)].tolist()}
            kept += [row for row in curve if row[1] in keep]
        if sum(len(",".join(map(str, row[:4]))) + 14 for row in kept) <= limit:  # a value takes 12 characters at most
            break
    return kept


def select(rows, metric, label=None):
    return [row for row in rows if row[3] == metric and label in (None, row[0])]


def table(rows):
    """Steps (s,) and values (s, trials) of one curve."""
    steps = sorted({row[1] for row in rows})
    return np.array(steps), np.array([[row[4] for row in rows if row[1] == step] for step in steps])


def curve(axis, rows, **style):
    if rows:
        steps, values = table(rows)
        (line,) = axis.plot(steps, values.mean(1), **style)
        axis.fill_between(steps, values.min(1), values.max(1), color=line.get_color(), alpha=0.15, linewidth=0)


def last(rows, metric, label):
    """Values (trials,) at the last step."""
    return table(select(rows, metric, label))[1][-1]


def labels(rows, metric):
    return [*dict.fromkeys(row[0] for row in select(rows, metric))]


def number(values, digits=4):
    spread = f" ({min(values):.{digits}g} to {max(values):.{digits}g})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}g}{spread}"


def draw_curves(rows, figure):
    """A panel per task: returns of q(a), dashed of p(a), and lines of the known controllers."""
    names = labels(rows, "eval/return")
    panels = group([(*label.rpartition(": "), label) for label in names], 0)  # task -> its labels, in parts and whole
    figure.set_size_inches(6.5 * len(panels), 4.5)
    for axis, ((panel,), members) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for i, (*_, short, label) in enumerate(members):
            curve(axis, select(rows, "eval/return", label), color=f"C{i}", label=short)
            steps, values = table(select(rows, "eval/return_prior", label))
            axis.plot(steps, values.mean(1), "--", color=f"C{i}", linewidth=1)
            returns, length = last(rows, "eval/return", label), last(rows, "eval/length", label).mean()
            yield (f"{label}: return at step {steps[-1]} {number(returns)}, by trial "
                   f"{', '.join(f'{value:.4g}' for value in returns)}; of p(a) {number(values[-1])}; length {length:.4g}")
        axis.set(title=panel, xlabel="environment steps per trial", ylabel="evaluation return (dashed: of p(a))")
    for controller, style in zip(labels(rows, "reference"), (":", "--", "-.", (0, (1, 4)))):
        *same, mean = (row[4] for row in sorted(select(rows, "reference", controller), key=lambda row: row[2] < 0))
        axis.axhline(mean, color="black", linestyle=style, linewidth=1, label=f"{controller}, {mean:.4g}")
        axis.set_yscale("symlog", linthresh=10)
        axis.set_ylim(top=0)
        exact = [f", {row[4]:.4g} exactly if the force had no limit"
                 for row in select(rows, "reference_unlimited", controller)]
        yield (f"{controller}: return {mean:.4g} ± {last(rows, 'error', controller)[0]:.2g} (error of the mean)"
               f"{''.join(exact)}; on the trials' evaluation episodes {', '.join(f'{value:.4g}' for value in same)}")
    for axis in figure.axes:
        axis.legend(fontsize=8)


def draw_sweep(rows, figure):
    """Learning curves, and for each setting the trials' means over the last quarter (dots) and their mean (line)."""
    names, metrics = labels(rows, "eval/return"), [metric for metric in TITLES if select(rows, metric)]
    figure.set_size_inches(18, 7)
    first, *axes = figure.subplots(2, -(-(len(metrics) + 1) // 2)).flatten()
    for label in names:
        curve(first, select(rows, "eval/return", label), label=label)
    first.set(title="evaluation return", xlabel="environment steps per trial", yscale="symlog")
    first.legend(fontsize=8)
    for axis, metric in zip(axes, metrics):
        curves = {i: table(select(rows, metric, label)) for i, label in enumerate(names) if select(rows, metric, label)}
        ends = {i: values[steps >= 0.75 * steps[-1]].mean(0) for i, (steps, values) in curves.items()}  # (trials,) each
        axis.plot([*ends], [values.mean() for values in ends.values()], color="black", linewidth=1)
        for i, values in ends.items():
            axis.plot([i] * len(values), values, ".", color=f"C{i}")
        axis.set(title=TITLES[metric], yscale="symlog" if metric in RETURNS else "linear")
        axis.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        yield f"{TITLES[metric]}: " + "; ".join(f"{names[i]}: {number(values)}" for i, values in ends.items())
    for axis in axes[len(metrics) :]:
        axis.remove()


def draw_planning(rows, figure):
    times, gaps = figure.subplots(1, 2)
    for i, run in enumerate(labels(rows, "gap")):
        kinds = [row for row in select(rows, "ms_per_step") if row[0].rpartition(": ")[0] == run]
        for marker, (label, *_, ms) in zip("v^osDPX", kinds):
            returns = last(rows, "return", label)
            reach = np.abs(np.quantile(returns, [0, 1]) - returns.mean())[:, None]  # to the worst and the best trial
            times.errorbar(ms, returns.mean(), reach, fmt=marker, color=f"C{i}", capsize=3, label=label)
            yield f"{label}: return {number(returns)}, {ms:.3g} ms per step"
        curve(gaps, select(rows, "gap", run), color=f"C{i}", label=run)
        yield f"{run}: return of q(a) less that of p(a) at the end {number(last(rows, 'gap', run))}"
    times.set(xlabel="milliseconds per step, of one agent in one environment", ylabel="return", xscale="log")
    times.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    times.minorticks_off()
    gaps.set(xlabel="environment steps per trial", title="return of q(a) less that of p(a)", yscale="symlog")
    gaps.axhline(0, color="black", linewidth=0.5)
    for axis in (times, gaps):
        axis.legend(fontsize=7)


def draw_velocity(rows, figure):
    """A row per run: true and decoded velocities along an episode, then the prediction of each observed dimension."""
    names, metrics = labels(rows, "velocity/r2"), dict.fromkeys(row[3] for row in rows)
    dims = [metric for metric in metrics if metric.startswith("prediction/true_")][:3]
    figure.set_size_inches(5 * (1 + len(dims)), 3.4 * len(names))
    for (first, *axes), label in zip(figure.subplots(len(names), 1 + len(dims), squeeze=False), names):
        r2, floor = last(rows, "velocity/r2", label), last(rows, "velocity/r2_observation", label)
        for i, metric in enumerate(metric for metric in metrics if metric.startswith("velocity/true_")):
            for name, style in (("true", "-"), ("decoded", "--")):
                series = select(rows, metric.replace("true", name), label)
                curve(first, series, color=f"C{2 * i + (name == 'decoded')}", linestyle=style, label=name)
        sampled = last(rows, "velocity/r2_sampled", label) if select(rows, "velocity/r2_sampled", label) else None
        title = f"{label}: velocity, R² {number(r2, 3)}"
        title += "" if sampled is None else f"\nfrom z as it is sampled {number(sampled, 3)}"
        first.set(title=title, xlabel="step of the episode")
        for i, (axis, metric) in enumerate(zip(axes, dims)):
            mean, std = (select(rows, metric.replace("true", name), label) for name in ("mean", "std"))
            curve(axis, select(rows, metric, label), color="black", label="seen")
            if mean:
                (steps, mean), (_, std) = table(mean), table(std)
                axis.plot(steps, mean, color="C3", label="foreseen, ± 2 std")
                axis.fill_between(steps, *((mean + k * std)[:, 0] for k in (-2, 2)), color="C3", alpha=0.2, linewidth=0)
            axis.set(title=f"observation {i}", xlabel="step of the episode")
        for axis in (first, *axes):
            axis.legend(fontsize=7) if axis.lines else axis.remove()
        yield f"{label}: R² of the velocity {number(r2, 3)}, from the observation alone {number(floor, 3)}"
        if sampled is not None:
            yield f"{label}: R² from z as it is sampled {number(sampled, 3)}"
        if select(rows, "prediction/within", label):
            share = number(last(rows, "prediction/within", label), 3)
            yield f"{label}: share of the observations within 2 std of the prediction {share}"


def draw_bound(rows, figure):
    metrics = [metric for metric in (*TERMS, "eval/return") if select(rows, metric)]
    figure.set_size_inches(14, 8.5)
    axes = figure.subplots(3, 3).flatten()
    for axis, metric in zip(axes, metrics):
        for label in labels(rows, metric):
            curve(axis, select(rows, metric, label), color=f"C{labels(rows, 'eval/return').index(label)}", label=label)
            yield f"{label}: {TITLES[metric]} {number(last(rows, metric, label))}"
        axis.set(title=TITLES[metric] + ", nats" * (metric in TERMS), xlabel="environment steps per trial")
    axes[len(metrics) - 1].legend(fontsize=8)
    for axis in axes[len(metrics) :]:
        axis.remove()


def draw_speed(rows, figure):
    axis, contestants = figure.subplots(), labels(rows, "ms_per_update")
    times = [table(select(rows, "ms_per_update", label))[1][:, 0] for label in contestants]
    for i, (label, ms) in enumerate(zip(contestants, times)):
        low, middle, high = np.quantile(ms, [0.1, 0.5, 0.9])
        axis.barh(i, middle, xerr=[[middle - low], [high - middle]], color=f"C{i}", capsize=3)
        ratio = np.median(ms / times[0])  # in the same block
        yield f"{label}: {middle:.3g} ms per update ({low:.3g} to {high:.3g}), {ratio:.3g} times {contestants[0]}"
    axis.axvline(BUDGET_MS, color="black", linestyle=":")
    axis.set_yticks(range(len(contestants)), contestants)
    axis.invert_yaxis()
    axis.set(xlabel=f"milliseconds per update of 32 × 20 windows, H = 3, one thread (dotted: {BUDGET_MS})")


MEASURE = {"planning": planning, "velocity": velocity, "bound": bound, "speed": speed}  # else learning
DRAW = {"planning": draw_planning, "velocity": draw_velocity, "bound": draw_bound, "speed": draw_speed,
        **dict.fromkeys(SWEEPS, draw_sweep)}  # else draw_curves


def check(args, path):
    """Refuse what cannot work, before anything is opened."""
    for name, least in {"jobs": 1, "episodes": 2, "after": 1, "samples": 2, "blocks": 1, "updates": 1}.items():
        if getattr(args, name) < least:
            refuse(f"--{name} {getattr(args, name)}: must be at least {least}")
    takes_runs = args.experiment in ("planning", "velocity", "bound")
    for refused, message in (
        (args.trials < 0, f"--trials {args.trials}: must be at least 0"),
        (args.total_steps < 0, f"--total-steps {args.total_steps}: must be at least 0"),
        (min(args.plan_iters, default=0) < 1, "--plan-iters: name at least one number, from 1"),
        (args.runs and not takes_runs, f"--runs: only with planning, velocity or bound, not with {args.experiment}"),
        (args.labels and len(args.labels) != len(args.runs), "--labels: one per run"),
        (len({*run_labels(args)}) < len(args.runs), "--labels: needed, as runs must not have the same name"),
        ("/" in args.out, f"--out {args.out}: a name without folders"),
        (args.from_csv and not path.is_file(), f"--from-csv: there is no {path.name} among the results"),
    ):
        if refused:
            refuse(message)
    for run in args.runs:
        open_args(run)


def main(args):
    name = f"latent_{args.out or args.experiment}{'_quick' * args.quick}"
    path, picture = HERE / "results" / f"{name}.csv", HERE / "figures" / f"{name}.png"
    check(args, path)
    if not args.from_csv:
        torch.set_num_threads(1)
        rows = thin(MEASURE.get(args.experiment, learning)(args))
        with path.open("w", newline="") as file:
            lines = [(*row[:4], f"{row[4]:.6g}") for row in rows]
            csv.writer(file, lineterminator="\n").writerows([("label", "step", "trial", "metric", "value"), *lines])
    with path.open() as file:
        rows = [(label, int(step), int(trial), metric, float(value))
                for label, step, trial, metric, value in [*csv.reader(file)][1:]]
    figure = Figure(figsize=(10, 4), layout="constrained")
    print("\n".join([*DRAW.get(args.experiment, draw_curves)(rows, figure), str(path), str(picture)]))
    figure.suptitle(name)
    figure.savefig(picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
