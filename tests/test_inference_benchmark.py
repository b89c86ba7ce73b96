"""benchmarks/inference.py against closed forms, brute force and the script's evaluation; a small run of each."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from matplotlib.figure import Figure

sys.path.append(str(ROOT / "benchmarks"))
import common
import inference as INF

SAC = load_script("sac_iterative")
OBS, ACT, PRIOR_STD, CURVE = 3, 2, 1.5, 3.0
both = pytest.mark.parametrize("inference", ["iterative", "direct"])


def build(action_dim=ACT, **flags):
    """A small agent in float64, whose temperature is not 1."""
    small = {"hidden_dim": 16, "action_samples": 6, "device": "cpu", "prior_std": PRIOR_STD,
             "matmul_precision": "highest"}
    agent = SAC.Agent(SAC.Args(**small | flags), OBS, action_dim).double()
    agent.log_alpha.data.uniform_(-2, -1)
    return agent


def states(n=5, trials=1):
    return torch.randn(trials, n, OBS, dtype=torch.float64)


class Bowl(torch.nn.Module):
    """Twins with Q(s, tanh u) = -c/2 |u - m(s)|², for which the best policy is Gaussian before the tanh."""

    def forward(self, x):
        obs, action = x[..., :OBS], x[..., OBS:]
        q = -CURVE / 2 * (action.atanh() - obs[..., : action.shape[-1]]).square().sum(-1, keepdim=True)
        return q.expand(2, *q.shape)


def signs(obs, samples, action_dim, seed=0):
    """Noise of mean 0 and variance 1 exactly, so that the average of a quadratic is its expectation."""
    one = torch.tensor([1.0, -1.0], dtype=obs.dtype).repeat(samples // 2)
    return one[None, :, None, None].expand(obs.shape[0], -1, obs.shape[1], action_dim)


def bowl_value(agent, obs, params):
    """E[Q] − α KL (trials, n) written out for the bowl."""
    mean, var = params[..., 0, :], (2 * params[..., 1, :]).exp()
    q = -CURVE / 2 * ((mean - obs[..., :ACT]) ** 2 + var).sum(-1)
    kl = 0.5 * ((mean**2 + var) / PRIOR_STD**2 - 1 - (var / PRIOR_STD**2).log()).sum(-1)
    return q - agent.log_alpha.exp()[..., 0] * kl


def bowl_optimum(agent, obs):
    """α log E_p[exp(Q/α)] (trials, n), the bound that the best policy (11) attains, by the integral of a Gaussian."""
    alpha, var = agent.log_alpha.exp(), PRIOR_STD**2
    each = -0.5 * (1 + CURVE * var / alpha).log() - CURVE / 2 * obs[..., :ACT] ** 2 / (alpha + CURVE * var)
    return (alpha * each).sum(-1)


# J̃ and its inference


def test_common_random_numbers(monkeypatch):
    agent, obs = build(trials=2), states(trials=2)
    noise = INF.common_noise(obs, 20, ACT, 0)
    params = agent.prior.expand(2, 5, -1, -1) + 0.3
    value = INF.estimate(agent, obs, params, noise)
    torch.randn(3)
    assert torch.equal(value, INF.estimate(agent, obs, params.clone(), INF.common_noise(obs, 20, ACT, 0)))
    assert not torch.equal(value, INF.estimate(agent, obs, params, INF.common_noise(obs, 20, ACT, 1)))
    for seed in range(3):  # inference draws from the global stream, which a command seeds alike
        torch.manual_seed(seed)
        assert not torch.equal(torch.randn_like(noise), INF.common_noise(obs, 20, ACT, seed))
    sizes, objective = [], agent.objective

    def counting(critic, obs, *others):
        sizes.append(obs.shape[1])
        return objective(critic, obs, *others)

    monkeypatch.setattr(agent, "objective", counting)
    monkeypatch.setattr(INF, "ROWS", 90)  # two states at a time
    torch.testing.assert_close(INF.estimate(agent, obs, params, noise), value)
    assert sizes == [2, 2, 1]


def test_no_iterations_are_the_prior():
    """J̃(λ_0) is the mean over the prior's actions of the lower twin: its KL is 0."""
    agent, obs = build(), states()
    noise = INF.common_noise(obs, 50, ACT, 0)
    agent.iters = 0
    (params,) = agent.infer(obs)[0]
    action = (PRIOR_STD * noise[0]).tanh()  # (samples, n, action_dim)
    q = agent.critic(torch.cat([obs.expand(50, -1, -1), action], -1).flatten(0, 1)[None])
    torch.testing.assert_close(INF.estimate(agent, obs, params, noise), q.amin(0).view(50, -1).mean(0)[None])


