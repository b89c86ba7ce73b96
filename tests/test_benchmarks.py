"""What the benchmarks share, and figures.py, errors.py, tasks.py and peers.py, on runs made up here."""

import json
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, load_script

sys.path.append(str(ROOT / "benchmarks"))
import common
import errors as ERRORS
import figures as FIGURES
import fits as FITS
import peers as PEERS

from benchmarks import tasks as TASKS


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two runs of 300 evaluations and two trials, and empty folders for what is drawn from them."""
    for folder in ("results", "figures", "one", "two"):
        (tmp_path / folder).mkdir()
    for index, run in enumerate(("one", "two")):
        rows = [f"{step},{trial},{metric},{step + trial + 1000 * index}" for step in range(10, 3010, 10)
                for trial in (0, 1) for metric in ("eval/return", "model/kl", "loss/critic")]
        rows += [f"{step},-1,time/sps,{50 * (1 + index)}" for step in range(10, 3010, 10)]
        (tmp_path / run / "metrics.csv").write_text("step,trial,metric,value\n" + "\n".join(rows) + "\n")
    monkeypatch.setattr(common, "OUT", tmp_path)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were to be saved."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


# common.py


def test_a_table_that_is_cut_short_leaves_the_old_one(here):
    def rows():
        yield {"a": 1, "b": 0.123456789}
        raise RuntimeError

    common.write("made_up", [{"a": 0, "b": 5.0}])
    with pytest.raises(RuntimeError):
        common.write("made_up", rows())
    assert common.read("made_up") == [{"a": "0", "b": "5"}]
    assert (here / "results/made_up.partial").read_text() == "a,b\n1,0.123457\n"


def test_a_run_is_opened_as_it_was_trained(tmp_path):
    """The same evaluation as the script's own, at the end of a short run; what is no run is refused."""
    script = load_script("beta_vmbpo")
    flags = ("--env-id InvertedPendulum-v4 --trials 2 --total-steps 60 --learning-starts 40 --eval-episodes 2 "
             "--eval-every 60 --hidden-dim 8 --model-dim 8 --rollouts 50 --model-buffer-size 100 --updates-per-step 1 "
             "--min-first-batches 2 --min-batches 2 --batch-size 8 --device cpu --max-eval-steps 50 --run-dir run")
    script.main(flags.split())
    agent, args, buffer, step = common.open_run("run", eval_episodes=1)
    assert step == 60 and args.trials == 2 and args.eval_episodes == 1 and buffer.rows().shape[1] == 60
    assert type(agent).__module__ == "beta_vmbpo" and common.run_args("run")[1].hidden_dim == 8
    assert common.run_args("run", script="mbpo", task="InvertedPendulum-v4")[0] == "beta_vmbpo"  # its name has it
    for wrong in ({"run": "nowhere"}, {"run": "run", "script": "sac_iterative"}, {"run": "run", "task": "Hopper-v4"}):
        with pytest.raises(SystemExit, match="2"):
            common.open_run(**wrong)


def test_a_line_that_is_not_finished_is_left_out(here):
    """A full disk has cut the last value, 123, to 12."""
    (here / "one/metrics.csv").write_text("step,trial,metric,value\n1,0,eval/return,123\n2,0,eval/return,12")
    assert common.metrics_of(here / "one") == [(1, 0, "eval/return", 123)]


def test_say_goes_on_when_nobody_listens():
    code = (f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r}); import common\n"
            "for i in range(99999): common.say(i)\nsys.stderr.write('end')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "end" and process.wait(60) == 0


def test_committed_results_are_small():
    tables = [*(ROOT / "benchmarks/results").glob("*.csv")]
    assert len(tables) > 20 and all(path.stat().st_size <= 350_000 for path in tables)


# errors.py


