"""Tasks of the experiments, for any script: --env-id benchmarks.tasks:NoisyHalfCheetah-v4, in the repository's folder.

    RiskyEdge-v0         a rewarding edge beside deadly ones, under noisy moves
    NoisyTASK-v4         MuJoCo's task, with noise N(0, 0.3²) on the action, so that its dynamics are random
    PositionsTASK        the task without its velocities and forces
    StackedTASK          the same, its last four observations side by side: what an agent without memory can have
    DoubleIntegrator-v0  a mass on a line between two walls; only its position is seen, with noise

The risky edge: s' = s + a + N(0, 0.5²) in the box [-7, 7]², −0.1 per step, 100 steps from the centre. Leaving to the
left, right or top costs 100; leaving at the bottom pays 100 |x| / 7: the most in the corners, a step away from what
costs most. An optimist goes for the corner, a cautious agent leaves where it pays less.
"""

import gymnasium as gym
import numpy as np

SIZE, NOISE, STEP_REWARD, FALL, PRIZE = 7.0, 0.5, -0.1, -100.0, 100.0  # of the risky edge
ACTION_NOISE = 0.3  # standard deviation, where actions reach from -1 to 1
# Tasks whose observation is so many positions (sines and cosines too) followed by velocities and forces.
POSITIONS = {"Pendulum": 2, "MountainCarContinuous": 1, "InvertedPendulum": 2, "InvertedDoublePendulum": 5, "Hopper": 5,
             "Walker2d": 8, "HalfCheetah": 8, "Swimmer": 3, "Ant": 13}


def exit_reward(x, y):
    """What leaving at (x, y) pays, by the edge that is crossed furthest; 0 inside. Arrays of one shape."""
    beyond = np.stack([-x, x, y, -y]) - SIZE  # left, right, top, bottom
    pays = np.where(beyond.argmax(0) == 3, PRIZE * np.minimum(np.abs(x), SIZE) / SIZE, FALL)
    return np.where(beyond.max(0) > 0, pays, 0.0)


class RiskyEdge(gym.Env):
    """Observation: the position (2,); action: the move (2,) in [-1, 1]."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.zeros(2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + np.clip(action, -1, 1) + NOISE * self.np_random.normal(size=2)
        left = bool(np.abs(self.position).max() > SIZE)
        return self.position.astype(np.float32), STEP_REWARD + float(exit_reward(*self.position)), left, False, {}


class DoubleIntegrator(gym.Env):
    """A mass pushed by the action (1,) towards 0, whose position (1,) is seen with noise."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    dt, force, noise, start, wall = 0.2, 4.0, 0.05, (1.0, 0.5), 5.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.normal(0, self.start)
        return self.observe(), {}

    def observe(self):
        return np.array([self.position + self.noise * self.np_random.normal()], np.float32)

    def step(self, action):
        push = float(np.clip(action[0], -1, 1))
        reward = -(self.position**2 + 0.1 * self.velocity**2 + 0.05 * push**2)
        self.position += self.dt * self.velocity + 0.5 * self.dt**2 * self.force * push
        self.velocity += self.dt * self.force * push
        if abs(self.position) > self.wall:
            self.position, self.velocity = float(np.copysign(self.wall, self.position)), 0.0
        return self.observe(), reward, False, False, {}


def noisy(task, **kwargs):
    """Noise on the action before the step, from the task's own generator; what leaves the bounds is clipped."""
    env = gym.make(task, **kwargs)
    space = env.action_space

    def disturb(action):
        noise = ACTION_NOISE * (space.high - space.low) / 2 * env.np_random.normal(size=space.shape)
        return np.clip(action + noise, space.low, space.high).astype(space.dtype)

    return gym.wrappers.TransformAction(env, disturb, space)


def positions(task, **kwargs):
    """Only the first numbers of the observation."""
    env, shown = gym.make(task, **kwargs), slice(POSITIONS[task.rpartition("-v")[0]])
    space = env.observation_space
    space = gym.spaces.Box(space.low[shown], space.high[shown], dtype=space.dtype)
    return gym.wrappers.TransformObservation(env, lambda obs: obs[shown], space)


def stacked(task, **kwargs):
    return gym.wrappers.FrameStackObservation(positions(task, **kwargs), 4)


gym.register("RiskyEdge-v0", RiskyEdge, max_episode_steps=100)
gym.register("DoubleIntegrator-v0", DoubleIntegrator, max_episode_steps=50)
for name in ("InvertedPendulum-v4", "Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"):
    gym.register(f"Noisy{name}", noisy, kwargs={"task": name})
for name in [name for name in gym.registry if name.rpartition("-v")[0] in POSITIONS]:
    gym.register(f"Positions{name}", positions, kwargs={"task": name})
    gym.register(f"Stacked{name}", stacked, kwargs={"task": name})