def test_adam_reaches_the_optimum_of_a_quadratic():
    agent, obs = build(), states()
    agent.critic, start = Bowl(), agent.prior.repeat(1, 5, 1, 1)
    noise, optimum = signs(obs, 4, ACT), bowl_optimum(agent, obs)
    trace, values = INF.adam(agent, obs, start, 400, 0.03, noise)
    params, value = INF.best(trace, values)
    torch.testing.assert_close(value, optimum, atol=1e-3, rtol=0)
    torch.testing.assert_close(value, bowl_value(agent, obs, params))
    torch.testing.assert_close(values[0], bowl_value(agent, obs, start))
    assert torch.equal(value, values.amax(0)) and (values[0] < optimum - 0.05).all()


@both
def test_gap_in_closed_form(inference, monkeypatch):
    agent, obs = build(inference=inference, trials=2), states(trials=2)
    agent.critic = Bowl()
    monkeypatch.setattr(INF, "common_noise", signs)
    torch.manual_seed(1)
    measured = INF.Gap(samples=4, adam_steps=300, adam_rate=0.03).at(agent, obs)
    torch.manual_seed(1)
    network = bowl_value(agent, obs, agent.infer(obs)[0][-1])
    expected = {"network": network, "best": bowl_optimum(agent, obs), "gap": bowl_optimum(agent, obs) - network,
                "prior": bowl_value(agent, obs, agent.prior.expand(2, 5, -1, -1))}
    for name, value in expected.items():
        for kind in (name, f"{name}_fresh"):
            torch.testing.assert_close(measured[kind], value, atol=2e-3, rtol=1e-3)
    assert (measured["gap"] > 0).all()


@pytest.mark.parametrize("prior", ["gaussian", "uniform"])
def test_best_of_adam_against_a_grid(prior):
    """A network as critic, one action: no λ of a fine grid is better than what the gap compares with."""
    agent, obs = build(action_dim=1, prior=prior), states(3)
    for parameter in agent.critic.parameters():
        parameter.data *= 2
    measured = INF.Gap(samples=20, adam_steps=300, adam_rate=0.03).at(agent, obs)
    noise = INF.common_noise(obs, 40, 1, 0)[:, :20]
    mean, log_std = torch.meshgrid(torch.linspace(-3, 3, 121), torch.linspace(-5, 2, 71), indexing="ij")
    grid = torch.stack([mean, log_std], -1).view(1, -1, 2, 1).double()
    for i in range(3):
        n, here = grid.shape[1], slice(i, i + 1)
        value = INF.estimate(agent, obs[:, here].expand(-1, n, -1), grid, noise[:, :, here].expand(-1, -1, n, -1))
        assert -1e-3 < measured["best"][0, i] - value.max() < 0.05
    assert (measured["gap"] >= 0).all()


# Tables


def test_a_line_is_the_mean_over_trials():
    values = torch.randn(2, 3, 7)  # (k, trials, states)
    rows = [{"k": k, **INF.moments("x", values[k, trial])} for k in (1, 0) for trial in range(3)]
    k, mean, std = INF.line(Figure().subplots(), rows, "k", "x")
    assert k.tolist() == [0, 1]
    np.testing.assert_allclose(mean, values.flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, values.mean(2).std(1, correction=0), rtol=1e-5)


# As a user runs it

SMALL = {"env_id": "Pendulum-v1", "hidden_dim": 16, "batch_size": 16, "learning_starts": 20, "total_steps": 60,
         "eval_every": 30, "eval_episodes": 1, "log_every": 20, "device": "cpu", "action_samples": 4}


