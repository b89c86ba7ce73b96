"""One figure and one csv from several runs: a panel per metric, mean and one standard deviation over the trials.

    python benchmarks/figures.py --name inverted_pendulum --runs runs/InvertedPendulum-v4/* \
        --metrics eval/return model/beta model/kl

writes benchmarks/results/inverted_pendulum.csv (label,step,trial,metric,value) and benchmarks/figures/inverted_pendulum.png.
`--from-csv` draws the figure again from the committed csv, without the runs.
"""

import csv
import dataclasses
import importlib.util
import sys
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
    name: str  # the figure's and the csv's name
    runs: tuple[str, ...] = ()  # run directories, in the order of the legend
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    metrics: tuple[str, ...] = ("eval/return",)  # one panel each
    reference: str = ""  # a task whose published points are drawn behind the return
    budget: float = 0.0  # a line at this KL
    title: str = ""  # above the panels
    aggregate: Literal["mean", "iqm"] = "mean"  # mean ± std over trials, or interquartile mean and 95 % bootstrap interval
    from_csv: bool = False  # draw from the committed csv


def read(args):
    """Rows label, step, trial, metric, value of the metrics asked for; at most about 100 steps per curve, six digits."""
    rows = []
    for run, label in zip(args.runs, args.labels or [Path(run).name for run in args.runs], strict=True):
        found = defaultdict(list)
        for row in csv.DictReader((Path(run) / "metrics.csv").open()):
            if row["metric"] in args.metrics:
                found[row["metric"]].append((int(row["step"]), int(row["trial"]), float(row["value"])))
        for metric, values in found.items():
            steps = sorted({step for step, *_ in values})
            keep = set(steps[:: max(1, len(steps) // 100)]) | {steps[-1]}
            rows += [(label, step, trial, metric, f"{value:.5g}") for step, trial, value in values if step in keep]
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
    columns = min(3, len(args.metrics))
    lines = -(-len(args.metrics) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    labels = list(dict.fromkeys(row[0] for row in rows))
    for axis, metric in zip(axes, args.metrics):
        for i, label in enumerate(labels):
            curve = defaultdict(list)
            for _, step, _, _, value in (row for row in rows if row[0] == label and row[3] == metric):
                curve[int(step)].append(float(value))
            if not curve:
                continue
            steps, values = list(curve), np.array(list(curve.values()))  # (steps, trials)
            if metric in LOG_METRICS:  # geometric mean and spread, as the axis is logarithmic
                mean, low, high = (np.exp(x) for x in spread(np.log(np.maximum(values, 1e-8)), args.aggregate))
            else:
                mean, low, high = spread(values, args.aggregate)
            axis.plot(steps, mean, color=f"C{i}", label=label)
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        if metric in LOG_METRICS:
            axis.set_yscale("log")
        if metric == "model/kl" and args.budget:
            axis.axhline(args.budget, color="black", linestyle=":", linewidth=1)
        if metric == "eval/return" and args.reference:
            last = max(int(row[1]) for row in rows)
            for (name, points), marker in zip(PUBLISHED[args.reference].items(), "os"):
                points = [(step, *point) for step, point in points.items() if step <= 1.5 * last]
                if points:
                    step, mean, std = zip(*points)
                    axis.errorbar(step, mean, std, fmt=marker, color="grey", capsize=3, zorder=0, label=f"{name}, published")
        axis.set(xlabel="environment steps per trial", title=NAMES.get(metric, metric))
    for axis in axes[len(args.metrics) :]:
        axis.remove()
    axes[0].legend(fontsize=8)
    figure.suptitle(args.title or args.name)
    figure.savefig(path, dpi=120)


def main(args):
    table, picture = HERE / "results" / f"{args.name}.csv", HERE / "figures" / f"{args.name}.png"
    missing = [run for run in args.runs if not (Path(run) / "metrics.csv").is_file()]
    for refused, message in (
        (missing, f"--runs {' '.join(missing)}: no metrics.csv there"),
        (not args.from_csv and not args.runs, "--runs: name at least one run directory, or use --from-csv"),
        (args.from_csv and not table.is_file(), f"--from-csv: there is no {table.name} among the results"),
        (args.labels and len(args.labels) != len(args.runs), "--labels: one per run"),
        (args.aggregate == "iqm" and not importlib.util.find_spec("rliable"),
         "--aggregate iqm: needs the package rliable (benchmarks/requirements.txt)"),
        (args.reference and args.reference not in PUBLISHED, f"--reference {args.reference}: known are {', '.join(PUBLISHED)}"),
    ):
        if refused:
            print(f"figures.py: error: {message}", file=sys.stderr)
            return 2
    if args.from_csv:
        rows = [tuple(row.values()) for row in csv.DictReader(table.open())]
    else:
        rows = read(args)
        with table.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("label", "step", "trial", "metric", "value"), *rows])
    draw(args, rows, picture)
    for label in dict.fromkeys(row[0] for row in rows):
        last = max((int(row[1]) for row in rows if row[0] == label and row[3] == "eval/return"), default=None)
        returns = [float(row[4]) for row in rows if row[0] == label and row[3] == "eval/return" and int(row[1]) == last]
        print(f"{label}: return at step {last}: {np.mean(returns):.1f} ± {np.std(returns):.1f} ({', '.join(f'{r:.0f}' for r in returns)})")
    print(f"{table}\n{picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
