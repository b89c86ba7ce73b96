"""What the benchmarks share: scripts as modules, finished runs, refusals, tables and figures."""

import csv
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = HERE  # where results/ and figures/ are
sys.path += ["", str(ROOT), str(ROOT / "baselines")]  # one's own modules; the scripts, and benchmarks.tasks:EnvId


def fail(message, code=2):
    """Print one line and exit."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def say(text):
    """Print a line; that nobody listens any more (`| head`, a lost terminal) stops nothing."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_row(row):
    """Print what a row of a table has, each value behind its column."""
    say("  ".join(f"{key} {value}" for key, value in row.items() if value != ""))


def at_least(args, **least):
    """Refuse numbers that are too small, by the flag's name."""
    for name, low in least.items():
        if getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")


def commit():
    """The repository's commit, with a mark where files differ from it."""
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip()


# Scripts and runs

load_script = importlib.import_module  # by a training script's name, without .py


def build(name, **flags):
    """Module, flags, environments, agent and empty buffer of a script, as it makes them at the start of a run."""
    script = load_script(name)
    args = script.Args(**flags)
    script.set_precision(args)
    envs = script.make_envs(args, args.trials)
    sizes = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = script.Agent(args, *sizes)
    if hasattr(script, "EpisodeBuffer"):
        buffer = script.EpisodeBuffer(args.trials, args.buffer_size, agent.widths, args.device)
    else:
        buffer = script.ReplayBuffer(args.trials, args.buffer_size, *sizes, args.device)
    return script, args, envs, agent, buffer


def run_args(run, flag="--runs", script="", task=""):
    """The name of a run's script, which has `script` in it, and its flags, of a task which has `task` in its id."""
    import torch

    run = Path(run)
    try:
        (run / "metrics.csv").stat()
        name = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["script"]
        saved = json.loads((run / "args.json").read_text())
        if script in name and task in saved["env_id"]:
            return name, load_script(name).Args(**saved)
    except Exception:  # a file can be damaged in many ways
        pass
    fail(f"{flag} {run}: no args.json, metrics.csv, checkpoint.pt of {script or 'a script'}{task and ' on ' + task}")


def open_run(run, flag="--runs", script="", seed=0, task="", **changed):
    """Agent, flags, replay buffer and step of a run, on the CPU; what follows draws its noise from the seed."""
    import torch

    name, saved = run_args(run, flag, script, task)
    flags = vars(saved) | {"device": "cpu", "run_dir": str(run)} | changed
    script, args, _, agent, buffer = build(name, **flags)
    step = script.load(args, agent, [buffer])
    torch.manual_seed(seed)  # after the checkpoint's own random state
    return agent, args, buffer, step


def labelled(runs, labels):
    """Pairs of label and run directory, by default under the directories' names."""
    if not runs:
        fail("--runs: name at least one run directory")
    if labels and len(labels) != len(runs):
        fail("--labels: one per run")
    return list(zip(labels or [Path(run).name for run in runs], runs))


def metrics_of(run):
    """Rows (step, trial, metric, value) of a run's metrics.csv; what a process is just writing is left out."""
    text = (Path(run) / "metrics.csv").read_text()
    lines = [line for line in csv.reader(text.split("\n")[1:-1]) if len(line) == 4]
    return [(int(step), int(trial), metric, float(value)) for step, trial, metric, value in lines]


# Tables and figures


def write(name, rows):
    """Rows, as they come, to results/NAME.csv; what is cut short leaves NAME.partial and the old table."""
    if "/" in name:
        fail(f"--out {name}: a name without folders")
    rows, partial = iter(rows), OUT / f"results/{name}.partial"
    first = next(rows)
    with partial.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, first.keys(), lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain([first], rows):
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    partial.rename(partial.with_suffix(".csv"))


def read(name):
    """The rows of results/NAME.csv, all values as text."""
    path = OUT / f"results/{name}.csv"
    if "/" in name or not path.is_file():
        fail(f"--from-csv: there is no {name}.csv among the results")
    with path.open() as file:
        return [*csv.DictReader(file)]


def publish(name, rows, draw, size, title=""):
    """Write the rows (None: they are written), draw figures/NAME.png from the csv alone, print what `draw` tells."""
    from matplotlib.figure import Figure

    if rows is not None:
        write(name, rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title or name)
    try:
        lines = [*(draw(read(name), figure) or ())]
    except KeyError as error:
        fail(f"--from-csv: {name}.csv has no column {error}; it is of another experiment")
    figure.savefig(OUT / f"figures/{name}.png", dpi=120)
    for line in (*lines, OUT / f"results/{name}.csv", OUT / f"figures/{name}.png"):
        say(line)
    return 0


def group(rows, *columns):
    """Value of a column, or values of several -> rows, in the order of their first appearance."""
    groups = defaultdict(list)
    for row in rows:
        key = tuple(row[column] for column in columns)
        groups[key if len(columns) > 1 else key[0]].append(row)
    return groups


def curve(rows, by="step", name="value"):
    """Steps (n,), or another whole number, and values (n, trials) of one line, as far as all of its trials go."""
    found = group(rows, by)
    most = max(len(at) for at in found.values())
    steps = sorted((step for step, at in found.items() if len(at) == most), key=int)
    values = [[float(row[name]) for row in found[step]] for step in steps]
    return np.array([int(step) for step in steps]), np.array(values)


def band(axis, x, middle, low, high, **style):
    """A line, and what lies around it."""
    (line,) = axis.plot(x, middle, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
