"""A look inside active_vem.py's agents: what z knows of the velocity it never sees.

    python benchmarks/latent.py --runs RUN RUN --labels hidden seen

Figures, sections and equations are those of Marino & Yue, "An Inference Perspective on Model-Based RL". Learning curves
and sweeps are the experiments latent_NAME of experiments.toml, trained by grid.py and drawn by figures.py. This command
writes benchmarks/results/latent_velocity.csv (label,step,trial,metric,value) and its figure.
"""

import dataclasses
import sys
from collections import defaultdict

import numpy as np
import torch
import tyro
from common import at_least, band, curve, fail, group, labelled, load_script, open_run, publish

VEM = load_script("active_vem")
SOURCES = {"velocity/r2": ("latent", "from the mean of z"),
           "velocity/r2_sampled": ("noisy", "from z as it is sampled"),
           "velocity/r2_observation": ("obs", "from the observation alone")}


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories of active_vem.py
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    out: str = "latent_velocity"  # name of the csv and the figure
    episodes: int = 20  # per trial, to decode the velocity; half of them serve to fit
    after: int = 10  # steps that are seen before the open-loop prediction
    samples: int = 100  # of the open-loop prediction
    from_csv: bool = False  # draw from the csv


def true_velocity(task):
    """The velocities (v,) that an unwrapped task of benchmarks/tasks.py moves with now."""
    if hasattr(task, "velocity"):  # the double integrator
        return np.array([task.velocity])
    return task.data.qvel.copy() if hasattr(task, "data") else np.array(task.state)[1:]  # after the angle or position


@torch.no_grad()
def record(agent, saved, deterministic=False):
    """Episodes on the seeds of the script's evaluation, with actions drawn from q: name -> (trials, steps, episodes, ·)
    of obs, the reward received with it, the latent state inferred then (its mean, and with noise as in training), the
    action and the true velocity then, and alive, 1 where the episode was not over yet."""
    envs = VEM.make_envs(saved, saved.trials * saved.eval_episodes)
    obs, _ = envs.reset(seed=[saved.seed + 10**9 + i for i in range(envs.num_envs)])
    column = lambda x: torch.as_tensor(np.array(x), dtype=torch.float32).view(saved.trials, saved.eval_episodes, -1)
    if not any(hasattr(envs.unwrapped.envs[0].unwrapped, name) for name in ("velocity", "data", "state")):
        fail(f"--runs: the true velocity of {saved.env_id} cannot be read")
    alive, tape, last = np.ones(envs.num_envs, bool), defaultdict(list), None
    while alive.any():
        seen, velocity = column(obs), column([true_velocity(env.unwrapped) for env in envs.unwrapped.envs])
        last = last or agent.begin(seen)  # latent state, action, reward, observation
        noisy = agent.perceive(seen, *(last if not tape else (tape["noisy"][-1], *last[1:])))
        latent = agent.perceive(seen, *last, deterministic=True)
        action = agent.act(latent, "posterior", deterministic)
        for name, value in (("obs", seen), ("reward", last[2]), ("latent", latent), ("noisy", noisy),
                            ("action", action), ("velocity", velocity), ("alive", column(alive))):
            tape[name].append(value)
        obs, reward, terminated, truncated, _ = envs.step(action.flatten(0, 1).numpy())
        last, alive = (latent, action, column(reward), seen), alive & ~(terminated | truncated)
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
    last = agent.begin(wide("obs", 0))
    for t in range(tape["obs"].shape[1]):
        if t < after:
            latent = agent.perceive(wide("obs", t), *last)
        else:
            latent = VEM.sample(*agent.latent_prior(*last[:2]))
            percept = VEM.sample(*agent.decode(latent)[:2]) * agent.percepts.std + agent.percepts.mean
            moments.append(torch.std_mean(percept[..., :-1].unflatten(1, (episodes, samples)), 2))
        last = latent, wide("action", t), wide("reward", min(t + 1, tape["obs"].shape[1] - 1)), wide("obs", t)
    std, mean = (torch.stack(values, 1) for values in zip(*moments))
    return mean, std


