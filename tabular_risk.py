# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "tyro==1.0.17", "matplotlib==3.11.2"]
# ///
"""The exact world of β-VMBPO: what its risk parameter β does in small decision processes, solved exactly and learned.

After "Risk-Sensitive Variational Model-Based Policy Optimization", whose equation numbers are used. A small β > 0
believes in luck, β = ∞ is value iteration, β < 0 fears the worst.

  V(s) = log E_π exp Q(s, a)                                            (2)
  Q(s, a) = r(s, a) / β + log E_p exp V(s')                             (3), (5)
  q(s'|s, a) ∝ p(s'|s, a) exp V(s')                                     (4): what the agent believes will follow
  q(a|s) ∝ π(a|s) exp Q(s, a)                                           the minimum of (13)
  β log p_π(O; β) = β log E exp(Σ r / β) ≥ E_q Σ r - β KL(q‖p_π)        (6), (7)
  J(β) = β ε - β KL(q(s'|s, a)‖p(s'|s, a))                              (9): β rises while KL > ε
  T Q(s, a) = r(s, a) / β + γ log E_p,π exp Q(s', a')                   (15); T*: the maximum over a' in place of π

Deviations, each explained in docs/tabular_risk.md; tests/test_tabular_risk.py has the counterexamples
1. γ is missing in (2)-(7) and stands before the logarithm in (15). Thm. 4.1 and Lemma 4.1 need γ < 1.
2. For β < 0 Lemma 4.1 and Thm. 4.2-4.4 need a minimum, and (7) bounds from above. (7) is tight for one start state.
3. The cliff costs -100 through a state "fallen", so that the reward stays r(s, a) and the risk sits in the dynamics.
4. Prior and variational policy are one, the greedy one (Thm. 4.4): V is the maximum. Half of all actions are random.
5. Rewards are known, the model is counts, q their exact twist (4), and the target of (12) its mean over q: less noise.
6. Imagination starts in real states and lasts one step (Algorithm 1). Learners hold the Q of (5), not that of C.3.
7. Dual steps: log β moves by 5e-4 · clip(KL / ε - 1, -1, 1) per episode, KL the mean over imagined steps.
8. For speed 100 episodes of a trial run side by side and add their updates of Q.

  python tabular_risk.py                                    # Fig. 1 in a second: the arm flips at β = 5 / ln 9 = 2.2756
  python tabular_risk.py --figure all --out-dir runs/all    # all figures, ten trials: 3 minutes on one core
  python tabular_risk.py --figure learning --mdp my.npz     # a process of one's own (see make_mdp)
"""

import contextlib
import csv
import itertools
import os
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

SCRIPT = Path(__file__).stem
HORIZON, EXPLORE = 200, 0.5  # steps of an episode, chance of a random action
CURVES = "return", "falls", "beta", "kl"  # what learners' curves show

# The states that may follow a state and action stand in successor (S, A, K), their probabilities in probability; spare
# places have probability 0. So ten thousand states fit into memory. reward (S, A); start (S,) probabilities; hazard
# (S,) bool: to enter such a state counts as a fall. An end is a state that leads to itself with reward 0.
Mdp = namedtuple("Mdp", "successor probability reward start hazard gamma")

# ---------------------------------------------------------------- exact solvers
# Values are in reward units: β times those of eq. (5) and (15), as in Appendix C.3. So the greedy action is an argmax
# for either sign of β. At small |β|, on the cliff from -3.2 to 2, rounding hides which is best. `beta`: number, array.
def twist(value, prob, beta, axis=-1):
    """Exponential twisting of `prob` by `value`, both (..., K), along `axis`; `beta`, of either sign, broadcasts.

    Returns the posterior q ∝ p exp(v/β), (..., K), the certainty equivalent β log E_p exp(v/β), (...), and KL(q‖p) in
    nats, (...). At β = ±∞ these are p, the mean and 0. Stable from |β| = 1e-2 on, without loss of digits at large β.
    """
    exponent = value / beta
    top = np.where(prob > 0, exponent, -np.inf).max(axis, keepdims=True)
    gap = np.minimum(exponent - top, 0)  # a spare place may lie above top
    change = prob * np.expm1(gap)  # p exp(gap) is p + change; at large β the change alone keeps its digits
    excess = change.sum(axis, keepdims=True)
    posterior = (prob + change) / (1 + excess)
    log_mean = np.log1p(excess)
    kl = ((posterior * gap).sum(axis, keepdims=True) - log_mean).clip(min=0)
    neutral = np.isinf(beta)
    finite_beta = np.where(neutral, 0, beta)  # ∞ · 0 is not a number
    mean = (prob * value).sum(axis, keepdims=True)
    certain = np.where(neutral, mean, finite_beta * (top + log_mean))
    return posterior, certain.squeeze(axis), kl.squeeze(axis)

