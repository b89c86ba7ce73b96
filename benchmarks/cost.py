"""What an environment step costs at the scripts' default settings, part by part, and the memory at full buffers.

    python benchmarks/cost.py                      # writes benchmarks/results/cost.csv
    python benchmarks/cost.py --full-buffers       # prints the peak memory of one process per script

A step's cost is environment + updates_per_step updates + (fit + roll-outs) / fit_every, with the buffer at `--rows` rows, filled by
uniformly random actions; an environment step includes acting and storing. Medians of `--repeats`; evaluation is not in it.
"""

import csv
import dataclasses
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Args:
    scripts: tuple[str, ...] = ("baselines/mbpo", "vmbpo", "beta_vmbpo")  # without .py
    env_id: str = "HalfCheetah-v4"  # gymnasium task
    rows: int = 10_000  # transitions in the buffer
    trials: int = 1  # independent agents
    threads: int = 1  # of torch
    repeats: int = 5  # measurements per part
    device: str = "cpu"  # cpu, cuda
    full_buffers: bool = False  # fill both buffers to their default sizes, do one of everything and print the peak memory


def load(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), HERE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def timed(function, repeats):
    """Median milliseconds of a call."""
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return 1000 * statistics.median(seconds)


def measure(args, name):
    script = load(name)
    flags = script.Args(env_id=args.env_id, trials=args.trials, device=args.device)
    envs = script.make_envs(args.env_id, args.trials)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = script.Agent(flags, obs_dim, action_dim)
    buffer = script.ReplayBuffer(args.trials, flags.buffer_size, obs_dim, action_dim, args.device)
    model_buffer = script.ReplayBuffer(args.trials, flags.model_buffer_size, obs_dim, action_dim, args.device)
    extra = len(buffer.widths) - 5
    tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float32, device=args.device).view(args.trials, 1, -1)
    obs, _ = envs.reset(seed=0)

    def step():
        nonlocal obs
        action = agent.act(tensor(obs))
        next_obs, reward, terminated, *_ = envs.step(action[:, 0].cpu().numpy())
        columns = [tensor(obs), action, tensor(reward), tensor(next_obs), tensor(terminated)]
        buffer.add(*columns, *[torch.zeros_like(columns[2])] * extra)
        obs = next_obs

    for _ in range(args.rows):
        step()
    if args.full_buffers:  # copies of the rows with a little noise
        rows = buffer.storage[:, : args.rows].clone()
        while int(buffer.count) < flags.buffer_size:
            buffer.add(rows + 1e-3 * torch.randn_like(rows))
        flags.max_batches = flags.min_first_batches = 5
        for _ in range(4):
            agent.fit_model(buffer)
            agent.imagine(buffer, model_buffer, 0)
        agent.learn(buffer, model_buffer, *([] if name == "baselines/mbpo" else [0]))
        print(f"{name}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB peak, buffers of "
              f"{int(buffer.count):,} and {int(model_buffer.count):,} rows per trial")
        return {}
    agent.fit_model(buffer)
    agent.imagine(buffer, model_buffer, 0)
    learn = lambda: agent.learn(buffer, model_buffer, *([] if name == "baselines/mbpo" else [0]))
    learn()
    row = {"script": name, "env": args.env_id, "rows": args.rows, "trials": args.trials, "threads": args.threads, "device": args.device,
           "environment_ms": timed(step, 200), "update_ms": timed(learn, args.repeats) / flags.updates_per_step,
           "fit_ms": timed(lambda: agent.fit_model(buffer), max(1, args.repeats // 2)),
           "rollouts_ms": timed(lambda: agent.imagine(buffer, model_buffer, 0), args.repeats)}
    step_ms = row["environment_ms"] + flags.updates_per_step * row["update_ms"] + (row["fit_ms"] + row["rollouts_ms"]) / flags.fit_every
    return row | {"step_ms": step_ms, "steps_per_second": 1000 / step_ms}


def main(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.full_buffers and len(args.scripts) > 1:  # one process each: peak memory never falls
        for name in args.scripts:
            subprocess.run([sys.executable, __file__, "--full-buffers", "--env-id", args.env_id, "--scripts", name], check=True)
        return 0
    rows = [measure(args, name) for name in args.scripts]
    if args.full_buffers:
        return 0
    with (HERE / "results" / "cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
