"""benchmarks/speed.py: every comparison runs at tiny sizes, its tables add up, and it refuses what cannot work."""

import csv
import dataclasses
import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import ROOT, load_script
from torch.utils.flop_counter import FlopCounterMode

SPEED = load_script("benchmarks/speed")
PLACE = ["torch", "machine", "date"]
PARTS = ["ms_per_update", "ms_low", "ms_high", "ms_per_fit_minibatch", "ms_per_step", "environment_ms", "fit_ms",
         "rollouts_ms", "updates_per_second", "floor_share", "peak_mb"]
MODEL_BASED = ["baselines/mbpo.py", "vmbpo.py", "beta_vmbpo.py"]


def table(path):
    with path.open() as file:
        return [*csv.DictReader(file)]


def positive(row, columns):
    return all(math.isfinite(float(row[column])) and float(row[column]) > 0 for column in columns)


def quick(tmp_path, compare, **flags):
    """The exit code of a comparison at tiny sizes."""
    return SPEED.main(SPEED.Args(compare=compare, quick=True, out_dir=str(tmp_path / "out"), **flags))


@pytest.mark.parametrize("compare", ["sac", "fit", "inference"])
def test_peers(tmp_path, compare):
    assert quick(tmp_path, compare) == 0
    rows = table(tmp_path / f"out/results/speed_{compare}.csv")
    assert [*rows[0]] == ["compare", "contestant", "threads", "device", "batch_size", "hidden_dim", "trials",
                          "ms_per_update", "ratio_to_first", "ratio_low", "ratio_high", "blocks", *PLACE]
    own = {"sac": "sac_iterative.py", "fit": "baselines/mbpo.py", "inference": "direct, K=1, 10 samples"}[compare]
    assert rows[0]["contestant"] == own and rows[-1]["contestant"] == "floor" and rows[0]["ratio_to_first"] == "1"
    assert all(positive(row, ("ms_per_update", "ratio_to_first", "ratio_low", "ratio_high")) for row in rows)


def test_place_and_time():
    place = SPEED.place("cpu")
    assert [*place] == PLACE and place["torch"] == torch.__version__ and place["machine"]
    assert [len(part) for part in place["date"].split("-")] == [4, 2, 2]


# scripts


def test_scripts_in_processes_of_their_own(tmp_path, capsys):
    assert quick(tmp_path, "scripts", script_trials=(1,)) == 0
    rows = table(tmp_path / "out/results/speed_scripts.csv")
    columns = ["script", "setting", "trials", "device", "threads", *PARTS, "updates_per_step", "blocks", *PLACE]
    assert [*rows[0]] == columns
    assert [(row["script"], row["setting"]) for row in rows] == [
        ("sac_iterative.py", "direct, uniform, 1 sample"), ("sac_iterative.py", "iterative, 10 samples"),
        *((script, "") for script in MODEL_BASED), ("active_vem.py", "")]
    empty = lambda row: {column for column in PARTS if not row[column]}
    for row in rows:
        model = {"ms_per_fit_minibatch", "rollouts_ms"} if row["script"] not in MODEL_BASED else set()
        of_its_own = {"sac_iterative.py": {"fit_ms"}, "active_vem.py": {"floor_share"}}
        assert empty(row) == model | of_its_own.get(row["script"], set())
        assert positive(row, {*PARTS} - empty(row)) and row["device"] == "cpu" and all(row[column] for column in PLACE)
        assert 100 < float(row["peak_mb"]) < 5000
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and {len(line) for line in lines} == {len(head)} and lines[-1].startswith("active_vem.py ")


@pytest.mark.parametrize("name, every", [("sac", 1), ("mbpo", 250), ("beta_vmbpo", 250)])
def test_step_is_the_sum_of_its_parts(tmp_path, name, every):
    assert quick(tmp_path, "scripts", scripts=(name,), script_trials=(2,)) == 0
    (row,) = table(tmp_path / "out/results/speed_scripts.csv")
    value = lambda column: float(row[column] or 0)
    shared = (value("fit_ms") + value("rollouts_ms")) / every
    step = value("environment_ms") + value("updates_per_step") * value("ms_per_update") + shared
    assert value("ms_per_step") == pytest.approx(step, rel=0.01) and row["trials"] == "2"
    assert value("updates_per_second") == pytest.approx(2000 / value("ms_per_update"), rel=0.01)
    if name != "sac":  # 10,000 rows less a fifth, five times, in minibatches of 16, are more than 800
        assert value("fit_ms") > 0.99 * 800 * value("ms_per_fit_minibatch")


@pytest.mark.parametrize("rows, batches", [(200, 10), (1_000, 50), (5_000, 60)])
@pytest.mark.parametrize("name", ["baselines/mbpo", "vmbpo"])
def test_minibatches_of_a_fit_are_the_script_s(monkeypatch, name, rows, batches):
    script = load_script(name)
    flags = script.Args(device="cpu", batch_size=80, model_dim=4, hidden_dim=4, min_batches=3, min_first_batches=1,
                        max_batches=60)
    agent = script.Agent(flags, 3, 1)
    buffer = SPEED.fill(script.ReplayBuffer(1, rows, 3, 1, "cpu"), rows)
    agent.fit_model(buffer)  # the first has a rule of its own
    seen, model_loss = [], agent.model_loss
    monkeypatch.setattr(agent, "model_loss", lambda *columns: seen.append(0) or model_loss(*columns))
    agent.fit_model(buffer)
    assert len(seen) == SPEED.fit_batches(flags, rows) == batches
    SPEED.minibatch(agent, buffer)()
    assert len(seen) == batches + 1


