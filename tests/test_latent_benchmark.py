"""benchmarks/latent.py against computations made another way, and how it skips, resumes and refuses runs."""

import csv
import fcntl
import json
import math
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script

VEM, LATENT = load_script("active_vem"), load_script("benchmarks/latent")
TRAINED, OTHERS = [*LATENT.SETTINGS], ["planning", "velocity", "bound", "speed"]


class Done:
    """A process that ended."""

    def __init__(self, code=0):
        self.returncode = code

    def poll(self):
        return self.returncode

    def terminate(self):
        pass

    wait = terminate


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Empty folders for tables and figures, and runs of the script within this process."""
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(LATENT, "HERE", tmp_path)
    monkeypatch.setattr(LATENT, "launch", lambda flags, log: Done(VEM.main(VEM.parse_args(flags))))
    return tmp_path


def made_up_run(run, flags=(), step=100, rows=()):
    """What a finished run leaves, without running it."""
    run.mkdir(parents=True, exist_ok=True)
    args = VEM.parse_args([*flags])
    (run / "args.json").write_text(json.dumps(vars(args)))
    lines = [f"{step},{trial},{metric},{value}" for step, trial, metric, value in rows]
    (run / "metrics.csv").write_text("\n".join(["step,trial,metric,value", *lines, ""]))
    torch.save({"step": step}, run / "checkpoint.pt")


# --- LQG


def matrices():
    """Dynamics and costs of the task's own class, measured by stepping it."""
    env = VEM.DoubleIntegrator()

    def step(position, velocity, action):
        env.reset(seed=0)
        env.position, env.velocity = position, velocity
        reward = env.step(np.array([action]))[1]
        return np.array([env.position, env.velocity]), -reward

    (p, cp), (v, cv), (u, cu) = step(1, 0, 0), step(0, 1, 0), step(0, 0, 1)
    return np.stack([p, v], 1), u[:, None], np.diag([cp, cv]), cu


def test_lqr_is_the_least_squares_solution_over_all_actions_at_once():
    a, b, cost, price = matrices()
    gains, _, lqr, _ = LATENT.lqg()
    steps = len(gains)
    power = [np.linalg.matrix_power(a, t) for t in range(steps)]
    free = np.concatenate(power)  # states over time from the start and from the actions
    push = lambda t, k: power[t - 1 - k] @ b if k < t else np.zeros((2, 1))
    forced = np.block([[push(t, k) for k in range(steps)] for t in range(steps)])
    weight = np.kron(np.eye(steps), cost)
    hessian = price * np.eye(steps) + forced.T @ weight @ forced
    cross = forced.T @ weight @ free
    np.testing.assert_allclose(-np.linalg.solve(hessian, cross)[0], -gains[0][0], rtol=1e-9)
    value = free.T @ weight @ free - cross.T @ np.linalg.solve(hessian, cross)
    assert lqr == pytest.approx(-np.trace(value @ np.diag(np.square(VEM.DoubleIntegrator.start))), rel=1e-9)


def test_lqg_return_is_that_of_the_joint_covariance_of_state_and_estimate():
    a, b, cost, price = matrices()
    gains, kalman, lqr, lqg = LATENT.lqg()
    joint, total = np.zeros((4, 4)), 0.0  # of the state and of its estimate
    joint[:2, :2] = np.diag(np.square(VEM.DoubleIntegrator.start))
    c, eye, none = np.array([[1.0, 0.0]]), np.eye(2), np.zeros((2, 2))
    for gain, k in zip(gains, kalman):
        seen = np.block([[eye, none], [k @ c, eye - k @ c]])
        joint = seen @ joint @ seen.T
        joint[2:, 2:] += VEM.DoubleIntegrator.noise**2 * k @ k.T
        total += np.trace(cost @ joint[:2, :2]) + price * float((gain @ joint[2:, 2:] @ gain.T)[0, 0])
        moved = np.block([[a, -b @ gain], [none, a - b @ gain]])
        joint = moved @ joint @ moved.T
    assert lqg == pytest.approx(-total, rel=1e-9) and lqg < lqr


