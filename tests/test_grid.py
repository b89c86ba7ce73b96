"""benchmarks/grid.py with a made-up script; the two-node test runs where Ray is installed (benchmarks/requirements.txt)."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib

import pytest
from conftest import ROOT, load_script

GRID = load_script("benchmarks/grid")
SCRIPT = '''
import argparse, json, os, pathlib, sys, time
p = argparse.ArgumentParser()
for name in ("env-id", "seed", "run-dir", "resume", "total-steps", "die-at", "pause"):
    p.add_argument(f"--{name}", default="")
a = p.parse_args()
if a.env_id == "Wrong-v0":
    sys.exit(2)
run = pathlib.Path(a.resume or a.run_dir)
run.mkdir(parents=True, exist_ok=bool(a.resume))
start = int((run / "checkpoint.pt").read_text()) if a.resume else 0
lines = (run / "metrics.csv").read_text().splitlines() if a.resume else ["step,trial,metric,value"]
lines = lines[:1] + [line for line in lines[1:] if int(line.split(",")[0]) <= start]
(run / "metrics.csv").write_text("\\n".join([*lines, ""]))
with open(run / "metrics.csv", "a", buffering=1) as file:
    for step in range(start + 1, int(a.total_steps) + 1):
        time.sleep(float(a.pause or 0))
        file.write(f"{step},0,eval/return,{step * 10}\\n")
        if a.die_at and step == int(a.die_at) and not a.resume:
            os.kill(os.getpid(), 9)
        if step % 5 == 0 or step == int(a.total_steps):
            (run / "checkpoint.tmp").write_text(str(step))
            (run / "checkpoint.tmp").replace(run / "checkpoint.pt")
'''


@pytest.fixture
def args(tmp_path):
    """An experiment of two environments, two labels and two seeds."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "table.toml").write_text(f'''
[made_up]
envs = ["A-v0", "b/B-v0"]
seeds = [1, 2]
flags = "--total-steps 12 --pause 0"
[made_up.runs]
"one" = "{tmp_path}/script.py"
"β = 2" = "{tmp_path}/script.py --die-at 8"
[made_up.env_flags]
"b/B-v0" = "--total-steps 7"
''')
    return GRID.Args("made_up", table=str(tmp_path / "table.toml"), runs_dir=str(tmp_path / "runs"))


def steps(run_dir):
    return [int(line.split(",")[0]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]]


def test_every_run_of_the_table(args):
    runs = GRID.runs_of(args)
    assert len(runs) == 8 and len({tuple(command) for command in runs.values()}) == 8
    command = runs[GRID.Path(args.runs_dir) / "made_up/b_B-v0/β_=_2_s2"]
    assert command[1:] == "--env-id b/B-v0 --seed 2 --total-steps 12 --pause 0 --total-steps 7 --die-at 8".split()


def test_an_experiment_of_parts_is_their_runs(args, tmp_path):
    """In the directories that the parts use, so that nothing is trained twice."""
    table = tmp_path / "table.toml"
    table.write_text(table.read_text() + f'''
