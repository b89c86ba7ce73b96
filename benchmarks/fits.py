"""Which rule for refitting the dynamics is exact, never breaks, and leaves a KL(q‖p) that is the tilt alone.

    python benchmarks/fits.py                       # records, refits, writes results/fits.csv, draws figures/fits.png

Each task is recorded once: random actions, then the last 5,000 steps of a soft actor-critic, so that data shift. The
dynamics are refitted as 250 rows at a time are added, by `fit_model` of `beta_vmbpo.py` under each rule, then thrice on
the same rows. The last fit is made again for every β, and seven times at β = 10 with other minibatches.
"""

import copy
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import ROOT, at_least, build, group, load_script, open_run, publish

BETAS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# Rule -> the script's CONSTANTS under it: rate, where in a fit the second phase begins, Adam's betas.
CONSTANTS = ("FIT_RATE", "SECOND_PHASE", "FIT_BETAS")
FALL = (0, 8, 2, 0.5, 0)  # the default
RULES = {
    "two phases": (FALL, 0.5, (0.9, 0.95)),
    "two phases, float32": (FALL, 0.5, (0.9, 0.95)),
    "two phases, β₂ = 0.99": (FALL, 0.5, (0.9, 0.99)),
    "two phases, lower rate": ((0, 3, 1, 0.5, 0), 0.5, (0.9, 0.95)),
    "constant, β₂ = 0.999": ((1, 1, 1, 1, 1), 0, (0.9, 0.999)),
}
QUICK = {"hidden_dim": 128, "model_dim": 100, "model_layers": 3}
RECORDINGS = {"InvertedPendulum-v4": QUICK | {"learning_starts": 500, "total_steps": 5_500, "updates_per_step": 3},
              **dict.fromkeys(("Hopper-v4", "HalfCheetah-v4"), {"total_steps": 30_000, "updates_per_step": 1})}


@dataclasses.dataclass
class Args:
    tasks: tuple[Literal[(*RECORDINGS, "toy")], ...] = (*RECORDINGS, "toy")  # what to refit on
    rules: tuple[Literal[(*RULES,)], ...] = (*RULES,)  # how
    refits: int = 20  # fits per rule, each with 250 rows more
    seed: int = 1  # of recordings, networks and minibatches
    runs_dir: str = "runs/fits"  # where recordings are kept
    out: str = "fits"  # name of csv and figure
    from_csv: bool = False  # draw the csv again


def record(task, args):
    """Rows (1, n, row): those of random actions, then the trained agent's last 5,000; the run they are from."""
    run, flags = Path(args.runs_dir, f"{task}_s{args.seed}"), RECORDINGS[task]
    if not run.exists():
        part = run.with_suffix(f".{time.time():.0f}")  # what is cut short stays beside it
        flags = flags | {"env_id": task, "seed": args.seed, "run_dir": part, "rollouts": 100, "real_ratio": 1.0,
                         "fit_every": 10**8, "eval_every": flags["total_steps"]}
        command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        subprocess.run([sys.executable, ROOT / "beta_vmbpo.py", *command], check=True)
        part.rename(run)
    rows, starts = open_run(run)[2].rows(), flags.get("learning_starts", 5_000)
    return torch.cat([rows[:, :starts], rows[:, starts:][:, -5_000:]], 1), starts, run


def toy():
    """s' = s + 0.1 sin(s, swapped) a, without noise."""
    obs, action, zero = torch.randn(1, 6_000, 2), 2 * torch.rand(1, 6_000, 1) - 1, torch.zeros(1, 6_000, 1)
    return torch.cat([obs, action, zero, obs + 0.1 * obs.flip(-1).sin() * action, zero], -1), 1_000