def measure(args, label, run):
    """R² per trial from the mean of z, from z as training samples it, and from the observation alone. Of the middle
    trial, along the episode in which the velocity varies most: the true and the decoded velocity, and the open-loop
    prediction. Of all episodes: the share of the observations within two standard deviations of the prediction."""
    agent, saved, _, step = open_run(run, script="active_vem", eval_episodes=args.episodes)
    tape = record(agent, saved)
    steps = tape["alive"][..., 0].sum(1).int()  # (trials, episodes)
    rows = [(label, step, trial, metric, decode_velocity(tape, trial, source)[0])
            for trial in range(saved.trials) for metric, (source, _) in SOURCES.items()]
    found = [decode_velocity(tape, trial) for trial in range(saved.trials)]
    trial, half = int(np.argsort([r2 for r2, *_ in found])[(saved.trials - 1) // 2]), args.episodes // 2
    spread = [float(tape["velocity"][trial, : steps[trial, i], i].var(0, correction=0).sum())
              for i in range(half, args.episodes)]
    episode = half + int(np.argmax(spread))
    along = lambda values: values[trial, :, episode]
    series = {"velocity/true": (0, along(tape["velocity"])), "velocity/decoded": (1, found[trial][1][episode - half]),
              "prediction/true": (0, along(tape["obs"]))}
    if agent.generative and args.after < tape["obs"].shape[1]:
        mean, std = predict(agent, tape, args.after, args.samples)
        seen, running = tape["obs"][:, args.after :], tape["alive"][:, args.after :].expand_as(mean)
        within = (((seen - mean).abs() <= 2 * std) * running).sum((1, 2, 3)) / running.sum((1, 2, 3))
        shares = [(i, float(share)) for i, share in enumerate(within) if share == share]
        rows += [(label, step, i, "prediction/within", share) for i, share in shares]
        series |= {"prediction/mean": (args.after, along(mean)), "prediction/std": (args.after, along(std))}
    for name, (first, values) in series.items():
        for t, row in enumerate(values[: max(0, steps[trial, episode] - first)], first):
            rows += [(label, t, trial, f"{name}_{i}", float(value)) for i, value in enumerate(row)]
    return rows


# The figure


def number(rows):
    """Mean, and least and greatest where there are several."""
    values = curve(rows)[1][-1]
    return f"{np.mean(values):.3g}" + f" ({min(values):.3g} to {max(values):.3g})" * (len(values) > 1)


def draw(rows, figure):
    """A row per run: true and decoded velocities along an episode, then the prediction of each observed dimension."""
    found, labels = group(rows, "label", "metric"), group(rows, "label")
    metrics = group(rows, "metric")
    dims = [metric for metric in metrics if metric.startswith("prediction/true_")][:3]
    figure.set_size_inches(5 * (1 + len(dims)), 3.6 * len(labels))
    for (first, *axes), label in zip(figure.subplots(len(labels), 1 + len(dims), squeeze=False), labels):
        title = f"{label}: velocity"
        for metric, (_, source) in SOURCES.items():
            if (label, metric) in found:
                r2 = number(found[label, metric])
                title += f"\nR² {r2} {source}"
                yield f"{label}: R² of the velocity {source} {r2}"
        first.set_title(title, fontsize=9)
        for i, metric in enumerate(metric for metric in metrics if metric.startswith("velocity/true_")):
            for name, style in (("true", "-"), ("decoded", "--")):
                if lines := found.get((label, metric.replace("true", name))):
                    first.plot(*curve(lines), style, color=f"C{2 * i + (name == 'decoded')}", label=name)
        for i, (axis, metric) in enumerate(zip(axes, dims)):
            axis.set_title(f"{label}: observation {i}")
            if means := found.get((label, metric.replace("true", "mean"))):
                axis.plot(*curve(found[label, metric]), color="black", label="seen")
                (steps, mean), (_, std) = curve(means), curve(found[label, metric.replace("true", "std")])
                low, high = (mean - 2 * std)[:, 0], (mean + 2 * std)[:, 0]
                band(axis, steps, mean[:, 0], low, high, color="C3", label="foreseen, ± 2 std")
        for axis in (first, *axes):
            axis.set_xlabel("step of the episode")
            axis.legend(fontsize=7) if axis.lines else axis.remove()
        if share := found.get((label, "prediction/within")):
            yield f"{label}: share of the observations within 2 std of the prediction {number(share)}"


def main(args):
    at_least(args, episodes=2, after=1, samples=2)
    rows, names = None, ("label", "step", "trial", "metric", "value")
    if not args.from_csv:
        torch.set_num_threads(1)
        runs = labelled(args.runs, args.labels)
        rows = (dict(zip(names, row)) for label, run in runs for row in measure(args, label, run))
    return publish(args.out, rows, draw, (10, 4), "The velocity that z knows, and what the model foresees")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
