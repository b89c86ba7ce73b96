"""benchmarks/risk.py: the task's numbers, the analysis of a run."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import common
import risk as RISK


@pytest.fixture
def here(tmp_path, monkeypatch):
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(common, "OUT", tmp_path)
    return tmp_path


def test_what_leaving_pays():
    x, y = np.array([-8.0, 8, 0, 3.5, -7, 0, 7.2]), np.array([0.0, 0, 7.5, -7.1, -8, 0, -7.5])
    np.testing.assert_allclose(RISK.exit_reward(x, y), [-100, -100, -100, 50, 100, 0, 100])


def test_steps_of_the_task():
    env = RISK.gym.make("RiskyEdge-v0")
    obs, _ = env.reset(seed=0)
    assert (obs == 0).all()
    moves = []
    for _ in range(6000):
        next_obs, reward, terminated, truncated, _ = env.step(np.array([0.2, -3.0], np.float32))
        moves.append(next_obs - obs)
        assert terminated == (abs(next_obs).max() > 7) and reward == pytest.approx(RISK.exit_reward(*next_obs) - 0.1)
        obs = env.reset()[0] if terminated or truncated else next_obs
    np.testing.assert_allclose(np.mean(moves, 0), [0.2, -1.0], atol=0.03)
    np.testing.assert_allclose(np.std(moves, 0), [0.5, 0.5], atol=0.02)


def test_walk_and_edges():
    """An agent that always goes straight down leaves at the bottom after about seven steps, near x = 0."""
    down = SimpleNamespace(act=lambda obs, deterministic: torch.tensor([0.0, -1.0]).expand(*obs.shape))
    returns, paths = RISK.walk(down, 2, 50, seed=0)
    assert paths.shape == (2, 50, 101, 2)
    row = RISK.describe("down", 1, returns[1], paths[1])
    assert row["bottom"] == 1 and row["nowhere"] == row["left"] == 0
    distances = []
    for path, earned in zip(paths[1], returns[1]):
        steps = (~np.isnan(path[:, 0])).sum() - 1
        distances.append(abs(path[steps, 0]))
        assert earned == pytest.approx(-0.1 * steps + 100 * distances[-1] / 7)
    assert row["x_at_bottom"] == pytest.approx(np.mean(distances))
    ends = np.array([[-7.5, 0], [8, 7.5], [0, 9], [3, -7.1], [5, -8], [0, 0], [1, 1], [-6, 6], [7, 7], [2, -2]])
    row = RISK.describe("ends", 0, np.arange(10.0), np.stack([0 * ends, ends], 1))
    assert [row[name] for name in (*RISK.EDGES, "nowhere")] == [0.1, 0.1, 0.1, 0.2, 0.5]
    assert row["x_at_bottom"] == 4 and row["worst_tenth"] == 0 and row["return"] == 4.5


def test_table_of_a_run(here, monkeypatch, capsys):
    mbpo = load_script("baselines/mbpo")
    args = mbpo.Args(hidden_dim=8, model_dim=8, trials=2, device="cpu")
    monkeypatch.setattr(RISK, "open_run", lambda run, **_: (mbpo.Agent(args, 2, 2), args, None, 0))
    flags = {"runs": ("run",), "labels": ("new",), "episodes": 5}
    assert RISK.main(RISK.Args(**flags)) == 0
    assert "new: return" in capsys.readouterr().out
    rows = common.read("risk")
    assert [row["trial"] for row in rows] == ["0", "1"] and (here / "figures/risk.png").exists()
    assert all(sum(float(row[way]) for way in (*RISK.EDGES, "nowhere")) == pytest.approx(1) for row in rows)


@pytest.mark.parametrize("flags, named", [
    ({}, "--runs"), ({"runs": ("none",)}, "--runs none"), ({"runs": ("none",), "labels": ("a", "b")}, "--labels"),
    ({"episodes": 0}, "--episodes 0"),
    ({"reward_fit": True, "steps": 10}, "--steps 10"), ({"reward_fit": True, "batches": 0}, "--batches 0"),
], ids=str)
def test_refuses_in_one_line(here, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        RISK.main(RISK.Args(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0] and not [*(here / "results").iterdir()]


def test_reward_fit(here):
    """True rewards against the normal distribution's; the fits, of a few rows here, have the same places."""
    assert RISK.main(RISK.Args(reward_fit=True, steps=400, batches=2)) == 0
    rows = common.read("risk_reward_fit")
    rewards = {(row["weight"], float(row["x"]), float(row["y"])): float(row["reward"]) for row in rows}
    assert len(rows) == 4 * len(RISK.PLACES) and {row["weight"] for row in rows} == {"true", "0", "0.5", "1"}
    beyond = 0.5 * (1 + math.erf(1 / 2**0.5))  # a move by 1 towards an edge half a step away ends one deviation beyond
    assert rewards["true", 6.5, 0] == pytest.approx(-100 * beyond - 0.1, abs=1) and rewards["true", 0, 0] == -0.1
    assert rewards["true", 5, -6.5] == pytest.approx(rewards["true", -5, -6.5], abs=1)