def make(script, task, args):
    """A fresh agent with the recorded actor and critics, an empty buffer, the rows to come and how many come first."""
    torch.manual_seed(args.seed)
    if task == "toy":
        rows, starts = toy()
        agent = script.Agent(script.Args(**QUICK, batch_size=64, max_batches=200, device="cpu"), 2, 1)
        agent.value = lambda obs: 10 * obs.sum(-1, keepdim=True)
        buffer = script.ReplayBuffer(1, rows.shape[1], 2, 1, "cpu")
    else:
        rows, starts, run = record(task, args)
        trained, trained_args, *_ = open_run(run, seed=args.seed)  # also of the networks to come
        *_, agent, buffer = build("beta_vmbpo", **vars(trained_args) | {"buffer_size": rows.shape[1]})
        for part in ("actor", "critic", "critic_target"):
            getattr(agent, part).load_state_dict(getattr(trained, part).state_dict())
        agent.log_alpha.data.copy_(trained.log_alpha)
    return agent, buffer, rows, starts


def fit(agent, buffer, beta, seed):
    """One fit at a given β; the same seed draws the same minibatches."""
    torch.manual_seed(seed)
    agent.log_beta.data.fill_(math.log(beta))
    return {name: value.item() for name, value in agent.fit_model(buffer).items()}


def study(task, rule, args):
    """Rows of the table: the error of p after each fit, and on the same rows again; KL(q‖p) by β and by minibatches."""
    script = load_script("beta_vmbpo")
    for name, setting in zip(CONSTANTS, RULES[rule]):
        setattr(script, name, {"two_phase": setting})
    agent, buffer, rows, starts = make(script, task, args)
    agent.low = None if "float32" in rule else agent.low
    base, began = {"task": task, "rule": rule}, time.perf_counter()
    for i in range(args.refits + 3):
        buffer.add(rows[:, int(buffer.added) : starts + 250 * min(i, args.refits - 1)])
        if i == args.refits - 1:
            before = copy.deepcopy((agent.state_dict(), agent.opts["models"].state_dict()))
        value = fit(agent, buffer, 1e7, 1000 * args.seed + i)["model/prior_error"]
        yield base | {"what": "error" if i < args.refits else "again", "x": i + 1, "value": value,
                        "seconds": time.perf_counter() - began}
    for what, x in [*(("kl", beta) for beta in BETAS), *(("scatter", i) for i in range(7))]:
        networks, moments = copy.deepcopy(before)
        agent.load_state_dict(networks)
        agent.opts["models"].load_state_dict(moments)
        beta, seed = (x, 99) if what == "kl" else (10, x)
        yield base | {"what": what, "x": x, "value": fit(agent, buffer, beta, seed)["model/kl"], "seconds": 0.0}


def draw(rows, figure):
    """Errors above, KL below, a column per task; tells the geometric mean of the errors, and how the KL behaves."""
    tasks = group(rows, "task")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    for column, (task, of_task) in enumerate(tasks.items()):
        for rule, found in group(of_task, "rule").items():
            error, kl, again, scatter = ({float(r["x"]): float(r["value"]) for r in found if r["what"] == what}
                                         for what in ("error", "kl", "again", "scatter"))
            grid[0, column].semilogy([*error], [*error.values()], label=rule)
            grid[1, column].loglog([*kl], [*kl.values()], marker="o", label=rule)
            last = [[*error.values()][-1], *again.values()]
            rise = max(b / a for a, b in zip(last, last[1:]))
            mean = statistics.geometric_mean(error.values())
            spread = statistics.pstdev(map(math.log10, scatter.values()))
            yield (f"{task}, {rule}: error {mean:.2g}, on the same rows again at most times {rise:.2f}; KL falls "
                   f"{kl[10] / kl[100]:.0f} (β 10 to 100) and {kl[30] / kl[300]:.0f} times (30 to 300), "
                   f"log10 ± {spread:.2f}")
        grid[0, column].set(title=task, xlabel="fit", ylabel="squared error of p, held-out rows")
        grid[1, column].set(xlabel="β", ylabel="KL(q‖p), nats")
    grid[0, 0].legend(fontsize=7)


def main(args):
    at_least(args, refits=2)
    rows = (row for task in args.tasks for rule in args.rules for row in study(task, rule, args))
    size, title = (4 * max(len(args.tasks), 2), 7), "Refits of the dynamics under different rules, one seed"
    return publish(args.out, None if args.from_csv else rows, draw, size, title)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