def test_simulated_controllers_against_brute_force():
    """Many episodes at once by other code, with the same draws: the same returns, and the known numbers."""
    gains, kalman = LATENT.lqg()[:2]

    def returns(controller, start, noise):
        x, estimate, total = start.copy(), np.zeros_like(start), 0.0
        for t, (gain, k) in enumerate(zip(gains, kalman)):
            seen = (x[:, 0] + 0.05 * noise[:, t]).astype(np.float32)
            estimate = estimate + (seen - estimate[:, 0])[:, None] * k[:, 0]
            state = {"LQR": x, "LQG": estimate}.get(controller, 0 * x)
            u = rng.uniform(-1, 1, len(x)) if controller == "random" else np.clip(-(state @ gain[0]), -1, 1)
            total = total - (x[:, 0] ** 2 + 0.1 * x[:, 1] ** 2 + 0.05 * u**2)
            push = lambda s: np.stack([s[:, 0] + 0.2 * s[:, 1] + 0.08 * u, s[:, 1] + 0.8 * u], 1)
            x, estimate = push(x), push(estimate)
            wall = np.abs(x[:, 0]) > 5
            x[wall] = np.stack([5 * np.sign(x[wall, 0]), 0 * x[wall, 0]], 1)
        return total

    streams = [gym.utils.seeding.np_random(seed)[0] for seed in range(40)]
    start, noise = (np.stack(x) for x in zip(*[(rng.normal(0, (1.0, 0.5)), rng.normal(size=50)) for rng in streams]))
    rng = np.random.default_rng(0)
    many = rng.normal(0, (1.0, 0.5), (200_000, 2)), rng.normal(size=(200_000, 50))
    for controller, known in {"LQR": -3.73, "LQG": -3.87, "zero action": -323}.items():
        np.testing.assert_allclose(LATENT.simulate(controller, range(40)), returns(controller, start, noise), rtol=1e-4)
        assert returns(controller, *many).mean() == pytest.approx(known, rel=0.012)
    drawn = LATENT.simulate("random", range(500))
    assert abs(drawn.mean() - returns("random", *many).mean()) < 3 * drawn.std() / 500**0.5


# --- inside an agent


def tape_of(latent, velocity, alive):
    widen = lambda x: torch.as_tensor(x, dtype=torch.float32)[None]
    return {"latent": widen(latent), "velocity": widen(velocity), "alive": widen(alive)}