@pytest.mark.parametrize("name, iters, samples", [("sac", 0, 0), ("iterative", 2, 10), ("mbpo", 0, 0), ("vmbpo", 0, 0)])
def test_floor_is_all_matrix_products_of_the_script_s_update(name, iters, samples):
    """As PyTorch counts operations: those of the update, up to what it does beside them."""
    args = SPEED.Args(compare="sac", trials=2, quick=True)
    flags, parts = SPEED.script_parts(args, name)
    args = dataclasses.replace(args, batch_size=flags.batch_size, hidden_dim=flags.hidden_dim)
    floor = SPEED.floor(args, iters, samples)
    counts = []
    for function in (parts["update"], floor):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts[1] <= counts[0] / flags.updates_per_step <= 1.02 * counts[1]


def test_filled_buffers_hold_whole_episodes():
    script = load_script("active_vem")
    buffer = SPEED.fill(script.EpisodeBuffer(2, 1_000, 3, 1, 8, "cpu"), 600)
    *_, terminated, _, _, _, time = buffer.storage[:, :600].split(buffer.widths, -1)
    assert int(buffer.count) == 600 and not terminated.any() and (time[..., 0] == torch.arange(600) % 200).all()
    assert buffer.sample(50, 20)[2].mean() > 0.9  # hardly a window reaches beyond its episode


def test_a_process_that_fails_ends_the_comparison(tmp_path, monkeypatch, capsys):
    failed = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "out of memory")
    monkeypatch.setattr(SPEED.subprocess, "run", failed)
    with pytest.raises(SystemExit, match="1"):
        quick(tmp_path, "scripts")
    assert "out of memory" in capsys.readouterr().err and not (tmp_path / "out/results/speed_scripts.csv").exists()


# growth


def test_growth(tmp_path, monkeypatch):
    """One number grows in each table, the figure is there, and is the same again when drawn from the tables."""
    monkeypatch.setattr(SPEED, "ROWS", 500)
    assert quick(tmp_path, "growth") == 0
    quantities = {"trials": ["fit minibatch", "update"], "batch": ["fit minibatch", "update"], "width": ["update"],
                  "buffer": ["fit minibatch", "sample"]}
    fixed = {"trials": "1", "batch_size": "16", "hidden_dim": "16", "rows": "500"}
    for what, column in SPEED.COLUMN.items():
        rows = table(tmp_path / f"out/results/speed_growth_{what}.csv")
        assert [*rows[0]] == ["quantity", "trials", "batch_size", "hidden_dim", "rows", "ms", "ms_low", "ms_high",
                              "ratio_to_first", "threads", "device", "blocks", *PLACE]
        expected = [(name, str(value)) for name, value in product(quantities[what], SPEED.QUICK_GROWTH[what])]
        assert [(row["quantity"], row[column]) for row in rows] == expected
        for row in rows:
            others = fixed | ({} if row["quantity"] == "update" else {"hidden_dim": ""}) | {column: row[column]}
            assert {key: row[key] for key in fixed} == others
            assert positive(row, ("ms", "ms_low", "ms_high", "ratio_to_first"))
            assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"]) and all(row[key] for key in PLACE)
    picture = tmp_path / "out/figures/speed_growth.png"
    drawn = picture.read_bytes()
    picture.unlink()
    monkeypatch.setattr(SPEED, "measure", None)
    assert quick(tmp_path, "growth", from_csv=True) == 0 and picture.read_bytes() == drawn
    path = tmp_path / "out/results/speed_growth_width.csv"
    path.write_text(path.read_text().replace("update,", "update,,"))
    assert quick(tmp_path, "growth", from_csv=True) == 2


def test_full_sizes_are_those_asked_for():
    assert SPEED.GROWTH == {"trials": (1, 2, 5, 10), "batch": (64, 128, 256, 512, 1024), "width": (256, 512, 1024),
                            "buffer": (10_000, 100_000, 1_000_000)}
    assert SPEED.Args().script_trials == (1, 5) and {*SPEED.QUICK_GROWTH} == {*SPEED.GROWTH} == {*SPEED.COLUMN}


# refusals


@pytest.mark.parametrize("flags, named", [
    ({"blocks": 0}, "--blocks"), ({"updates": -1}, "--updates"), ({"trials": 0}, "--trials"),
    ({"batch_size": 0}, "--batch-size"), ({"hidden_dim": 0}, "--hidden-dim"), ({"threads": ()}, "--threads"),
    ({"compare": "growth", "threads": (1, 2)}, "--threads"), ({"script_trials": (1, 0)}, "--script-trials"),
    ({"script_trials": ()}, "--script-trials"), ({"scripts": ("sac", "ppo")}, "--scripts ppo"),
    ({"scripts": ()}, "--scripts"),
    ({"device": "abacus"}, "--device abacus"), ({"device": "cpu,"}, "--device"), ({"out_dir": ""}, "--quick"),
    ({"from_csv": True}, "--from-csv"), ({"compare": "growth", "from_csv": True}, "--from-csv"),
    ({"out_dir": "file"}, "--out-dir"), ({"cuda_graph": True}, "--cuda-graph"),
], ids=str)
def test_refuses_in_one_line(tmp_path, capsys, monkeypatch, flags, named):
    (tmp_path / "file").write_text("")
    for work in ("peers", "scripts", "growth", "draw"):
        monkeypatch.setattr(SPEED, work, None)
    flags = {"compare": "scripts", "quick": True, "out_dir": str(tmp_path / "out")} | flags
    assert SPEED.main(SPEED.Args(**flags)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0] and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_line_refuses_with_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--compare", "growth", "--blocks", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == ["speed.py: error: --blocks 0: must be at least 1"]
