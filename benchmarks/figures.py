"""One figure and one csv from several runs: a panel per task and metric, mean and one standard deviation over the trials.

    python benchmarks/figures.py --experiment quick_fig5                     # all runs that `grid.py quick_fig5` has left
    python benchmarks/figures.py --name inverted_pendulum --runs runs/InvertedPendulum-v4/* \
        --metrics eval/return model/beta model/kl

writes benchmarks/results/NAME.csv (task,label,step,trial,metric,value) and benchmarks/figures/NAME.png; an experiment's NAME is
its own. Runs that share task and label are further trials of one curve, which ends where not all of them go on.
`--from-csv` draws the figure again from the committed csv, without the runs.
"""

import csv
import dataclasses
import importlib.util
import json
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
LOG_METRICS = {"model/beta", "model/kl", "model/prior_error", "model/posterior_error"}
NAMES = {"eval/return": "evaluation return", "model/beta": "β", "model/kl": "KL(q‖p), nats", "model/prior_error": "hold-out error of p",
         "model/posterior_error": "hold-out error of q", "model/optimism_gap": "optimism gap, value units",
         "model/effective_sample_size": "effective sample size of the weights", "value/q": "Q", "policy/entropy": "policy entropy"}
# Published means and standard deviations. MBPO: Janner et al. (2019), curves as stored by erl_lib, the early points over the
# last 5k steps. SAC: erl_lib, eight seeds, at the steps of MBPO's last point.
PUBLISHED = {
    "Hopper-v4": {"MBPO": {10_000: (247, 145), 20_000: (497, 246), 30_000: (641, 209), 50_000: (1646, 793),
                           100_000: (3314, 334), 125_000: (3279, 454)}, "SAC": {125_000: (2792, 627)}},
    "Walker2d-v4": {"MBPO": {20_000: (384, 148), 50_000: (783, 544), 100_000: (3485, 1023), 200_000: (4120, 829),
                             300_000: (4897, 428)}, "SAC": {300_000: (4030, 770)}},
    "HalfCheetah-v4": {"MBPO": {10_000: (1316, 360), 20_000: (3893, 654), 30_000: (5534, 1117), 50_000: (7830, 603),
                                100_000: (9563, 688), 200_000: (10654, 1398), 400_000: (13065, 962)},
                       "SAC": {400_000: (9350, 1012)}},
    "Ant-v4": {"MBPO": {20_000: (656, 53), 50_000: (781, 215), 100_000: (1489, 898), 200_000: (4264, 1341),
                        300_000: (5368, 633)}, "SAC": {300_000: (4197, 1589)}},
}


@dataclasses.dataclass
class Args:
    name: str = ""  # the figure's and the csv's name; default: the experiment
    experiment: str = ""  # of experiments.toml, whose runs are drawn under their labels
    runs_dir: str = "runs/grid"  # where grid.py has put them
    runs: tuple[str, ...] = ()  # run directories, in the order of the legend
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    metrics: tuple[str, ...] = ()  # one panel each; default: eval/return, from a csv all that it holds
    reference: str = ""  # a task whose published points are drawn behind the return; default: the runs' own task
    budget: float = 0.0  # a line at this KL
    title: str = ""  # above the panels
    aggregate: Literal["mean", "iqm"] = "mean"  # mean ± std over trials, or interquartile mean and 95 % bootstrap interval
    from_csv: bool = False  # draw from the committed csv


