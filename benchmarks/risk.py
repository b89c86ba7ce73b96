"""A task where risk matters, with networks (RiskyEdge-v0 of tasks.py), and what an agent does there.

    python benchmarks/grid.py risk
    python benchmarks/risk.py --runs RUN RUN --labels "β = 1" "β = 100"    # writes results/risk.csv, figures/risk.png
    python benchmarks/risk.py --reward-fit                                 # writes results/risk_reward_fit.csv

For every run: the mean return, the mean of the worst tenth, where paths leave, and |x| there, over `--episodes`
episodes of the deterministic policy. Rewards are −0.1 but for the few that are of the size of 100. A Gaussian
likelihood fits the many, with a variance at its lower bound, and leaves its mean near the edges where it was. So runs
have `--variance-weight 0.5`; `--reward-fit` shows why: expected rewards at five places, true and as fitted to random
steps with weights 0, 0.5, 1. They also have `--gamma 0.95`: at 0.99 it costs a hundredth of the prize to put off
leaving, less than critics err, and agents that put it off for ever came and went from one evaluation to the next.
"""

import dataclasses
import sys

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import at_least, build, group, labelled, open_run, publish, say, write
from benchmarks.tasks import NOISE, SIZE, STEP_REWARD, exit_reward

EDGES = "left", "right", "top", "bottom"
PLACES = ((0, 0), (0, 0)), ((0, -6.5), (0, -1)), ((5, -6.5), (0, -1)), ((-5, -6.5), (0, -1)), ((6.5, 0), (1, 0))


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories of one of the model-based scripts or of sac_iterative.py
    labels: tuple[str, ...] = ()  # their names in the table and the figure
    episodes: int = 200  # episodes per trial
    reward_fit: bool = False  # fit dynamics to random steps, print what they expect near the edges and do nothing else
    steps: int = 15_000  # random steps of --reward-fit
    batches: int = 3_000  # minibatches of --reward-fit


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
    """Rows place, move, weight, reward (expected, after a step) of baselines/mbpo.py's dynamics; "true": sampled."""
    data = random_rows(args.steps)
    places, moves = torch.tensor(PLACES, dtype=torch.float32)[None].unbind(-2)
    after = places + moves + NOISE * torch.randn(100_000, *places.shape[1:], generator=torch.Generator().manual_seed(0))
    paid = exit_reward(*after.double().numpy().reshape(-1, 2).T).reshape(len(after), -1)
    found = {"true": STEP_REWARD + paid.mean(0)}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        *_, agent, buffer = build(
            "mbpo", env_id="RiskyEdge-v0", device="cpu", buffer_size=args.steps, variance_weight=weight, model_dim=100,
            model_layers=3, min_first_batches=args.batches, max_batches=args.batches)
        buffer.add(*data[None].split(buffer.widths, -1))
        agent.fit_model(buffer)
        with torch.no_grad():
            mean = agent.moments(agent.model, places, moves)[0].mean(0)
        found[weight] = agent.targets.inverse(mean)[0, :, -1].tolist()
    for weight, rewards in found.items():
        say(f"weight {weight}: " + "  ".join(f"{reward:.3g}" for reward in rewards))
        for ((x, y), (a, b)), reward in zip(PLACES, rewards):
            yield {"x": x, "y": y, "move_x": a, "move_y": b, "weight": weight, "reward": f"{reward:.3g}"}


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


def describe(label, trial, returns, paths):
    """The row of one trial's episodes: returns (episodes,) and paths (episodes, time, 2)."""
    x, y = np.array([path[~np.isnan(path).any(-1)][-1] for path in paths]).T  # where they end
    beyond = np.stack([-x, x, y, -y]) - SIZE
    way = np.where(beyond.max(0) > 0, np.array(EDGES)[beyond.argmax(0)], "nowhere")
    worst, bottom = np.sort(returns)[: max(1, len(returns) // 10)], np.abs(x[way == "bottom"])
    return {"label": label, "trial": trial, "return": returns.mean(), "worst_tenth": worst.mean(),
            **{name: (way == name).mean() for name in (*EDGES, "nowhere")},
            "x_at_bottom": bottom.mean() if len(bottom) else float("nan")}


def main(args):
    at_least(args, episodes=1, steps=300, batches=1)
    if args.reward_fit:
        write("risk_reward_fit", reward_fit(args))
        return 0
    rows, walks, height = [], {}, (len(args.runs) + 3) // 4  # pictures in rows of four
    for label, run in labelled(args.runs, args.labels):
        agent, saved, *_ = open_run(run, task="RiskyEdge-v0")
        returns, walks[label] = walk(agent, saved.trials, args.episodes, seed=20_000)
        rows += [describe(label, trial, returns[trial], walks[label][trial]) for trial in range(saved.trials)]

    def draw(rows, figure):
        for place, (label, paths) in enumerate(walks.items(), 1):
            axis = figure.add_subplot(height, 4, place, title=label, xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
            axis.plot([-SIZE, -SIZE, SIZE, SIZE], [-SIZE, SIZE, SIZE, -SIZE], "k", lw=1)
            axis.plot([-SIZE, SIZE], [-SIZE, -SIZE], "g", lw=2)
            for trial, path in ((trial, path) for trial in range(len(paths)) for path in paths[trial, :20]):
                axis.plot(*path.T, color=f"C{trial}", alpha=0.3, lw=0.8)
        for label, trials in group(rows, "label").items():
            means = {key: np.nanmean([float(row[key]) for row in trials]) for key in [*rows[0]][2:]}
            yield f"{label}: " + "  ".join(f"{key} {value:.3g}" for key, value in means.items())

    return publish("risk", rows, draw, (9.6, 0.4 + 2.6 * height), "(x, y) of 20 episodes per trial; green pays")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
