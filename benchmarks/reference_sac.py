"""Soft actor-critic of Stable-Baselines3, as a run directory: the curve to hold sac_iterative.py's against.

    python benchmarks/reference_sac.py --env-id Hopper-v4 --total-steps 150_000 --run-dir runs/sb3_hopper
    python benchmarks/figures.py --name sac_hopper --runs runs/sb3_hopper runs/hopper --labels Stable-Baselines3 "this collection"

Same settings as `sac_iterative.py --inference direct --prior uniform --action-samples 1 --batch-size 256`: 2×256, learning
rates 3e-4, τ 0.005, γ 0.99, 5000 random steps, one update per step, target entropy −(action dimensions), deterministic
evaluation on the same seeds. Writes metrics.csv with eval/return and time/sps, and args.json.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"  # gymnasium task with Box actions
    seed: int = 1  # of the agent and of the environment
    total_steps: int = 150_000  # environment steps
    learning_starts: int = 5_000  # uniformly random steps before the first update
    eval_every: int = 10_000  # environment steps between evaluations
    eval_episodes: int = 5  # per evaluation
    batch_size: int = 256  # rows per update
    run_dir: str = ""  # where the run goes; default runs/ENV_ID/reference_sac_sSEED_DATE-TIME


def refuse(message):
    """Print one line and exit with code 2."""
    print(f"reference_sac.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(args):
    run = Path(args.run_dir or f"runs/{args.env_id}/reference_sac_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    for name in ("total_steps", "learning_starts", "eval_every", "eval_episodes", "batch_size"):
        if getattr(args, name) < 1:
            refuse(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if run.exists():
        refuse(f"--run-dir {run}: exists already")
    try:
        env, eval_env = gym.make(args.env_id), gym.make(args.env_id)
    except gym.error.Error as error:
        refuse(f"--env-id {args.env_id}: cannot be made ({error})")
    if not importlib.util.find_spec("stable_baselines3"):
        refuse("needs the package stable-baselines3 (benchmarks/requirements.txt)")
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    def evaluate(model, episode):
        obs, _ = eval_env.reset(seed=args.seed + 10_000 + episode)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = eval_env.step(model.predict(obs, deterministic=True)[0])
            total, over = total + reward, terminated or truncated
        return total

    class Evaluation(BaseCallback):
        def _on_training_start(self):
            self.clock, self.before = time.perf_counter(), 0

        def _on_step(self):
            if self.num_timesteps % args.eval_every == 0 or self.num_timesteps == args.total_steps:
                score = np.mean([evaluate(self.model, episode) for episode in range(args.eval_episodes)])
                speed = (self.num_timesteps - self.before) / (time.perf_counter() - self.clock)
                table.writelines([f"{self.num_timesteps},0,eval/return,{score:.6g}\n",
                                  f"{self.num_timesteps},-1,time/sps,{speed:.6g}\n"])
                print(f"step {self.num_timesteps}: return {score:.1f}, {speed:.0f} steps per second", flush=True)
                self.clock, self.before = time.perf_counter(), self.num_timesteps
            return True

    model = SAC("MlpPolicy", env, learning_rate=3e-4, buffer_size=args.total_steps, learning_starts=args.learning_starts,
                batch_size=args.batch_size, tau=0.005, gamma=0.99, ent_coef="auto", target_entropy="auto",
                policy_kwargs={"net_arch": [256, 256]}, seed=args.seed, device="cpu")
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    with (run / "metrics.csv").open("w", buffering=1) as table:
        table.write("step,trial,metric,value\n")
        model.learn(args.total_steps, callback=Evaluation())
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