def posterior_dynamics(mdp, value, beta):
    """From V (..., S): q(s'|s,a) in successor places (..., S, A, K), certainty equivalents and KL(q‖p), (..., S, A)."""
    return twist(value[..., mdp.successor], mdp.probability, np.asarray(beta, float)[..., None, None, None])  # eq. (4)

def posterior_policy(q_value, policy, beta):
    """q(a|s) ∝ π(a|s) exp(Q(s,a)/β), (..., S, A), V(s) and KL(q‖π), both (..., S)."""
    return twist(q_value, policy, np.asarray(beta, float)[..., None, None])  # eq. (2), and the minimum of eq. (13)

def backup(mdp, value, beta):
    """The risk-sensitive operator: `value` (..., S) to Q (..., S, A)."""
    return mdp.reward + mdp.gamma * posterior_dynamics(mdp, value, beta)[1]  # eq. (5), (15), times β

def greedy(q_value):
    """The deterministic policy (..., S, A) that takes the best action, the first of equals."""
    return np.eye(q_value.shape[-1])[q_value.argmax(-1)]

def soft_value_iteration(mdp, beta, policy=None, sweeps=100_000):
    """Q (..., S, A) of `policy`, or of the best one: value iteration at β = ∞. Raises ValueError if none is found."""
    q_value = np.zeros(np.shape(beta) + mdp.reward.shape)
    for _ in range(sweeps):
        value = q_value.max(-1) if policy is None else posterior_policy(q_value, policy, beta)[1]
        previous, q_value = q_value, backup(mdp, value, beta)  # Lemma 4.1 without a policy, Thm. 4.1 with one
        need(np.isfinite(q_value).all(), "values are not finite: beta must not be 0 or nan, rewards must not overflow")
        if (np.abs(q_value - previous) <= 1e-12 * (1 + np.abs(q_value))).all():
            return q_value
    raise ValueError(f"no fixed point in {sweeps} sweeps: gamma must be below 1, or every policy must come to an end")

def policy_iteration(mdp, beta, policy):
    """Yields policies (..., S, A), each with its Q and better than the last one, up to the best."""
    while True:  # Thm. 4.3
        q_value = soft_value_iteration(mdp, beta, policy)
        yield policy, q_value
        # a choice within rounding of the best one stays, so that ties cannot make the iteration cycle
        previous, policy = policy, greedy(q_value + 1e-9 * (1 + np.abs(q_value)) * policy)  # Thm. 4.2
        if (policy == previous).all():
            return

def log_marginal(mdp, policy, beta, horizon):
    """β log p_π(O_1:T; β) of `horizon` undiscounted steps, (...), and its stage values (horizon + 1, ..., S)."""
    values = [np.zeros(np.shape(beta) + (len(mdp.start),))]
    for _ in range(horizon):
        q_value = mdp.reward + posterior_dynamics(mdp, values[0], beta)[1]  # eq. (3)
        values.insert(0, posterior_policy(q_value, policy, beta)[1])
    return twist(values[0], mdp.start, np.asarray(beta, float)[..., None])[1], np.stack(values)  # eq. (1), (6)

def visits(mdp, policy, gamma=1.0):
    """Expected, discounted visits to each pair (..., S, A) in HORIZON real steps of `policy` (..., S, A)."""
    states = len(mdp.start)
    flow = (policy[..., None] * mdp.probability).reshape(-1, states, mdp.successor[0].size)
    target = np.arange(len(flow))[:, None] * states + mdp.successor.ravel()
    share, total = np.tile(mdp.start, (len(flow), 1)), 0.0
    for step in range(HORIZON):
        total = total + gamma**step * share
        share = np.bincount(target.ravel(), (share[..., None] * flow).ravel(), share.size).reshape(share.shape)
    return total.reshape(*policy.shape[:-1], 1) * policy

