"""The training scripts as a user runs them: short runs, resume, signals, refusals, numbers that are not finite."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
import torch
from conftest import ROOT, load_script

PATHS = {name.split("/")[-1]: name for name in ("beta_vmbpo", "vmbpo", "baselines/mbpo", "active_vem", "sac_iterative")}
SCRIPTS = {name: load_script(path) for name, path in PATHS.items()}
SIZES = {"hidden_dim": 16, "model_dim": 16, "model_layers": 2, "ensemble_size": 3, "num_elites": 2, "updates_per_step": 2,
         "batch_size": 16, "rollouts": 50, "model_buffer_size": 200, "buffer_size": 1000, "learning_starts": 20,
         "fit_every": 10, "imagine_every": 10, "min_first_batches": 5, "max_batches": 5, "log_every": 10,
         "eval_every": 20, "eval_episodes": 1, "save_every": 1000, "total_steps": 40, "device": "cpu", "windows": 4,
         "window_length": 5}
MODEL_BASED = ["beta_vmbpo", "vmbpo", "mbpo"]
every_script = pytest.mark.parametrize("name", SCRIPTS)
model_based = pytest.mark.parametrize("name", MODEL_BASED)


def one_script_each(argument, rows):
    """A script per row, in turn: what is below the fence is the same text in all of them, as test_copies.py shows."""
    def flags_of(row):
        return [word[2:].replace("-", "_") for word in str(row[0]).split() if word.startswith("--")]

    pairs = []
    for i, row in enumerate(rows):
        able = [name for name in SCRIPTS if all(hasattr(SCRIPTS[name].Args, flag) for flag in flags_of(row))]
        pairs.append(pytest.param(able[i % len(able)], row, id=f"{able[i % len(able)]}-{row[0] or i}"))
    return pytest.mark.parametrize(f"name, {argument}", pairs)


def flags(**changed):
    """Keyword arguments as a command line."""
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in changed.items())
    return [text for pair in pairs for text in pair]


def known(name, shape):
    """Those of the flags that the script has."""
    return {key: value for key, value in shape.items() if key in SCRIPTS[name].Args.__annotations__}


def exit_code(name, argv):
    try:
        SCRIPTS[name].main([str(text) for text in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def run(name, *more, **changed):
    """A training run in this process: exit code, agent, and its state when it was built."""
    script, built = SCRIPTS[name], []

    class Recorded(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            built.append((self, {key: value.clone() for key, value in self.state_dict().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Agent", Recorded)
        sizes = {} if {"resume", "evaluate"} & set(changed) else SIZES
        code = exit_code(name, flags(**known(name, sizes | changed)) + list(more))
    agent, initial = built[0] if built else (None, None)
    return SimpleNamespace(code=code, args=agent and agent.args, agent=agent, initial=initial)


def subprocess_run(command, cwd, shell=None, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(shell or [sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=100, shell=bool(shell))


def checkpoint(run_dir, name="checkpoint.pt"):
    return torch.load(f"{run_dir}/{name}", weights_only=True)


def metrics(run_dir):
    """Rows (step, trial, metric, value as text) of metrics.csv, without the times, which no two runs share."""
    with open(f"{run_dir}/metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "trial", "metric", "value"]
    return [(int(step), int(trial), metric, value) for step, trial, metric, value in rows if not metric.startswith("time/")]


def leaves(value, path=""):
    """Every tensor and number of a nested state, by its path."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, child in items for key, leaf in leaves(child, f"{path}/{name}").items()}
    return {path: value}


def assert_same(state, other):
    state, other = leaves(state), leaves(other)
    assert state.keys() == other.keys() and len(state) > 50
    different = [k for k, v in state.items() if not (torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k])]
    assert not different


def assert_finite(state):
    wrong = [k for k, v in leaves(state).items() if torch.is_tensor(v) and v.is_floating_point() and not v.isfinite().all()]
    assert not wrong


