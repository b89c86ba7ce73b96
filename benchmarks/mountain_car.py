"""Fig. 4 of the β-VMBPO paper: what a policy does in its own learned dynamics, and what it does in the real ones.

    python benchmarks/grid.py mountain_car                                     # trains; random actions are held at first
    python benchmarks/mountain_car.py --runs RUN RUN --labels VMBPO β-VMBPO    # writes results/mountain_car*, figures/
    python benchmarks/mountain_car.py --from-csv                               # draws the figure again

Mean trajectories (position, velocity) of the deterministic policy on MountainCarContinuous-v0, under the true dynamics and under
the learned ones that its actor and critic were trained in (q of the variational scripts, p of MBPO). Optimism is told from
mere bang-bang control by the one-step value gap: E[V(s')] under the learned dynamics minus V(s') of the real next state, from
the same states and actions; an optimistic model has a positive gap, whatever the policy. The policy's mean standard
deviation says whether its entropy has collapsed. A mean trajectory ends where half of its episodes have ended.
"""

import csv
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
TASK, GOAL, STEPS = "MountainCarContinuous-v0", 0.45, 999


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories on MountainCarContinuous-v0
    labels: tuple[str, ...] = ()  # their names in the table and the figure
    episodes: int = 50  # per trial and dynamics
    from_csv: bool = False  # draw results/mountain_car.csv again


def load_agent(run):
    """Agent and flags of a run directory."""
    saved = json.loads((Path(run) / "args.json").read_text())
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    path = next(p for p in (HERE.parent / f"{state['script']}.py", HERE.parent / "baselines" / f"{state['script']}.py") if p.exists())
    spec = importlib.util.spec_from_file_location(state["script"], path)
    sys.modules[spec.name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.Args(**saved | {"device": "cpu"})
    agent = script.Agent(args, 2, 1)
    script.load(Path(run) / "checkpoint.pt", args, agent)
    return agent, args


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
    """E[V(s')] under the learned dynamics minus that of the real next state, and the policy's standard deviation: (trials,)."""
    rows = [path[~path.isnan().any(-1)] for path in paths.flatten(1, 2)]
    obs = torch.stack([row[torch.randint(len(row), (n,))] for row in rows])
    action = agent.act(obs)
    (imagined, _, imagined_end, *_), (real, _, end) = agent.predict(obs, action), true_step(obs, action)
    gap = (1 - imagined_end) * agent.value(imagined) - (1 - end) * agent.value(real)
    return gap.mean((-2, -1)), agent.actor(obs)[1].exp().mean((-2, -1))


def draw(rows):
    """figures/mountain_car.png: velocity against position, one panel per label, true and learned dynamics."""
    labels = [*dict.fromkeys(row["label"] for row in rows)]
    figure = Figure(figsize=(3.6 * len(labels), 3.2), layout="constrained")
    for column, label in enumerate(labels):
        axes = figure.add_subplot(1, len(labels), column + 1, title=label, xlabel="position", ylabel="velocity")
        for dynamics, color in (("true", "C0"), ("learned", "C1")):
            for trial in {row["trial"] for row in rows}:
                points = [(float(row["position"]), float(row["velocity"])) for row in rows
                          if (row["label"], row["dynamics"], row["trial"]) == (label, dynamics, trial)]
                axes.plot(*zip(*points), color=color, lw=1, label=f"{dynamics} dynamics" if trial == min(r["trial"] for r in rows) else None)
        axes.axvline(GOAL, color="k", ls=":", lw=1)
        axes.legend(fontsize=7)
    figure.savefig(HERE / "figures" / "mountain_car.png", dpi=130)


def main(args):
    path = HERE / "results" / "mountain_car.csv"
    missing = [run for run in args.runs if not (Path(run) / "checkpoint.pt").exists()]
    refusal = (f"--from-csv: no {path.name} in results" if args.from_csv and not path.exists() else
               "--runs: none given" if not args.runs and not args.from_csv else
               f"--runs {missing[0]}: no checkpoint.pt there" if missing else
               "--labels: as many as --runs" if len(args.labels) != len(args.runs) else
               "--episodes counts from 1" if args.episodes < 1 else "")
    if refusal:
        print(f"mountain_car.py: error: {refusal}", file=sys.stderr)
        return 2
    if args.from_csv:
        draw([*csv.DictReader(path.open())])
        return 0
    rows, returns_of = [], []
    for run, label in zip(args.runs, args.labels):
        agent, saved = load_agent(run)
        torch.manual_seed(0)
        paths = {}
        for dynamics, step in (("true", true_step), ("learned", agent.predict)):
            paths[dynamics], returns = roll_out(agent, step, saved.trials, args.episodes)
            best = paths[dynamics][..., 0].nan_to_num(-9).amax(-1)
            for trial in range(saved.trials):
                print(f"{label}, trial {trial}, {dynamics} dynamics: return {returns[trial].mean():.1f} ± {returns[trial].std():.1f}, "
                      f"the goal in {100 * (best[trial] >= GOAL).float().mean():.0f} % of {args.episodes} episodes", flush=True)
                going_on = (~paths[dynamics][trial, :, :, 0].isnan()).sum(0).tolist()
                rows += [{"label": label, "trial": trial, "dynamics": dynamics, "step": t, "position": f"{x:.4f}",
                          "velocity": f"{v:.5f}", "alive": alive}
                         for t, ((x, v), alive) in enumerate(zip(paths[dynamics][trial].nanmean(0).tolist(), going_on))
                         if 2 * alive >= args.episodes and (t < 200 or t % 20 == 0)]
                returns_of.append({"label": label, "trial": trial, "dynamics": dynamics, "return": f"{returns[trial].mean():.4g}",
                                   "std": f"{returns[trial].std():.4g}", "goal": f"{(best[trial] >= GOAL).float().mean():.3g}"})
        for trial, (gap, std) in enumerate(zip(*(x.tolist() for x in value_gap(agent, paths["true"])))):
            returns_of.append({"label": label, "trial": trial, "value_gap": f"{gap:.3g}", "policy_std": f"{std:.3g}"})
            print(f"{label}, trial {trial}: one-step value gap {gap:.3g}, standard deviation of the policy {std:.3g}", flush=True)
    columns = "label", "trial", "dynamics", "return", "std", "goal", "value_gap", "policy_std"
    for place, names, table in ((path, rows[0].keys(), rows), (path.with_stem("mountain_car_returns"), columns, returns_of)):
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    draw([{key: str(value) for key, value in row.items()} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
