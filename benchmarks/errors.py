"""How wrong p and q are where the policy is: on the newest steps of a run's buffer, beside all of it.

    python benchmarks/errors.py --out tilt --runs RUN RUN --labels "ε=0.01" "ε=1"    # writes results/tilt.csv

Of held-out transitions: the squared one-step error in units of the target's variance, mean over members, as
model/prior_error; KL(q‖p); the optimism gap, E[V(s')] under the learned dynamics less V(s') of the real next state.
"""

import dataclasses
import sys

import torch
import tyro
from common import at_least, group, labelled, open_run, say, write


@dataclasses.dataclass
class Args:
    runs: tuple[str, ...] = ()  # run directories of the model-based scripts
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    out: str = "errors"  # name of the csv
    newest: int = 1_000  # environment steps, of which every fifth is held out


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


def main(args):
    at_least(args, newest=5)
    rows = []
    for label, run in labelled(args.runs, args.labels):
        agent, _, buffer, step = open_run(run, script="mbpo")
        count = buffer.rows().shape[1]
        held_out = torch.arange(0, count, sys.modules[type(agent).__module__].HOLD_OUT_EVERY)
        for which, index in (("all", held_out), ("newest", held_out[held_out >= count - args.newest])):
            for name, values in measure(agent, buffer.widths, buffer.rows()[:, index]).items():
                rows += [{"label": label, "step": step, "rows": which, "trial": trial, "metric": name, "value": value}
                         for trial, value in enumerate(values.tolist())]
    for (label, which, name), found in group(rows, "label", "rows", "metric").items():
        say(f"{label}, {which} rows: {name} " + ", ".join(f"{row['value']:.3g}" for row in found))
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
