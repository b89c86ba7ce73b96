"""benchmarks/latent.py against computations made another way."""

import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from benchmarks import tasks as TASKS
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import common
import latent as LATENT

VEM = load_script("active_vem")


# --- LQG: the best that an agent can do on the double integrator, for comparison with docs/active_vem.md


def lqg():
    """Gains and expected returns of the optimal controllers of the double integrator, were there no limit to its force
    and no walls: Riccati gains (steps, 1, 2), Kalman gains (steps, 2, 1), E[Σ r] of LQR, E[Σ r] of LQG."""
    env = TASKS.DoubleIntegrator
    steps, dt = VEM.gym.spec("DoubleIntegrator-v0").max_episode_steps, env.dt
    a, b = np.array([[1, dt], [0, 1]]), np.array([[dt**2 / 2], [dt]]) * env.force
    cost, price = np.diag([1, 0.1]), 0.05  # of the state and of the action, as in the task's reward
    values, gains = [np.zeros((2, 2))], []  # the state after the last action costs nothing
    for _ in range(steps):
        p = values[0]
        gains.insert(0, np.linalg.solve(price + b.T @ p @ b, b.T @ p @ a))
        values.insert(0, cost + a.T @ p @ a - a.T @ p @ b @ gains[0])
    spread = np.diag(np.square(env.start))
    kalman, lqr = [], -np.trace(values[0] @ spread)
    return_of_lqg = lqr
    for p, gain in zip(values[1:], gains):
        kalman.append(spread[:, :1] / (spread[0, 0] + env.noise**2))
        spread = spread - kalman[-1] @ spread[:1]  # covariance of the state given what has been seen
        return_of_lqg -= np.trace(a.T @ p @ b @ gain @ spread)
        spread = a @ spread @ a.T
    return np.array(gains), np.array(kalman), lqr, return_of_lqg


def simulate(seeds):
    """Returns (seeds,) of LQR and LQG in the script's task itself, with its walls and its force clipped at its limit."""
    gains, kalman = lqg()[:2]
    returns = {"LQR": np.zeros(len(seeds)), "LQG": np.zeros(len(seeds))}
    for controller, earned in returns.items():
        for i, seed in enumerate(seeds):
            env, mean = TASKS.DoubleIntegrator(), np.zeros(2)
            obs, _ = env.reset(seed=int(seed))
            for gain, filter_gain in zip(gains, kalman):
                mean = mean + filter_gain[:, 0] * (obs[0] - mean[0])
                state = mean if controller == "LQG" else np.array([env.position, env.velocity])
                action = np.clip(-gain @ state, -1, 1)
                force = env.force * action[0]
                mean = np.array([mean[0] + env.dt * mean[1] + env.dt**2 / 2 * force, mean[1] + env.dt * force])
                obs, reward, *_ = env.step(action)
                earned[i] += reward
    return returns


def matrices():
    """Dynamics and costs of the task's own class, measured by stepping it."""
    env = TASKS.DoubleIntegrator()

    def step(position, velocity, action):
        env.reset(seed=0)
        env.position, env.velocity = position, velocity
        reward = env.step(np.array([action]))[1]
        return np.array([env.position, env.velocity]), -reward

    (p, cp), (v, cv), (u, cu) = step(1, 0, 0), step(0, 1, 0), step(0, 0, 1)
    return np.stack([p, v], 1), u[:, None], np.diag([cp, cv]), cu


def test_lqr_is_the_least_squares_solution_over_all_actions_at_once():
    a, b, cost, price = matrices()
    gains, _, lqr, _ = lqg()
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
    assert lqr == pytest.approx(-np.trace(value @ np.diag(np.square(TASKS.DoubleIntegrator.start))), rel=1e-9)


def test_lqg_return_is_that_of_the_joint_covariance_of_state_and_estimate():
    a, b, cost, price = matrices()
    gains, kalman, lqr, return_of_lqg = lqg()
    joint, total = np.zeros((4, 4)), 0.0  # of the state and of its estimate
    joint[:2, :2] = np.diag(np.square(TASKS.DoubleIntegrator.start))
    c, eye, none = np.array([[1.0, 0.0]]), np.eye(2), np.zeros((2, 2))
    for gain, k in zip(gains, kalman):
        seen = np.block([[eye, none], [k @ c, eye - k @ c]])
        joint = seen @ joint @ seen.T
        joint[2:, 2:] += TASKS.DoubleIntegrator.noise**2 * k @ k.T
        total += np.trace(cost @ joint[:2, :2]) + price * float((gain @ joint[2:, 2:] @ gain.T)[0, 0])
        moved = np.block([[a, -b @ gain], [none, a - b @ gain]])
        joint = moved @ joint @ moved.T
    assert return_of_lqg == pytest.approx(-total, rel=1e-9) and return_of_lqg < lqr


