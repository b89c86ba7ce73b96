"""A task where risk matters, with networks: a rewarding edge beside deadly ones, under noisy moves; and what an agent does there.

    python beta_vmbpo.py --env-id benchmarks.risk:RiskyEdge-v0 --beta 1 …      # the runs of `grid.py risk`
    python benchmarks/risk.py --runs RUN RUN --labels "β = 1" "β = 100"        # writes results/risk.csv, figures/risk.png
    python benchmarks/risk.py --optimum                                        # the risk-neutral optimum, by dynamic programming

s' = s + a + N(0, 0.5²) in the box [-7, 7]², −0.1 per step. Leaving to the left, right or top costs 100; leaving at the bottom pays
100 |x| / 7: the most in the corners, a step away from what costs most. An optimist goes for the corner, a cautious agent
leaves where it pays less. Episodes begin at the centre and end after 100 steps. For every run: the mean return, the mean of the
worst tenth, where paths leave, and |x| there, all over `--episodes` episodes of the deterministic policy.

Rewards here are −0.1 but for the few that are of the size of 100. A Gaussian likelihood then fits the many, with a variance that goes
to its lower bound, and leaves the mean near the edges where it was: after 3,000 minibatches on 660 exits it was −5 where it should be
−84. With `--variance-weight 0.5` it is −78 to −93; the runs of `grid.py risk` have it.
"""

import csv
import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SIZE, NOISE, STEP_REWARD, FALL, PRIZE = 7.0, 0.5, -0.1, -100.0, 100.0


def exit_reward(x, y):
    """What leaving at (x, y) pays, by the edge that is crossed furthest; 0 inside. Arrays of one shape."""
    beyond = np.stack([-x, x, y, -y]) - SIZE  # left, right, top, bottom
    pays = np.where(beyond.argmax(0) == 3, PRIZE * np.minimum(np.abs(x), SIZE) / SIZE, FALL)
    return np.where(beyond.max(0) > 0, pays, 0.0)


class RiskyEdge(gym.Env):
    """Observation: the position (2,); action: the move (2,) in [-1, 1]."""

    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + np.clip(action, -1, 1) + NOISE * self.np_random.normal(size=2)
        left = bool(np.abs(self.position).max() > SIZE)
        return self.position.astype(np.float32), STEP_REWARD + float(exit_reward(*self.position)), left, False, {}


gym.register("RiskyEdge-v0", RiskyEdge, max_episode_steps=100)


def optimum(gamma=0.99, cell=0.1, sweeps=400):
    """Risk-neutral optimal value on a grid of the positions, by value iteration; returns axis and values (y, x).

    V(s) = max_a E[r + γ V(s')]: values and exit rewards are blurred with the noise, and the best of the moves within reach
    is the largest blurred value in a square around s. The grid goes on beyond the box by as far as a move can carry.
    """
    axis = np.arange(-round(11 / cell), round(11 / cell) + 1) * cell
    inside, reach = np.abs(axis) <= SIZE + 1e-9, round(1 / cell)
    steps = np.arange(-round(3 / cell), round(3 / cell) + 1) * cell
    kernel = np.exp(-0.5 * (steps / NOISE) ** 2)
    kernel /= kernel.sum()
    x, y = np.meshgrid(axis, axis)
    outside, within = exit_reward(x, y), inside[:, None] & inside[None]
    value = np.zeros_like(outside)
    for _ in range(sweeps):
        landing = np.where(within, gamma * value, outside)
        for way in (0, 1):
            landing = np.apply_along_axis(np.convolve, way, landing, kernel, "same")
        best = landing
        for way in (0, 1):
            best = np.max([np.roll(best, shift, way) for shift in range(-reach, reach + 1)], 0)
        new = np.where(within, STEP_REWARD + best, 0.0)
        change, value = np.abs(new - value).max(), new
        if change < 1e-6:
            break
    return axis[inside], value[np.ix_(inside, inside)]


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories of one of the model-based scripts or of sac_iterative.py
    labels: tuple[str, ...] = ()  # their names in the table and the figure
    episodes: int = 200  # episodes per trial
    optimum: bool = False  # print the risk-neutral optimum and do nothing else


