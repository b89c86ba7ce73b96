"""benchmarks/speed.py: contestants do what their rows say, take turns in processes of their own, and tables add up."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import common
import speed as SPEED

COLUMNS = ["table", "row", "threads", "blocks", "ms", "ms_low", "ms_high", "per_second", "peer_ms", "ratio",
           "ratio_low", "ratio_high", "same_peer_ms", "same_ratio", "same_ratio_low", "same_ratio_high", "peak_mb",
           "precision", "device", "torch", "machine", "date", "commit"]
SMALL = {"batch_size": 8, "hidden_dim": 8, "model_dim": 8, "model_layers": 2, "rollouts": 20, "buffer_size": 400,
         "model_buffer_size": 60, "fit_every": 2, "min_first_batches": 2, "min_batches": 2, "max_batches": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(common, "OUT", tmp_path)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    """The rows of a table, with tiny networks, buffers and blocks."""
    rows_of = SPEED.rows_of

    def tiny_rows(table):
        for name, own, peer in rows_of(table):
            small = {key: value for key, value in (SMALL | {"windows": 2}).items()
                     if hasattr(load_script({"mbpo": "baselines/mbpo"}.get(own.script, own.script)).Args, key)}
            own.flags = own.flags | small
            for contestant in filter(None, (own, peer)):
                contestant.rows, contestant.calls = min(contestant.rows, 300), min(contestant.calls, 2)
            yield name, own, peer

    monkeypatch.setattr(SPEED, "rows_of", tiny_rows)


def counted(monkeypatch, agent, *names):
    """How often each method is called."""
    calls = dict.fromkeys(names, 0)

    def count(name, method):
        def counting(*args):
            calls[name] += 1
            return method(*args)
        return counting

    for name in names:
        monkeypatch.setattr(agent, name, count(name, getattr(agent, name)))
    return calls


def contestant(monkeypatch, contestant, *names):
    """Its call, and how often its agent's methods are called from now on."""
    kept, prepare = [], SPEED.prepare
    monkeypatch.setattr(SPEED, "prepare", lambda contestant: kept.append(prepare(contestant)) or kept[-1])
    call = SPEED.KINDS[contestant.kind](contestant)
    return call, counted(monkeypatch, kept[0][2], *names)


# Contestants


def test_an_update_is_one(monkeypatch):
    own = SPEED.Contestant("update", "sac_iterative", {"hidden_dim": 8} | SPEED.SAC, 300)
    call, calls = contestant(monkeypatch, own, "update")
    call()
    assert calls == {"update": 1}


def test_a_fit_has_a_hundred_minibatches(monkeypatch):
    """For each of which a part of its time counts."""
    ((_, own, _),) = SPEED.rows_of("fit")
    own.rows, own.flags = 300, SMALL | own.flags
    call, calls = contestant(monkeypatch, own, "model_loss", "fit_model")
    call()
    call()
    assert calls == {"model_loss": 200, "fit_model": 2} and (own.calls, own.parts) == (1, 100)


def test_steps_are_those_of_the_script_s_loop(monkeypatch):
    """A fit first, then one every fit_every steps, roll-outs after each, updates and the dual step at every step."""
    names = "fit_model", "imagine", "act", "update", "update_beta"
    flags = SMALL | {"fit_every": 4, "updates_per_step": 3, "env_id": "InvertedPendulum-v4"}
    call, calls = contestant(monkeypatch, SPEED.Contestant("steps", "beta_vmbpo", flags, 300), *names)
    for _ in range(8):
        call()
    assert calls == {"fit_model": 2, "imagine": 2, "act": 8 + 2 + 2, "update": 24, "update_beta": 8}


def test_buffers_are_filled_as_asked():
    """To the last row."""
    for rows, expected in ((300, 300), (0, 400)):
        buffer = SPEED.prepare(SPEED.Contestant("steps", "beta_vmbpo", SMALL, rows))[3][0]
        obs, action, *_, terminated = buffer.rows().split(buffer.widths, -1)
        assert buffer.rows().shape[1] == expected and action.abs().max() <= 1 and obs.std() > 0.9
        assert not terminated.any()


def test_filled_buffers_of_active_vem_hold_whole_episodes():
    flags = {"env_id": "Pendulum-v1", "hidden_dim": 8, "model_dim": 8}
    *_, (buffer,) = SPEED.prepare(SPEED.Contestant("update", "active_vem", flags, 600))
    time = buffer.rows()[..., -1]
    assert (time[0] == torch.arange(600) % 200).all() and not buffer.rows()[..., 8].any()
    assert (buffer.sample(50, 20)[2] > 0).float().mean() > 0.4  # windows are cut at both ends, not within