def files(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def signal_handlers():
    """Scripts set handlers; a script that sets none fails its test instead of ending pytest."""
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each script, two trials on InvertedPendulum-v4; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    runs = {name: run(name, env_id="InvertedPendulum-v4", trials=2, run_dir=folder / name) for name in SCRIPTS}
    assert all(item.code == 0 for item in runs.values())
    return runs


@pytest.fixture
def copy_of(finished, tmp_path):
    """A private copy of a script's finished run."""
    return lambda name: shutil.copytree(finished[name].args.run_dir, tmp_path / f"copy_of_{name}")


# A short run


@every_script
def test_short_run_moves_every_parameter(name, finished):
    agent, initial, args = finished[name].agent, finished[name].initial, finished[name].args
    torch.manual_seed(args.seed)
    fresh = SCRIPTS[name].Agent(args, 4, 1)
    assert all(torch.equal(value, initial[key]) for key, value in fresh.state_dict().items())
    final = dict(agent.named_parameters())
    expected = {"actor.layers.0.weight", "critic.layers.2.bias", "critic_target.layers.0.weight", "log_alpha"}
    expected |= {"model.layers.2.weight", "model.max_log_var", "model.min_log_var"} if name in MODEL_BASED else set()
    expected |= {"latent_posterior.layers.0.weight", "latent_prior.layers.2.bias", "decoder.layers.1.weight",
                 "log_scale", "first_latent"} if name == "active_vem" else set()
    expected |= {"prior_actor.layers.0.weight"} if name == "active_vem" else set()
    expected |= {"log_beta"} if name == "beta_vmbpo" else set()
    assert expected <= final.keys()
    for key, parameter in final.items():
        moved = (parameter != initial[key]).flatten(0, -3).flatten(1)  # one row per slice of the stack
        stack = {"critic": 2 * 2, "model": 3 * 2, "posterior_model": 3 * 2}.get(re.split(r"_t|\.", key)[0], 2)
        assert len(moved) == stack, key
        assert moved.any(1).all(), key
        assert parameter.isfinite().all(), key


@pytest.mark.parametrize("name", ["beta_vmbpo", "vmbpo"])
def test_short_run_trains_the_posterior_apart_from_the_prior(name, finished):
    agent = finished[name].agent
    for (key, prior), posterior in zip(agent.model.named_parameters(), agent.posterior_model.parameters()):
        if key != "min_log_var":  # far below the variances of so short a fit: it feels the penalty alone
            assert (prior != posterior).flatten(0, -3).flatten(1).any(1).all(), key


@model_based
def test_short_run_fills_buffers_and_statistics(name, finished):
    agent, initial = finished[name].agent, finished[name].initial
    state = checkpoint(finished[name].args.run_dir)
    real, imagined = state["buffers"]
    assert state["step"] == 40
    assert (real["added"], imagined["added"]) == (40, 3 * 50)  # fits at steps 20, 30 and 40
    assert imagined["storage"].shape[1] == 150
    assert imagined["storage"].isfinite().all()
    assert imagined["storage"][..., :4].std(1).gt(0).all()  # imagined states are not all the same
    # The statistics of the last fit, which saw all 40 rows.
    rest = [1] * (real["storage"].shape[-1] - 10)
    obs, action, reward, next_obs, terminated = real["storage"].split((4, 1, 1, 4, *rest), -1)[:5]
    for normalizer, x in ((agent.inputs, torch.cat([obs, action], -1)),
                          (agent.targets, torch.cat([next_obs - obs, reward], -1))):
        std = x.std(1, keepdim=True)
        torch.testing.assert_close(normalizer.mean, x.mean(1, keepdim=True))
        torch.testing.assert_close(normalizer.std, torch.where(std < 1e-6, 1.0, std))
    both = torch.cat([obs, next_obs], 1)
    assert torch.equal(agent.state_range, torch.stack([both.amin(1, keepdim=True), both.amax(1, keepdim=True)]))
    assert terminated.any(1).all()  # a pole moved at random falls within 40 steps
    assert torch.equal(agent.termination(obs, action, next_obs), terminated)
    assert all(len(set(elites)) == 2 and set(elites) <= {0, 1, 2} for elites in agent.elites.T.tolist())
    # The critic's target follows the critic at a distance.
    for key, value in agent.critic_target.state_dict().items():
        start, end = initial[f"critic.{key}"], agent.critic.state_dict()[key]
        assert 0 < (value - start).norm() < (end - start).norm(), key


@every_script
def test_run_directory(name, finished):
    args = finished[name].args
    folder = ROOT / args.run_dir
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.csv", "checkpoint.pt", "curve.png"}
    saved = json.loads((folder / "args.json").read_text())
    assert {key: saved[key] for key in known(name, SIZES)} == known(name, SIZES)
    assert (saved["env_id"], saved["trials"], saved["seed"]) == ("InvertedPendulum-v4", 2, 1)
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = metrics(folder)
    assert len({row[:3] for row in rows}) == len(rows)
    steps = {}
    for step, trial, metric, value in rows:
        assert trial in (0, 1) and math.isfinite(float(value))
        steps.setdefault((metric, trial), []).append(step)
    assert all(when == sorted(when) for when in steps.values())
    always = {"loss/critic", "value/q", "policy/entropy", "policy/alpha"}
    groups = {"train", "eval", "loss", "value", "policy"} | ({"model"} if name != "sac_iterative" else set())
    assert {metric.split("/")[0] for metric, _ in steps} == groups
    for trial in (0, 1):
        assert all(steps[metric, trial] == [20, 30, 40] for metric in always)
        fits = {metric: when for (metric, i), when in steps.items() if metric.startswith("model/") and i == trial}
        assert (len(fits) >= 2 or name == "sac_iterative") and all(when == [20, 30, 40] for when in fits.values())
        assert steps["eval/return", trial] == steps["eval/length", trial] == [20, 40]
        # Every step is rewarded with 1 until the pole falls.
        for group in ("train", "eval"):
            ends = {kind: [value for _, i, metric, value in rows if (i, metric) == (trial, f"{group}/{kind}")]
                    for kind in ("return", "length")}
            assert ends["return"] and ends["return"] == ends["length"]
    times = (folder / "metrics.csv").read_text().splitlines()
    assert all(line.split(",")[1] == "-1" for line in times if ",time/" in line)
    assert sum(",time/sps," in line for line in times) == 4


@every_script
def test_default_run_directory_and_last_line(name, tmp_path, capsys):
    """Two runs of one seed in one second do not meet, and a run without a terminal ends with its return and its place."""
    for _ in range(2):
        assert run(name, env_id="Pendulum-v1", total_steps=20, seed=3).code == 0
        first, last = capsys.readouterr().err.splitlines()
        folder = Path(last.partition(":")[0])
        assert re.fullmatch(rf"{name}_s3_\d{{8}}-\d{{6}}-\d{{6}}", folder.name) and (folder / "checkpoint.pt").exists()
        assert str(folder) in first and "Pendulum-v1" in first and "cpu" in first
        assert re.search(r": return -\d+\.\d at step 20$", last)
    assert len([*(tmp_path / "runs" / "Pendulum-v1").iterdir()]) == 2


@every_script
def test_rows_of_the_buffer_against_a_counter(name):
    """Observation, action, reward, next observation and termination belong together, in two trials of known numbers."""
    args = run(name, env_id="tiny_envs:Counter-v0", trials=2, seed=3, run_dir="run").args
    rows = checkpoint(args.run_dir)["buffers"][0]["storage"]
    for trial in range(2):
        obs, action, reward, next_obs, terminated = rows[trial].split((2, 1, 1, 2, *[1] * (rows.shape[-1] - 6)), -1)[:5]
        expected, ends, episode, count = [], [], 0, 0
        for step in range(1, 41):
            base, count = 1000 * (3 + trial) + 100 * episode, count + 1
            dies = episode % 2 == 1 and count == 5
            expected.append((base + count - 1, count, base + count, float(dies)))
            if dies or count == 7:
                ends.append((step, sum(range(1, count + 1)), count))
                episode, count = episode + 1, 0
        columns = [obs[:, 0], reward[:, 0], next_obs[:, 0], terminated[:, 0]]
        assert torch.equal(torch.stack(columns, 1), torch.tensor(expected))
        assert sum(row[3] for row in expected) == 3
        received = tiny_envs.LOW + (action[:, 0] + 1) / 2 * (tiny_envs.HIGH - tiny_envs.LOW)
        torch.testing.assert_close(next_obs[:, 1], received, rtol=1e-4, atol=1e-4)
        assert action.abs().max() <= 1 and action[:20].unique().numel() == 20
        starts = torch.tensor([step in {0, *(end[0] for end in ends)} for step in range(40)])
        assert torch.equal(obs[:, 1], torch.where(starts, 0.0, torch.cat([obs[:1, 1], next_obs[:-1, 1]])))
        logged = {(metric, step): float(value) for step, i, metric, value in metrics(args.run_dir) if i == trial}
        assert [(step, logged["train/return", step], logged["train/length", step]) for step, *_ in ends] == ends
        assert sum(metric == "train/return" for metric, _ in logged) == len(ends)
        assert logged["eval/return", 40] == 28 and logged["eval/length", 40] == 7


@every_script
def test_random_actions_are_held(name):
    """For three steps each, and drawn anew after the checkpoint at step 10, where a resumed run begins."""
    args = run(name, env_id="tiny_envs:Counter-v0", explore_hold=3, save_every=10, run_dir="run").args
    actions = checkpoint(args.run_dir)["buffers"][0]["storage"][0, :40, 2]
    assert [step for step in range(1, 20) if actions[step] != actions[step - 1]] == [3, 6, 9, 10, 13, 16, 19]


@pytest.mark.parametrize("name", [*MODEL_BASED, "sac_iterative"])
def test_training_explores(name, monkeypatch):
    """Actions after the random ones, standardised by a policy that does not learn, are standard normal."""
    monkeypatch.setattr(SCRIPTS[name].Agent, "learn", lambda *_: {})
    agent = run(name, env_id="Pendulum-v1", total_steps=150, eval_every=1000, inference="direct", run_dir="run").agent
    rows = checkpoint("run")["buffers"][0]["storage"][:, 20:150]
    with torch.no_grad():
        policy = agent.infer(rows[..., :3])[0][-1].unbind(-2) if name == "sac_iterative" else agent.actor(rows[..., :3])
    noise = (rows[..., 3:4].atanh() - policy[0]) / policy[1].exp()
    assert abs(noise.mean().item()) < 0.3 and noise.std().item() == pytest.approx(1, abs=0.25)


def test_active_vem_explores_and_stores_what_it_perceived(monkeypatch):
    """z and actions, standardised by q(z) and q(a) that do not learn, are standard normal."""
    agent_class, seen = SCRIPTS["active_vem"].Agent, []
    perceive = agent_class.perceive
    monkeypatch.setattr(agent_class, "learn", lambda *_: {})
    monkeypatch.setattr(agent_class, "fit_scales", lambda *_: None)
    monkeypatch.setattr(agent_class, "perceive", lambda *args, **kw: seen.append(perceive(*args, **kw)) or seen[-1])
    agent = run("active_vem", env_id="Pendulum-v1", total_steps=150, eval_every=1000, run_dir="run").agent
    rows = checkpoint("run")["buffers"][0]["storage"][:, :150]
    obs, action, reward, _, _, latent, _ = rows.split(agent.widths, -1)
    assert torch.equal(latent, torch.cat(seen[:150], 1))
    with torch.no_grad():
        sight = agent.sight(obs[:, 1:], reward[:, :-1], obs[:, :-1])
        state, policy = agent.latent_posterior(latent[:, :-1], action[:, :-1], sight), agent.actor(latent[:, 20:])
    for x, (mean, log_std) in ((latent[:, 1:], state), (action[:, 20:].atanh(), policy)):
        noise = (x - mean) / log_std.exp()
        assert abs(noise.mean().item()) < 0.3 and noise.std().item() == pytest.approx(1, abs=0.25)


@model_based
def test_order_of_a_step(name, monkeypatch):
    """A fit, roll-outs in it, then updates; every step moves β."""
    calls, agent = [], SCRIPTS[name].Agent
    for method in {"fit_model", "imagine", "learn", "update_beta"} & {*dir(agent)}:
        record = lambda self, *args, own=getattr(agent, method), method=method: calls.append(method) or own(self, *args)
        monkeypatch.setattr(agent, method, record)
    run(name, env_id="tiny_envs:Counter-v0", total_steps=31, run_dir="run")
    step = ["learn"] + ["update_beta"] * (name == "beta_vmbpo")
    assert calls == ["fit_model", "imagine", *step * 10, "fit_model", "imagine", *step * 2]


def test_active_vem_fits_its_scales_every_so_often(monkeypatch):
    calls, agent = [], SCRIPTS["active_vem"].Agent
    fit = agent.fit_scales
    monkeypatch.setattr(agent, "fit_scales", lambda self, buffer: calls.append(int(buffer.added)) or fit(self, buffer))
    run("active_vem", env_id="tiny_envs:Counter-v0", scale_every=8, run_dir="run")
    assert calls == [20, 28, 36]


@pytest.mark.parametrize("task, ended", [("Counter-v0", 1), ("Endless-v0", 0)])
def test_plans_of_active_vem_end_once_an_end_was_seen(task, ended):
    agent = run("active_vem", env_id=f"tiny_envs:{task}", max_eval_steps=10, run_dir="run").agent
    assert agent.ever_ended.item() == ended


def test_all_methods_begin_with_the_same_transitions():
    """At one seed, whatever their networks have drawn; a trial of seed 4 is the second of two that begin at seed 3."""
    first = []
    for name in SCRIPTS:
        args = run(name, env_id="InvertedPendulum-v4", trials=2, seed=3, total_steps=20, run_dir=f"run_{name}").args
        first.append(checkpoint(args.run_dir)["buffers"][0]["storage"][:, :20, :5])  # obs and action
        assert torch.equal(first[0], first[-1]), name
    run(name, env_id="InvertedPendulum-v4", seed=4, total_steps=20, run_dir="alone")
    assert torch.equal(checkpoint("alone")["buffers"][0]["storage"][0, :20, :5], first[0][1])
    assert first[0][..., 4].unique().numel() == 40


@model_based
def test_dictionary_observations_and_known_termination(name):
    args = run(name, env_id="tiny_envs:Dictionary-v0", termination_fn="tiny_envs:ends_above", run_dir="run").args
    real, imagined = (buffer["storage"][0] for buffer in checkpoint(args.run_dir)["buffers"])
    assert torch.equal(real[:7, 0], torch.arange(1000.0, 1007.0))
    assert torch.equal(real[:7, 4], torch.arange(1001.0, 1008.0))
    assert torch.equal(imagined[:, 6], (imagined[:, 5] > 2).float())
    assert imagined[:, 6].unique().numel() == 2


# Resume


@every_script
def test_resume_equals_an_uninterrupted_run(name):
    """Two trials, episodes that end early and buffers that wrap; the interruption is an end or a crash."""
    shape = {"env_id": "InvertedPendulum-v4", "trials": 2, "save_every": 40, "buffer_size": 30,
             "model_buffer_size": 120}
    assert run(name, **shape, total_steps=80, run_dir="whole").code == 0
    assert run(name, **shape, total_steps=40, run_dir="halves").code == 0
    assert run(name, resume="halves", total_steps=80).code == 0

    learn, calls = SCRIPTS[name].Agent.learn, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 36:  # step 55
            raise ZeroDivisionError
        return learn(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SCRIPTS[name].Agent, "learn", crash)
        with pytest.raises(ZeroDivisionError):
            run(name, **shape, total_steps=80, run_dir="crashed")
    assert checkpoint("crashed")["step"] == 40
    with open("crashed/metrics.csv", "a") as file:
        file.write("5")  # of a line that the process did not finish, at step 55
    after = [line for line in open("crashed/metrics.csv") if line.startswith("50,")]
    assert len(after) > 8
    assert run(name, resume="crashed").code == 0

    whole, rows = checkpoint("whole"), metrics("whole")
    assert whole["step"] == 80 and whole["buffers"][0]["added"] == 80
    assert len({row[:3] for row in rows}) == len(rows) and rows[-1][0] == 80
    assert any(step < 80 and metric == "train/return" for step, _, metric, _ in rows)
    for other in ("halves", "crashed"):
        assert_same(checkpoint(other), whole)
        assert metrics(other) == rows


@every_script
def test_resume_with_other_intervals_keeps_the_rest(name, copy_of):
    folder = copy_of(name)
    assert run(name, resume=folder, total_steps=50, eval_episodes=2, log_every=5).code == 0
    assert checkpoint(folder)["step"] == 50
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["total_steps"], saved["eval_episodes"], saved["hidden_dim"], saved["trials"]) == (50, 2, 16, 2)
    assert {step for step, _, metric, _ in metrics(folder) if metric == "loss/critic"} == {20, 30, 40, 45, 50}