def real_outcome(mdp, policy):
    """Discounted return and falls of a real episode of `policy` (..., S, A), computed, not sampled; (...) each."""
    fall = (mdp.probability * mdp.hazard[mdp.successor]).sum(-1)
    gains = visits(mdp, policy, mdp.gamma) * mdp.reward, visits(mdp, policy) * fall
    return [gain.sum((-1, -2)) for gain in gains]

# ---------------------------------------------------------------- learners from sampled episodes
def learn(mdp, method, episodes, trials=10, beta=1.0, kl_budget=0.001, q_init=0.0, seed=1, actors=100,
          learning_rate=0.01, beta_lr=5e-4, evals=40):
    """Runs "q-learning", "vmbpo", "beta-vmbpo" or "mnm"; `beta`, its start in β-VMBPO, may be one number per trial.

    In every step an actor acts in the real world; the model-based methods count what follows, and take one step from
    the same state in their imagination, with the posterior of the counted model. Returns arrays: "episode" (n,), with
    n at most evals + 1; at each of these, (n, trials), "return" and "falls" of the greedy policy in the real world,
    "beta", and "kl", the mean over imagined steps that eq. (9) sees; at the end "q" (trials, S, A). MnM raises
    ValueError at a reward ≤ 0.
    """
    need(method in METHODS, f"no method {method}: there are {', '.join(METHODS)}")
    states, choices, places = mdp.successor.shape
    rows, walkers = trials * states, trials * actors
    first_row = np.repeat(np.arange(trials) * states, actors)  # of each walker's trial
    rng = np.random.default_rng(seed)
    # successor places come first in these tables: sums over a leading axis are what NumPy does fastest
    successor, probability = (each.reshape(-1, places).T.copy() for each in (mdp.successor, mdp.probability))
    worlds = 1 if method == "q-learning" else 2  # real, imagined
    reward = mdp.reward.ravel()
    if method == "mnm":
        need((reward > 0).all(), "MnM takes the logarithm of the reward: it must be positive")
        reward = (1 - mdp.gamma) * np.log(reward)  # as MnM's authors have it
    q_value = np.full((choices, rows), q_init, float)
    table = q_value.reshape(choices, trials, states).transpose(1, 2, 0)  # the same memory as (trials, S, A)
    value = q_value.max(0)
    counts = np.zeros((places, rows * choices))
    log_beta = np.log(np.ones(trials) * beta)
    mean_kl = np.zeros(trials)
    seen = []
    for episode in range(0, episodes + 1, actors):
        if episode // actors in np.linspace(0, episodes // actors, evals + 1).astype(int):
            gain, falls = real_outcome(mdp, greedy(table))
            seen.append({"episode": episode, "return": gain, "falls": falls, "beta": np.exp(log_beta), "kl": mean_kl})
        if episode == episodes:
            break
        state = mdp.start.cumsum().searchsorted(rng.random(walkers), side="right").clip(max=states - 1)
        walker_beta = np.repeat(np.exp(log_beta), actors)
        kl_sum, kl_count = np.zeros(trials), np.zeros(trials)
        for luck, wind in rng.random((HORIZON, 2, worlds, walkers), dtype=np.float32):
            # act: luck decides what is done in each world, wind[0] what follows in the real one; wind[1] is not used
            row = first_row + state
            best_choice = q_value.take(row, axis=1).argmax(0)
            any_choice = (luck * (choices / EXPLORE)).astype(int).clip(max=choices - 1)
            choice = np.where(luck < EXPLORE, any_choice, best_choice)
            pair = state * choices + choice
            place = (wind[0] >= probability.take(pair[0], axis=1).cumsum(0)[:-1]).sum(0)
            after = successor[place, pair[0]]
            if method == "q-learning":
                future, known = value[first_row + after], 1.0
            else:
                np.add.at(counts, (place, first_row * choices + pair[0]), 1.0)  # remember
                # imagine; a choice that was never tried has no model, and nothing is learned of it
                prior = counts.take(first_row * choices + pair[1], axis=1)
                known = prior.any(0)
                prior[0] += ~known
                follow = first_row + successor.take(pair[1], axis=1)
                _, future, kl = twist(value.take(follow), prior / prior.sum(0), 1.0, axis=0)  # eq. (4), of values / β
                kl_sum += kl.reshape(trials, actors).sum(1)
                kl_count += known.reshape(trials, actors).sum(1)
            # learn of the imagined step, in Q-learning of the real one
            entry = choice[-1], row
            error = reward[pair[-1]] / walker_beta + mdp.gamma * future - q_value[entry]  # eq. (5), (12)
            np.add.at(q_value, entry, learning_rate * known * error)
            value[row] = q_value.take(row, axis=1).max(0)
            state = after
        mean_kl = kl_sum / np.maximum(kl_count, 1)
        if method == "beta-vmbpo":
            # the gradient of eq. (9) is ε - KL: descent raises β where the posterior has strayed too far
            log_beta = log_beta + beta_lr * actors * np.clip(mean_kl / kl_budget - 1, -1, 1)  # eq. (8), (9)
            log_beta = log_beta.clip(np.log(1e-2), np.log(1e7))  # the upper limit is that of Appendix C.4
    return {key: np.array([at[key] for at in seen]) for key in seen[0]} | {"q": table}