def test_readout_of_a_latent_that_contains_the_velocity_and_of_noise():
    rng = np.random.default_rng(0)
    velocity, noise = rng.normal(size=(30, 40, 2)), rng.normal(size=(30, 40, 8))
    alive = (np.arange(30)[:, None] < rng.integers(5, 31, 40))[..., None]
    exact = noise.copy()
    exact[..., :2] = velocity @ np.array([[1.0, 2.0], [-1.0, 0.5]]) + 3
    exact = np.where(alive, exact, 100 * noise)  # after the end and before the second observation there is no velocity
    exact[0] = noise[0]
    r2, episodes = LATENT.decode_velocity(tape_of(exact, velocity, alive), 0)
    assert r2 == pytest.approx(1, abs=1e-6)
    assert [len(episode) for episode in episodes] == [*(alive[1:, 20:, 0].sum(0))]
    np.testing.assert_allclose(episodes[3], velocity[1 : 1 + len(episodes[3]), 23], atol=1e-3)
    assert abs(LATENT.decode_velocity(tape_of(noise, velocity, alive), 0)[0]) < 0.1
    half = np.concatenate([velocity[..., :1], noise[..., 1:]], -1)
    assert LATENT.decode_velocity(tape_of(half, velocity, alive), 0)[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCarContinuous-v0", "InvertedPendulum-v5", "Hopper-v5"])
def test_true_velocity_is_what_the_mask_hides(env_id):
    env = gym.make(env_id)
    env.reset(seed=0)
    obs = env.step(env.action_space.sample())[0]
    hidden = obs[VEM.POSITIONS[VEM.task_name(env_id)] :]
    np.testing.assert_allclose(LATENT.true_velocity(env.unwrapped), hidden, rtol=1e-5)


def small(**flags):
    small = {"env_id": "DoubleIntegrator-v0", "device": "cpu", "hidden_dim": 16, "model_dim": 16}
    args = VEM.Args(**small | {"trials": 2, "eval_episodes": 3} | flags)
    return VEM.Agent(args, 1, 1), args


def test_recorded_episodes_are_those_of_the_evaluation():
    agent, args = small()
    tape = LATENT.record(agent, args, deterministic=True)
    returns, _ = VEM.evaluate(agent, VEM.make_tasks(args, 6), args, "posterior")
    p, v, u = tape["obs"], tape["velocity"], tape["action"]
    assert p.shape == (2, 50, 3, 1) and tape["alive"].min() == 1
    moving = (p[:, 1:].abs() < 4.8) & (p[:, :-1].abs() < 4.8)  # away from the walls
    torch.testing.assert_close((v[:, 1:] - v[:, :-1])[moving], 0.8 * u[:, :-1][moving])
    last = -(p[:, -1] ** 2 + 0.1 * v[:, -1] ** 2 + 0.05 * u[:, -1] ** 2)[..., 0]  # but for the noise of the position
    np.testing.assert_allclose((tape["reward"].sum(1)[..., 0] + last).numpy(), returns, atol=2)


def test_open_loop_prediction_of_a_linear_model():
    """z' = .9 z + .5 a + N(0, .3²), seen exactly for three steps, then with N(0, .2²), in units of the normalizer."""
    agent, args = small(latent_dim=1, trials=1)
    for name in ("latent_prior", "latent_posterior", "decoder"):
        agent._modules.pop(name)
    agent.latent_posterior = lambda z, a, x: (x[..., :1], torch.full_like(z, -30.0))
    agent.latent_prior = lambda z, a: (0.9 * z + 0.5 * a, torch.full_like(z, math.log(0.3)))
    agent.decoder = lambda z: torch.cat([z, 0 * z, 0 * z], -1)
    agent.log_scale.data.fill_(math.log(0.2))
    agent.percepts.mean[..., 0], agent.percepts.std[..., 0] = 2.0, 3.0
    obs, action = torch.randn(1, 7, 2, 1), torch.randn(1, 7, 2, 1)
    mean, std = LATENT.predict(agent, {"obs": obs, "action": action, "reward": 0 * obs}, 3, 40_000)
    z, variance = (obs[:, 2] - 2) / 3, 0.0
    for t in range(4):
        z, variance = 0.9 * z + 0.5 * action[:, 2 + t], 0.81 * variance + 0.09
        torch.testing.assert_close(mean[:, t], 3 * z + 2, atol=0.05, rtol=0)
        torch.testing.assert_close(std[:, t], torch.full_like(z, 3 * math.sqrt(variance + 0.04)), rtol=0.02, atol=0)


# --- runs


def training(tmp_path, **flags):
    flags = {"experiment": "weight", "runs_dir": str(tmp_path / "runs"), "total_steps": 600, "trials": 1} | flags
    return LATENT.Args(**flags)


def fake(monkeypatch, codes=()):
    """Runs that only leave a checkpoint; returns the flags they were started with and how many were at work at once."""
    started, at_work, most = [], set(), []
    codes = iter(codes)

    class Process(Done):
        def __init__(self, flags, log):
            super().__init__(next(codes, 0))
            at_work.add(log.name)
            most.append(len(at_work))
            started.append(flags)
            self.name, self.polls = log.name, 0
            own = [flag for flag in flags if not flag.startswith(("--resume", "--run-dir"))]
            made_up_run(LATENT.Path(log.name.removesuffix(".log")), own, VEM.parse_args(own).total_steps)

        def poll(self):
            self.polls += 1
            if self.polls > 2:
                at_work.discard(self.name)
            return self.returncode if self.polls > 2 else None

    monkeypatch.setattr(LATENT, "launch", Process)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return started, most


def test_runs_are_skipped_resumed_and_begun_anew(tmp_path, monkeypatch):
    started, most = fake(monkeypatch)
    args, settings = training(tmp_path, jobs=2), LATENT.SETTINGS["weight"]
    runs = LATENT.train(args, settings)
    assert len(started) == 5 and max(most) == 2 and all(any("--run-dir" in flag for flag in flags) for flags in started)
    assert [LATENT.open_args(run).marginal_weight for run in runs.values()] == [0, 0.25, 0.5, 0.75, 1]
    assert LATENT.train(args, settings) == runs and len(started) == 5  # skipped
    torch.save({"step": 300}, LATENT.Path(runs["w = 0"]) / "checkpoint.pt")  # interrupted
    (LATENT.Path(runs["w = 1"]) / "checkpoint.pt").unlink()  # killed before it could save
    assert LATENT.train(args, settings) == runs and len(started) == 7
    resumed, anew = started[5:]
    assert f"--resume={runs['w = 0']}" in resumed and not any("--run-dir" in flag for flag in resumed)
    assert f"--run-dir={runs['w = 1']}" in anew
    assert LATENT.train(training(tmp_path, total_steps=900), settings) == runs and len(started) == 12  # further
    assert LATENT.train(training(tmp_path, trials=2), {"w = 0": ""}) != {"w = 0": runs["w = 0"]}  # not the same run


def test_runs_of_other_flags_and_failures_are_told(tmp_path, monkeypatch, capsys):
    fake(monkeypatch)
    args, settings = training(tmp_path), {"w = 0": ""}
    run = LATENT.Path(LATENT.train(args, settings)["w = 0"])
    saved = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(saved | {"gamma": 0.5}))
    with pytest.raises(SystemExit, match="2"):
        LATENT.train(args, settings)
    assert "--runs-dir" in (text := capsys.readouterr().err) and "gamma" in text and text.count("\n") == 1
    fake(monkeypatch, codes=[0, 3])
    with pytest.raises(SystemExit, match="1"):
        LATENT.train(training(tmp_path, runs_dir="elsewhere"), LATENT.SETTINGS["horizon"])
    assert "exit code 3" in capsys.readouterr().err


