"""benchmarks/figures.py, cost.py, speed.py and reference_sac.py do what their docstrings say, on runs made up here."""

import csv
import importlib.util
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, load_script
from torch.utils.flop_counter import FlopCounterMode

FIGURES, COST, SPEED, REFERENCE = (load_script(f"benchmarks/{name}") for name in ("figures", "cost", "speed", "reference_sac"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two runs of 300 evaluations and two trials, and empty folders for what is drawn from them."""
    for folder in ("results", "figures", "one", "two"):
        (tmp_path / folder).mkdir()
    for index, run in enumerate(("one", "two")):
        rows = [f"{step},{trial},{metric},{step + trial + 1000 * index}" for step in range(10, 3010, 10) for trial in (0, 1)
                for metric in ("eval/return", "model/kl", "loss/critic")]
        (tmp_path / run / "metrics.csv").write_text("step,trial,metric,value\n" + "\n".join(rows) + "\n")
    monkeypatch.setattr(FIGURES, "HERE", tmp_path)
    monkeypatch.setattr(COST, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(SPEED, "HERE", tmp_path)
    return tmp_path


def test_figure_and_thinned_csv(here, capsys):
    flags = {"name": "made_up", "metrics": ("eval/return", "model/kl"), "labels": ("A", "B")}
    assert FIGURES.main(FIGURES.Args(runs=(str(here / "one"), str(here / "two")), **flags)) == 0
    rows = list(csv.DictReader((here / "results/made_up.csv").open()))
    steps = {int(row["step"]) for row in rows}
    assert {row["metric"] for row in rows} == {"eval/return", "model/kl"} and {row["label"] for row in rows} == {"A", "B"}
    assert len(steps) <= 101 and {10, 3000} <= steps
    assert all(float(row["value"]) == int(row["step"]) + int(row["trial"]) + 1000 * (row["label"] == "B") for row in rows)
    assert "A: return at step 3000: 3000.5 ± 0.5 (3000, 3001)" in capsys.readouterr().out
    picture = (here / "figures/made_up.png").read_bytes()
    (here / "figures/made_up.png").unlink()
    assert FIGURES.main(FIGURES.Args(from_csv=True, name="made_up")) == 0
    assert (here / "figures/made_up.png").read_bytes() == picture


def test_figure_of_an_experiment(here, monkeypatch):
    """A panel per task, published points where there are any; runs that share task and label are trials of one curve."""
    (here / "experiments.toml").write_text('[made_up]\nenvs = ["Hopper-v4", "b/B-v0"]\n[made_up.runs]\n"x y" = "s.py"\n"β" = "s.py"\n')
    for env in ("Hopper-v4", "b/B-v0"):
        for run in ("x_y_s1", "x_y_s2", "β_s1"):
            place = here / "runs/made_up" / env.replace("/", "_") / run
            place.mkdir(parents=True)
            (place / "args.json").write_text(json.dumps({"env_id": env}))
            steps = range(10_000, 40_000, 10_000) if run == "x_y_s2" else range(10_000, 60_000, 10_000)
            lines = [f"{step},{trial},eval/return,{step + trial}" for step in steps for trial in (0, 1)]
            (place / "metrics.csv").write_text("step,trial,metric,value\n" + "\n".join(lines) + "\n")
    drawn = []
    monkeypatch.setattr(FIGURES.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    assert FIGURES.main(FIGURES.Args(experiment="made_up", runs_dir=str(here / "runs"))) == 0
    rows = list(csv.DictReader((here / "results/made_up.csv").open()))
    assert {row["task"] for row in rows} == {"Hopper-v4", "b/B-v0"} and {row["label"] for row in rows} == {"x y", "β"}
    assert {row["trial"] for row in rows if row["label"] == "x y"} == {*"0123"} and {row["trial"] for row in rows if row["label"] == "β"} == {*"01"}
    hopper, other = drawn[0].axes
    assert hopper.get_title() == "Hopper-v4: evaluation return" and other.get_title() == "b/B-v0: evaluation return"
    lines = {line.get_label(): line.get_xdata() for line in other.get_lines()}
    assert [*lines["x y"]] == [10_000, 20_000, 30_000] and [*lines["β"]] == [*range(10_000, 60_000, 10_000)]
    published = [container.get_label() for container in hopper.containers]
    assert published == ["MBPO, published"] and not other.containers


@pytest.mark.parametrize("flags, named", [
    ({}, "--runs"), ({"runs": ("nowhere",)}, "--runs"), ({"from_csv": True}, "--from-csv"), ({"name": "", "runs": ("one",)}, "--name"),
    ({"runs": ("one",), "labels": ("A", "B")}, "--labels"), ({"experiment": "made_up"}, "--runs-dir"),
    ({"experiment": "parts"}, "--experiment parts: known are made_up"), ({"experiment": "nothing"}, "--experiment nothing"),
    ({"runs": ("one",), "reference": "Swimmer-v4"}, "--reference"),
], ids=str)
def test_figures_refuses_in_one_line(here, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(here)
    (here / "experiments.toml").write_text('[made_up]\nenvs = ["A-v0"]\n[made_up.runs]\n"x" = "s.py"\n[parts]\nparts = ["made_up"]\n')
    with pytest.raises(SystemExit) as stopped:
        FIGURES.main(FIGURES.Args(**{"name": "made_up"} | flags))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0] and not list((here / "results").iterdir())


@pytest.mark.parametrize("flags, named", [
    ({"run_dir": "one"}, "--run-dir one"), ({"env_id": "Nothing-v1"}, "--env-id Nothing-v1"), ({"eval_every": 0}, "--eval-every 0"),
], ids=str)
def test_reference_sac_refuses_in_one_line(here, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit) as stop:
        REFERENCE.main(REFERENCE.Args(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and named in lines[0] and not (here / "runs").exists()


def test_spread_over_trials(monkeypatch):
    """Mean and standard deviation; the interquartile mean of eight trials is the mean of the middle four."""
    values = np.random.default_rng(0).normal(size=(3, 8)) + np.arange(3)[:, None]
    middle, low, high = FIGURES.spread(values, "mean")
    np.testing.assert_allclose([middle, high - low], [values.mean(1), 2 * values.std(1)])
    pytest.importorskip("rliable", reason="see benchmarks/requirements.txt")
    middle, low, high = FIGURES.spread(values, "iqm")
    np.testing.assert_allclose(middle, np.sort(values, 1)[:, 2:6].mean(1))
    assert (low < middle).all() and (middle < high).all()


def test_committed_results_are_small_and_draw(here):
    for path in (ROOT / "benchmarks/results").glob("*.csv"):
        assert path.stat().st_size <= 200_000, path


def test_cost_of_a_step_is_the_sum_of_its_parts(here, monkeypatch):
    (here / "benchmarks/results").mkdir(parents=True)
    args = COST.Args(scripts=("beta_vmbpo",), env_id="InvertedPendulum-v4", rows=60, repeats=1)
    script = COST.load
    small = {"hidden_dim": 8, "model_dim": 8, "batch_size": 8, "rollouts": 50, "model_buffer_size": 100, "min_first_batches": 1}

    def load(name):
        monkeypatch.setattr(COST, "HERE", ROOT / "benchmarks")
        module = script(name)
        monkeypatch.setattr(COST, "HERE", here / "benchmarks")
        defaults = module.Args
        monkeypatch.setattr(module, "Args", lambda **flags: defaults(**small, **flags))
        return module

    monkeypatch.setattr(COST, "load", load)
    assert COST.main(args) == 0
    row, = csv.DictReader((here / "benchmarks/results/cost.csv").open())
    total = float(row["environment_ms"]) + 20 * float(row["update_ms"]) + (float(row["fit_ms"]) + float(row["rollouts_ms"])) / 250
    assert float(row["step_ms"]) == pytest.approx(total, rel=0.01) and total > 0
    assert float(row["steps_per_second"]) == pytest.approx(1000 / total, rel=0.01)


@pytest.mark.parametrize("compare", ["sac", "fit", "inference"])
def test_floor_is_the_update_without_all_that_is_no_matrix_product(compare, monkeypatch):
    """PyTorch's own count of operations: the update wastes none, and nobody else's form makes fewer."""
    monkeypatch.setattr(SPEED, "ROWS", 300)
    flops = {}
    for name, make in SPEED.contestants(SPEED.Args(compare=compare, batch_size=64, hidden_dim=64)).items():
        if not (update := make()):
            continue
        update()
        with FlopCounterMode(display=False) as counter:
            update()
        flops[name] = counter.get_total_flops()
    own, *others = [count for name, count in flops.items() if name != "floor"]
    assert flops["floor"] <= own <= 1.02 * flops["floor"] and min(others) > 0.99 * own, flops


def test_speed_table(here, capsys, monkeypatch):
    monkeypatch.setattr(SPEED, "contestants", lambda args: {"one": lambda: lambda: None, "two": lambda: lambda: time.sleep(0.002),
                                                             "not installed": lambda: None})
    assert SPEED.main(SPEED.Args(blocks=3, updates=2, threads=(1,))) == 0
    one, two = csv.DictReader((here / "results/speed_sac.csv").open())
    assert (one["contestant"], one["ratio_to_first"], two["contestant"]) == ("one", "1", "two")
    assert float(two["ms_per_update"]) >= 2 and float(two["ratio_low"]) > 1
    assert SPEED.main(SPEED.Args(compare="growth", processes=True)) == 2 and "--processes" in capsys.readouterr().err
    assert SPEED.main(SPEED.Args(blocks=0)) == 2 and "--blocks" in capsys.readouterr().err


def test_speed_in_processes_of_their_own(here):
    """Tiny ones; a peer that is not installed is left out, and neither csv replaces the other."""
    command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--compare", "sac", "--processes", "--quick", "--out-dir", str(here)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["contestant"]: row for row in csv.DictReader((here / "results/speed_sac_processes.csv").open())}
    peer = {"Stable-Baselines3"} if importlib.util.find_spec("stable_baselines3") else set()
    assert rows.keys() == {"sac_iterative.py", "CleanRL-style", "floor"} | peer and not (here / "results/speed_sac.csv").exists()
    assert float(rows["floor"]["ms_per_update"]) < float(rows["sac_iterative.py"]["ms_per_update"])