def test_simulated_controllers_against_brute_force():
    """Many episodes at once by other code, with the same draws: the same returns, and the known numbers."""
    gains, kalman = lqg()[:2]

    def returns(controller, start, noise):
        x, estimate, total = start.copy(), np.zeros_like(start), 0.0
        for t, (gain, k) in enumerate(zip(gains, kalman)):
            seen = (x[:, 0] + 0.05 * noise[:, t]).astype(np.float32)
            estimate = estimate + (seen - estimate[:, 0])[:, None] * k[:, 0]
            state = x if controller == "LQR" else estimate
            u = np.clip(-(state @ gain[0]), -1, 1)
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
    simulated = simulate(range(40))
    for controller, known in {"LQR": -3.73, "LQG": -3.86}.items():
        np.testing.assert_allclose(simulated[controller], returns(controller, start, noise), rtol=1e-4)
        assert returns(controller, *many).mean() == pytest.approx(known, rel=0.01)


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
    hidden = obs[TASKS.POSITIONS[env_id.rpartition("-v")[0]] :]
    np.testing.assert_allclose(LATENT.true_velocity(env.unwrapped), hidden, rtol=1e-5)


def small(**flags):
    small = {"env_id": "DoubleIntegrator-v0", "device": "cpu", "hidden_dim": 16, "model_dim": 16}
    args = VEM.Args(**small | {"trials": 2, "eval_episodes": 3} | flags)
    return VEM.Agent(args, 1, 1), args


def test_recorded_episodes_are_those_of_the_evaluation():
    agent, args = small()
    tape = LATENT.record(agent, args, deterministic=True)
    returns = VEM.evaluate(agent, VEM.make_envs(args, 6), args)["eval/return"]
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


# --- as a user runs it


@pytest.fixture
def here(tmp_path, monkeypatch):
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(common, "OUT", tmp_path)
    return tmp_path


def trained(agent):
    VEM.main(f"--run-dir {agent} --agent {agent} --env-id DoubleIntegrator-v0 --trials 2 --total-steps 60 "
             "--learning-starts 50 --eval-episodes 1 --eval-every 60 --hidden-dim 8 --model-dim 8 --windows 2 "
             "--window-length 3 --device cpu".split())
    return agent


def test_velocity(here, capsys):
    """Of an agent with a model also what it foresees; the figure is drawn again, byte for byte, from the csv."""
    runs = trained("generative"), trained("discriminative")
    assert LATENT.main(LATENT.Args(runs=runs, episodes=4, samples=4)) == 0
    assert "generative: R² of the velocity from the mean of z" in capsys.readouterr().out
    rows = common.read("latent_velocity")
    assert [*rows[0]] == ["label", "step", "trial", "metric", "value"]
    assert all(math.isfinite(float(row["value"])) for row in rows)
    metrics = {label: {row["metric"] for row in rows if row["label"] == label} for label in runs}
    assert {*LATENT.SOURCES, "velocity/true_0", "velocity/decoded_0", "prediction/true_0"} <= metrics["discriminative"]
    foreseen = {"prediction/mean_0", "prediction/std_0", "prediction/within"}
    assert metrics["generative"] - metrics["discriminative"] == foreseen
    picture = here / "figures/latent_velocity.png"
    drawn = picture.read_bytes()
    assert LATENT.main(LATENT.Args(from_csv=True)) == 0 and picture.read_bytes() == drawn


@pytest.mark.parametrize("flags, named", [
    ({"runs": ("nowhere",)}, "--runs nowhere"), ({}, "--runs"), ({"runs": ("a", "b"), "labels": ("a",)}, "--labels"),
    ({"episodes": 1}, "--episodes 1"),
    ({"from_csv": True}, "--from-csv"),
    ({"from_csv": True, "out": "a/b"}, "a/b"),
], ids=str)
def test_refuses_in_one_line(here, capsys, flags, named):
    with pytest.raises(SystemExit, match="2"):
        LATENT.main(LATENT.Args(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0] and not [*(here / "results").iterdir()]
