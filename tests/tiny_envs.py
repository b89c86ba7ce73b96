"""Environments whose numbers are known in advance; `tiny_envs:Counter-v0` and so on. Importing registers them."""

import os
import signal

import gymnasium as gym
import numpy as np

LOW, HIGH = -2.0, 6.0  # bounds of the action, so that rescaling shows


class Counter(gym.Env):
    """Observation (1000 seed + 100 episode + step, action received); reward: the step; odd episodes terminate at step 5."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(LOW, HIGH, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.total = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.base, self.episode = 1000 * (seed % 10_000), -1  # float32 holds it
        self.episode, self.count, self.received = self.episode + 1, 0, 0.0
        return self.observe(), {}

    def observe(self):
        return np.array([self.base + 100 * self.episode + self.count, self.received], np.float32)

    def step(self, action):
        self.total, self.count, self.received = self.total + 1, self.count + 1, float(action[0])
        return self.observe(), float(self.count), self.episode % 2 == 1 and self.count == 5, False, {}

    def render(self):
        return np.full((64, 64, 3), 20 * self.count, np.uint8)


class NanObservation(Counter):
    """An observation that is not a number in step 33 of every environment."""

    def observe(self):
        return super().observe() * (np.nan if self.total == 33 else 1)


class InfFinalObservation(Counter):
    """An infinite observation in step 31; infinity, too, is not a finite number."""

    def step(self, action):
        obs, *others = super().step(action)
        return obs + (np.inf if self.total == 31 else 0), *others


class NanResetObservation(Counter):
    """An observation that is not a number after the reset that follows step 15, and only there."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs * (np.nan if self.total == 15 else 1), info


class NanReward(Counter):
    """A reward that is not a number in step 33 of every environment."""

    def step(self, action):
        obs, reward, *others = super().step(action)
        return obs, np.nan if self.total == 33 else reward, *others


class Signal(Counter):
    """The process receives the signal TINY_SIGNAL, if set, in step 33."""

    def step(self, action):
        if self.total + 1 == 33 and "TINY_SIGNAL" in os.environ:
            signal.raise_signal(int(os.environ["TINY_SIGNAL"]))
        return super().step(action)


class Endless(Signal):
    """Neither ends nor has a time limit."""

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, False, truncated, info


class HugeReward(Counter):
    """A reward in step 33 that is finite, but not as a float32."""

    def step(self, action):
        obs, reward, *others = super().step(action)
        return obs, 1e39 if self.total == 33 else reward, *others


class NoRenderer(Counter):
    """Knows no render_mode."""

    metadata = {}

    def __init__(self):
        super().__init__()


class NeedsPackage(Counter):
    """A task whose renderer lacks its package."""

    def render(self):
        raise gym.error.DependencyNotInstalled("something is not installed, run `pip install something`")


class NoPicture(Counter):
    """A renderer that gives nothing."""

    def render(self):
        return None


class Sequence(Counter):
    """Observations of any length."""

    observation_space = gym.spaces.Sequence(gym.spaces.Box(-np.inf, np.inf, (1,)))


class Dictionary(Counter):
    """The counter's observation as a dictionary."""

    observation_space = gym.spaces.Dict(
        {"count": gym.spaces.Box(-np.inf, np.inf, (1,)), "received": gym.spaces.Box(-np.inf, np.inf, (1,))}
    )

    def observe(self):
        count, received = super().observe()
        return {"count": np.array([count]), "received": np.array([received])}


class Unbounded(Counter):
    """Actions without bounds."""

    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Integer(Counter):
    """Whole numbers as actions."""

    action_space = gym.spaces.Box(-2, 6, (1,), np.int64)


class Degenerate(Counter):
    """An action that cannot move."""

    action_space = gym.spaces.Box(1.0, 1.0, (1,), np.float32)


class Scalar(Counter):
    """An action that is a number, not a vector."""

    action_space = gym.spaces.Box(LOW, HIGH, (), np.float32)


class Image(Counter):
    """Frames of a video game as observations."""

    observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)

    def observe(self):
        return np.zeros((210, 160, 3), np.uint8)


class FailingReset(Counter):
    """A simulator that does not start."""

    def reset(self, **kwargs):
        raise ValueError("no simulator")


class OldStep(Counter):
    """A step of the old gym: four values."""

    def step(self, action):
        return super().step(action)[:4]


def ends_above(obs, action, next_obs):
    """A rule of termination, for --termination-fn."""
    return next_obs[..., 1] > 2


def ends_in_numpy(obs, action, next_obs):
    """A rule that forgets tensors."""
    return next_obs[..., 1].numpy() > 2


def ends_by_state(next_obs):
    """A rule that asks for less than it is given."""
    return next_obs[..., 1] > 2


for kind in (Counter, NanObservation, InfFinalObservation, NanResetObservation, NanReward, HugeReward, Signal, Dictionary,
             NoRenderer, NeedsPackage, NoPicture, Sequence, Unbounded, Integer, Degenerate, Scalar, Image, FailingReset,
             OldStep):
    gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=7)
gym.register("Endless-v0", Endless)
