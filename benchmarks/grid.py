"""Runs an experiment of experiments.toml as Ray tasks: on this machine, or on a cluster.

    python benchmarks/grid.py quick                       # starts a Ray of its own, on this machine's cores
    python benchmarks/grid.py quick --status              # what has been done, from the run directories alone
    python benchmarks/grid.py fig5 --address auto --gpus-per-run 0.2 --runs-dir /shared/runs

Every task is a plain `python SCRIPT.py …` with a run directory of its own, beside which lie its log and, at its end, its
command and exit code (RUN_DIR.log, RUN_DIR.json). A run that has finished is skipped; one that was interrupted, by whatever, goes on from its last checkpoint with `--resume`, in this call (`--retries`) or
the next. On a cluster RUNS_DIR must be a folder that all nodes share. A run that is going on holds a lock on RUN_DIR.lock,
which its process inherits: two never write to one directory, and a training process dies with the worker that began it.
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
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
TABLE = HERE / "experiments.toml"


@dataclasses.dataclass
class Args:
    experiment: tyro.conf.Positional[str]  # name of a table in experiments.toml
    only: str = ""  # run only what has this text in its name
    runs_dir: str = "runs/grid"  # where run directories go; on a cluster, a folder that all nodes share
    address: str = ""  # of a Ray cluster, as host:port or auto; default: a Ray on this machine, for this call
    cpus_per_run: int = 1  # cores, and threads, of a run
    gpus_per_run: float = 0.0  # share of a GPU of a run; 0.2 puts five on one
    retries: int = 5  # times that a run which died is continued before it counts as failed
    table: str = str(TABLE)  # the file of experiments
    status: bool = False  # print what has been done and start nothing
    dry_run: bool = False  # print the commands and start nothing


def fail(message):
    """Print one line and exit with code 2."""
    print(f"grid.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def runs_of(args):
    """Run directory -> command, of every run of the experiment whose name has the text asked for."""
    try:
        table = tomllib.loads(Path(args.table).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        fail(f"--table {args.table}: {error}")
    if args.experiment not in table:
        fail(f"{args.experiment}: not an experiment; there are {', '.join(table)}")
    found = {}
    for part in table[args.experiment].get("parts", [args.experiment]):
        experiment = table[part]
        for env, (label, command), seed in itertools.product(
                experiment["envs"], experiment["runs"].items(), experiment.get("seeds", [1])):
            script, *flags = shlex.split(command)
            shared = shlex.split(f"{experiment.get('flags', '')} {experiment.get('env_flags', {}).get(env, '')}")
            name = "/".join(name.replace("/", "_").replace(" ", "_") for name in (part, env, f"{label}_s{seed}"))
            if args.only in name:
                found[Path(args.runs_dir).absolute() / name] = [
                    str(HERE.parent / script), "--env-id", env, "--seed", str(seed), *shared, *flags]
    if not found:
        fail(f"--only {args.only}: no run of {args.experiment} has this in its name")
    return found


def last_row(run_dir, metric=""):
    """Last row of metrics.csv, or the last of a metric: (step, value), or None."""
    try:
        lines = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    except OSError:
        return None
    rows = [line.split(",") for line in lines if line.count(",") == 3 and (not metric or f",{metric}," in line)]
    return (int(rows[-1][0]), float(rows[-1][3])) if rows else None


def note(run_dir):
    """What a run that came to its end, or was refused, left beside its directory."""
    try:
        return json.loads(Path(f"{run_dir}.json").read_text())
    except (OSError, ValueError):
        return {}


def locked(run_dir):
    """Whether a process holds the run's lock."""
    try:
        with open(f"{run_dir}.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def finished(run_dir, command):
    """Whether this very command has come to its end there."""
    return (note(run_dir).get("command"), note(run_dir).get("code")) == (command, 0)


def state(run_dir, command):
    """finished, running, refused, interrupted or absent."""
    if finished(run_dir, command):
        return "finished"
    if locked(run_dir):
        return "running"
    if note(run_dir).get("command") == command:
        return "refused"
    return "interrupted" if run_dir.exists() else "absent"


def die_with_parent():
    """Linux kills the process when the one that began it ends, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def train(run_dir, command, threads):
    """Begin a run or continue it; returns the exit code, or raises where trying again can help."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the process of a worker that has just died
        if finished(run_dir, command):
            return 0
        place = ["--run-dir", str(run_dir)]
        if (run_dir / "checkpoint.pt").exists():
            place = ["--resume", str(run_dir)]
        elif run_dir.exists():  # it died before its first checkpoint: begin anew, and keep what there is beside it
            run_dir.rename(f"{run_dir}.lost-{time.strftime('%Y%m%d-%H%M%S')}")
        before, environment = time.time(), os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(f"{run_dir}.log", "ab") as log:
            code = subprocess.run([sys.executable, *command, *place], env=environment, stdout=log, stderr=log,
                                  pass_fds=[lock.fileno()], preexec_fn=die_with_parent).returncode
        if code in (0, 2):  # done, or refused: no use in trying again
            record = {"command": command, "code": code, "seconds": round(time.time() - before), "node": os.uname().nodename}
            Path(f"{run_dir}.json").write_text(json.dumps(record, indent=2))
            return code
    raise RuntimeError(f"{run_dir.name} ended with code {code}; see {run_dir}.log")


def print_status(runs):
    for run_dir, command in runs.items():
        (step, _), (_, value) = last_row(run_dir) or (0, 0), last_row(run_dir, "eval/return") or (0, float("nan"))
        print(f"{state(run_dir, command):12} step {step:>9,}  return {value:>9.1f}  {run_dir}")


def main(args):
    if args.cpus_per_run < 1 or args.gpus_per_run < 0 or args.retries < 0:
        fail("--cpus-per-run counts from 1, --gpus-per-run and --retries from 0")
    runs = runs_of(args)
    if args.dry_run:
        for run_dir, command in runs.items():
            print(shlex.join(["python", *command, "--run-dir", str(run_dir)]))
        return 0
    if args.status:
        print_status(runs)
        return 0
    try:
        import ray
    except ImportError:
        fail("the package ray is needed: pip install -r benchmarks/requirements.txt")
    ray.init(log_to_driver=False, **({"address": args.address} if args.address else {"include_dashboard": False}))
    task = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries,
                      retry_exceptions=True)(train)
    waiting = {task.remote(run_dir, command, args.cpus_per_run): run_dir
               for run_dir, command in runs.items() if not finished(run_dir, command)}
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are there already", flush=True)
    failed = 0
    while waiting:
        (done,), _ = ray.wait([*waiting], num_returns=1)
        run_dir, outcome = waiting.pop(done), "finished"
        try:
            code = ray.get(done)
            failed, outcome = failed + (code != 0), "finished" if code == 0 else f"refused; see {run_dir}.log"
        except ray.exceptions.RayError as error:
            failed, outcome = failed + 1, f"failed: {str(error).strip().splitlines()[-1]}"
        print(f"{run_dir}: {outcome}; {len(waiting)} to go", flush=True)
    ray.shutdown()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
