"""One figure and one csv from several runs: a panel per task and metric, a line and a band over the trials.

    python benchmarks/figures.py --experiment quick_fig5    # all runs that `grid.py quick_fig5` has left
    python benchmarks/figures.py --name mine --runs runs/Pendulum-v1/* --metrics eval/return model/beta model/kl

writes benchmarks/results/NAME.csv (task,label,step,trial,metric,value) and benchmarks/figures/NAME.png; an
experiment's NAME is its own. Runs of one task and label are trials of one curve, which ends with the shortest.
"""

import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Literal

import grid
import numpy as np
import tyro
from common import band, curve, fail, group, labelled, metrics_of, publish, read
from matplotlib.ticker import EngFormatter

LOG_METRICS = {"model/beta", "model/kl", "model/prior_error", "model/posterior_error"}
NAMES = {"eval/return": "evaluation return", "eval/discounted_return": "discounted return", "model/beta": "β",
         "model/kl": "KL(q‖p), nats", "model/prior_error": "hold-out error of p", "value/q": "Q",
         "model/posterior_error": "hold-out error of q", "model/optimism_gap": "optimism gap, value units",
         "model/effective_sample_size": "effective sample size of the weights", "model/information": "information",
         "eval/return_prior": "evaluation return of p(a)", "policy/entropy": "policy entropy",
         "model/log_likelihood": "log p(x, r | z)", "model/log_marginal": "log p(x, r | z, a before)"}
# Published means and standard deviations. MBPO: Janner et al. (2019), as stored by erl_lib, early points over the last
# 5k steps; with the 5,000 random steps that their count leaves out. SAC: erl_lib, eight seeds, at MBPO's last point.
PUBLISHED = {
    "Hopper-v4": {"MBPO": {15_000: (247, 145), 25_000: (497, 246), 35_000: (641, 209), 55_000: (1646, 793),
                           105_000: (3314, 334), 130_000: (3279, 454)}, "SAC": {125_000: (2792, 627)}},
    "Walker2d-v4": {"MBPO": {25_000: (384, 148), 55_000: (783, 544), 105_000: (3485, 1023), 205_000: (4120, 829),
                             305_000: (4897, 428)}, "SAC": {300_000: (4030, 770)}},
    "HalfCheetah-v4": {"MBPO": {15_000: (1316, 360), 25_000: (3893, 654), 35_000: (5534, 1117), 55_000: (7830, 603),
                                105_000: (9563, 688), 205_000: (10654, 1398), 405_000: (13065, 962)},
                       "SAC": {400_000: (9350, 1012)}},
    "Ant-v4": {"MBPO": {25_000: (656, 53), 55_000: (781, 215), 105_000: (1489, 898), 205_000: (4264, 1341),
                        305_000: (5368, 633)}, "SAC": {300_000: (4197, 1589)}},
}
COLORS = {"MBPO": "C0", "β-VMBPO": "C1", "VMBPO": "C2", "SAC": "C3", "generative": "C4", "discriminative": "C5",
          "fully observed": "C6"}  # the same in all figures
PALETTE = [*(f"C{i}" for i in range(10)), "black"]  # other methods have what is left of it


@dataclasses.dataclass
class Args:
    name: str = ""  # the figure's and the csv's name; default: the experiment
    experiment: str = ""  # of experiments.toml, whose runs are drawn under their labels
    runs_dir: str = "runs/grid"  # where grid.py has put them
    table: str = str(grid.TABLE)  # the file of experiments
    runs: tuple[str, ...] = ()  # run directories, in the order of the legend
    labels: tuple[str, ...] = ()  # one per run; default: the directories' names
    metrics: tuple[str, ...] = ()  # one panel each; default: eval/return, from a csv all that it holds
    task: str = ""  # draw all runs in one panel under this name; default: one per task
    solved: float | None = None  # tell at which steps of the csv the trials first return as much, and which less again
    title: str = ""  # above the panels
    aggregate: Literal["mean", "iqm"] = "mean"  # mean ± std over trials; interquartile mean and 95 % interval
    from_csv: bool = False  # draw from the committed csv
    keep: bool = False  # the csv's rows of other tasks and labels stay, as their runs may be gone