[other]
envs = ["A-v0"]
[other.runs]
"one" = "{tmp_path}/script.py"
[both]
parts = ["other", "made_up"]
''')
    parts = [GRID.runs_of(GRID.dataclasses.replace(args, experiment=name)) for name in ("other", "made_up")]
    assert GRID.runs_of(GRID.dataclasses.replace(args, experiment="both")) == parts[0] | parts[1] and len(parts[0]) == 1


def test_the_committed_table_can_be_run(tmp_path):
    """Every flag of every experiment is one its script accepts; two runs never share a directory."""
    table, count = tomllib.loads(GRID.TABLE.read_text()), 0
    scripts = {path: load_script(path.removesuffix(".py")) for path in
               ("beta_vmbpo.py", "vmbpo.py", "baselines/mbpo.py", "sac_iterative.py", "active_vem.py")}
    for name, experiment in table.items():
        runs = GRID.runs_of(GRID.Args(name, runs_dir=str(tmp_path)))
        parts = [table[part] for part in experiment.get("parts", [name])]
        assert len(runs) == sum(len(part["envs"]) * len(part["runs"]) * len(part.get("seeds", [1])) for part in parts)
        for run_dir, command in runs.items():
            script = os.path.relpath(command[0], ROOT)
            parsed = scripts[script].parse_args([*command[1:], "--run-dir", str(run_dir)])
            assert parsed.env_id == command[2]
            count += 1
    assert count > 40


def test_a_run_is_begun_continued_and_then_left_alone(args):
    runs = GRID.runs_of(args)
    run_dir = GRID.Path(args.runs_dir) / "made_up/A-v0/β_=_2_s1"
    assert GRID.state(run_dir, runs[run_dir]) == "absent"
    with pytest.raises(RuntimeError, match="code -9"):
        GRID.train(run_dir, runs[run_dir], 1)
    assert steps(run_dir) == [*range(1, 9)] and GRID.state(run_dir, runs[run_dir]) == "interrupted"
    assert GRID.train(run_dir, runs[run_dir], 1) == 0
    assert steps(run_dir) == [*range(1, 13)] and GRID.state(run_dir, runs[run_dir]) == "finished"
    before = (run_dir / "metrics.csv").stat().st_mtime_ns
    assert GRID.train(run_dir, runs[run_dir], 1) == 0 and (run_dir / "metrics.csv").stat().st_mtime_ns == before
    longer = [*runs[run_dir], "--total-steps", "15"]
    assert GRID.state(run_dir, longer) == "interrupted"  # the same directory, another command: it goes on
    assert GRID.train(run_dir, longer, 1) == 0 and steps(run_dir) == [*range(1, 16)]


def test_a_run_without_a_checkpoint_begins_anew_and_nothing_is_lost(args):
    run_dir, command = next(iter(GRID.runs_of(args).items()))
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.csv").write_text("step,trial,metric,value\n1,0,eval/return,5\n")
    assert GRID.train(run_dir, command, 1) == 0 and steps(run_dir) == [*range(1, 13)]
    kept, = run_dir.parent.glob(f"{run_dir.name}.lost-*")
    assert steps(kept) == [1]


def test_refused_runs_are_not_tried_again(args, tmp_path):
    table = tmp_path / "table.toml"
    table.write_text(table.read_text().replace('"A-v0"', '"Wrong-v0"'))
    run_dir, command = next(iter(GRID.runs_of(args).items()))
    assert GRID.train(run_dir, command, 1) == 2 and GRID.state(run_dir, command) == "refused"


def test_two_never_write_to_one_directory(args):
    """While a process holds the lock the status says so; a training process inherits it and dies with its parent."""
    run_dir, command = next(iter(GRID.runs_of(args).items()))
    run_dir.parent.mkdir(parents=True)
    with open(f"{run_dir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert GRID.state(run_dir, command) == "running"
    slow = [*command, "--pause", "0.05", "--total-steps", "1000"]
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\nfrom test_grid import GRID\nGRID.train(GRID.Path({str(run_dir)!r}), {slow!r}, 1)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: run_dir.exists() and GRID.last_row(run_dir))
    assert GRID.state(run_dir, slow) == "running"
    parent.kill()
    parent.wait()
    wait_until(lambda: GRID.state(run_dir, slow) == "interrupted")
    ended = steps(run_dir)
    time.sleep(0.3)
    assert steps(run_dir) == ended


def wait_until(condition, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_status_and_refusals(args, capsys, tmp_path):
    args.only = "A-v0/one"
    run_dir, command = next(iter(GRID.runs_of(args).items()))
    GRID.train(run_dir, command, 1)
    assert GRID.main(GRID.dataclasses.replace(args, status=True)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:5] == ["finished", "step", "12", "return", "120.0"] and second.startswith("absent")
    assert json.loads(open(f"{run_dir}.json").read())["code"] == 0
    for changed, named in (({"experiment": "nothing"}, "nothing: not an experiment"), ({"only": "nowhere"}, "--only"),
                           ({"table": "none.toml"}, "--table"), ({"retries": -1}, "--retries")):
        with pytest.raises(SystemExit) as stopped:
            GRID.main(GRID.dataclasses.replace(args, **changed))
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0]


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray, see benchmarks/requirements.txt")
def test_a_node_that_dies_loses_no_more_than_its_last_checkpoint(args, tmp_path):
    """Two nodes on loopback, one is killed while its runs are going on: every run ends whole on the other."""
    from ray.cluster_utils import Cluster

    table = tmp_path / "table.toml"
    table.write_text(table.read_text().replace("--pause 0", "--pause 0.3").replace(" --die-at 8", ""))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=3)
    grid = subprocess.Popen([sys.executable, ROOT / "benchmarks/grid.py", "made_up", "--address", cluster.address, "--table",
                             args.table, "--runs-dir", args.runs_dir, "--only", "A-v0"])
    runs = {run_dir: command for run_dir, command in GRID.runs_of(args).items() if "A-v0" in str(run_dir)}
    wait_until(lambda: sum(GRID.last_row(run_dir) is not None for run_dir in runs) >= 2)
    cluster.remove_node(doomed, allow_graceful=False)
    wait_until(lambda: any(GRID.state(run_dir, command) == "interrupted" for run_dir, command in runs.items()))
    assert grid.wait(300) == 0
    cluster.shutdown()
    for run_dir, command in runs.items():
        assert GRID.state(run_dir, command) == "finished" and steps(run_dir) == [*range(1, 13)]