# Signals


@one_script_each("row", [("SIGTERM",), ("SIGINT",), ("SIGHUP",), ("SIGINT",), ("SIGTERM",)])
def test_signal_saves_and_exits(name, row, tmp_path, monkeypatch):
    """The run has not been evaluated yet when the signal comes."""
    shape = {"env_id": "tiny_envs:Signal-v0", "eval_every": 1000, "total_steps": 60, "run_dir": "run"}
    number = signal.Signals[row[0]]
    signal.signal(number, lambda *_: pytest.fail("the script has not set a handler"))
    monkeypatch.setenv("TINY_SIGNAL", str(int(number)))
    assert run(name, **shape).code == 128 + number
    assert checkpoint("run")["step"] == 33
    assert_finite(checkpoint("run"))
    monkeypatch.delenv("TINY_SIGNAL")
    assert run(name, resume="run").code == 0
    assert checkpoint("run")["step"] == 60


def test_signal_between_two_steps_is_saved_too(monkeypatch):
    """It comes after step 30 was found in no need of a save: the run makes one more step, and saves that."""
    script = SCRIPTS["sac_iterative"]

    class Bar(script.tqdm):
        def update(self, n=1):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 30:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "tqdm", Bar)
    assert run("sac_iterative", env_id="tiny_envs:Counter-v0", run_dir="run").code == 128 + signal.SIGTERM
    assert checkpoint("run")["step"] == 31