# ---------------------------------------------------------------- the paper's processes; gamma: 0.9 if none is given
SIZE, GOAL = 10, 9  # side of the grid, its goal
MOVES = np.array([[-1, 0], [0, -1], [1, 0], [0, 1]])  # up, left, down, right as (row, column)
CELLS = np.arange(SIZE * SIZE)
ROW, COL = np.divmod(CELLS, SIZE)
BLOCK = (ROW <= 5) & (COL >= 4) & (COL <= 5)  # a wall, or the cliff

def risky_arm():
    """Fig. 1: S goes left to L (-5 follows), or right to A with probability .9 (-10 follows) or B (0); gamma 1."""
    start, arm_a, arm_b, arm_l, end = range(5)
    transition = np.zeros((5, 2, 5))
    transition[start, 0, arm_l] = 1
    transition[start, 1, [arm_a, arm_b]] = 0.9, 0.1
    transition[[arm_a, arm_b, arm_l, end], :, end] = 1
    return make_mdp(np.outer([0, -10, 0, -5, 0], [1, 1]), start, transition, gamma=1.0)

def grid_landing(cliff):
    """Where each of MOVES leads from each cell if it succeeds, (cells, 4); the number after the cells is "fallen"."""
    row, column = np.clip([ROW[:, None] + MOVES[:, 0], COL[:, None] + MOVES[:, 1]], 0, SIZE - 1)
    target = row * SIZE + column
    return np.where(BLOCK[target], len(CELLS) if cliff else CELLS[:, None], target)

def grid_world(cliff):
    """The 10x10 grid of Eysenbach et al. (2022); with `cliff`, that of Fig. 2 and 3.

    An action moves its way with probability .5, else any of four ways. A block (rows 0-5, columns 4-5) is a wall,
    or a cliff: stepping in leads to state 100, "fallen", which costs -100 and leads to the start.
    """
    one_hot = np.eye(len(CELLS) + cliff)[grid_landing(cliff)]
    transition = 0.5 * one_hot + 0.5 * one_hot.mean(1, keepdims=True)
    reward = np.full((len(CELLS), 4), 0.001)
    reward[GOAL] = 10
    if cliff:
        transition = np.concatenate([transition, np.tile(np.arange(len(CELLS) + 1) == 0, (1, 4, 1))])
        reward = np.concatenate([reward, np.full((1, 4), -100)])
    return make_mdp(reward, 0, transition, hazard=np.arange(len(reward)) == len(CELLS))

def risk_line():
    """The 1x3 risk test of Eysenbach et al. (2022, Fig. 3a), start in the middle: the left end pays 50 and holds,
    the right end pays 51 but slips back to the middle with probability .5; the middle pays .001."""
    transition = np.zeros((3, 2, 3))
    transition[range(3), 0, [0, 0, 1]] = 1  # left
    transition[range(2), 1, [1, 2]] = 1  # right
    transition[2, 1, [1, 2]] = 0.5
    return make_mdp(np.outer([50, 0.001, 51], [1, 1]), 1, transition)

