"""How wrong p and q are where the policy is: on the newest steps of a run's buffer, beside all of it.

    python benchmarks/errors.py --out tilt --runs RUN RUN --labels "ε=0.01" "ε=1"    # writes results/tilt.csv

Of held-out transitions: the squared one-step error in units of the target's variance, mean over members, as
model/prior_error; KL(q‖p); the optimism gap, E[V(s')] under the learned dynamics less V(s') of the real next state.
Per 100 ends in the newest rows: those missed, and false ones, by a tree and by a perceptron that know the older rows.
"""

import dataclasses
import sys

import torch
import tyro
from common import at_least, fail, group, labelled, open_run, say, write
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


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


def ends(script, obs, ended, newest):
    """Name -> value per trial: what becomes of 100 ends in the newest rows (trials, n, ·)."""
    old_obs, old_ended, obs, ended = obs[:, :-newest], ended[:, :-newest], obs[:, -newest:], ended[:, -newest:]
    tree, perceptron = script.Terminator(len(obs)), make_pipeline(StandardScaler(), MLPClassifier(random_state=0))
    tree.fit(old_obs, old_ended)
    learn = lambda x, y, new: torch.as_tensor(perceptron.fit(x, y).predict_proba(new)[:, 1:])
    learned = {"tree": tree(obs), "perceptron": torch.stack([*map(learn, old_obs, old_ended[..., 0], obs)])}
    found, per_end = {}, lambda x: 100 * x.clamp(min=0).sum((1, 2)) / ended.sum((1, 2))
    for name, share in learned.items():
        found[f"missed_{name}"], found[f"false_{name}"] = per_end(ended - share), per_end(share - ended)
    return found


def main(args):
    at_least(args, newest=5)
    rows = []
    for label, run in labelled(args.runs, args.labels):
        agent, _, buffer, step = open_run(run, script="mbpo")
        script, (*_, next_obs, ended) = sys.modules[type(agent).__module__], buffer.rows().split(buffer.widths, -1)
        if int(buffer.added) > ended.shape[1]:
            fail(f"--runs {run}: its buffer is full, and the newest rows have overwritten the oldest")
        held_out = torch.arange(0, ended.shape[1], script.HOLD_OUT_EVERY)
        parts = {"all": held_out, "newest": held_out[held_out >= ended.shape[1] - args.newest]}
        found = {which: measure(agent, buffer.widths, buffer.rows()[:, index]) for which, index in parts.items()}
        if ended[:, : -args.newest].any(1).all() and ended[:, -args.newest :].any(1).all():
            found["newest"] |= ends(script, next_obs, ended, args.newest)
        rows += [{"label": label, "step": step, "rows": which, "trial": trial, "metric": name, "value": value}
                 for which in found for name in found[which] for trial, value in enumerate(found[which][name].tolist())]
    for (label, which, name), found in group(rows, "label", "rows", "metric").items():
        say(f"{label}, {which} rows: {name} " + ", ".join(f"{row['value']:.3g}" for row in found))
    write(args.out, rows)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