def test_waits_for_a_run_that_another_process_trains(tmp_path, monkeypatch):
    """The others go first; what was trained meanwhile is not trained again."""
    started, _ = fake(monkeypatch)
    args, settings, naps = training(tmp_path), LATENT.SETTINGS["rollout"], []
    first = tmp_path / "runs" / LATENT.run_name(VEM.parse_args([*LATENT.DOUBLE.split(), "--trials=1"]))
    first.parent.mkdir()
    other = open(f"{first}.log", "a")
    fcntl.flock(other, fcntl.LOCK_EX)

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 10:
            made_up_run(first, [*LATENT.DOUBLE.split(), "--trials=1"], 600)
            other.close()

    monkeypatch.setattr(time, "sleep", sleep)
    runs = LATENT.train(args, settings)
    assert runs["imagine with prior"] == str(first) and len(started) == 1 and len(naps) >= 10
    assert any("rollout-policy=posterior" in flag for flag in started[0])


def test_real_processes_are_trained_and_resumed(tmp_path):
    """To step 60 and then to step 90, by the script itself."""
    flags = ("--learning-starts=20 --first-updates=1 --hidden-dim=8 --windows=2 --window-length=3 --eval-episodes=1 "
             "--eval-every=30")
    for steps in (60, 90):
        args = training(tmp_path, total_steps=steps, env_flags=flags)
        (run,) = LATENT.train(args, {"memoryless": "--agent=memoryless"}).values()
        assert LATENT.progress(run) == steps
    returns = [row[1] for row in LATENT.read(run, "", {"eval/return"})]
    assert returns == [30, 60, 90]
    assert "steps 60 to 90" in LATENT.Path(f"{run}.log").read_text()


