"""Runs an experiment of experiments.toml, in the order of its table: on this machine, or as Ray tasks on a cluster.

    python benchmarks/grid.py quick             # two runs at a time, one thread each
    python benchmarks/grid.py quick --status    # what has been done, and hours to go
    python benchmarks/grid.py fig5 --address auto --jobs 20 --gpus-per-run 0.2 --runs-dir /shared/runs

A run is a plain `python SCRIPT.py …` with a directory of its own. Beside it lie its log and, since it last stopped,
its command, exit code, seconds and commit (RUN_DIR.log, RUN_DIR.json). Ctrl-C, SIGTERM or a lost terminal let all
that runs save and end; the same command goes on from there, also after a restart of the machine. A run holds a lock
on RUN_DIR.lock, which its process inherits: two never write to one directory, and a run saves and ends with its parent.
"""

import ctypes
import dataclasses
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import tyro
from common import HERE, ROOT, at_least, commit, fail, metrics_of, say

TABLE = HERE / "experiments.toml"
STOPPED, RUNNING = [], []  # signals received; processes of this machine


@dataclasses.dataclass
class Args:
    experiment: tyro.conf.Positional[str]  # name of a table in experiments.toml
    only: str = ""  # run only what has this text in its name
    flags: str = ""  # added to every command, as in --flags="--cuda-graph" on a GPU
    runs_dir: str = "runs/grid"  # where run directories go; on a cluster, a folder that all nodes share
    jobs: int = 2  # runs side by side
    cpus_per_run: int = 1  # cores, and threads, of a run
    address: str = ""  # of a Ray cluster, as host:port or auto; default: this machine, without Ray
    gpus_per_run: float = 0.0  # share of a GPU of a run on a cluster; 0.2 puts five on one
    retries: int = 5  # times that a run which died is continued before it counts as failed
    table: str = str(TABLE)  # the file of experiments
    status: bool = False  # print what has been done and start nothing
    dry_run: bool = False  # print the commands and start nothing


class Run(NamedTuple):
    dir: Path
    label: str
    command: list  # a script, relative to the repository, and its flags


def runs_of(args):
    """The runs of the experiment whose name has the text asked for."""
    found, part = [], args.experiment
    try:
        everything = tomllib.loads(Path(args.table).read_text())
        table = {name: part for name, part in everything.items() if isinstance(part, dict)}
        if args.experiment not in table:
            fail(f"{args.experiment}: not an experiment; there are {', '.join(table)}")
        for part in table[args.experiment].get("parts", [args.experiment]):
            experiment = table.get(part, {})
            if not isinstance(experiment.get("runs"), dict) or not isinstance(experiment.get("envs"), list):
                fail(f"--table {args.table}: [{part}] needs a list `envs` and a table `runs`")
            seeds = experiment.get("seeds", [1])
            for env, label, seed in itertools.product(experiment["envs"], experiment["runs"], seeds):
                script, *flags = shlex.split(experiment["runs"][label])
                shared = shlex.split(f"{experiment.get('flags', '')} {experiment.get('env_flags', {}).get(env, '')}")
                name = "/".join(text.replace("/", "_").replace(" ", "_") for text in (part, env, f"{label}_s{seed}"))
                command = [script, "--env-id", env, "--seed", str(seed), *shared, *flags, *args.flags.split()]
                if args.only in name:
                    found.append(Run(Path(args.runs_dir).absolute() / name, label, command))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        fail(f"--table {args.table}: [{part}]: {error}")
    if not found:
        fail(f"{args.experiment}: no run of it has --only {args.only!r} in its name")
    return found


# What a run has done, by its files