def fail(message):
    """Print one line and exit with code 2."""
    print(f"figures.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def runs_of(args):
    """Run directories and their labels: those asked for, then the experiment's."""
    labels = args.labels or [Path(run).name for run in args.runs]
    if len(labels) != len(args.runs):
        fail("--labels: one per run")
    pairs = [(Path(run), label) for run, label in zip(args.runs, labels)]
    if args.experiment:
        table = tomllib.loads((HERE / "experiments.toml").read_text())
        if "runs" not in table.get(args.experiment, {}):
            fail(f"--experiment {args.experiment}: known are {', '.join(name for name in table if 'runs' in table[name])}")
        safe = lambda name: name.replace("/", "_").replace(" ", "_")
        for env in table[args.experiment]["envs"]:
            for label in table[args.experiment]["runs"]:
                found = sorted((Path(args.runs_dir) / args.experiment / safe(env)).glob(f"{safe(label)}_s*/metrics.csv"))
                pairs += [(path.parent, label) for path in found]
        if not pairs:
            fail(f"--runs-dir {args.runs_dir}: no run of {args.experiment} there")
    missing = [str(run) for run, _ in pairs if not (run / "metrics.csv").is_file()]
    if missing or not pairs:
        fail(f"--runs {' '.join(missing)}: no metrics.csv there" if missing else
             "--runs: name at least one run directory, or use --experiment or --from-csv")
    return pairs


def read(args):
    """Rows task, label, step, trial, metric, value of the metrics asked for; at most about 100 steps per curve, six digits."""
    rows, trials = [], defaultdict(int)
    for run, label in runs_of(args):
        settings = run / "args.json"
        task = json.loads(settings.read_text())["env_id"] if settings.is_file() else ""
        found = defaultdict(list)
        for row in csv.DictReader((run / "metrics.csv").open()):
            if row["metric"] in args.metrics:
                found[row["metric"]].append((int(row["step"]), int(row["trial"]), float(row["value"])))
        for metric, values in found.items():
            steps = sorted({step for step, *_ in values})
            keep = set(steps[:: max(1, len(steps) // 100)]) | {steps[-1]}
            rows += [(task, label, step, trials[task, label] + trial, metric, f"{value:.5g}")
                     for step, trial, value in values if step in keep]
        trials[task, label] += 1 + max((trial for values in found.values() for _, trial, _ in values), default=-1)
    return rows


def spread(values, aggregate):
    """Middle, low and high of values (steps, trials); the interquartile mean and its interval are rliable's."""
    if aggregate == "mean":
        return values.mean(1), values.mean(1) - values.std(1), values.mean(1) + values.std(1)
    from rliable import library, metrics

    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores[..., i]) for i in range(scores.shape[-1])])
    scores = {"": values.T[:, None]}  # (trials, tasks, steps)
    middle, interval = library.get_interval_estimates(scores, iqm, reps=500, random_state=np.random.RandomState(0))
    return middle[""], *interval[""]


def draw(args, rows, path):
    tasks, labels = (list(dict.fromkeys(row[i] for row in rows)) for i in (0, 1))
    panels = [(task, metric) for task in tasks for metric in args.metrics]
    columns = min(3, len(panels)) if 1 in (len(tasks), len(args.metrics)) else len(args.metrics)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (task, metric) in zip(axes, panels):
        for i, label in enumerate(labels):
            curve = defaultdict(list)
            for *_, step, _, _, value in (row for row in rows if (row[0], row[1], row[4]) == (task, label, metric)):
                curve[int(step)].append(float(value))
            if not curve:
                continue
            most = max(len(values) for values in curve.values())
            curve = {step: values for step, values in sorted(curve.items()) if len(values) == most}
            steps, values = list(curve), np.array(list(curve.values()))  # (steps, trials)
            if metric in LOG_METRICS:  # geometric mean and spread, as the axis is logarithmic
                mean, low, high = (np.exp(x) for x in spread(np.log(np.maximum(values, 1e-8)), args.aggregate))
            else:
                mean, low, high = spread(values, args.aggregate)
            style = {"color": f"C{i}", "linestyle": "-" if i < 10 else "--"}
            axis.plot(steps, mean, label=label, **style)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        if metric in LOG_METRICS:
            axis.set_yscale("log")
        if metric == "model/kl" and args.budget:
            axis.axhline(args.budget, color="black", linestyle=":", linewidth=1)
        if metric == "eval/return":
            last = max(int(row[2]) for row in rows if row[0] == task)
            for (name, points), marker in zip(PUBLISHED.get(args.reference or task, {}).items(), "os"):
                points = [(step, *point) for step, point in points.items() if step <= 1.5 * last]
                if points:
                    step, mean, std = zip(*points)
                    axis.errorbar(step, mean, std, fmt=marker, color="grey", capsize=3, zorder=0, label=f"{name}, published")
        name = NAMES.get(metric, metric)
        axis.set(xlabel="environment steps per trial", title=f"{task}: {name}" if len(tasks) > 1 else name)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].legend(fontsize=8 if len(labels) < 8 else 6)
    figure.suptitle(args.title or (f"{args.name}, {tasks[0]}" if len(tasks) == 1 and tasks[0] else args.name))
    figure.savefig(path, dpi=120)


def main(args):
    asked = args.metrics
    args = dataclasses.replace(args, name=args.name or args.experiment, metrics=args.metrics or ("eval/return",))
    table, picture = HERE / "results" / f"{args.name}.csv", HERE / "figures" / f"{args.name}.png"
    if not args.name:
        fail("--name: how the figure and the csv are called; or name an --experiment")
    if args.from_csv and not table.is_file():
        fail(f"--from-csv: there is no {table.name} among the results")
    if args.reference and args.reference not in PUBLISHED:
        fail(f"--reference {args.reference}: known are {', '.join(PUBLISHED)}")
    if args.aggregate == "iqm" and not importlib.util.find_spec("rliable"):
        fail("--aggregate iqm: needs the package rliable (benchmarks/requirements.txt)")
    if args.from_csv:
        rows = [tuple(({"task": ""} | row).values()) for row in csv.DictReader(table.open())]
        args = dataclasses.replace(args, metrics=asked or tuple(dict.fromkeys(row[4] for row in rows)))
    else:
        rows = read(args)
        with table.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("task", "label", "step", "trial", "metric", "value"), *rows])
    draw(args, rows, picture)
    for task, label in dict.fromkeys(row[:2] for row in rows):
        returns = defaultdict(list)
        for *which, step, _, metric, value in rows:
            if (*which, metric) == (task, label, "eval/return"):
                returns[int(step)].append(float(value))
        if returns:
            step, last = max(returns.items())
            print(f"{task} {label}: return at step {step}: {np.mean(last):.1f} ± {np.std(last):.1f} "
                  f"({', '.join(f'{value:.0f}' for value in last)})".lstrip())
    print(f"{table}\n{picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