# -------------------- Below: a process of one's own, figures, the command line. --------------------
def need(condition, message):
    if not condition:
        raise ValueError(message)

def make_mdp(reward, start, transition, hazard=None, gamma=0.9):
    """An `Mdp` from a dense `transition` (S, A, S); `start` is a state or a distribution (S,). Raises ValueError."""
    for name, given in (("reward", reward), ("start", start), ("transition", transition), ("gamma", gamma)):
        need(np.asarray(given).dtype.kind in "biuf", f"{name} must hold real numbers")
    reward, start, transition = np.asarray(reward, float), np.asarray(start), np.asarray(transition, float)
    need(reward.ndim == 2 and reward.size and (abs(reward) < 1e100).all(), "reward must be (states, actions), < 1e100")
    states, actions = reward.shape
    need(transition.shape == (states, actions, states), f"transition must be {states} x {actions} x {states}")
    need(((transition == 0) | (transition > 1e-9)).all() and np.allclose(transition.sum(-1), 1, rtol=0, atol=1e-6),
         "transition probabilities must be 0 or above 1e-9, not negative, finite, and sum to 1 in every row")
    most = (transition > 0).sum(-1).max()
    successor = (transition == 0).argsort(-1, kind="stable")[..., :most]
    probability = np.take_along_axis(transition, successor, -1)
    if start.ndim == 0 and start in range(states):
        start = np.arange(states) == start
    need(start.shape == (states,) and (start >= 0).all() and abs(start.sum() - 1) < 1e-6,
         f"start must be a state 0 to {states - 1}, or {states} probabilities that sum to 1")
    hazard = np.zeros(states) if hazard is None else np.asarray(hazard)
    need(hazard.shape == (states,) and np.isin(hazard, (0, 1)).all(), f"hazard must be {states} values 0 or 1")
    need(np.ndim(gamma) == 0 and 0 <= gamma <= 1, "gamma must be a number from 0 to 1")
    probability = probability / probability.sum(-1, keepdims=True)
    return Mdp(successor, probability, reward, start / start.sum(), hazard.astype(bool), float(gamma))

def load_mdp(path):
    """The process in an .npz file that holds arguments of `make_mdp`, gamma up to .999."""
    try:
        mdp = make_mdp(**np.load(path))
        need(mdp.gamma <= 0.999, "gamma must be at most 0.999, or the solvers take forever")
        return mdp
    except Exception as error:  # a file can be wrong in many ways
        reason = "it holds something else than numbers" if "pickle" in str(error) else error  # NumPy of text, objects
        fail(f"--mdp {path}: must be an .npz file with the arrays of make_mdp ({reason})")

# ---------------------------------------------------------------- figures: a picture, the rows of a csv file, a table
METHODS = {"q-learning": ("Q-learning", "tab:blue", "o"), "vmbpo": ("VMBPO (β = 1)", "tab:red", "s"),
           "beta-vmbpo": ("β-VMBPO", "tab:green", "^"), "mnm": ("MnM", "tab:orange", "x")}  # label, colour, marker
HEADER = ["world", "method", "beta_start", "episode", *(f"{key}_{x}" for key in CURVES for x in ("mean", "std"))]

def show_optimum(axis, mdp):
    value = real_outcome(mdp, greedy(soft_value_iteration(mdp, np.inf)))[0]
    axis.axhline(value, color="black", linestyle=":", label=f"risk-neutral optimum: {value:.4g}")
    axis.set_ylabel("return of the greedy policy")
    axis.yaxis.set_major_formatter("{x:g}")