def last(run_dir, metric=""):
    """Last row of metrics.csv, or the last of a metric: (step, value), or None."""
    try:
        rows = [(step, value) for step, _, name, value in metrics_of(run_dir) if metric in ("", name)]
    except (OSError, ValueError):
        return None
    return rows[-1] if rows else None


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def locked(run_dir):
    """Whether a process holds the run's lock."""
    try:
        with open(f"{run_dir}.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # there is none, or someone has it
        return isinstance(error, BlockingIOError)
    return False


def state(run):
    """finished, running, refused, interrupted or absent."""
    note = load_json(f"{run.dir}.json")
    code = note.get("code") if note.get("command") == run.command else None
    if code == 0 and run.dir.exists():
        return "finished"
    if locked(run.dir):
        return "running"
    return "refused" if code == 2 else "interrupted" if run.dir.exists() else "absent"


def total_steps(run):
    """How long the run will be, by its own flags; None where the script's default counts and it has not begun."""
    flags = dict(itertools.pairwise(run.command))
    asked = flags.get("--total-steps") or load_json(run.dir / "args.json").get("total_steps")
    return asked and int(asked)


def print_status(args, runs):
    """A line per run, and the hours to go at the speed last logged; of runs not begun, at that of the others."""
    states = [state(run) for run in runs]
    speeds = [last(run.dir, "time/sps") for run in runs]
    known = [speed for _, speed in filter(None, speeds)]
    hours, unknown = 0.0, 0
    for run, now, speed in zip(runs, states, speeds):
        step, _ = last(run.dir) or (0, 0)
        _, value = last(run.dir, "eval/return") or (0, float("nan"))
        total, sps = total_steps(run), speed[1] if speed else sum(known) / max(1, len(known))
        to_go = 0.0 if now == "finished" else (total - step) / sps / 3600 if total and sps else None
        hours, unknown = hours + (to_go or 0), unknown + (to_go is None)
        shown = "?" if to_go is None else f"{to_go:.1f}"
        say(f"{now:12} step {step:>9,} of {total or 0:>9,}  return {value:>9.1f}  {shown:>5} h to go  {run.dir}")
    say(f"{states.count('finished')} of {len(runs)} finished; {hours / args.jobs:.1f} hours to go with {args.jobs} at "
        f"a time{f', and {unknown} runs of which nothing is known' * bool(unknown)}")


# Running


def end_with_parent():
    """Linux tells the process to save and end when the one that began it ends, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def train(run, threads, retries):
    """Begin a run or continue it, again and again if it dies; returns its exit code, None if it was told to stop."""
    code = None
    for _ in range(1 + retries):
        if STOPPED or code in (0, 2):  # done, or refused: no use in trying again
            break
        code = attempt(run, threads)
    return None if STOPPED and code != 0 else code


def attempt(run, threads):
    """Begin a run or continue it; returns its exit code, -1 if that is 0 but the run is not at its end."""
    run.dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.dir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a process whose parent has just died
        if state(run) == "finished":
            return 0
        place = ["--run-dir", str(run.dir)]
        if (run.dir / "checkpoint.pt").exists():
            place = ["--resume", str(run.dir)]
        elif run.dir.exists():  # it died before its first checkpoint: begin anew, and keep what there is beside it
            run.dir.rename(f"{run.dir}.lost-{time.strftime('%Y%m%d-%H%M%S')}")
        script, *flags = run.command
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"  # benchmarks.tasks, from anywhere
        before = time.time()
        with open(f"{run.dir}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *flags, *place], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}, pass_fds=[lock.fileno()],
                preexec_fn=end_with_parent, start_new_session=True)  # Ctrl-C reaches it through `stop` alone
        RUNNING.append(process)
        if STOPPED:  # meanwhile
            process.send_signal(signal.SIGINT)
        code = process.wait()
        RUNNING.remove(process)
        note, (reached, _) = load_json(f"{run.dir}.json"), last(run.dir) or (0, 0)
        at_its_end = reached >= (total_steps(run) or 0)
        if code == 0 and not at_its_end:  # a signal ended it
            code = -1
        same = note.get("command", run.command) == run.command and note.get("code") != 2
        if code == 2 and same and run.dir.exists() and at_its_end:  # it had come to its end, of which no note was left
            code = 0
        if code == 2 and note.get("code") == 0:  # refused, but finished with other flags: that stays known
            return code
        spent = note.get("seconds", 0) + round(time.time() - before)
        note = {"command": run.command, "code": code, "seconds": spent, "commit": commit(), "node": os.uname().nodename}
        Path(f"{run.dir}.json").write_text(json.dumps(note, indent=2))
        return code


def stop(signum, frame):
    """Let what runs here save and end."""
    STOPPED.append(signum)
    for process in [*RUNNING]:
        process.send_signal(signal.SIGINT)


def on_cluster(args):
    """`train` as a Ray task; a node that dies is one more try."""
    try:
        import ray
    except ImportError:
        fail("--address: the package ray is needed, pip install ray==2.60.0")
    ray.init(address=args.address, log_to_driver=False)
    remote = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries)(train)

    def begin(*arguments):
        task = remote.remote(*arguments)
        while not ray.wait([task], timeout=1)[0]:
            if STOPPED:  # this process ends, and with it its tasks
                return None
        return ray.get(task)

    return begin


def main(args):
    at_least(args, jobs=1, cpus_per_run=1, gpus_per_run=0, retries=0)
    runs = runs_of(args)
    if args.dry_run:
        for run in runs:
            say(shlex.join(["python", *run.command, "--run-dir", str(run.dir)]))
        return 0
    if args.status:
        print_status(args, runs)
        return 0
    begin = on_cluster(args) if args.address else train
    waiting = [run for run in runs if state(run) != "finished"]
    say(f"{len(runs) - len(waiting)} of {len(runs)} runs are there already")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup wants it to go on
            signal.signal(signum, stop)
    failed, left = 0, len(waiting)
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = {pool.submit(begin, run, args.cpus_per_run, args.retries): run for run in waiting}
        for task in as_completed(tasks):
            run, error, left = tasks[task], task.exception(), left - 1
            code = 1 if error else task.result()
            outcome = {0: "finished", 2: "refused", None: "stopped"}.get(code, f"failed with code {code}")
            failed += code != 0
            if code is not None or run.dir.exists():
                say(f"{run.dir}: {error or outcome}{f'; see {run.dir}.log' * (code != 0)}; {left} to go")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