def test_errors_and_gap_of_known_models():
    """p predicts 0 and q 1 where 2 is right. With V(s) = s, a model that never ends and adds 0.5 to the real next state
    has a gap of 0.5 where episodes go on and of s' + 0.5 where they end."""
    rows = torch.zeros(1, 10, 5)  # obs, action, reward, next_obs, terminated
    rows[..., 2:4], rows[:, 5:, 4] = 2, 1
    agent = SimpleNamespace(
        targets=lambda x: x, model=0.0, posterior_model=1.0, value=lambda obs: obs,
        moments=lambda model, obs, action: (torch.full((3, 1, 10, 2), model), None),
        predict=lambda obs, action: (torch.full_like(obs, 2.5), None, torch.zeros_like(obs)),
        divergence=lambda obs: obs.sum((1, 2)) + 7)
    found = {name: value.tolist() for name, value in ERRORS.measure(agent, (1, 1, 1, 1, 1), rows).items()}
    assert found == {"error_p": [4], "error_q": [1], "kl": [7], "gap": [(0.5 + 2.5) / 2]}


def test_where_an_agent_balances():
    """A linear controller, which keeps the pole up from everywhere, but pushes on where the cart is right of 0.4."""
    args = SimpleNamespace(env_id="InvertedPendulum-v4", trials=2, seed=1, capture_video=False)
    gains = torch.tensor([0.3, 5, 0.5, 1])
    act = lambda obs, deterministic: torch.where(obs[..., :1] > 0.4, 1, (gains * obs).sum(-1, keepdim=True)).clamp(-1, 1)
    positions = torch.tensor([[0, 0.2, -0.4, 0.6], [0, 0, 0, 0]])
    found = ERRORS.balance(load_script("baselines/mbpo"), SimpleNamespace(act=act), args, positions)
    assert [found[f"stands_from_{x}"].tolist() for x in (0.1, 0.3, 0.5, 0.9)] == [[1, 1], [1, 1], [0.5, 0.5], [0.5, 0.5]]
    assert [found[f"beyond_{x}"].tolist() for x in (0.1, 0.3, 0.5, 0.7)] == [[0.75, 0], [0.5, 0], [0.25, 0], [0, 0]]


def test_errors_of_a_full_buffer_are_refused(here, capsys):
    """Its last rows are not the newest."""
    load_script("vmbpo").main(("--env-id Pendulum-v1 --total-steps 60 --learning-starts 60 --eval-episodes 1 "
                               "--max-eval-steps 9 --buffer-size 50 --rollouts 9 --batch-size 8 --max-batches 1 "
                               "--min-first-batches 1 --device cpu --run-dir run").split())
    with pytest.raises(SystemExit, match="2"):
        ERRORS.main(ERRORS.Args(runs=("run",)))
    assert "--runs run: its buffer is full" in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_a_run_without_a_model_are_refused(here, capsys):
    script = load_script("sac_iterative")
    script.main(("--env-id Pendulum-v1 --total-steps 20 --learning-starts 20 --eval-episodes 1 --max-eval-steps 9 "
                 "--batch-size 8 --device cpu --run-dir run").split())
    with pytest.raises(SystemExit, match="2"):
        ERRORS.main(ERRORS.Args(runs=("run",)))
    assert "--runs run: no " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ("beta_vmbpo", "baselines/mbpo"))
def test_errors_of_a_run(here, name, capsys):
    """On all rows, what the script has logged at its last fit; the newest 20 of 60 are held-out rows 40, 45, 50, 55."""
    script = load_script(name)
    script.main(("--env-id Pendulum-v1 --trials 2 --total-steps 60 --learning-starts 60 --eval-every 60 "
                 "--eval-episodes 1 --max-eval-steps 9 --hidden-dim 8 --model-dim 8 --rollouts 50 "
                 "--model-buffer-size 100 --batch-size 8 --updates-per-step 1 --min-first-batches 2 --max-batches 2 "
                 "--device cpu --run-dir run").split())
    ERRORS.main(ERRORS.Args(runs=("run",), labels=("A",), out="made_up", newest=20))
    rows = common.read("made_up")
    assert "A, newest rows: error_p" in capsys.readouterr().out and {row["step"] for row in rows} == {"60"}
    logged = [value for _, _, metric, value in common.metrics_of("run") if metric == "model/prior_error"]
    found = {which: [float(row["value"]) for row in rows if (row["metric"], row["rows"]) == ("error_p", which)]
             for which in ("all", "newest")}
    assert found["all"] == pytest.approx(logged, rel=1e-4)
    agent, _, buffer, _ = common.open_run("run")
    obs, action, reward, next_obs, _ = buffer.rows()[:, 40:60:5].split(buffer.widths, -1)
    target = agent.targets(torch.cat([next_obs - obs, reward], -1))
    error = (agent.moments(agent.model, obs, action)[0] - target).square().mean((0, 2, 3))
    assert found["newest"] == pytest.approx(error.tolist(), rel=1e-4)