def show_curve(axis, history, key, label, colour, marker="", **look):
    """The mean over the trials, and a band of one standard deviation."""
    episode, mean, std = history["episode"] / 1000, history[key].mean(1), history[key].std(1)
    axis.plot(episode, mean, color=colour, marker=marker, label=f"{label}: {mean[-1]:.4g} ± {std[-1]:.4f}", **look)
    axis.fill_between(episode, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel(f"thousand episodes\n(mean ± one standard deviation, {history[key].shape[1]} trials)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9, title="where it ends")

def curve_rows(history, *names):
    """The csv's rows of one learner: mean and standard deviation over the trials at every evaluation."""
    columns = [statistic(history[key], axis=1) for key in CURVES for statistic in (np.mean, np.std)]
    return [[*names, *numbers] for numbers in zip(history["episode"], *columns)]

def plot_risky_arm(args, mdp, figure):
    """Fig. 1: the two soft Q-values in S, and the posterior of what follows 'right', against β."""
    arm, flip = risky_arm(), 5 / np.log(9)
    beta = np.array([*np.geomspace(0.5, 50, 200), *(args.beta or (1, 2.5, 5, 10, 50))])  # 200 to draw, then the table
    q_value = soft_value_iteration(arm, beta)
    posterior, _, kl = posterior_dynamics(arm, q_value.max(-1), beta)
    axes = figure.subplots(1, 2)
    axes[0].plot(beta[:200], q_value[:200, 0], label=["left: −5 for certain", "right: −10 (0.9) or 0 (0.1)"])
    axes[1].plot(beta[:200], posterior[:200, 0, 1], label=["to A (−10)", "to B (0)"])
    axes[0].set(ylabel="soft Q in S, reward units", title=f"risky below β = 5 / ln 9 = {flip:.4f}")
    axes[1].set(ylabel="posterior of the step after 'right'", title="small β: optimism (in truth A 0.9, B 0.1)")
    for axis in axes:
        axis.axvspan(0.5, flip, color="mistyrose", label="the agent goes right")
        axis.axvspan(flip, 50, color="honeydew", label="the agent goes left")
        axis.set(xlabel="β", xscale="log", xlim=(0.5, 50))
        axis.legend()
    columns = np.column_stack([beta, q_value[:, 0], posterior[:, 0, 1], kl[:, 0, 1]])
    rows = [[*row, "right" if row[2] > row[1] else "left"] for row in columns]
    header = ["beta", "q_left", "q_right", "p_a", "p_b", "kl", "choice"]
    return [header, *rows[:200]], [header, *rows[200:]]

def plot_dynamics(args, mdp, figure):
    """Fig. 2: the dynamics of the action 'right', real and twisted, with the path of the greedy policy."""
    grid, landing, free = grid_world(cliff=True), grid_landing(cliff=True), CELLS[~BLOCK]
    betas = np.array([np.inf, *(args.beta or (1.0, 100.0))])
    q_value = soft_value_iteration(grid, betas)
    posterior, _, kl = posterior_dynamics(grid, q_value.max(-1), betas)
    policy = greedy(q_value)
    outcome = np.column_stack([*real_outcome(grid, policy), (visits(grid, policy) * kl).sum((-1, -2)) / HORIZON])
    axes, rows = figure.subplots(1, len(betas)), []
    for beta, axis, after, plan, ends in zip(betas, axes, posterior, policy.argmax(-1), outcome):
        path = [0]  # the cells that the intended moves visit, up to the goal or a cell met before
        while path[-1] != GOAL and (ahead := landing[path[-1], plan[path[-1]]]) not in (*path, len(CELLS)):
            path.append(ahead)
        axis.plot(COL[path], ROW[path], color="tab:blue", linewidth=5, alpha=0.35)
        there = grid.successor[CELLS, 3][:, None] == landing[..., None]  # (cells, 4, K)
        moved = (there * after[CELLS, 3][:, None]).sum(-1) * (landing != CELLS[:, None])  # chance of each way
        rows += [[beta, ROW[cell], COL[cell], *moved[cell], plan[cell], cell in path] for cell in free]
        for way in range(4):
            down, right = 0.85 * MOVES[way][:, None] * moved[free, way]
            colour = np.where(landing[free, way] == len(CELLS), "red", "dimgrey")
            axis.quiver(COL[free], ROW[free], right, down, color=colour, angles="xy", scale_units="xy", scale=1,
                        width=0.006, minlength=0.3)
        axis.fill_between([3.5, 5.5], -0.5, 5.5, color="black", alpha=0.75)
        for x, y, text, colour in ((4.5, 2.5, "cliff", "white"), (0, -0.75, "S", "black"), (9, -0.75, "G", "black")):
            axis.text(x, y, text, color=colour, ha="center", va="center", weight="bold")
        axis.set(title="real dynamics" if np.isinf(beta) else f"posterior dynamics, β = {beta:g}", aspect="equal",
                 xticks=[], yticks=[], xlim=(-0.7, 9.7), ylim=(9.6, -1.2),
                 xlabel="in reality: return {:.4g}, {:.3g} falls an episode".format(*ends))
    figure.supxlabel("Arrows: where the action 'right' leads, as long as it is likely; red: into the cliff (−100)."
                     "\nBlue: the way to the goal G that is best if these dynamics hold.", fontsize=11)
    header = ["beta", "row", "column", "p_up", "p_left", "p_down", "p_right", "greedy_action", "on_path"]
    return [header, *rows], [["beta", "return", "falls", "kl"], *np.column_stack([betas, outcome])]

def plot_learning(args, mdp, figure):
    """Fig. 3: three learners; β-VMBPO from several starts of β; β itself."""
    mdp, world = mdp or grid_world(cliff=True), args.mdp or "cliff"
    starts = args.beta or (100.0, 1.0, 10.0, 1000.0)  # the first one is drawn beside the other learners
    learners = [("q-learning", 1.0), ("vmbpo", 1.0), *(("beta-vmbpo", start) for start in starts)]
    axes, rows, table = figure.subplots(1, 3), [HEADER], [HEADER]
    axes[0].set_title("three learners")
    axes[1].set_title("β-VMBPO from several β")
    axes[2].set(title=f"its β, by dual descent on ε = {args.kl_budget:g}", ylabel="β", yscale="log")
    for axis in axes[:2]:
        axis.set_yscale("symlog", linthresh=0.2)  # linear near the optimum, logarithmic where policies fall
        show_optimum(axis, mdp)
    for index, (method, start) in enumerate(learners):
        history = learn(mdp, method, args.episodes, args.trials, start, args.kl_budget, seed=args.seed)
        rows += curve_rows(history, world, method, start)
        table.append(rows[-1])
        if index < 3:
            show_curve(axes[0], history, "return", *METHODS[method], markevery=5)
        if index > 1:
            show_curve(axes[1], history, "return", f"from β = {start:g}", f"C{index + 2}")
            show_curve(axes[2], history, "beta", f"from β = {start:g}", f"C{index + 2}")
    return rows, table

def plot_mnm(args, mdp, figure):
    """Fig. 6: four learners on the MnM grid, from an optimistic Q and from 0; and on MnM's risk test."""
    axes, rows, table = figure.subplots(1, 3), [HEADER], [HEADER]
    start = args.beta[0] if args.beta else 100.0
    tenth = -(-args.episodes // 1000) * 100  # in whole hundreds
    cases = (("MnM grid, initial Q = 0.1", grid_world(cliff=False), 0.1, args.episodes),
             ("MnM grid, initial Q = 0", grid_world(cliff=False), 0.0, args.episodes),
             ("risk test, initial Q = 0", risk_line(), 0.0, tenth))
    for axis, (title, world, q_init, episodes) in zip(axes, cases):
        axis.set_title(title)
        show_optimum(axis, world)
        for index, (method, look) in enumerate(METHODS.items()):
            beta = start if method == "beta-vmbpo" else 1.0
            history = learn(world, method, episodes, args.trials, beta, args.kl_budget, q_init, args.seed)
            show_curve(axis, history, "return", *look, markevery=(2 * index, 8), linewidth=5 - index)
            rows += curve_rows(history, title, method, beta)
            table.append(rows[-1])
    return rows, table

PLOTS = {"risky-arm": plot_risky_arm, "dynamics": plot_dynamics, "learning": plot_learning, "mnm": plot_mnm}

# ---------------------------------------------------------------- the command
@dataclass
class Args:
    """Small decision processes, solved and learned: the tabular figures of the beta-VMBPO paper."""

    figure: Literal[(*PLOTS, "all")] = "risky-arm"  # Fig. 1, 2, 3, 6 of the paper, or all of them
    mdp: str = ""  # .npz file with the arrays of make_mdp: a process of one's own, for learning
    out_dir: str = ""  # folder for results/*.csv and figures/*.png; empty: runs/tabular_risk/FIGURE_sSEED_DATE-TIME
    overwrite: bool = False  # replace results that out-dir already holds
    seed: int = 1  # seed of all random numbers
    trials: int = 10  # independent trials of each learner
    episodes: int = 40_000  # episodes of 200 steps per trial, a multiple of 100 (risk test of mnm: a tenth of them)
    beta: tuple[float, ...] = ()
    """values in the risky-arm table (empty: 1 2.5 5 10 50), panels of dynamics (1 100), starts of dual descent in
    learning (100 1 10 1000; the first is drawn beside the other learners), the one start in mnm (100)"""
    kl_budget: float = 0.001  # epsilon of eq. (8), nats a step

    def conflicts(self):
        """Yields the flags that cannot work, each with the rule."""
        for name, low, high in ("seed", 0, 1e9), ("trials", 1, 1000), ("episodes", 100, 1e9), ("kl_budget", 1e-12, 1e9):
            if not low <= getattr(self, name) <= high:
                yield name, f"must be {low:g} to {high:g}"
        if self.episodes % 100:
            yield "episodes", "must be a multiple of 100"
        exact = self.figure in ("risky-arm", "dynamics")
        if exact and not all(abs(beta) >= 1e-2 for beta in self.beta):
            yield "beta", "must be 0.01 to inf, or -inf to -0.01"
        if not exact and not all(1e-2 <= beta <= 1e7 for beta in self.beta):
            yield "beta", "must be 0.01 to 1e7"
        if len(self.beta) > 1 and self.figure in ("mnm", "all"):
            yield "beta", f"must be one number with --figure {self.figure}"
        if self.mdp and self.figure != "learning":
            yield "mdp", "works with --figure learning"

def fail(message, code=2):
    """Print one line and exit."""
    print(f"{SCRIPT}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)

def parse_args(argv):
    """Read the command line and refuse what cannot work. Returns the flags, --mdp's process or None, and the files."""
    args = tyro.cli(Args, args=argv)
    for name, rule in args.conflicts():
        value = " ".join(map(str, np.atleast_1d(getattr(args, name))))
        fail(f"--{name.replace('_', '-')} {value}: {rule}")
    mdp = load_mdp(args.mdp) if args.mdp else None
    folder = Path(args.out_dir or f"runs/{SCRIPT}/{args.figure}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    stems = {name: f"tabular_{name.replace('-', '_')}" for name in PLOTS if args.figure in (name, "all")}
    files = {name: (folder / f"results/{stem}.csv", folder / f"figures/{stem}.png") for name, stem in stems.items()}
    try:
        for path in itertools.chain(*files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            need(os.access(path.parent, os.W_OK), f"no permission to write to {path.parent}")
            need(args.overwrite or not path.exists(), f"it holds {path} already; --overwrite replaces it")
    except (OSError, ValueError) as error:
        fail(f"--out-dir {folder}: must be a folder to write to ({error})")
    return args, mdp, files

def main(argv):
    args, mdp, files = parse_args(argv)
    try:
        from matplotlib.figure import Figure
        for name, (csv_path, png_path) in files.items():
            figure = Figure(figsize=(14, 5.8), layout="constrained")
            rows, table = PLOTS[name](args, mdp, figure)
            with open(csv_path, "w", newline="") as file:
                file.write(f"# python tabular_risk.py {' '.join(argv)}\n")
                csv.writer(file, lineterminator="\n").writerows(map(as_text, rows))
            figure.savefig(png_path, dpi=110)
            lines = [" ".join(cell.rjust(10) for cell in as_text(row)) for row in table]
            with contextlib.suppress(BrokenPipeError):  # that nobody listens any more (`| head`) stops nothing
                print(f"\n{name}: {png_path}, {csv_path}", *lines, sep="\n", flush=True)
    except (ImportError, OSError, MemoryError, ValueError) as error:
        fail(error, code=1)

def as_text(row):
    return [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]

if __name__ == "__main__":
    main(sys.argv[1:])