def test_settings_are_accepted_and_share_the_default_run():
    base, names = LATENT.DOUBLE.split(), {}
    for experiment, settings in LATENT.SETTINGS.items():
        flags = LATENT.BASE.get(experiment, LATENT.DOUBLE).split()
        name = lambda more, flags=flags: LATENT.run_name(VEM.parse_args([*flags, *more.split()]))
        names[experiment] = {label: name(more) for label, more in settings.items()}
        assert len({*names[experiment].values()}) == len(settings)
    shared = {"weight": "w = 0", "information": "w_i = 0", "horizon": "H = 3", "rollout": "imagine with prior",
              "prior": "learned p(a)", "double_integrator": "generative"}
    assert {names[experiment][label] for experiment, label in shared.items()} == {LATENT.run_name(VEM.parse_args(base))}
    assert names["information"]["w_i = -0.3"] == "DoubleIntegrator-v0_trials=5_info_weight=-0.3"


# --- tables and figures


def test_thinning_keeps_the_ends_and_the_limit():
    metrics = "eval/return", "model/kl", "policy/kl"
    rows = [(label, step, trial, metric, step / 7) for label in "AB" for step in range(0, 30_001, 100)
            for trial in range(5) for metric in metrics] + [("C", 0, -1, "reference", -3.87)]
    few = LATENT.thin(rows)
    size = sum(len(",".join([*map(str, row[:4]), f"{row[4]:.6g}"])) + 1 for row in few)
    assert 50_000 < size <= LATENT.LIMIT and {*few} <= {*rows} and rows[-1] in few
    for label, metric in [(label, metric) for label in "AB" for metric in metrics]:
        steps = [row[1] for row in few if (row[0], row[3]) == (label, metric)]
        assert {0, 30_000} <= {*steps} and all(steps.count(step) == 5 for step in steps) and len({*steps}) > 40
    assert {*LATENT.thin(rows[:50])} == {*rows[:50]}


def test_bracket_is_likelihood_less_marginal_less_kl(here):
    values = {"model/log_likelihood": 3.0, "model/log_marginal": 2.5, "model/kl": 0.75, "eval/return": -9.0}
    made_up_run(here / "run", rows=[(step, 0, metric, step * x) for step in (1, 2) for metric, x in values.items()])
    rows = LATENT.bound(LATENT.Args(experiment="bound", runs=(str(here / "run"),)))
    assert [(row[1], row[4]) for row in rows if row[3] == "model/bracket"] == [(1, -0.25), (2, -0.5)]