@every_script
def test_evaluation_that_never_ends(name, monkeypatch):
    """A task without an end is cut off at --max-eval-steps, and by a signal, which leaves no half evaluation behind."""
    shape = {"env_id": "tiny_envs:Endless-v0", "max_eval_steps": 15}
    assert run(name, **shape, run_dir="run").code == 0
    assert {value for _, _, metric, value in metrics("run") if metric == "eval/length"} == {"15"}
    monkeypatch.setenv("TINY_SIGNAL", str(int(signal.SIGINT)))  # in the environments' step 33: training makes 20
    assert run(name, **shape | {"max_eval_steps": 10**9}, run_dir="stopped").code == 130
    assert checkpoint("stopped")["step"] == 20
    assert not any(metric.startswith("eval/") for _, _, metric, _ in metrics("stopped"))


def test_a_process_whose_terminal_and_output_are_gone(tmp_path):
    """nohup's SIGHUP is ignored, and the pipe that takes the output is closed after a line: the run goes on to its end."""
    shape = known("beta_vmbpo", SIZES) | {"env_id": "tiny_envs:Signal-v0", "run_dir": "run"}
    command = shlex.join([sys.executable, str(ROOT / "beta_vmbpo.py"), *flags(**shape)])
    result = subprocess_run([], tmp_path, shell=f"(trap '' HUP; {command}; echo $? > code) 2>&1 | head -1",
                            TINY_SIGNAL=str(int(signal.SIGHUP)))
    assert result.stdout.startswith("run: tiny_envs:Signal-v0") and result.stderr == ""
    assert checkpoint("run")["step"] == 40


def test_a_process_without_stderr(tmp_path):
    shape = known("sac_iterative", SIZES) | {"env_id": "tiny_envs:Counter-v0", "run_dir": "run"}
    command = shlex.join([sys.executable, str(ROOT / "sac_iterative.py"), *flags(**shape)])
    assert subprocess_run([], tmp_path, shell=f"{command} 2>&-").returncode == 0 and checkpoint("run")["step"] == 40


KILL = """
import importlib.util, io, os, signal, sys
import torch
spec = importlib.util.spec_from_file_location({name!r}, {path!r})
script = importlib.util.module_from_spec(spec)
sys.modules[{name!r}] = script
spec.loader.exec_module(script)
save, replace, saves = torch.save, os.replace, []

def killed_save(state, path):
    saves.append(path)
    if len(saves) == 2 and {where!r} == "write":
        whole = io.BytesIO()
        save(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: whole.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)

def killed_replace(source, target):
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

torch.save, os.replace = killed_save, killed_replace
script.main({argv!r})
"""


@pytest.mark.parametrize("name, where", [("beta_vmbpo", "write"), ("sac_iterative", "replace")])
def test_kill_during_a_save_leaves_the_last_checkpoint(name, where, tmp_path):
    shape = SIZES | {"env_id": "tiny_envs:Counter-v0", "save_every": 25, "total_steps": 60, "run_dir": "run"}
    argv = flags(**known(name, shape))
    program = KILL.format(name=name, path=str(ROOT / f"{PATHS[name]}.py"), argv=argv, where=where)
    result = subprocess_run(["-c", program], tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert checkpoint("run")["step"] == 25
    assert any(step > 25 for step, *_ in metrics("run"))
    assert run(name, resume="run").code == 0
    assert run(name, env_id="tiny_envs:Counter-v0", save_every=25, total_steps=60, run_dir="whole").code == 0
    assert_same(checkpoint("run"), checkpoint("whole"))
    assert metrics("run") == metrics("whole")


# Refusals


def refusal(name, argv, capsys, tmp_path, code=2):
    """The one line on stderr with which a command is refused; nothing is written meanwhile."""
    before = files(tmp_path)
    capsys.readouterr()
    assert exit_code(name, argv) == code
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"{name}.py: error: ") and output.out == ""
    assert files(tmp_path) == before
    return line