def test_the_peers_learn():
    """mbpo_pytorch's form fits what it is given; Stable-Baselines3's takes the updates asked for."""
    ensemble = SPEED.BatchedEnsemble(3, 1, members=2, width=8)
    mean, log_var = ensemble(torch.randn(2, 5, 4))
    assert mean.shape == log_var.shape == (2, 5, 4) and (log_var < 0.5).all() and (log_var > -10).all()
    SPEED.mbpo_pytorch(SPEED.Contestant("mbpo_pytorch", rows=50))()
    SPEED.sb3(SPEED.Contestant("sb3", rows=300))()


# The measurement


def test_blocks_alternate_and_ratios_are_of_neighbours(monkeypatch):
    """With one that gets slower and slower, a ratio of medians would be wrong; that of neighbours is exact."""
    order = []

    class Fake:
        peak, precision = 100.0, "medium"

        def __init__(self, contestant, stack):
            self.name = f"{contestant.kind} {contestant.precision}"

        def block(self, count):
            order.append(self.name)
            drift = 1 + len(order)
            return drift * (1 if self.name.startswith("update") else 2)

    monkeypatch.setattr(SPEED, "Process", Fake)
    own, peer = SPEED.Contestant("update", "sac_iterative"), SPEED.Contestant("mbpo_pytorch")
    row = SPEED.measure(SPEED.Args(blocks=3), own, peer)
    assert order[2:8] == ["update default", "mbpo_pytorch highest"] * 3
    assert order[9:] == ["update default", "mbpo_pytorch medium"] * 3
    ratios = [(3 + 2 * i) / (2 * (4 + 2 * i)) for i in (0.5, 1.5, 2.5)]
    found = [float(row[name]) for name in ("ratio_low", "ratio", "ratio_high")]
    assert found == pytest.approx(sorted(ratios), rel=1e-3)
    assert float(row["same_ratio"]) < 0.5 and row["precision"] == "medium"


@pytest.mark.parametrize("table, only, peer", [
    ("fit", "", True), ("steps", "beta_vmbpo, 10,000 rows, 3", False), ("latent", "generative", False)])
def test_tables_in_processes_of_their_own(here, tiny, table, only, peer):
    """In the precision asked for; without a peer its columns are empty."""
    precision = "high" if table == "steps" else "default"
    sizes = {"blocks": 2, "updates": 2, "out": "made_up"}
    assert SPEED.main(SPEED.Args(table=table, only=only, matmul_precision=precision, **sizes)) == 0
    row, = common.read("made_up")
    assert [*row] == COLUMNS and row["precision"] == {"fit": "medium", "steps": "high", "latent": "highest"}[table]
    numbers = ["ms", "ms_low", "ms_high", "per_second", "peak_mb", *(COLUMNS[8:16] if peer else [])]
    assert all(math.isfinite(float(row[name])) and float(row[name]) > 0 for name in numbers)
    assert peer or not any(row[name] for name in COLUMNS[8:16])
    assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"]) and 100 < float(row["peak_mb"]) < 5000


def test_every_row_has_flags_that_its_script_accepts():
    """And a name of its own."""
    tables = "sac", "fit", "inference", "steps", "latent", "memory"
    names = [(table, *row) for table in tables for row in SPEED.rows_of(table)]
    assert len({(table, name) for table, name, *_ in names}) == len(names) > 13
    for _, _, own, peer in names:
        script = load_script({"mbpo": "baselines/mbpo"}.get(own.script, own.script))
        args = script.Args(**own.flags)
        assert own.parts % args.trials == 0 and not [*args.conflicts()] and (peer is None or peer.kind in SPEED.KINDS)


@pytest.mark.parametrize("flags, named", [
    ({"blocks": 0}, "--blocks"), ({"updates": -1}, "--updates"), ({"device": "cuda"}, "--device cuda"),
    ({"cuda_graph": True}, "--cuda-graph"), ({"only": "ppo"}, "--only ppo"),
    ({"out": "a/b"}, "--out a/b"),
], ids=str)
def test_refuses_in_one_line(here, capsys, monkeypatch, flags, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        SPEED.main(SPEED.Args(**{"out": "made_up"} | flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0] and not [*(here / "results").iterdir()]


def test_a_process_that_fails_ends_the_table(tmp_path):
    """Flags that make no network: one line, code 1, no table."""
    code = (f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r}); import common, speed\n"
            f"if __name__ == '__main__':\n    speed.HUNDRED['batch_size'] = -1\n    common.OUT = common.Path('.')\n"
            f"    speed.main(speed.Args(table='fit', blocks=1, out='made_up'))")
    (tmp_path / "results").mkdir()
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "script.py: error: fit mbpo: RuntimeError" in done.stderr.splitlines()[-1]
    assert not [*(tmp_path / "results").iterdir()]
