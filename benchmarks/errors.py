"""How wrong p and q are where the policy is: on the newest steps of a run's buffer, beside all of it.

    python benchmarks/errors.py --out tilt --runs RUN RUN --labels "ε=0.01" "ε=1"    # writes results/tilt.csv

Of held-out transitions: the squared one-step error in units of the target's variance, mean over members; KL(q‖p); the
optimism gap, E[V(s')] under the learned dynamics less V(s') of the real next state. On InvertedPendulum also from how
far off the middle the policy balances, and how far off the newest steps have been.
"""

import dataclasses
import sys

import numpy as np
import torch
import tyro
from common import at_least, fail, group, labelled, open_run, say, write


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories of the model-based scripts
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    out: str = "errors"  # name of the csv
    newest: int = 1_000  # environment steps; of the ensembles' errors every fifth, which is held out


@torch.no_grad()
def measure(agent, widths, rows):
    """Name -> value per trial, on rows (trials, n, ·) of a buffer."""
    obs, action, reward, next_obs, terminated = rows.split(widths, -1)
    target = agent.targets(torch.cat([next_obs - obs, reward], -1))
    error = lambda model: (agent.moments(model, obs, action)[0] - target).square().mean((0, -2, -1))
    imagined_obs, _, imagined_end = agent.predict(obs, action)
    gap = (1 - imagined_end) * agent.value(imagined_obs) - (1 - terminated) * agent.value(next_obs)
    found = {"error_p": error(agent.model), "gap": gap.mean((-2, -1))}
    if hasattr(agent, "posterior_model"):
        found |= {"error_q": error(agent.posterior_model), "kl": agent.divergence(obs)}
    return found


def balance(script, agent, args, positions):
    """Shares of both sides from which 300 mean actions keep it up, and of positions (trials, n) beyond: (trials,)."""
    distances = np.arange(1, 10, 2) / 10
    starts = np.tile(np.outer(distances, (-1, 1)).flatten(), args.trials)
    envs, stands = script.make_envs(args, len(starts)), np.ones(len(starts), bool)
    envs.reset(seed=args.seed)
    for env, start in zip(envs.unwrapped.envs, starts):
        env.unwrapped.set_state(np.array([start, 0]), np.zeros(2))
    obs = np.stack([starts, *np.zeros((3, len(starts)))], 1)
    for _ in range(300):
        seen = torch.as_tensor(obs, dtype=torch.float32).unflatten(0, (args.trials, -1))
        obs, _, terminated, *_ = envs.step(agent.act(seen, deterministic=True).flatten(0, 1).numpy())
        stands &= ~terminated
    shares = stands.reshape(args.trials, -1, 2).mean(-1).T
    found = {f"stands_from_{distance}": torch.tensor(share) for distance, share in zip(distances, shares)}
    return found | {f"beyond_{distance}": (positions.abs() >= distance).float().mean(1) for distance in distances}


def main(args):
    at_least(args, newest=5)
    rows = []
    for label, run in labelled(args.runs, args.labels):
        agent, saved, buffer, step = open_run(run, script="mbpo")
        script, count = sys.modules[type(agent).__module__], buffer.rows().shape[1]
        if int(buffer.added) > count:
            fail(f"--runs {run}: its buffer is full, and the newest rows have overwritten the oldest")
        held_out = torch.arange(0, count, script.HOLD_OUT_EVERY)
        parts = {"all": held_out, "newest": held_out[held_out >= count - args.newest]}
        found = {which: measure(agent, buffer.widths, buffer.rows()[:, index]) for which, index in parts.items()}
        if "InvertedPendulum" in saved.env_id:
            found["newest"] |= balance(script, agent, saved, buffer.rows()[:, -args.newest :, 0])
        rows += [{"label": label, "step": step, "rows": which, "trial": trial, "metric": name, "value": value}
                 for which in found for name in found[which] for trial, value in enumerate(found[which][name].tolist())]
    for (label, which, name), found in group(rows, "label", "rows", "metric").items():
        say(f"{label}, {which} rows: {name} " + ", ".join(f"{row['value']:.3g}" for row in found))
    write(args.out, rows)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