def words(flags):
    return [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An iterative and a direct run of two trials."""
    found = {}
    for inference in ("iterative", "direct"):
        found[inference] = str(tmp_path_factory.mktemp("runs") / inference)
        SAC.main(words(SMALL | {"inference": inference, "run_dir": found[inference], "trials": 2}))
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(common, "OUT", tmp_path)
    return tmp_path


def command(here, args, name):
    """The rows that a command writes; its figure is drawn again, byte for byte, from the csv."""
    assert INF.main(args) == 0
    picture = here / f"figures/{name}.png"
    before = picture.read_bytes()
    picture.unlink()
    assert INF.main(type(args)(from_csv=True, out=name)) == 0 and picture.read_bytes() == before
    assert [path.name for path in (here / "results").iterdir()] == [f"{name}.csv"]
    return common.read(name)


def test_roll_out_is_the_evaluation_of_the_script(runs):
    agent, saved, *_ = common.open_run(runs["iterative"])
    returns, met, running = INF.roll_out(agent, saved, 2, agent.iters)
    np.testing.assert_allclose(returns, SAC.evaluate(agent, SAC.make_envs(saved, 4), saved)["eval/return"])
    assert met.shape == (2, 200, 2, OBS) and running.shape == (2, 200, 2) and running.all()


def test_improvement(runs, here):
    args = INF.Improvement(run=runs["iterative"], iters=3, episodes=1, states=11, samples=9)
    rows = command(here, args, "inference_fig2_Pendulum-v1")
    table = {(int(row["k"]), int(row["trial"])): row for row in rows}
    assert {*table} == {(k, trial) for k in range(4) for trial in range(2)} and rows[0]["trained_iters"] == "2"
    for (k, trial), row in table.items():
        now, prior, first = (float(table[i, trial]["objective"]) for i in (k, 0, 1))
        assert float(row["absolute"]) == pytest.approx(now - prior, abs=1e-4)
        assert float(row["from_first"]) == pytest.approx(now - first, abs=1e-4)
        assert k or {row[name] for name in ("absolute", "absolute_std", "relative", "relative_std")} == {"0"}
    agent, saved, *_ = common.open_run(runs["iterative"])
    for k in (0, 2):
        returns = INF.roll_out(agent, saved, 1, k)[0].mean(1)
        assert [float(table[k, trial]["return"]) for trial in range(2)] == pytest.approx(returns, rel=1e-5)


def test_gap(here):
    flags = " ".join(words({key: value for key, value in SMALL.items() if key != "total_steps"}))
    args = INF.Gap(modes=("iterative",), flags=flags, total_steps=50, pieces=2, run_dir="runs/gap", states=4, samples=4,
                   adam_steps=5)
    rows = command(here, args, "inference_gap_Pendulum-v1")
    assert [(row["mode"], row["step"]) for row in rows] == [("iterative", "25"), ("iterative", "50")]
    for row in rows:
        best, network, prior, gap = (float(row[name]) for name in ("best", "network", "prior", "gap"))
        assert 0 <= gap == pytest.approx(best - network, abs=1e-4)
        assert 0 <= float(row["share"]) <= 1
        assert float(row["share"]) == pytest.approx(gap / max(gap, best - prior), abs=0.02)
    with open("runs/gap/iterative/args.json") as file:
        assert json.load(file)["total_steps"] == 50


@pytest.mark.parametrize("args, named", [
    (INF.Improvement(), "--run"), (INF.Improvement(run="nowhere"), "--run nowhere"),
    (INF.Improvement(run="direct"), "--run"), (INF.Improvement(run="iterative", iters=0), "--iters 0"),
    (INF.Improvement(from_csv=True), "--from-csv"),
    (INF.Gap(flags="--env-id Pendulum-v1 --resume x"), "--resume"), (INF.Gap(flags="--tau 2"), "--tau 2"),
    (INF.Gap(flags="--env-id Pendulum-v1", total_steps=6000), "--pieces 5"), (INF.Gap(out="a/b"), "--out a/b"),
], ids=str)
def test_refused_in_one_line(runs, here, args, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if getattr(args, "run", ""):
        args = dataclasses.replace(args, run=runs.get(args.run, args.run))
    with pytest.raises(SystemExit) as stop:
        INF.main(args)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in line and not [*(here / "results").iterdir()]
