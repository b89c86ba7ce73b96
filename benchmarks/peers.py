"""What a user would pick instead: agents of Stable-Baselines3 and sb3-contrib at their defaults, as a run directory.

    python benchmarks/peers.py --algorithm SAC --env-id Hopper-v4 --total-steps 150_000 --run-dir runs/sb3_hopper
    python benchmarks/peers.py --algorithm RecurrentPPO --env-id benchmarks.tasks:PositionsPendulum-v1

SAC, TQC and CrossQ learn from step --learning-starts on. SAC then has the settings of `sac_iterative.py --inference
direct --prior uniform --action-samples 1 --batch-size 256`: 2×256, 3e-4, τ 0.005, γ 0.99, one update per step.
Evaluation is the scripts': deterministic, on the same seeds. A trial has networks and an environment of its own,
seeded --seed + trial; trials run one after the other. Writes args.json and metrics.csv.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import tyro
from common import at_least, fail, say

PACKAGES = {"SAC": "stable_baselines3", "TQC": "sb3_contrib", "CrossQ": "sb3_contrib", "RecurrentPPO": "sb3_contrib"}


@dataclasses.dataclass
class Args:
    algorithm: Literal["SAC", "TQC", "CrossQ", "RecurrentPPO"] = "SAC"  # whose
    env_id: str = "Hopper-v4"  # gymnasium task with Box actions
    seed: int = 1  # of the first trial
    trials: int = 1  # independent agents
    total_steps: int = 150_000  # environment steps per trial
    learning_starts: int = 5_000  # uniformly random steps before the first update, as in the scripts
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # per evaluation
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/ALGORITHM_sSEED_DATE-TIME


def make_model(args, trial):
    algorithm = getattr(importlib.import_module(PACKAGES[args.algorithm]), args.algorithm)
    settings = {"env": gym.make(args.env_id), "seed": args.seed + trial, "device": "cpu"}
    if args.algorithm == "RecurrentPPO":
        return algorithm("MlpLstmPolicy", **settings)
    return algorithm("MlpPolicy", buffer_size=args.total_steps, learning_starts=args.learning_starts, **settings)


def train(args, trial, file):
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    envs = make_vec_env(args.env_id, args.eval_episodes)  # one for each episode

    class Evaluation(BaseCallback):
        def _on_training_start(self):
            self.clock, self.before = time.perf_counter(), 0

        def _on_step(self):
            step = self.num_timesteps
            if step % args.eval_every == 0 or step == args.total_steps:
                envs.seed(args.seed + 10**9 + trial * args.eval_episodes)  # environment i gets this plus i
                score, _ = evaluate_policy(self.model, envs, args.eval_episodes)
                speed = (step - self.before) / (time.perf_counter() - self.clock)
                file.write(f"{step},{trial},eval/return,{score:.6g}\n{step},{trial},time/sps,{speed:.6g}\n")
                say(f"trial {trial}, step {step}: return {score:.1f}, {speed:.0f} steps per second")
                self.clock, self.before = time.perf_counter(), step
            return step < args.total_steps

    make_model(args, trial).learn(args.total_steps, callback=Evaluation())


def main(args):
    name = f"{args.algorithm}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    run = Path(args.run_dir or f"runs/{args.env_id.replace(':', '_')}/{name}")
    at_least(args, seed=0, trials=1, total_steps=1, learning_starts=1, eval_every=1, eval_episodes=1)
    if run.exists():
        fail(f"--run-dir {run}: exists already")
    try:
        gym.make(args.env_id)
    except Exception as error:  # whatever is wrong in a user's environment
        fail(f"--env-id {args.env_id}: cannot be made ({error})")
    package = PACKAGES[args.algorithm]
    if not importlib.util.find_spec(package):
        fail(f"--algorithm {args.algorithm}: needs the package {package} (benchmarks/requirements.txt)")
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    with (run / "metrics.csv").open("w", buffering=1) as file:
        file.write("step,trial,metric,value\n")
        for trial in range(args.trials):
            train(args, trial, file)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