# fits.py


@pytest.mark.parametrize("flag", ["--tasks", "--rules"])
def test_fits_knows_its_tasks_and_rules(capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(FITS.Args, args=[flag, "toy", "nothing"])
    assert flag in capsys.readouterr().err and tyro.cli(FITS.Args, args=[]).rules == (*FITS.RULES,)


def test_refits_of_a_study(here, monkeypatch, capsys):
    """250 rows more before each of four, three on the same rows; then the fourth for every β, and seven times at β = 10,
    always from the networks before it."""
    script, calls = load_script("beta_vmbpo"), []
    for name in FITS.CONSTANTS:
        monkeypatch.setattr(script, name, getattr(script, name))  # the study sets its own

    def fit(agent, buffer, beta, seed):
        assert agent.opts["models"].param_groups[0]["betas"] == (0.9, 0.99)
        bias = agent.model.layers[-1].bias.data
        calls.append((int(buffer.added), beta, seed, round(bias.flatten()[0].item())))
        bias.flatten()[0] += 10
        return {"model/prior_error": 2.0 ** -len(calls), "model/kl": 100 / beta**2 + seed}

    monkeypatch.setattr(FITS, "fit", fit)
    assert FITS.main(FITS.Args(tasks=("toy",), rules=("two phases, β₂ = 0.99",), refits=4)) == 0
    rows = [1000, 1250, 1500, 1750, 1750, 1750, 1750]
    assert calls[:7] == [(count, 1e7, 1000 + i, 10 * i) for i, count in enumerate(rows)]
    assert calls[7:] == [*((1750, beta, 99, 30) for beta in FITS.BETAS), *((1750, 10, i, 30) for i in range(7))]
    table = [(row["what"], float(row["x"]), float(row["value"])) for row in common.read("fits")]
    assert table[:5] == [("error", i + 1, 2.0 ** -(i + 1)) for i in range(4)] + [("again", 5, 2.0**-5)]
    assert [what for what, *_ in table] == ["error"] * 4 + ["again"] * 3 + ["kl"] * 6 + ["scatter"] * 7
    assert script.FIT_RATE == {"two_phase": (0, 8, 2, 0.5, 0)} and "on the same rows again at most" in capsys.readouterr().out


def test_beta_of_a_fit_and_the_default_rule():
    """β is the one asked for; "two phases" are what the script does."""
    script = load_script("beta_vmbpo")
    agent, buffer, *_ = FITS.make(script, "toy", FITS.Args())
    agent.fit_model = lambda buffer: {"beta": agent.beta}
    assert FITS.fit(agent, buffer, 30.0, 0)["beta"] == pytest.approx(30)
    assert FITS.RULES["two phases"] == tuple(getattr(script, name)["two_phase"] for name in FITS.CONSTANTS)


# figures.py


def test_runs_of_several_tasks_in_one_panel(here):
    """The runs' own tasks differ from the name that --task gives them all."""
    for name in ("one", "two"):
        (here / name / "args.json").write_text(f'{{"env_id": "{name}"}}')
    flags = {"name": "made_up", "runs": (str(here / "one"), str(here / "two")), "metrics": ("eval/return",)}
    for task, expected in (("", {"one", "two"}), ("Both", {"Both"})):
        assert FIGURES.main(FIGURES.Args(task=task, **flags)) == 0
        assert {row["task"] for row in common.read("made_up")} == expected


def test_figure_and_thinned_csv(here, capsys):
    flags = {"name": "made_up", "metrics": ("eval/return", "model/kl"), "labels": ("A", "B")}
    assert FIGURES.main(FIGURES.Args(runs=(str(here / "one"), str(here / "two")), **flags)) == 0
    rows = common.read("made_up")
    steps = {int(row["step"]) for row in rows}
    assert {row["metric"] for row in rows} == {"eval/return", "model/kl"}
    assert len(steps) <= 101 and {10, 3000} <= steps and {row["label"] for row in rows} == {"A", "B"}
    for row in rows:
        assert float(row["value"]) == int(row["step"]) + int(row["trial"]) + 1000 * (row["label"] == "B")
    assert "A: return at step 3000: 3000.5 ± 0.5 (3000, 3001)" in capsys.readouterr().out
    picture = (here / "figures/made_up.png").read_bytes()
    (here / "figures/made_up.png").unlink()
    assert FIGURES.main(FIGURES.Args(from_csv=True, name="made_up")) == 0
    assert (here / "figures/made_up.png").read_bytes() == picture


def test_rows_of_runs_that_are_gone_stay(here):
    """Those of other tasks or labels; what is drawn anew replaces what was there."""
    def draw(run, label, **flags):
        flags |= {"name": "made_up", "metrics": ("eval/return",)}
        assert FIGURES.main(FIGURES.Args(runs=(str(here / run),), labels=(label,), **flags)) == 0
        return common.read("made_up")

    first = draw("one", "A")
    second = draw("two", "B", keep=True)
    assert second[: len(first)] == first and {row["label"] for row in second} == {"A", "B"}
    other = draw("one", "B", keep=True, task="other")
    assert other[: len(second)] == second and {row["task"] for row in other[len(second) :]} == {"other"}
    again = draw("two", "A", keep=True)
    assert [row for row in again if row["label"] == "B"] == other[len(first) :]
    assert [row["value"] for row in again if row["label"] == "A"] == [row["value"] for row in second[len(first) :]]


def table_of(metric, steps, *trials):
    return [{"metric": metric, "step": str(step), "value": str(value)}
            for i, step in enumerate(steps) for value in [trial[i] for trial in trials]]


def test_a_curve_in_words():
    """By hand: the second half begins at step 20 of 40; the second trial falls back at 30, the third is never there."""
    kl = table_of("model/kl", (10, 20, 30, 40), (9, 0.1, 1, 10), (9, 0.01, 0.01, 0.01))
    assert FIGURES.tell(kl) == "model/kl in the second half: 0.1 (by trial 1 0.01; log10 ± 0.82 0.00)"
    size = table_of("model/effective_sample_size", (10, 20), (0.5, 0.25))
    assert FIGURES.tell(size) == "model/effective_sample_size in the second half: 0.375"
    returns = [(0, 1000, 1000, 960), (0, 980, 5, 1000), (1, 2, 3, 4)]
    text = FIGURES.tell(table_of("eval/return", (10, 20, 30, 40), *returns), solved=950)
    assert text.startswith("return at step 40: 654.7 ± 460.4 (960, 1000, 4); 950 first at 20, 20, never; ")
    assert text.endswith("not all at the end; again below: trial 1 5 at 30")
    text = FIGURES.tell(table_of("eval/return", (10, 20, 30, 40), *returns[:2]), solved=950)
    assert text.endswith("950 first at 20, 20; all stay from 40; again below: trial 1 5 at 30")
    assert FIGURES.tell(table_of("eval/return", (10, 20), (1, 1)), solved=1).endswith(
        "1 first at 10; all stay from 10; again below: none")


def test_figure_of_an_experiment(here, drawn):
    """A panel per task, published points where there are any; runs of one task and label are trials of one curve."""
    table = here / "experiments.toml"
    table.write_text('[made_up]\nenvs = ["Hopper-v4", "b/B-v0"]\nseeds = [1, 2]\n'
                     '[made_up.runs]\n"x MBPO" = "s.py"\n"β" = "s.py"\n')
    for env in ("Hopper-v4", "b/B-v0"):
        for run in ("x_MBPO_s1", "x_MBPO_s2", "β_s1"):
            place = here / "runs/made_up" / env.replace("/", "_") / run
            place.mkdir(parents=True)
            (place / "args.json").write_text(json.dumps({"env_id": env}))
            steps = range(10_000, 40_000, 10_000) if run == "x_MBPO_s2" else range(10_000, 60_000, 10_000)
            lines = [f"{step},{trial},eval/return,{step + trial}" for step in steps for trial in (0, 1)]
            (place / "metrics.csv").write_text("step,trial,metric,value\n" + "\n".join(lines) + "\n")
    assert FIGURES.main(FIGURES.Args(experiment="made_up", runs_dir=str(here / "runs"), table=str(table))) == 0
    rows = common.read("made_up")
    assert {row["task"] for row in rows} == {"Hopper-v4", "b/B-v0"} and {row["label"] for row in rows} == {"x MBPO", "β"}
    trials = {label: {row["trial"] for row in rows if row["label"] == label} for label in ("x MBPO", "β")}
    assert trials == {"x MBPO": {*"0123"}, "β": {*"01"}}
    hopper, other = drawn[0].axes
    assert hopper.get_title() == "Hopper-v4: evaluation return" and other.get_title() == "b/B-v0: evaluation return"
    lines = {line.get_label(): line.get_xdata() for line in other.get_lines()}
    assert [*lines["x MBPO"]] == [10_000, 20_000, 30_000] and [*lines["β"]] == [*range(10_000, 60_000, 10_000)]
    published = [container.get_label() for container in hopper.containers]
    assert published == ["MBPO, published"] and not other.containers


@pytest.mark.parametrize("flags, named", [
    ({}, "--runs"), ({"runs": ("nowhere",)}, "--runs nowhere"), ({"from_csv": True}, "--from-csv"),
    ({"name": "", "runs": ("one",)}, "--name"), ({"runs": ("one",), "labels": ("A", "B")}, "--labels"),
    ({"experiment": "fig5"}, "--runs-dir"), ({"experiment": "nothing"}, "nothing: not an experiment"),
    ({"runs": ("one",), "metrics": ("none",)}, "--metrics none"),
    ({"runs": ("one",), "name": "a/b"}, "a/b"),
], ids=str)
def test_figures_refuses_in_one_line(here, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit) as stopped:
        FIGURES.main(FIGURES.Args(**{"name": "made_up"} | flags))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and named in lines[0] and not list((here / "results").iterdir())


def test_spread_over_trials():
    """Mean and standard deviation; the interquartile mean of eight trials is the mean of the middle four."""
    values = np.random.default_rng(0).normal(size=(3, 8)) + np.arange(3)[:, None]
    middle, low, high = FIGURES.spread(values, "mean")
    np.testing.assert_allclose([middle, high - low], [values.mean(1), 2 * values.std(1)])
    middle, low, high = FIGURES.spread(values, "iqm")
    np.testing.assert_allclose(middle, np.sort(values, 1)[:, 2:6].mean(1))
    assert (low < middle).all() and (middle < high).all()


@pytest.mark.parametrize("text, metrics, named", [("", (), "--metrics"), ("metric,step\na,1\n", ("b",), "--metrics b"),
                                                   ("other,step\na,1\n", (), "no column")], ids=str)
def test_tables_that_cannot_be_drawn(here, capsys, text, metrics, named):
    (here / "results/made_up.csv").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        FIGURES.main(FIGURES.Args(from_csv=True, name="made_up", metrics=metrics))
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", ["half_cheetah", "inference_fig3b_Hopper-v4", "latent_discriminative_rate"])
def test_committed_tables_draw(here, name):
    (here / f"results/{name}.csv").write_bytes((ROOT / f"benchmarks/results/{name}.csv").read_bytes())
    assert FIGURES.main(FIGURES.Args(from_csv=True, name=name)) == 0 and (here / f"figures/{name}.png").exists()


# tasks.py


def test_noise_reaches_the_dynamics_and_follows_the_seed():
    """The same action from the same state: next states scatter as actions with noise of 0.3 of their range would."""
    def after(seed, steps=1):
        env = gym.make("NoisyInvertedPendulum-v4")  # actions from -3 to 3
        env.reset(seed=seed)
        env.unwrapped.set_state(np.zeros(2), np.zeros(2))
        for _ in range(steps):
            obs = env.step(np.zeros(1, np.float32))[0]
        return obs

    exact = gym.make("InvertedPendulum-v4")
    def speed(force):
        exact.reset(seed=0)
        exact.unwrapped.set_state(np.zeros(2), np.zeros(2))
        return exact.step(np.array([force], np.float32))[0][2]

    speeds = np.array([after(seed)[2] for seed in range(200)])
    assert speeds.std() == pytest.approx(0.3 * 3 * (speed(0.1) - speed(-0.1)) / 0.2, rel=0.15)
    assert abs(speeds.mean()) < 3 * speeds.std() / 200**0.5
    np.testing.assert_array_equal(after(5, 3), after(5, 3))
    noisy = TASKS.noisy("HalfCheetah-v4")
    actions = np.array([noisy.action(np.ones(6, np.float32)) for _ in range(20)])
    assert actions.max() == 1 and 0.3 < (actions < 1).mean() < 0.7 and actions.min() > -1


@pytest.mark.parametrize("task", ["Pendulum-v1", "MountainCarContinuous-v0", "InvertedPendulum-v5", "Hopper-v4",
                                  "Walker2d-v4", "HalfCheetah-v4", "Swimmer-v4", "Ant-v4", "InvertedDoublePendulum-v4"])
def test_velocities_are_hidden_and_observations_stacked(task):
    """What is hidden begins with the simulator's own velocities."""
    plain, hidden, stacked = gym.make(task), gym.make(f"Positions{task}"), gym.make(f"Stacked{task}")
    seen = [plain.reset(seed=3)[0]]
    first, rows = hidden.reset(seed=3)[0], stacked.reset(seed=3)[0]
    count = len(first)
    np.testing.assert_array_equal(first, seen[0][:count])
    for _ in range(4):
        action = np.full(plain.action_space.shape, 0.3, np.float32)
        seen.append(plain.step(action)[0])
        assert hidden.step(action)[0].shape == hidden.observation_space.shape == (count,)
        rows = stacked.step(action)[0]
    np.testing.assert_array_equal(rows, np.array(seen)[1:, :count])
    task = plain.unwrapped
    velocity = task.data.qvel if hasattr(task, "data") else np.atleast_1d(task.state[1])
    np.testing.assert_allclose(seen[-1][count:][: len(velocity)], np.clip(velocity, -10, 10), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["RiskyEdge-v0", "NoisyHalfCheetah-v4", "StackedPendulum-v1"])
def test_the_scripts_find_the_tasks(monkeypatch, task):
    monkeypatch.chdir(ROOT)
    script = load_script("beta_vmbpo")
    args = script.parse_args(["--env-id", f"benchmarks.tasks:{task}", "--run-dir", "none-such", "--device", "cpu"])
    envs = script.make_envs(args, 2)
    obs, _ = envs.reset(seed=[1, 2])
    assert obs.ndim == 2 and envs.step(envs.action_space.sample())[1].shape == (2,)


# peers.py


@pytest.mark.parametrize("flags, named", [
    ({"run_dir": "one"}, "--run-dir one"), ({"env_id": "Nothing-v1"}, "--env-id Nothing-v1"),
    ({"eval_every": 0}, "--eval-every 0"), ({"seed": -1}, "--seed -1"), ({"env_id": "a:b:c"}, "--env-id a:b:c"),
], ids=str)
def test_peers_refuses_in_one_line(here, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit) as stop:
        PEERS.main(PEERS.Args(**flags))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and named in lines[0] and not (here / "runs").exists()


def test_peers_leave_a_run(here, monkeypatch):
    """Evaluated on the seeds of the scripts, where trial i of two episodes each has environments 2 i and 2 i + 1."""
    from stable_baselines3.common import evaluation

    seeds, evaluate = [], evaluation.evaluate_policy
    monkeypatch.setattr(evaluation, "evaluate_policy",
                        lambda model, envs, count: seeds.append(envs._seeds) or evaluate(model, envs, count))
    args = PEERS.Args(env_id="Pendulum-v1", trials=2, total_steps=60, learning_starts=40, eval_every=30,
                      eval_episodes=2, run_dir="run")
    PEERS.main(args)
    rows = [row for row in common.metrics_of("run") if row[2] == "eval/return"]
    assert [row[:2] for row in rows] == [(30, 0), (60, 0), (30, 1), (60, 1)] and len({row[3] for row in rows}) == 4
    first = 10**9 + 1
    assert seeds == [[first, first + 1]] * 2 + [[first + 2, first + 3]] * 2