@pytest.mark.parametrize("experiment", [*(name for name in TRAINED if name not in ("information", "prior")), *OTHERS])
def test_quick(here, runs_dir, experiment, capsys, monkeypatch):
    """Each experiment ends, in a table of its own, and draws the same figure again."""
    monkeypatch.setattr(LATENT.VEM, "evaluate", brief(VEM.evaluate))
    flags = {"experiment": experiment, "quick": True, "episodes": 2, "samples": 4}
    assert LATENT.main(LATENT.Args(runs_dir=runs_dir, **flags)) == 0
    name = f"latent_{experiment}_quick"
    rows = [*csv.DictReader((here / f"results/{name}.csv").open())]
    assert [*rows[0]] == ["label", "step", "trial", "metric", "value"]
    assert all(math.isfinite(float(row["value"])) for row in rows)
    metrics, labels = ({row[column] for row in rows} for column in ("metric", "label"))
    if experiment in TRAINED:
        assert {*LATENT.SETTINGS[experiment]} <= labels and {"eval/return", "eval/return_prior"} <= metrics
    expected = {"double_integrator": {"reference"}, "planning": {"return", "ms_per_step", "gap"},
                "velocity": {"velocity/r2", "velocity/r2_sampled", "velocity/true_0", "velocity/decoded_0",
                             "prediction/mean_0"},
                "bound": {"model/bracket", "model/information", "policy/kl"}, "speed": {"ms_per_update"},
                "weight": {"velocity/r2", "model/bracket"}}
    assert expected.get(experiment, set()) <= metrics
    picture = (here / f"figures/{name}.png").read_bytes()
    (here / f"figures/{name}.png").unlink()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.count(": ") and "from step" not in line]
    monkeypatch.setattr(LATENT, "launch", None)
    assert LATENT.main(LATENT.Args(from_csv=True, **flags)) == 0
    assert (here / f"figures/{name}.png").read_bytes() == picture
    assert {*lines} >= {line for line in capsys.readouterr().out.splitlines() if line.count(": ")}


def brief(evaluate):
    """The script's evaluation, in episodes of at most 50 steps."""

    class Cut:
        def __init__(self, envs):
            self.envs, self.num_envs, self.steps = envs, envs.num_envs, 0

        def reset(self, **options):
            return self.envs.reset(**options)

        def step(self, action):
            self.steps += 1
            obs, reward, terminated, truncated, infos = self.envs.step(action)
            return obs, reward, terminated, truncated | (self.steps == 50), infos

    return lambda agent, envs, args, policy: evaluate(agent, Cut(envs), args, policy)


def test_planning_evaluates_each_way_of_acting(here, runs_dir, monkeypatch):
    args = LATENT.Args(experiment="planning", runs_dir=runs_dir, quick=True, episodes=2, plan_iters=(2,))
    seen, evaluate = [], VEM.evaluate

    def watch(agent, envs, args, policy):
        seen.append((policy, agent.args.plan_iters))
        return evaluate(agent, envs, args, policy)

    (run,) = LATENT.given_runs(args).values()
    monkeypatch.setattr(VEM, "evaluate", watch)
    rows = LATENT.planning(args)
    assert seen == [("prior", 0), ("posterior", 0), ("posterior", 2)]
    agent, saved, _ = LATENT.open_run(run, 2)
    returns = evaluate(agent, VEM.make_tasks(saved, 4), saved, "prior")[0].mean(1)
    assert [row[4] for row in rows if row[0] == "generative: p(a)" and row[3] == "return"] == [*returns]
    ms = {row[0]: row[4] for row in rows if row[3] == "ms_per_step"}
    assert ms["generative: q(a) refined × 2"] > ms["generative: q(a)"] > 0


@pytest.mark.parametrize("flags, named", [
    ({"experiment": "velocity", "runs": ("nowhere",)}, "--runs"),
    ({"experiment": "weight", "runs": ("run",)}, "--runs"),
    ({"experiment": "bound", "runs": ("a/run", "b/run")}, "--labels"),
    ({"experiment": "bound", "runs": ("a", "b"), "labels": ("a",)}, "--labels"),
    ({"experiment": "speed", "blocks": 0}, "--blocks"), ({"experiment": "planning", "plan_iters": ()}, "--plan-iters"),
    ({"experiment": "weight", "jobs": 0}, "--jobs"), ({"experiment": "weight", "from_csv": True}, "--from-csv"),
    ({"experiment": "weight", "out": "a/b"}, "--out"), ({"experiment": "weight", "trials": -1}, "--trials"),
    ({"experiment": "weight", "env_flags": "--gamma 2"}, "--gamma"),
], ids=str)
def test_refuses_in_one_line(here, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        LATENT.main(LATENT.Args(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0] and not [*(here / "results").iterdir()]
