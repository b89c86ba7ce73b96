"""A task where risk matters, with networks: a rewarding edge beside deadly ones, under noisy moves; and what an agent does there.

    python beta_vmbpo.py --env-id benchmarks.risk:RiskyEdge-v0 --beta 1 …      # the runs of `grid.py risk`
    python benchmarks/risk.py --runs RUN RUN --labels "β = 1" "β = 100"        # writes results/risk.csv, figures/risk.png
    python benchmarks/risk.py --reward-fit                                     # writes results/risk_reward_fit.csv
    python benchmarks/risk.py --optimum                                        # the risk-neutral optimum, by dynamic programming

s' = s + a + N(0, 0.5²) in the box [-7, 7]², −0.1 per step. Leaving to the left, right or top costs 100; leaving at the bottom pays
100 |x| / 7: the most in the corners, a step away from what costs most. An optimist goes for the corner, a cautious agent
leaves where it pays less. Episodes begin at the centre and end after 100 steps. For every run: the mean return, the mean of the
worst tenth, where paths leave, and |x| there, all over `--episodes` episodes of the deterministic policy.

Rewards here are −0.1 but for the few that are of the size of 100. A Gaussian likelihood fits the many, with a variance at its
lower bound, and leaves its mean near the edges where it was. The runs of `grid.py risk` have `--variance-weight 0.5`;
`--reward-fit` shows why: expected rewards at five places, true and as fitted to random steps with weights 0, 0.5, 1.
They also have `--gamma 0.95`: at 0.99 it costs a hundredth of the prize to put off leaving, less than critics err, and agents
that put it off for ever came and went from one evaluation to the next.
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
PLACES = ((0, 0), (0, 0)), ((0, -6.5), (0, -1)), ((5, -6.5), (0, -1)), ((-5, -6.5), (0, -1)), ((6.5, 0), (1, 0))  # and moves


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
    gamma: float = 0.95  # discount of the optimum
    reward_fit: bool = False  # fit dynamics to random steps, print what they expect near the edges and do nothing else
    steps: int = 15_000  # random steps of --reward-fit
    batches: int = 3_000  # minibatches of --reward-fit


def load_script(name):
    """A script of the collection as a module."""
    path = next(p for p in (HERE.parent / f"{name}.py", HERE.parent / "baselines" / f"{name}.py") if p.exists())
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def random_rows(steps, hold=5, seed=0):
    """Transitions (steps, 8) of uniformly random moves, each held for some steps."""
    env, noise, rows = gym.make("RiskyEdge-v0"), np.random.default_rng(seed), []
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        action = noise.uniform(-1, 1, 2) if step % hold == 0 else action
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((*obs, *action, reward, *next_obs, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return torch.tensor(np.array(rows), dtype=torch.float32)


def reward_fit(args):
    """Rows place, move, weight, reward (expected, after a step) of baselines/mbpo.py's dynamics; weight true: sampled."""
    script, data, rows = load_script("mbpo"), random_rows(args.steps), []
    places, moves = torch.tensor(PLACES, dtype=torch.float32)[None].unbind(-2)
    after = (places + moves + NOISE * torch.randn(100_000, *places.shape[1:], generator=torch.Generator().manual_seed(0))).double()
    found = {"true": STEP_REWARD + exit_reward(*after.numpy().reshape(-1, 2).T).reshape(len(after), -1).mean(0)}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        flags = script.Args(device="cpu", model_dim=100, model_layers=3, min_first_batches=args.batches,
                            max_batches=args.batches, variance_weight=weight)
        agent, buffer = script.Agent(flags, 2, 2), script.ReplayBuffer(1, args.steps, 2, 2, "cpu")
        buffer.add(*data[None].split(buffer.widths, -1))
        agent.fit_model(buffer)
        with torch.no_grad():
            mean = agent.moments(places, moves)[0].mean(0)
        found[weight] = agent.targets.inverse(mean)[0, :, -1].tolist()
    for weight, rewards in found.items():
        rows += [{"x": x, "y": y, "move_x": a, "move_y": b, "weight": weight, "reward": f"{reward:.3g}"}
                 for ((x, y), (a, b)), reward in zip(PLACES, rewards)]
        print(f"weight {weight}: " + "  ".join(f"{reward:.3g}" for reward in rewards), flush=True)
    return rows


def load_agent(run):
    """Script, agent and flags of a run directory."""
    saved = json.loads((Path(run) / "args.json").read_text())
    state = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
    script = load_script(state["script"])
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


def write(name, rows):
    with (HERE / "results" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)


def main(args):
    if args.optimum:
        if not 0 <= args.gamma <= 1:
            print(f"risk.py: error: --gamma {args.gamma}: allowed are values from 0 to 1", file=sys.stderr)
            return 2
        axis, value = optimum(args.gamma)
        print(f"optimal discounted value at the start: {value[len(axis) // 2, len(axis) // 2]:.2f}")
        return 0
    if args.reward_fit:
        if args.steps < 300 or args.batches < 1:
            print("risk.py: error: --steps counts from 300, --batches from 1", file=sys.stderr)
            return 2
        write("risk_reward_fit", reward_fit(args))
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
    write("risk", rows)
    figure.savefig(HERE / "figures" / "risk.png", dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
