"""benchmarks/grid.py with a made-up script; the two-node test where Ray is installed."""

import dataclasses
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import grid as GRID

SCRIPT = '''
import argparse, json, os, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
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
(run / "args.json").write_text(json.dumps({"total_steps": int(a.total_steps)}))
with open(run / "metrics.csv", "a", buffering=1) as file:
    for step in range(start + 1, int(a.total_steps) + 1):
        time.sleep(0 if a.resume else float(a.pause or 0))
        file.write(f"{step},0,eval/return,{step * 10}\\n{step},-1,time/sps,0.5\\n")
        if a.die_at and step == int(a.die_at) and not a.resume:
            os.kill(os.getpid(), 9)
        if step % 5 == 0 or step == int(a.total_steps) or stop:
            (run / "checkpoint.tmp").write_text(str(step))
            (run / "checkpoint.tmp").replace(run / "checkpoint.pt")
        if stop:
            break
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
    return [int(line.split(",")[0]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1::2]]


def named(args, name):
    """The run of this name."""
    (run,) = [run for run in GRID.runs_of(args) if str(run.dir).endswith(name)]
    return run


def wait_until(condition, seconds=60):
    for _ in range(20 * seconds):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def command_line(args, *flags):
    """The grid in a process of its own."""
    command = [sys.executable, ROOT / "benchmarks/grid.py", args.experiment, "--table", args.table]
    command += ["--runs-dir", args.runs_dir, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def change(args, old, new):
    """Another text in the table."""
    path = GRID.Path(args.table)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_every_run_of_the_table_in_its_order(args):
    runs = GRID.runs_of(args)
    assert len(runs) == 8 == len({run.dir for run in runs})
    assert [run.label for run in runs[:4]] == ["one", "one", "β = 2", "β = 2"]
    command = named(args, "made_up/b_B-v0/β_=_2_s2").command
    assert command[1:] == "--env-id b/B-v0 --seed 2 --total-steps 12 --pause 0 --total-steps 7 --die-at 8".split()
    assert GRID.total_steps(named(args, "b_B-v0/one_s1")) == 7
    more = named(dataclasses.replace(args, flags="--die-at 9 --pause 1"), "made_up/b_B-v0/β_=_2_s2")
    assert more.command == [*command, "--die-at", "9", "--pause", "1"]


def test_an_experiment_of_parts_is_their_runs(args, tmp_path):
    """In the directories that the parts use, so that nothing is trained twice."""
    other = f'[other]\nenvs = ["A-v0"]\n[other.runs]\n"one" = "{tmp_path}/script.py"\n'
    change(args, "[made_up]\n", other + '[both]\nparts = ["other", "made_up"]\n[made_up]\n')
    parts = [GRID.runs_of(dataclasses.replace(args, experiment=name)) for name in ("other", "made_up")]
    assert GRID.runs_of(dataclasses.replace(args, experiment="both")) == parts[0] + parts[1] and len(parts[0]) == 1


def test_the_committed_table_can_be_run(tmp_path, monkeypatch):
    """Every flag of every experiment is one its script accepts; two runs never share a directory."""
    monkeypatch.chdir(ROOT)
    table, seen = tomllib.loads(GRID.TABLE.read_text()), {}
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for name, experiment in table.items():
        runs = GRID.runs_of(GRID.Args(name, runs_dir=str(tmp_path)))
        parts = [table[part] for part in experiment.get("parts", [name])]
        assert len(runs) == sum(len(part["envs"]) * len(part["runs"]) * len(part.get("seeds", [1])) for part in parts)
        for run in runs:
            if run.dir not in seen:
                script = load_script(run.command[0].removesuffix(".py"))
                parse = getattr(script, "parse_args", lambda flags: GRID.tyro.cli(script.Args, args=flags))
                assert parse([*run.command[1:], "--run-dir", str(run.dir)]).env_id == run.command[2]
            assert seen.setdefault(run.dir, run.command) == run.command
    assert len(seen) > 60


def test_a_run_is_begun_continued_and_then_left_alone(args):
    run = named(args, "A-v0/β_=_2_s1")
    assert GRID.state(run) == "absent" and GRID.train(run, 1, 0) == -9
    assert steps(run.dir) == [*range(1, 9)] and GRID.state(run) == "interrupted"
    assert GRID.train(run, 1, 0) == 0
    assert steps(run.dir) == [*range(1, 13)] and GRID.state(run) == "finished"
    before = (run.dir / "metrics.csv").stat().st_mtime_ns
    assert GRID.train(run, 1, 0) == 0 and (run.dir / "metrics.csv").stat().st_mtime_ns == before
    longer = run._replace(command=[*run.command, "--total-steps", "15"])
    assert GRID.state(longer) == "interrupted"  # the same directory, another command: it goes on
    assert GRID.train(longer, 1, 0) == 0 and steps(run.dir) == [*range(1, 16)]
    another = named(args, "A-v0/β_=_2_s2")
    assert GRID.train(another, 1, 1) == 0 and steps(another.dir) == [*range(1, 13)]  # it died and was tried again
    shutil.rmtree(another.dir)
    assert GRID.state(another) == "absent"  # whatever the note beside it says


def test_a_run_without_a_checkpoint_begins_anew_and_nothing_is_lost(args):
    run = named(args, "A-v0/one_s1")
    run.dir.mkdir(parents=True)
    (run.dir / "metrics.csv").write_text("step,trial,metric,value\n1,0,eval/return,5\n")
    assert GRID.train(run, 1, 0) == 0 and steps(run.dir) == [*range(1, 13)]
    kept, = run.dir.parent.glob(f"{run.dir.name}.lost-*")
    assert steps(kept) == [1]


@pytest.mark.parametrize("total", ["--total-steps 12", ""])  # or as long as the script's default
def test_refused_runs_are_not_tried_again(args, total):
    change(args, "--total-steps 12", total)
    change(args, '"A-v0"', '"Wrong-v0"')
    run = named(args, "Wrong-v0/one_s1")
    assert GRID.train(run, 1, 5) == 2 and GRID.state(run) == "refused"


@pytest.mark.parametrize("code, command, expected", [(130, "own", 0), (2, "own", 2), (0, "other", 2), (None, "own", 0)])
def test_a_run_that_a_signal_met_in_its_last_step(args, code, command, expected):
    """It is refused, having come to its end: it has finished, if it is not another command that is refused."""
    change(args, '"A-v0"', '"Wrong-v0"')
    run = named(args, "Wrong-v0/one_s1")
    run.dir.mkdir(parents=True)
    (run.dir / "checkpoint.pt").write_text("12")
    (run.dir / "metrics.csv").write_text("step,trial,metric,value\n12,0,eval/return,5\n")
    if code is not None:
        note = {"command": run.command if command == "own" else [command], "code": code}
        GRID.Path(f"{run.dir}.json").write_text(json.dumps(note))
    assert GRID.train(run, 1, 0) == expected and (GRID.state(run) == "finished") == (expected == 0)


def test_a_script_that_a_signal_ended_has_not_finished(args):
    """Though its exit code is 0; and what came to its end without a note is at its end."""
    change(args, "--pause 0", "--pause 1")
    run = named(args, "A-v0/one_s1")
    process = command_line(args, "--only", "A-v0/one_s1", "--retries", "0")
    wait_until(lambda: GRID.last(run.dir))
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    pid, = [pid for pid in pids if str(run.dir).encode() in read_bytes(f"/proc/{pid}/cmdline")]
    os.kill(int(pid), signal.SIGTERM)
    assert process.wait(60) == 1 and GRID.state(run) == "interrupted" and "failed with code -1" in process.stdout.read()
    assert GRID.train(run, 1, 0) == 0 and steps(run.dir) == [*range(1, 13)]


def read_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_all_runs_save_and_end_and_the_same_command_goes_on(args, signum):
    change(args, "--pause 0", "--pause 1")  # time enough for the signal
    process = command_line(args, "--only", "one", "--jobs", "2")
    runs = [run for run in GRID.runs_of(args) if run.label == "one"]
    wait_until(lambda: all(GRID.last(run.dir) for run in runs[:2]))
    process.send_signal(signum)
    assert process.wait(30) == 1
    reached = [steps(run.dir)[-1] for run in runs[:2]]
    assert [int((run.dir / "checkpoint.pt").read_text()) for run in runs[:2]] == reached  # saved
    assert [GRID.state(run) for run in runs] == ["interrupted"] * 2 + ["absent"] * 2 and max(reached) < 12
    assert command_line(args, "--only", "one").wait(60) == 0
    assert [steps(run.dir)[-1] for run in runs] == [12, 12, 7, 7] and {GRID.state(run) for run in runs} == {"finished"}


def test_under_nohup_a_lost_terminal_stops_nothing(args):
    change(args, "--pause 0", "--pause 0.1")
    run, before = named(args, "b_B-v0/one_s1"), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = command_line(args, "--only", "b_B-v0/one_s1")  # inherits it
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: GRID.last(run.dir))
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and GRID.state(run) == "finished"


def test_two_never_write_to_one_directory(args):
    """While a process holds the lock the status says so; a run inherits it, and saves and ends with its parent."""
    run = named(args, "A-v0/one_s1")
    run.dir.parent.mkdir(parents=True)
    with open(f"{run.dir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert GRID.state(run) == "running"
    change(args, "--pause 0", "--pause 0.05")
    change(args, "--total-steps 12", "--total-steps 1000")
    run = named(args, "A-v0/one_s1")
    parent = command_line(args, "--only", "A-v0/one_s1")
    wait_until(lambda: run.dir.exists() and GRID.last(run.dir))
    assert GRID.state(run) == "running"
    parent.kill()
    wait_until(lambda: GRID.state(run) == "interrupted")
    ended = steps(run.dir)
    assert int((run.dir / "checkpoint.pt").read_text()) == ended[-1]
    time.sleep(0.3)
    assert steps(run.dir) == ended


def test_status(args, capsys):
    args.only = "one_s1"
    first, second = GRID.runs_of(args)
    GRID.train(first, 1, 0)
    assert GRID.main(dataclasses.replace(args, status=True)) == 0
    done, absent, total = capsys.readouterr().out.splitlines()
    assert done.split()[:7] == ["finished", "step", "12", "of", "12", "return", "120.0"] and absent.startswith("absent")
    assert "1 of 2 finished" in total
    (first.dir / "checkpoint.pt").write_text("5")
    GRID.Path(f"{first.dir}.json").unlink()
    rows = (first.dir / "metrics.csv").read_text().splitlines()
    (first.dir / "metrics.csv").write_text("\n".join(rows[:11]) + "\n")
    assert [GRID.state(run) for run in (first, second)] == ["interrupted", "absent"]
    longer = first._replace(command=[*first.command, "--total-steps", "3605"])
    GRID.print_status(dataclasses.replace(args, jobs=1), [longer, second])
    to_go, unknown, total = capsys.readouterr().out.splitlines()  # at half a step per second
    assert " 2.0 h to go" in to_go and " 0.0 h to go" in unknown and "2.0 hours to go with 1 at a time" in total


@pytest.mark.parametrize("changed, table, named", [
    ({"experiment": "nothing"}, "", "nothing: not an experiment"), ({"only": "nowhere"}, "", "--only"),
    ({"table": "none.toml"}, "", "--table"), ({"retries": -1}, "", "--retries"), ({"jobs": 0}, "", "--jobs"),
    ({"experiment": "half"}, "[half]\nenvs = []", "[half] needs"),
    ({"experiment": "half"}, "[half]\nparts = ['none']", "[none] needs"),
    ({"experiment": "half"}, "[half]\nenvs = []\nruns = 3", "[half] needs"),
    ({"experiment": "half"}, "half", "--table"),
    *[({"experiment": "half"}, f"[half]\nenvs = ['A-v0']\nruns.one = 'script.py'\n{line}", "[half]")
      for line in ("seeds = 3", "env_flags = ''", "runs.two = 1", "runs.two = ''", "runs.two = '\"'")],
], ids=str)
def test_refuses_in_one_line(args, capsys, changed, table, named):
    with open(args.table, "a") as file:
        file.write(f"\n{table}\n")
    with pytest.raises(SystemExit) as stopped:
        GRID.main(dataclasses.replace(args, **changed))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0]


def test_a_file_in_the_place_of_runs_dir_is_one_line_per_run(args, capsys):
    assert GRID.main(dataclasses.replace(args, runs_dir=args.table)) == 1
    assert capsys.readouterr().out.count("Not a directory") == 8


@pytest.mark.parametrize("flag", ["--status", "--dry-run"])
def test_a_reader_that_leaves_is_no_error(args, flag):
    process = command_line(args, flag)
    process.stdout.close()
    assert process.wait(60) == 0


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray serves grid.py --address alone: ray==2.60.0")
def test_a_node_that_dies_loses_no_more_than_its_last_checkpoint(args):
    """Two nodes on loopback, one is killed while its runs are going on: every run ends whole on the other."""
    from ray.cluster_utils import Cluster

    change(args, "--pause 0", "--pause 0.3")
    change(args, " --die-at 8", "")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=3)
    process = command_line(args, "--address", cluster.address, "--only", "A-v0", "--jobs", "4")
    runs = [run for run in GRID.runs_of(args) if "A-v0" in str(run.dir)]
    wait_until(lambda: sum(GRID.last(run.dir) is not None for run in runs) >= 2)
    cluster.remove_node(doomed, allow_graceful=False)
    wait_until(lambda: any(GRID.state(run) == "interrupted" for run in runs))
    assert process.wait(300) == 0
    cluster.shutdown()
    for run in runs:
        assert GRID.state(run) == "finished" and steps(run.dir) == [*range(1, 13)]
