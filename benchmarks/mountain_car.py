"""Fig. 4 of the β-VMBPO paper: what a policy does in its own learned dynamics, and what it does in the real ones.

    python benchmarks/grid.py mountain_car                                 # trains
    python benchmarks/mountain_car.py --runs RUN RUN --labels VMBPO β-VMBPO    # writes results/mountain_car*, figures/

Mean trajectories (position, velocity) of the deterministic policy under the true dynamics and under the learned ones
that its actor and critic were trained in (q of the variational scripts, p of MBPO), as far as half of the episodes go
on. Optimism is told from mere bang-bang control by the one-step value gap: E[V(s')] under the learned dynamics minus
V(s') of the real next state, from the same states and actions, positive for an optimistic model whatever the policy.
The policy's mean standard deviation says whether its entropy has collapsed.
"""

import dataclasses
import sys

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import at_least, group, labelled, open_run, publish, say_row, write

TASK, GOAL, STEPS = "MountainCarContinuous-v0", 0.45, 999


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories on MountainCarContinuous-v0
    labels: tuple[str, ...] = ()  # their names in the table and the figure
    episodes: int = 50  # per trial and dynamics
    from_csv: bool = False  # draw results/mountain_car.csv again


def starts(trials, episodes):
    """The task's initial states: (trials, episodes, 2)."""
    env = gym.make(TASK)
    states = [env.reset(seed=1000 + i)[0] for i in range(episodes)]
    return torch.as_tensor(np.array(states)).expand(trials, -1, -1)


def true_step(obs, action):
    """The task's own dynamics, by its own code: next states (trials, n, 2), rewards and ends (trials, n, 1)."""
    env = gym.make(TASK).unwrapped
    env.reset(seed=0)
    found = []
    for state, force in zip(obs.reshape(-1, 2).numpy(), action.reshape(-1, 1).numpy()):
        env.state = state.copy()
        next_obs, reward, ended, *_ = env.step(force)
        found.append((*next_obs, reward, ended))
    found = torch.tensor(found, dtype=torch.float32).view(*obs.shape[:2], 4)
    return found[..., :2], found[..., 2:3], found[..., 3:]


@torch.no_grad()
def roll_out(agent, dynamics, trials, episodes, steps=STEPS):
    """States (trials, episodes, time, 2), not a number after the end, and returns (trials, episodes)."""
    obs = starts(trials, episodes)
    alive, returns, track = torch.ones(*obs.shape[:2], 1), torch.zeros(*obs.shape[:2], 1), [obs]
    for _ in range(steps):
        next_obs, reward, ended = dynamics(obs, agent.act(obs, deterministic=True))[:3]
        returns = returns + alive * reward
        obs = torch.where(alive > 0, next_obs, obs)
        track.append(torch.where(alive > 0, next_obs, torch.nan))
        alive = alive * (torch.rand_like(ended) >= ended)
        if not alive.any():
            break
    return torch.stack(track, 2), returns[..., 0]


@torch.no_grad()
def value_gap(agent, paths, n=500):
    """E[V(s')] under the learned dynamics minus that of the real next state; the policy's deviation; (trials,) each."""
    rows = [path[~path.isnan().any(-1)] for path in paths.flatten(1, 2)]
    obs = torch.stack([row[torch.randint(len(row), (n,))] for row in rows])
    action = agent.act(obs)
    (imagined, _, imagined_end, *_), (real, _, end) = agent.predict(obs, action), true_step(obs, action)
    gap = (1 - imagined_end) * agent.value(imagined) - (1 - end) * agent.value(real)
    return gap.mean((-2, -1)), agent.actor(obs)[1].exp().mean((-2, -1))


def mean_path(path, episodes):
    """Rows of the mean of a trial's episodes (episodes, time, 2), thinned after step 200."""
    alive = (~path[:, :, 0].isnan()).sum(0).tolist()
    for t, (x, v) in enumerate(path.nanmean(0).tolist()):
        if 2 * alive[t] >= episodes and (t < 200 or t % 20 == 0):
            yield {"step": t, "position": f"{x:.4f}", "velocity": f"{v:.5f}", "alive": alive[t]}


def measure(args):
    """Rows of both tables: mean trajectories; returns and value gaps."""
    rows, summary = [], []
    for label, run in labelled(args.runs, args.labels):
        agent, saved, *_ = open_run(run, script="mbpo", task=TASK)
        paths = {}
        for dynamics, step in (("true", true_step), ("learned", agent.predict)):
            paths[dynamics], returns = roll_out(agent, step, saved.trials, args.episodes)
            reached = (paths[dynamics][..., 0].nan_to_num(-9).amax(-1) >= GOAL).float().mean(-1)
            for trial in range(saved.trials):
                which = {"label": label, "trial": trial, "dynamics": dynamics}
                rows += [which | row for row in mean_path(paths[dynamics][trial], args.episodes)]
                found = {"return": f"{returns[trial].mean():.4g}", "std": f"{returns[trial].std():.4g}"}
                summary.append(which | found | {"goal": f"{reached[trial]:.3g}", "value_gap": "", "policy_std": ""})
        gaps, deviations = value_gap(agent, paths["true"])
        for trial in range(saved.trials):
            found = {"value_gap": f"{gaps[trial]:.3g}", "policy_std": f"{deviations[trial]:.3g}"}
            summary.append({"label": label, "trial": trial} | found)
    return rows, summary


def draw(rows, figure):
    """Velocity against position, one panel per label, true and learned dynamics."""
    labels = group(rows, "label")
    figure.set_size_inches(3.6 * len(labels), 3.4)
    for axis, (label, mine) in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels.items()):
        for (dynamics, trial), path in group(mine, "dynamics", "trial").items():
            x, v = ([float(row[name]) for row in path] for name in ("position", "velocity"))
            name = f"{dynamics} dynamics" if trial == mine[0]["trial"] else None
            axis.plot(x, v, color="C0" if dynamics == "true" else "C1", lw=1, label=name)
        axis.axvline(GOAL, color="k", ls=":", lw=1)
        axis.set(title=label, xlabel="position (dotted: the goal)", ylabel="velocity")
        axis.legend(fontsize=7)


def main(args):
    at_least(args, episodes=1)
    rows, summary = (None, []) if args.from_csv else measure(args)
    for row in summary:
        say_row(row)
    if summary:
        write("mountain_car_returns", summary)
    return publish("mountain_car", rows, draw, (8, 3.4), "one line per trial: the mean of its episodes")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