def runs_of(args):
    """Labels and run directories: those asked for, then the experiment's."""
    pairs = labelled(args.runs, args.labels) if args.runs or not args.experiment else []
    if args.experiment:
        runs = grid.runs_of(grid.Args(args.experiment, runs_dir=args.runs_dir, table=args.table))
        runs = [run for run in runs if (run.dir / "metrics.csv").is_file()]
        if len({(run.dir.parent.name, run.dir.name) for run in runs}) < len(runs):
            fail(f"--experiment {args.experiment}: two of its parts have runs of one label; draw them one by one")
        pairs += [(run.label, run.dir) for run in runs]
        if not pairs:
            fail(f"--runs-dir {args.runs_dir}: no run of {args.experiment} there")
    if missing := [str(run) for _, run in pairs if not (Path(run) / "metrics.csv").is_file()]:
        fail(f"--runs {' '.join(missing)}: no metrics.csv there")
    return pairs


def collect(args):
    """Rows of the metrics asked for; of at most 199 steps per curve, the last among them, with five digits."""
    trials = defaultdict(int)
    for label, run in runs_of(args):
        task = args.task or grid.load_json(Path(run) / "args.json").get("env_id", "").rpartition(":")[2]
        curves = group([row for row in metrics_of(run) if row[2] in args.metrics], 2)
        for metric in filter(curves.get, args.metrics):
            rows = curves[metric]
            steps = sorted({step for step, *_ in rows})
            keep = {*steps[:: max(1, len(steps) // 100)], steps[-1]}
            for step, trial, _, value in rows:
                if step in keep:
                    yield {"task": task, "label": label, "step": step, "trial": trials[task, label] + trial,
                           "metric": metric, "value": f"{value:.5g}"}
        trials[task, label] += 1 + max((row[1] for rows in curves.values() for row in rows), default=-1)


def spread(values, aggregate):
    """Middle, low and high of values (steps, trials); the interquartile mean and its interval are rliable's."""
    if aggregate == "mean":
        return values.mean(1), values.mean(1) - values.std(1), values.mean(1) + values.std(1)
    from rliable import library, metrics

    iqm = lambda scores: np.array([metrics.aggregate_iqm(scores[..., i]) for i in range(scores.shape[-1])])
    scores = {"": values.T[:, None]}  # (trials, tasks, steps)
    middle, interval = library.get_interval_estimates(scores, iqm, reps=500, random_state=np.random.RandomState(0))
    return middle[""], *interval[""]


def styles(labels):
    """Style of each label's line: a method, named before the comma, has one colour, and its variants are dashed."""
    labels = sorted(labels, key=lambda label: "," in label)  # methods as they are come first
    methods = [label.split(",")[0] for label in labels]
    free = itertools.cycle(color for color in PALETTE if color not in map(COLORS.get, methods))
    colors = {method: COLORS.get(method) or next(free) for method in dict.fromkeys(methods)}
    dashes = [("-", "--", ":")[methods[:i].count(method) % 3] for i, method in enumerate(methods)]
    return {label: {"color": colors[method], "ls": dash} for label, method, dash in zip(labels, methods, dashes)}


def draw_line(args, axis, rows, **style):
    """A line and its band; returns the number of trials."""
    steps, values = curve(rows)
    if rows[0]["metric"] in LOG_METRICS:  # geometric, as the axis is logarithmic; no line for a KL that is always 0
        found = np.exp(spread(np.log(np.maximum(values, 1e-8 if values.any() else np.nan)), args.aggregate))
    else:
        found = spread(values, args.aggregate)
    band(axis, steps, *found, **style)
    return values.shape[1]


def draw_published(axis, task, last):
    for (name, points), marker in zip(PUBLISHED.get(task, {}).items(), "os"):
        points = [(step, *point) for step, point in points.items() if step <= 1.5 * last]
        if points:
            step, mean, std = zip(*points)
            axis.errorbar(step, mean, std, fmt=marker, color="grey", capsize=3, zorder=0, label=f"{name}, published")


def draw_panel(args, axis, rows, task, metric, labels):
    axis.set_yscale("log" if metric in LOG_METRICS else "linear")
    trials = {draw_line(args, axis, lines, label=label, **styles(labels)[label])
              for label, lines in group(rows, "label").items()}
    if metric == "eval/return" and any("MBPO" in label for label in labels):
        draw_published(axis, task, max(int(row["step"]) for row in rows))
    what = {"mean": "mean ± one standard deviation", "iqm": "interquartile mean, 95 % interval"}[args.aggregate]
    what = "geometric " * (metric in LOG_METRICS) + what
    counts = " to ".join(map(str, sorted({min(trials), max(trials)})))
    axis.set_xlabel("environment steps per trial")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    axis.set_ylabel("one trial" if counts == "1" else f"{what}, {counts} trials", fontsize=7)


def draw(args, rows, figure):
    found = group(rows, "task", "metric")
    tasks, labels, metrics = ([*group(rows, column)] for column in ("task", "label", "metric"))
    metrics = [metric for metric in args.metrics or metrics if metric in metrics]
    panels = [(task, metric) for task in tasks for metric in metrics]
    columns = min(3, len(panels)) if 1 in (len(tasks), len(metrics)) else len(metrics)
    lines = -(-len(panels) // columns)
    figure.set_size_inches(4.4 * columns, 3.2 * lines + 0.4)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (task, metric) in zip(axes, panels):
        if (task, metric) in found:
            draw_panel(args, axis, found[task, metric], task, metric, labels)
        name = NAMES.get(metric, metric)
        axis.set_title(f"{task}: {name}" if len(tasks) > 1 else name)
    for axis in axes[len(panels) :]:
        axis.remove()
    legend = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2 * columns, fontsize=8)
    figure.suptitle(args.title or (tasks[0] if len(tasks) == 1 else ""))
    for (task, label, metric), rows in group(rows, "task", "label", "metric").items():
        yield f"{task} {label}: {tell(rows, args.solved)}".lstrip()


def tell(rows, solved=None):
    """A curve in words: the returns at the end and when they are solved for good, or a metric's second half."""
    metric, (steps, values) = rows[0]["metric"], curve(rows)
    half = values[steps >= steps[-1] / 2]
    if metric in LOG_METRICS:
        logs = np.log10(np.maximum(half, 1e-8))
        spread = " ".join(f"{trial:.2f}" for trial in logs.std(0))
        each = " ".join(f"{trial:.3g}" for trial in 10 ** logs.mean(0))
        return f"{metric} in the second half: {10 ** logs.mean():.3g} (by trial {each}; log10 ± {spread})"
    if metric != "eval/return":
        return f"{metric} in the second half: {half.mean():.3g}"
    each = ", ".join(f"{trial:.0f}" for trial in values[-1])
    text = f"return at step {steps[-1]}: {values[-1].mean():.1f} ± {values[-1].std():.1f} ({each})"
    if solved is None:
        return text
    firsts, falls, last = [], [], 0
    for trial, returns in enumerate(values.T):
        above = returns >= solved
        first = steps[above][0] if above.any() else math.inf
        firsts.append(f"{first:g}" if above.any() else "never")
        falls += [f"trial {trial} {returns[j]:.0f} at {steps[j]}" for j in np.flatnonzero(~above & (steps > first))]
        last = max(last, *steps[~above], 0)
    stay = f"all stay from {steps[steps > last][0]}" if last < steps[-1] else "not all at the end"
    return f"{text}; {solved:g} first at {', '.join(firsts)}; {stay}; again below: {', '.join(falls) or 'none'}"


def main(args):
    args.name = args.name or args.experiment
    if not args.name or "/" in args.name:
        fail(f"--name {args.name}: needed, for the csv and the figure, without folders")
    args.metrics = args.metrics or (() if args.from_csv else ("eval/return",))
    rows = read(args.name) if args.from_csv else [*collect(args)]
    if args.keep:
        drawn = group(rows, "task", "label")
        rows = [row for row in read(args.name) if (row["task"], row["label"]) not in drawn] + rows
    logged = {row.get("metric") for row in rows}
    if not logged.intersection(args.metrics or logged):
        fail(f"--metrics {' '.join(args.metrics)}: none of the runs has logged it")
    return publish(args.name, None if args.from_csv else rows, lambda *found: draw(args, *found), (6, 4), args.title)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