REFUSED = [  # flags, what the line must contain
    ("--env-id HalfCheeta-v4", "--env-id HalfCheeta-v4", "HalfCheetah"),
    ("--env-id tiny_envs:Nothing-v0", "--env-id tiny_envs:Nothing-v0"),
    ("--env-id no_such_module:Counter-v0", "--env-id no_such_module:Counter-v0"),
    ("--env-id dm_control/nothing-v0", "--env-id dm_control/nothing-v0"),
    ("--env-id CartPole-v1", "--env-id CartPole-v1", "Discrete"),
    ("--env-id tiny_envs:Unbounded-v0", "--env-id tiny_envs:Unbounded-v0", "bounds"),
    ("--env-id tiny_envs:Integer-v0", "--env-id tiny_envs:Integer-v0", "floats"),
    ("--env-id tiny_envs:Degenerate-v0", "--env-id tiny_envs:Degenerate-v0", "bounds"),
    ("--env-id tiny_envs:Scalar-v0", "--env-id tiny_envs:Scalar-v0", "vector"),
    ("--env-id tiny_envs:Image-v0", "--buffer-size", "GB"),
    ("--env-id tiny_envs:Sequence-v0", "--env-id tiny_envs:Sequence-v0", "flattened"),
    ("--buffer-size 16000000 --trials 1000", "--buffer-size", "GB"),
    ("--buffer-size 17000000", "--buffer-size 17000000", "1.67772e+07"),
    ("--hidden-dim 1000000", "GB"),
    ("--model-dim 1000000", "GB"),
    ("--batch-size 1000000000", "GB"),
    ("--learning-rate inf", "--learning-rate inf", "1e-12", "1e+09"),
    ("--model-learning-rate inf", "--model-learning-rate inf"),
    ("--kl-budget inf", "--kl-budget inf"),
    ("--kl-budget nan", "--kl-budget nan"),
    ("--kl-budget 0", "--kl-budget 0"),
    ("--beta-lr 0", "--beta-lr 0"),
    ("--target-entropy inf", "--target-entropy inf"),
    ("--target-entropy 0.7", "--target-entropy 0.7", "below 0.693"),
    ("--variance-weight nan", "--variance-weight nan"),
    ("--max-eval-steps 0", "--max-eval-steps 0"),
    ("--wandb online", "--wandb online"),
    ("--horizon-until 5", "--horizon-until 5", "no effect"),
    ("--entropy none --target-entropy -1", "--target-entropy -1", "no effect"),
    ("--entropy critic --target-entropy -1", "--target-entropy -1", "no effect"),
    ("--batch-size 0", "--batch-size 0", "1"),
    ("--window-length 1", "--window-length 1", "2"),
    ("--trials 0", "--trials 0", "1"),
    ("--seed -1", "--seed -1", "0"),
    ("--hidden-dim 0", "--hidden-dim 0"),
    ("--ensemble-size 0", "--ensemble-size 0"),
    ("--num-elites 0", "--num-elites 0"),
    ("--model-dim -5", "--model-dim -5"),
    ("--model-layers 0", "--model-layers 0"),
    ("--updates-per-step 0", "--updates-per-step 0"),
    ("--buffer-size 0", "--buffer-size 0"),
    ("--model-buffer-size 0", "--model-buffer-size 0"),
    ("--rollouts 0", "--rollouts 0"),
    ("--horizon 0", "--horizon 0"),
    ("--fit-every 0", "--fit-every 0"),
    ("--max-batches 0", "--max-batches 0"),
    ("--log-every 0", "--log-every 0"),
    ("--eval-every 0", "--eval-every 0"),
    ("--eval-episodes 0", "--eval-episodes 0"),
    ("--save-every 0", "--save-every 0"),
    ("--total-steps 0", "--total-steps 0"),
    ("--learning-starts 0", "--learning-starts 0"),
    ("--gamma 1.5", "--gamma 1.5", "0", "1"),
    ("--gamma nan", "--gamma nan"),
    ("--tau -0.1", "--tau -0.1"),
    ("--real-ratio 1.5", "--real-ratio 1.5"),
    ("--learning-rate 0", "--learning-rate 0"),
    ("--model-learning-rate nan", "--model-learning-rate nan"),
    ("--target-entropy nan", "--target-entropy nan"),
    ("--total-steps 500 --learning-starts 600", "--total-steps", "--learning-starts"),
    ("--num-elites 8", "--num-elites", "--ensemble-size"),
    ("--rollouts 500000", "--rollouts", "--model-buffer-size"),
    ("--rollouts 4", "--num-elites 5", "--rollouts"),
    ("--horizon 5", "--rollouts 100000", "--horizon"),
    ("--imagine-every 0", "--imagine-every 0"),
    ("--horizon 4 --horizon-from 7000", "--horizon-until", "--horizon-from"),
    ("--horizon 4 --horizon-from 7000 --horizon-until 6999", "--horizon-until", "--horizon-from"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device nonsense", "--device nonsense"),
    ("--device meta", "--device meta"),
    ("--termination-fn nonsense", "--termination-fn nonsense"),
    ("--termination-fn math", "--termination-fn math"),
    ("--termination-fn math:nothing", "--termination-fn math:nothing"),
    ("--termination-fn math:pi", "--termination-fn math:pi"),
    ("--termination-fn tiny_envs:ends_in_numpy", "--termination-fn tiny_envs:ends_in_numpy"),
    ("--termination-fn tiny_envs:ends_by_state", "--termination-fn tiny_envs:ends_by_state"),
    ("--env-id tiny_envs:FailingReset-v0", "--env-id tiny_envs:FailingReset-v0", "no simulator"),
    ("--env-id tiny_envs:OldStep-v0", "--env-id tiny_envs:OldStep-v0"),
    ("--capture-video", "--capture-video", "--evaluate"),
    ("--resume nowhere", "nowhere/args.json"),
    ("--evaluate nowhere", "nowhere/args.json"),
]


@one_script_each("row", REFUSED)
def test_refused(name, row, capsys, tmp_path, monkeypatch):
    for variable in ("HOME", "WANDB_API_KEY", "NETRC"):
        monkeypatch.setenv(variable, "")
    command, *parts = row
    default = [] if "--env-id" in command else ["--env-id", "Pendulum-v1"]
    line = refusal(name, default + command.split(), capsys, tmp_path)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_an_unset_variable_starts_no_run(flag, capsys, tmp_path):
    assert f"{flag}: its value is empty" in refusal("sac_iterative", ["--seed", "2", flag, ""], capsys, tmp_path)


def test_a_curve_that_cannot_be_drawn_ends_no_run():
    shape = {"env_id": "tiny_envs:Counter-v0", "save_every": 25, "run_dir": "run"}
    assert run("sac_iterative", total_steps=50, **shape).code == 0
    Path("run/curve.png").unlink()
    Path("run/curve.png").mkdir()
    assert run("sac_iterative", resume="run", total_steps=75).code == 0
    assert checkpoint("run")["step"] == 75 and not Path("run/curve.tmp").exists()


@pytest.mark.parametrize("name, command", [("beta_vmbpo", "--beta 0"), ("vmbpo", "--beta 0"), ("beta_vmbpo", "--beta -1"),
                                           ("beta_vmbpo", "--beta nan"), ("vmbpo", "--beta nan"),
                                           ("vmbpo", "--beta inf --log-ratio-in-critic"),
                                           ("beta_vmbpo", "--beta inf --log-ratio-in-critic")])
def test_beta_refused(name, command, capsys, tmp_path):
    assert " ".join(command.split()[:2]) in refusal(name, command.split(), capsys, tmp_path)


@model_based
def test_infinite_beta_is_allowed_where_there_is_one(name):
    """∞ is MBPO, as the flag's help says; rows of metrics before the first update do not stop the run."""
    beta = {} if name == "mbpo" else {"beta": "inf"}
    item = run(name, env_id="tiny_envs:Counter-v0", **beta, run_dir="run")
    assert item.code == 0
    assert_finite(checkpoint("run")["agent"])


@every_script
def test_run_directory_that_exists_is_refused(name, capsys, tmp_path):
    (tmp_path / "taken").mkdir()
    assert "--run-dir taken" in refusal(name, ["--env-id", "Pendulum-v1", "--run-dir", "taken"], capsys, tmp_path)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@every_script
def test_run_of_another_script_is_refused(name, flag, finished, copy_of, capsys, tmp_path):
    for other in SCRIPTS.keys() - {name}:
        folder = copy_of(other)
        assert str(folder) in refusal(name, [flag, folder], capsys, tmp_path)
        shutil.rmtree(folder)
    folder = copy_of(name)
    shutil.copy(f"{finished[other].args.run_dir}/checkpoint.pt", folder)
    line = refusal(name, [flag, folder], capsys, tmp_path)
    assert str(folder) in line and f"{other}.py" in line


@every_script
def test_checkpoint_of_another_environment_is_refused(name, copy_of, capsys, tmp_path):
    folder = copy_of(name)
    line = refusal(name, ["--resume", folder, "--env-id", "Pendulum-v1"], capsys, tmp_path)
    assert "--env-id" in line and "InvertedPendulum-v4" in line
    text = (folder / "args.json").read_text()
    (folder / "args.json").write_text(text.replace("InvertedPendulum-v4", "InvertedDoublePendulum-v4"))
    assert "InvertedPendulum-v4" in refusal(name, ["--resume", folder], capsys, tmp_path)


def test_resume_and_evaluate_together_are_refused(copy_of, capsys, tmp_path):
    folder = copy_of("vmbpo")
    argv = ["--evaluate", folder, "--resume", folder, "--total-steps", 60]
    assert "not together with --resume" in refusal("vmbpo", argv, capsys, tmp_path)


@every_script
def test_resume_refuses_changed_sizes(name, copy_of, capsys, tmp_path):
    folder = copy_of(name)
    for flag, value, saved in (("--hidden-dim", 32, "16"), ("--trials", 1, "2"), ("--gamma", 0.5, "0.99")):
        line = refusal(name, ["--resume", folder, flag, value], capsys, tmp_path)
        assert flag in line and saved in line
    assert "--total-steps" in refusal(name, ["--resume", folder, "--total-steps", 10], capsys, tmp_path)


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


def overwritten(text):
    half = len(text) // 2
    return text[:half] + "overwritten" + text[half + 11 :]


EDITS = [  # file, what is done to its text, what the line must contain
    ("args.json", lambda text: "{", "args.json"),
    ("args.json", replaced('"hidden_dim": 16', '"hidden_dim": 17'), "checkpoint.pt", "actor.layers.0.weight"),
    ("args.json", replaced('"hidden_dim": 16', '"hidden_dim": -1'), "args.json", "hidden_dim -1"),
    ("args.json", replaced('"hidden_dim": 16', '"hidden_dim": "x"'), "args.json", "hidden_dim x", "int"),
    ("args.json", replaced('"gamma": 0.', '"gamma": "x", "other": 0.'), "args.json", "other"),
    ("args.json", replaced('"tau": 0.005', '"tau": "x"'), "args.json", "tau x", "float"),
    ("args.json", replaced('"hidden_dim": 16,', ""), "args.json", "hidden_dim"),
    ("metrics.csv", replaced("\n20,0,", "\n20,zero,"), "metrics.csv", "zero"),
    ("metrics.csv", replaced("\n20,0,", "\n20,0,\udcff"), "metrics.csv"),
    ("metrics.csv", replaced("\n20,0,", "\n20,0\n"), "metrics.csv"),
    ("checkpoint.pt", lambda text: text[: len(text) // 2], "checkpoint.pt"),
    ("checkpoint.pt", overwritten, "checkpoint.pt", "damaged"),
    ("checkpoint.pt", lambda text: "", "checkpoint.pt"),
    ("args.json", replaced('"matmul_precision": "', '"matmul_precision": "x'), "matmul_precision x", "highest, high, medium"),
    ("args.json", replaced('"target_entropy": null', '"target_entropy": "x"'), "target_entropy x", "float | None"),
]


@one_script_each("row", EDITS)
def test_damaged_run_is_refused(name, row, copy_of, capsys, tmp_path):
    folder, (file, edit, *parts) = copy_of(name), row
    path = folder / file
    text = edit(path.read_bytes().decode("latin-1" if file == "checkpoint.pt" else "utf-8"))
    path.write_bytes(text.encode("latin-1" if file == "checkpoint.pt" else "utf-8", "surrogateescape"))
    line = refusal(name, ["--resume", folder, "--total-steps", 60], capsys, tmp_path)
    assert str(folder) in line and all(part in line for part in parts), line


@pytest.mark.parametrize("key", ["agent", "opts", "buffers", "rng", "step", "script"])
def test_checkpoint_without_a_key_is_refused(key, copy_of, capsys, tmp_path):
    folder = copy_of("beta_vmbpo")
    state = checkpoint(folder)
    del state[key]
    torch.save(state, folder / "checkpoint.pt")
    assert f"KeyError: '{key}'" in refusal("beta_vmbpo", ["--resume", folder, "--total-steps", 60], capsys, tmp_path)


@pytest.mark.parametrize("key", ["opts.actor", "buffers"])
def test_checkpoint_of_other_shapes_is_refused(key, copy_of, capsys, tmp_path):
    folder = copy_of("sac_iterative")
    state = checkpoint(folder)
    if key == "buffers":
        state["buffers"][0]["storage"] = state["buffers"][0]["storage"][..., 1:]
    else:
        state["opts"]["actor"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, folder / "checkpoint.pt")
    line = refusal("sac_iterative", ["--resume", folder, "--total-steps", 60], capsys, tmp_path)
    assert f"{folder}/checkpoint.pt: " in line and (key in line or "size" in line)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@every_script
def test_directory_without_a_run_is_refused(name, flag, copy_of, capsys, tmp_path):
    folder = copy_of(name)
    (folder / "checkpoint.pt").unlink()  # a run that was killed before its first save
    assert str(folder) in refusal(name, [flag, folder, "--total-steps", 60], capsys, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty/args.json" in refusal(name, [flag, "empty"], capsys, tmp_path)


# What the system refuses


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@one_script_each("row", [(OSError(28, "No space left on device"),), (RuntimeError("basic_ios::clear: iostream error"),)])
def test_disk_that_is_full_at_a_save(name, row, capsys, monkeypatch, tmp_path):
    """One line, exit code 1, the checkpoint before it whole and nothing half written beside it."""
    save, saved = torch.save, []

    def failing(state, path):
        if saved:
            Path(path).write_text("half")
            raise row[0]
        saved.append(save(state, path))

    monkeypatch.setattr(torch, "save", failing)
    assert run(name, env_id="tiny_envs:Counter-v0", save_every=25, run_dir="run").code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(row[0]) in line and "disk full" in line and checkpoint("run")["step"] == 25
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("method", ["mkdir", "write_text"])
def test_directory_that_cannot_be_written(method, copy_of, capsys, tmp_path, monkeypatch):
    """At the start, and when a finished run is resumed: its files stay as they were."""
    folder = copy_of("beta_vmbpo")
    before = files(folder)
    monkeypatch.setattr(Path, method, no_space)
    new = ["--env-id", "Pendulum-v1", "--run-dir", tmp_path / "new", *flags(**known("beta_vmbpo", SIZES))]
    for argv in (new, ["--resume", folder, "--total-steps", 60])[: 1 if method == "mkdir" else 2]:
        assert exit_code("beta_vmbpo", argv) == (0 if argv is not new and method == "mkdir" else 1)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("beta_vmbpo.py: error: ") and "No space left on device" in line
    assert files(folder) == before


def test_directory_that_cannot_be_looked_at(capsys, tmp_path):
    """Its name is too long; so it is with another user's directory."""
    argv = ["--env-id", "Pendulum-v1", "--run-dir", "x" * 300]
    assert "OSError: [Errno 36]" in refusal("beta_vmbpo", argv, capsys, tmp_path, code=1)


def test_a_mistake_in_the_code_keeps_its_trace(monkeypatch):
    """Only what the system raises becomes a line: someone who changes a script wants to see where it failed."""
    monkeypatch.setattr(SCRIPTS["beta_vmbpo"].Agent, "learn", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run("beta_vmbpo", env_id="tiny_envs:Counter-v0", run_dir="run")


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_where_the_processor_has_it(able, monkeypatch):
    """Elsewhere it would be slower than float32; a run saves what it took."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert run("sac_iterative", env_id="tiny_envs:Counter-v0", run_dir="run").code == 0
    saved = json.loads(Path("run/args.json").read_text())
    assert saved["matmul_precision"] == ("medium" if able else "highest")


def test_memory_that_is_full_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(SCRIPTS["beta_vmbpo"].Agent, "learn", lambda *_: torch.empty(2**60))
    assert run("beta_vmbpo", env_id="tiny_envs:Counter-v0", run_dir="run").code == 1
    assert "allocate memory" in capsys.readouterr().err.splitlines()[-1]


def test_module_in_the_current_directory(tmp_path):
    """Where the script lies elsewhere."""
    (tmp_path / "my_task.py").write_text((ROOT / "tests" / "tiny_envs.py").read_text())
    shape = known("beta_vmbpo", SIZES) | {"env_id": "my_task:Counter-v0", "total_steps": 20, "run_dir": "run"}
    result = subprocess_run([ROOT / "beta_vmbpo.py", *flags(**shape)], tmp_path, PYTHONPATH="")
    assert result.returncode == 0, result.stderr


@every_script
def test_unknown_flags_and_types_exit_with_2(name, capsys):
    for argv in (["--no-such-flag", "1"], ["--trials", "two"], ["--wandb", "cloud"], ["--total-steps", "1e5"]):
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[name].parse_args(argv)
        assert stop.value.code == 2
        assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vmbpo"])
def test_refusal_of_a_process_is_one_line(name, tmp_path):
    result = subprocess_run([ROOT / f"{PATHS[name]}.py", "--env-id", "tiny_envs:Unbounded-v0"], tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{name}.py: error: --env-id tiny_envs:Unbounded-v0: ")
    assert not [*tmp_path.iterdir()]


# Numbers that are not finite


@one_script_each("row", [("NanObservation-v0", 33, "observation"), ("NanReward-v0", 33, "reward"),
                         ("HugeReward-v0", 33, "reward"), ("InfFinalObservation-v0", 31, "observation"),
                         ("NanResetObservation-v0", 15, "observation")])
def test_environment_that_is_not_finite_stops_the_run(name, row, capsys):
    """Episodes end at 7, 15, 23, 31; at step 15 only the first state of the next one is wrong. 1e39 is no float32."""
    env_id, step, tensor = row
    shape = {"save_every": 8, "eval_every": 1000, "total_steps": 60, "env_id": f"tiny_envs:{env_id}", "run_dir": "run"}
    assert run(name, **shape).code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"step {step}" in line and tensor in line
    assert checkpoint("run")["step"] == step // 8 * 8
    assert_finite(checkpoint("run"))


@one_script_each("row", [("critic",), ("actor",), ("critic",), ("critic",), ("actor",)])
def test_parameter_that_is_not_finite_stops_the_run(name, row, capsys, monkeypatch):
    """Nothing that came after the fault at step 35 replaces the last good checkpoint."""
    learn, calls = SCRIPTS[name].Agent.learn, []

    def poison(agent, *args):
        result = learn(agent, *args)
        calls.append(1)
        if len(calls) == 16:  # the first call is at step 20
            getattr(agent, row[0]).layers[1].bias.data.flatten()[3] = math.nan
        return result

    monkeypatch.setattr(SCRIPTS[name].Agent, "learn", poison)
    shape = {"save_every": 18, "eval_every": 1000, "total_steps": 60, "env_id": "tiny_envs:Counter-v0", "run_dir": "run"}
    assert run(name, **shape).code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(r"step 3[67]: .*(action|actor|critic|alpha)", line)
    assert checkpoint("run")["step"] == 18
    assert_finite(checkpoint("run"))


# Evaluation


@pytest.mark.parametrize("name", [*MODEL_BASED, "sac_iterative"])
def test_evaluate_prints_the_returns_of_the_saved_agent(name, finished, copy_of, capsys):
    """Against a plain loop over one environment at a time."""
    folder, agent = copy_of(name), finished[name].agent
    mean_of = agent.actor if name in MODEL_BASED else lambda obs: agent.infer(obs, agent.quantiles)[0][-1].unbind(-2)
    before, returns = files(folder), np.zeros((2, 3))
    env = gym.make("InvertedPendulum-v4")
    for i in range(6):
        obs, over = env.reset(seed=1 + 10**9 + i)[0], False
        while not over:
            with torch.no_grad():
                mean = mean_of(torch.as_tensor(obs, dtype=torch.float32).expand(2, 1, 4))[0][i // 3, 0]
            obs, reward, terminated, truncated, _ = env.step(3 * mean.tanh().numpy())  # its bounds are ±3
            returns[i // 3, i % 3], over = returns[i // 3, i % 3] + reward, terminated or truncated
    output = []
    for _ in range(2):
        capsys.readouterr()
        assert run(name, evaluate=folder, eval_episodes=3).code == 0
        output.append(capsys.readouterr().out)
    assert output[0] == output[1]
    lines = [line for line in output[0].splitlines() if "eval/return " in line]
    assert len(lines) == 2
    for trial, line in enumerate(lines):
        assert f"trial {trial}" in line and "step 40" in line and "3 episodes" in line
        assert f"eval/return {returns[trial].mean():.1f}" in line and f"{returns[trial].std():.1f}" in line
    assert files(folder) == before


@pytest.mark.parametrize("env_id", ["tiny_envs:Counter-v0", "tiny_envs:Dictionary-v0"])
@every_script
def test_evaluate_in_an_environment_of_ones_own(name, env_id, capsys):
    run(name, env_id=env_id, total_steps=20, run_dir="run")
    capsys.readouterr()
    assert run(name, evaluate="run", eval_episodes=4).code == 0
    output = capsys.readouterr().out
    assert env_id in output and "eval/return 28.0 ± 0.0 over 4 episodes" in output  # 1 + 2 + ... + 7
    discounted = sum(reward * 0.99 ** (reward - 1) for reward in range(1, 8))
    assert f"eval/discounted_return {discounted:.1f}" in output and "eval/length 7.0" in output


@every_script
def test_capture_video_writes_an_mp4(name, tmp_path, capsys):
    from moviepy import VideoFileClip

    run(name, env_id="tiny_envs:Counter-v0", trials=2, total_steps=20, run_dir="run")
    assert run(name, "--capture-video", evaluate="run").code == 0
    (video,) = (tmp_path / "run" / "videos").glob("*.mp4")
    assert "step-20" in video.name
    with VideoFileClip(str(video)) as clip:
        assert clip.fps == 10 and 7 <= clip.n_frames <= 8
        brightness = [frame.mean() for frame in clip.iter_frames()]
    assert np.all(np.diff(brightness[:6]) > 5)  # the counter's frames grow brighter


@one_script_each("row", [("Counter-v0", "moviepy", "moviepy"), ("NoRenderer-v0", "none", "render_mode"),
                         ("NeedsPackage-v0", "none", "pip install something"), ("NoPicture-v0", "none", "shape")])
def test_capture_video_says_what_is_missing(name, row, capsys, tmp_path, monkeypatch):
    env_id, missing, said = row
    run(name, env_id=f"tiny_envs:{env_id}", total_steps=20, run_dir="run")
    monkeypatch.setitem(sys.modules, missing, None)
    line = refusal(name, ["--evaluate", "run", "--capture-video"], capsys, tmp_path)
    assert f"--env-id tiny_envs:{env_id} --capture-video: " in line and said in line


# What the optional packages add


def test_dm_control(tmp_path):
    import shimmy  # noqa: F401  (of the optional requirements; without it this test fails)

    item = run("beta_vmbpo", env_id="dm_control/cartpole-swingup-v0", total_steps=30, run_dir="run", eval_every=1000)
    assert item.code == 0 and item.agent.obs_dim == 5
    rows = checkpoint("run")["buffers"][0]["storage"][0]
    obs, action, reward, next_obs, terminated = rows.split((5, 1, 1, 5, 1), -1)
    torch.testing.assert_close(obs[:, 1:3].norm(dim=-1), torch.ones(30))  # cosine and sine of the pole
    assert torch.equal(obs[1:], next_obs[:-1]) and not terminated.any()
    assert reward.min() >= 0 and reward.max() <= 1


def test_wandb_offline_needs_no_account(tmp_path):
    shape = known("beta_vmbpo", SIZES) | {"env_id": "tiny_envs:Counter-v0", "total_steps": 20}
    shape |= {"run_dir": tmp_path / "run", "wandb": "offline"}
    home = {name: str(tmp_path / "home") for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    home |= {"WANDB_API_KEY": "", "WANDB_SILENT": "true"}
    result = subprocess_run([ROOT / "beta_vmbpo.py", *flags(**shape)], tmp_path, **home)
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"eval/return" in record.read_bytes()
    assert checkpoint("run")["step"] == 20