def load_agent(run):
    """Script, agent and flags of a run directory."""
    saved = json.loads((Path(run) / "args.json").read_text())
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    path = next(p for p in (HERE.parent / f"{state['script']}.py", HERE.parent / "baselines" / f"{state['script']}.py") if p.exists())
    spec = importlib.util.spec_from_file_location(state["script"], path)
    sys.modules[spec.name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.Args(**saved | {"device": "cpu"})
    agent = script.Agent(args, 2, 2)
    script.load(Path(run) / "checkpoint.pt", args, agent)
    return agent, args


def walk(agent, trials, episodes, seed):
    """Returns (trials, episodes) and paths, a list of positions (time, 2) per trial and episode."""
    noise = np.random.default_rng(seed)
    position, returns = np.zeros((trials, episodes, 2)), np.zeros((trials, episodes))
    alive, track = np.ones((trials, episodes), bool), [position]
    for _ in range(100):
        action = agent.act(torch.as_tensor(position, dtype=torch.float32), deterministic=True).numpy()
        moved = position + action + NOISE * noise.normal(size=position.shape)
        position = np.where(alive[..., None], moved, position)
        returns += alive * (STEP_REWARD + exit_reward(position[..., 0], position[..., 1]))
        track.append(np.where(alive[..., None], position, np.nan))
        alive &= np.abs(position).max(-1) <= SIZE
    return returns, np.stack(track, 2)  # (trials, episodes, time, 2)


def edge(path):
    """Where a path (time, 2) leaves, and |x| there."""
    x, y = path[~np.isnan(path).any(-1)][-1]
    beyond = np.array([-x, x, y, -y]) - SIZE
    return ("left", "right", "top", "bottom")[beyond.argmax()] if beyond.max() > 0 else "nowhere", abs(x)


def main(args):
    if args.optimum:
        axis, value = optimum()
        print(f"optimal discounted value at the start: {value[len(axis) // 2, len(axis) // 2]:.2f}")
        return 0
    missing = [run for run in args.runs if not (Path(run) / "checkpoint.pt").exists()]
    if not args.runs or missing or len(args.labels) != len(args.runs) or args.episodes < 1:
        flag = "--runs: none given" if not args.runs else f"--runs {missing[0]}: no checkpoint.pt there" if missing else (
            "--labels: as many as --runs" if len(args.labels) != len(args.runs) else "--episodes counts from 1")
        print(f"risk.py: error: {flag}", file=sys.stderr)
        return 2
    rows, figure = [], Figure(figsize=(3.2 * len(args.runs), 3.6), layout="constrained")
    for column, (run, label) in enumerate(zip(args.runs, args.labels)):
        agent, saved = load_agent(run)
        torch.manual_seed(0)
        returns, paths = walk(agent, saved.trials, args.episodes, seed=20_000)
        axes = figure.add_subplot(1, len(args.runs), column + 1, title=label, xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
        axes.plot([-SIZE, -SIZE, SIZE, SIZE], [-SIZE, SIZE, SIZE, -SIZE], "k", lw=1)
        axes.plot([-SIZE, SIZE], [-SIZE, -SIZE], "g", lw=2)
        for trial in range(saved.trials):
            ways = [edge(path) for path in paths[trial]]
            share, low = Counter(way for way, _ in ways), np.sort(returns[trial])[: max(1, args.episodes // 10)]
            below = [x for way, x in ways if way == "bottom"]
            rows.append({"label": label, "trial": trial, "return": returns[trial].mean(), "worst_tenth": low.mean(),
                         **{way: share[way] / args.episodes for way in ("left", "right", "top", "bottom", "nowhere")},
                         "x_at_bottom": np.mean(below) if below else float("nan")})
            for path in paths[trial, :20]:
                axes.plot(*path.T, color=f"C{trial}", alpha=0.3, lw=0.8)
        mean = {key: np.nanmean([row[key] for row in rows if row["label"] == label]) for key in [*rows[-1]][2:]}
        print(f"{label}: " + "  ".join(f"{key} {value:.3g}" for key, value in mean.items()), flush=True)
    with (HERE / "results" / "risk.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    figure.savefig(HERE / "figures" / "risk.png", dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
