"""benchmarks/mountain_car.py: the task's dynamics, trajectories and the value gap against what is known."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import common
import mountain_car as CAR

MBPO = load_script("baselines/mbpo")


def test_true_step_is_the_task():
    env = CAR.gym.make(CAR.TASK)
    obs, _ = env.reset(seed=3)
    for force in np.linspace(-1, 1, 9):
        next_obs, reward, ended, *_ = env.step([force])
        found = CAR.true_step(torch.tensor(obs)[None, None], torch.full((1, 1, 1), force))
        np.testing.assert_allclose(found[0].flatten(), next_obs, atol=1e-6)
        assert found[1].item() == pytest.approx(reward) and found[2].item() == ended
        obs = next_obs


def test_pushing_along_with_the_velocity_reaches_the_goal():
    """A known solution: its return is 100 less 0.1 per full-throttle step, and the states stop at the goal."""
    agent = SimpleNamespace(act=lambda obs, deterministic: torch.where(obs[..., 1:] >= 0, 1.0, -1.0))
    paths, returns = CAR.roll_out(agent, CAR.true_step, 1, 4)
    for path, earned in zip(paths[0], returns[0]):
        states = path[~path.isnan().any(-1)]
        assert states[-1, 0] >= CAR.GOAL > states[-2, 0]
        assert earned.item() == pytest.approx(100 - 0.1 * (len(states) - 1), abs=1e-3)


def test_gap_of_a_model_that_is_right_and_of_one_that_hopes():
    """With V(s) = position, a model that adds 0.1 to every next position has a gap of 0.1."""
    value = lambda obs: obs[..., :1]
    policy = {"act": lambda obs: torch.zeros_like(obs[..., :1]), "value": value,
              "actor": lambda obs: (None, torch.zeros_like(obs[..., :1]))}
    paths = CAR.starts(2, 10)[:, :, None]
    for shift in (0.0, 0.1):
        def predict(obs, action):
            next_obs, reward, end = CAR.true_step(obs, action)
            return next_obs + torch.tensor([shift, 0]), reward, end, None

        gap, std = CAR.value_gap(SimpleNamespace(predict=predict, **policy), paths, n=20)
        assert gap.tolist() == pytest.approx([shift, shift], abs=1e-6) and std.tolist() == [1, 1]


def test_figure_and_table(tmp_path, monkeypatch, capsys):
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    args = MBPO.Args(hidden_dim=8, model_dim=8, trials=2, device="cpu")
    monkeypatch.setattr(CAR, "open_run", lambda run, **_: (MBPO.Agent(args, 2, 1), args, None, 0))
    monkeypatch.setattr(common, "OUT", tmp_path)
    monkeypatch.setattr(CAR.roll_out, "__defaults__", (20,))
    assert CAR.main(CAR.Args(runs=("run",), labels=("new",), episodes=3)) == 0
    assert capsys.readouterr().out.count("value_gap") == 2
    rows = common.read("mountain_car")
    assert {row["dynamics"] for row in rows} == {"true", "learned"} and all(2 * int(row["alive"]) >= 3 for row in rows)
    returns = common.read("mountain_car_returns")
    assert len(returns) == 6 and sum(row["value_gap"] != "" for row in returns) == 2
    picture = (tmp_path / "figures/mountain_car.png").read_bytes()
    assert CAR.main(CAR.Args(from_csv=True)) == 0 and (tmp_path / "figures/mountain_car.png").read_bytes() == picture


@pytest.mark.parametrize("flags, named", [
    ({}, "--runs"), ({"runs": ("nowhere",)}, "--runs nowhere"), ({"runs": ("a",), "labels": ("a", "b")}, "--labels"),
    ({"episodes": 0}, "--episodes"),
], ids=str)
def test_refuses_in_one_line(capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        CAR.main(CAR.Args(**flags))
    assert named in capsys.readouterr().err
