"""The exact world of β-VMBPO: what the risk parameter β does, in processes small enough to solve, and learned as well.

  V(s) = log E_π exp Q(s, a)                                            (2)
  Q(s, a) = r(s, a) / β + log E_p exp V(s')                             (3), (5)
  q(s'|s, a) ∝ p(s'|s, a) exp V(s'),  q(a|s) ∝ π(a|s) exp Q(s, a)       (4): what the agent believes to follow
  β log p_π(O; β) = β log E exp(Σ r / β) ≥ E_q Σ r - β KL(q‖p_π)        (6), (7)
  J(β) = β ε - β KL(q(s'|s, a)‖p(s'|s, a))                              (9): β rises while KL > ε
  T Q(s, a) = r(s, a) / β + γ log E_p,π exp Q(s', a')                   (15); T*: the maximum over a' in place of π

Small β believes in luck, β → ∞ is value iteration, β < 0 fears the worst. On the cliff grid the plan for β = 1 returns
-6.18 and falls 1.38 times an episode, the optimum returns 0.1155 and falls 0.15 times. Learned (40,000 episodes, ten
trials): β-VMBPO 0.1145 ± 0.0005, wherever β starts (1 to 1000 end at 165 to 167), Q-learning 0.094 ± 0.014, VMBPO
-7.9 ± 1.1 with 1.6 falls. MnM's risk test: VMBPO 316.6, the others 450. **Not as in the paper**: Fig. 6 left, MnM ends
at 1.387 like β-VMBPO, only later, and VMBPO (1.357) beside Q-learning (1.353); Fig. 6 right, Q-learning and VMBPO do
struggle (0.79 ± 0.64, 0.79 ± 0.63) and β-VMBPO gets 1.387, but MnM gets that too, and sooner.

**Deviations**, and the conditions on which the theory holds (tests/test_tabular_risk.py has the counterexamples)
1. γ is missing in eq. (2)-(7) and stands before the logarithm in eq. (15), whose value then exceeds the log-marginal of
   the discounted return; its penalty is β γ KL, not eq. (12)'s β KL. Thm. 4.1 and Lemma 4.1 need γ < 1.
2. For β < 0 Lemma 4.1 holds with a minimum over the paper's Q, and eq. (7) bounds from above. It is tight only for a
   single start state, since q(τ) keeps p(s_1). The other theorems hold as stated.
3. The cliff costs -100 through a state "fallen", so that the reward stays r(s, a) and the risk sits in the dynamics.
4. Prior and variational policy are one, the greedy one (Thm. 4.4): V is the maximum. The actor explores half the time.
5. Learners take the mean over q of eq. (12)'s target. One sample (`sampled`) has the same fixed point, but ends no
   better than Q-learning, whose steps of 0.01 carry the same noise: the lead is the model's, not that of β.
6. Imagination starts in real states and lasts one step (Algorithm 1, Table 1); MnM's authors imagine episodes. With
   `rollout=200` from β = 1 it never falls, so its stale idea of falling keeps the KL high, and β runs to its limit.
7. Q counts in units of β (eq. 5). Fig. 6 right rests on it: when β rises, all that is stored grows, hence exploration;
   with `reward_units` (Appendix C.3) β-VMBPO mostly fails there. But β must not move faster than Q can follow.
8. Dual steps: log β moves by 5e-4 · clip(KL / ε - 1, -1, 1) per episode, KL the mean over imagined steps; ε = 0.001.
9. Speed: 100 episodes of a trial run side by side and add their updates of Q; trials, starts, budgets: one array.
   Models are counts, q is their exact twist (4) in place of eq. (11)'s fit, rewards are known. Limits: 3,000 states
   dense, 10,000 x 4 actions x 16 successors listed.

  python tabular_risk.py                                    # Fig. 1 in a second: the arm flips at β = 5 / ln 9 = 2.2756
  python tabular_risk.py --figure all --out-dir benchmarks  # all figures, ten trials: 5 minutes on one core
  python tabular_risk.py --figure beta-sweep --mdp my.npz   # a process of one's own (see make_mdp)
"""

import contextlib
import csv
import io
import itertools
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.scale import SymmetricalLogScale

matplotlib.use("Agg")  # draws without a display
SCRIPT = Path(__file__).stem
FIGURES = "risky-arm", "dynamics", "learning", "mnm", "beta-sweep"
SIZE, GOAL, HORIZON, EXPLORE = 10, 9, 200, 0.5  # side of the grid, its goal, steps of an episode, ε of ε-greedy
MOVES = np.array([[-1, 0], [0, -1], [1, 0], [0, 1]])  # up, left, down, right as (row, column)
CELLS = np.arange(SIZE * SIZE)
ROW, COL = np.divmod(CELLS, SIZE)
BLOCK = (ROW <= 5) & (COL >= 4) & (COL <= 5)  # a wall, or the cliff

# ---------------------------------------------------------------- decision processes as arrays
# The states that may follow a pair are listed in successor (S, A, K), their probabilities in probability; spare places
# have probability 0. reward (S, A); start (S,) probabilities; terminal and hazard (S,) bool, where to enter a hazard
# counts as a fall. Dense rows of ten thousand states would fill the memory; sixteen successors of each pair do not.
Mdp = namedtuple("Mdp", "successor probability reward start terminal hazard gamma")

def make_mdp(reward, start, transition=None, successor=None, probability=None, terminal=None, hazard=None, gamma=0.9):
    """An `Mdp` from a dense `transition` (S, A, S), or from `successor` and `probability` (S, A, K).

    `start` is a state or a distribution (S,). Terminal states are made absorbing, with reward 0.
    Raises ValueError with one line that says which array is wrong and what is allowed.
    """
    def need(condition, message):
        if not condition:
            raise ValueError(message)

    reward, start = np.array(reward, float), np.asarray(start)
    need(reward.ndim == 2 and reward.size and np.isfinite(reward).all(), "reward must be finite, (states, actions)")
    states = len(reward)
    need((transition is None) == (successor is not None) == (probability is not None),
         "either transition, or successor and probability, must be given")
    if transition is not None:
        transition = np.asarray(transition, float)
        need(transition.shape == (*reward.shape, states), f"transition must have shape {(*reward.shape, states)}")
        most = max(1, (transition != 0).sum(-1).max())
        successor = (transition == 0).argsort(-1, kind="stable")[..., :most]
        probability = np.take_along_axis(transition, successor, -1)
    successor, probability = np.array(successor), np.array(probability, float)
    need(successor.shape == probability.shape and probability.shape[:-1] == reward.shape,
         f"successor and probability must have shape {reward.shape} + (successors,) to fit reward")
    need(np.isin(successor, np.arange(states)).all(), f"successor must hold states 0 to {states - 1}")
    need(((probability == 0) | (probability > 1e-9)).all() and np.allclose(probability.sum(-1), 1, rtol=0, atol=1e-6),
         "transition probabilities must be 0 or above 1e-9, not negative, finite, and sum to 1 in every row")
    if start.ndim == 0 and start in range(states):
        start = np.arange(states) == start
    need(start.shape == (states,) and (start >= 0).all() and abs(start.sum() - 1) < 1e-6,
         f"start must be a state 0 to {states - 1}, or {states} probabilities that sum to 1")
    terminal, hazard = (np.zeros(states) if mask is None else np.asarray(mask) for mask in (terminal, hazard))
    need(all(mask.shape == (states,) and np.isin(mask, (0, 1)).all() for mask in (terminal, hazard)),
         f"terminal and hazard must be {states} values 0 or 1")
    need(np.ndim(gamma) == 0 and 0 <= gamma <= 1, "gamma must be a number from 0 to 1")
    terminal, successor = terminal.astype(bool), successor.astype(int)
    successor[terminal], probability[terminal], reward[terminal] = np.nonzero(terminal)[0][:, None, None], 0.0, 0.0
    probability[terminal, :, 0] = 1.0
    probability /= probability.sum(-1, keepdims=True)
    return Mdp(successor, probability, reward, start / start.sum(), terminal, hazard.astype(bool), float(gamma))

def load_mdp(path):
    """An `Mdp` from an .npz file that holds arguments of `make_mdp`, gamma up to .999. Raises ValueError, one line."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mdp = make_mdp(**arrays)
        if mdp.gamma > 0.999:
            raise ValueError("gamma must be at most 0.999, or the solvers take forever")
    except Exception as error:  # a file can be wrong in many ways; each has to end in one line
        raise ValueError(" ".join(str(error).split())) from None
    return mdp

def risky_arm():
    """Fig. 1: S goes left to L (-5 follows), or right to A with probability .9 (-10 follows) or B (0); gamma 1."""
    start, arm_a, arm_b, arm_l, end = range(5)
    transition = np.zeros((5, 2, 5))
    transition[start, 0, arm_l] = 1
    transition[start, 1, [arm_a, arm_b]] = 0.9, 0.1
    transition[[arm_a, arm_b, arm_l, end], :, end] = 1
    return make_mdp(np.outer([0, -10, 0, -5, 0], [1, 1]), start, transition, terminal=np.arange(5) == end, gamma=1.0)

def grid_landing(cliff):
    """Where each of MOVES leads from each cell if it succeeds, (cells, 4); the number after the cells is "fallen"."""
    target = np.clip(ROW[:, None] + MOVES[:, 0], 0, SIZE - 1) * SIZE + np.clip(COL[:, None] + MOVES[:, 1], 0, SIZE - 1)
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
    transition[[0, 0, 1, 1, 2], [0, 1, 0, 1, 0], [0, 1, 0, 2, 1]] = 1
    transition[2, 1, [1, 2]] = 0.5
    return make_mdp(np.outer([50, 0.001, 51], [1, 1]), 1, transition)

# ---------------------------------------------------------------- exact solvers
# Values are in reward units: Q here is β times the paper's Q of eq. (5) and (15), the Q_2 of its Appendix C.3. Greedy
# is then an argmax for either sign of β, and β → ∞ is value iteration. `beta` is a number or an array (...), whose
# shape stands in front of every result: a whole sweep over β is one call.
def lift(beta, axes):
    """`beta` with as many axes of length one behind it."""
    beta = np.asarray(beta, float)
    return beta.reshape(beta.shape + (1,) * axes)

def twist(value, prob, beta, axis=-1):
    """Exponential twisting of `prob` by `value` along `axis`, for a risk parameter `beta` of either sign.

    Returns the posterior q ∝ p exp(v/β), the certainty equivalent β log E_p exp(v/β), and KL(q‖p) in nats.
    Stable for |β| from 1e-2 to 1e7: the largest exponent is taken out, and the sum kept as its difference from one,
    because at large β all that distinguishes q from p lies behind 1.000000.
    """
    gap = value / beta
    top = np.where(prob > 0, gap, -np.inf).max(axis, keepdims=True)
    gap = np.minimum(gap - top, 0)
    shrink = prob * np.expm1(gap)
    excess = shrink.sum(axis, keepdims=True)
    posterior = (prob + shrink) / (1 + excess)
    log_mean = np.log1p(excess)
    kl = ((posterior * gap).sum(axis, keepdims=True) - log_mean).clip(min=0)
    return posterior, (beta * (top + log_mean)).squeeze(axis), kl.squeeze(axis)

def posterior_dynamics(mdp, value, beta):
    """q(s'|s,a) over the successor places (..., S, A, K), certainty equivalents and KL(q‖p), both (..., S, A)."""
    return twist(value[..., mdp.successor], mdp.probability, lift(beta, 3))  # eq. (4)

def posterior_policy(q_value, policy, beta):
    """q(a|s) ∝ π(a|s) exp(Q(s,a)/β), (..., S, A): where eq. (13) is least."""
    return twist(q_value, policy, lift(beta, 2))[0]

def state_value(q_value, policy, beta):
    """V(s) = β log E_π exp(Q(s,a)/β), (..., S)."""
    return twist(q_value, policy, lift(beta, 2))[1]  # eq. (2)

def backup(mdp, value, beta):
    """The risk-sensitive operator: `value` (..., S) to Q (..., S, A)."""
    return mdp.reward + mdp.gamma * posterior_dynamics(mdp, value, beta)[1]  # eq. (15), times β

def greedy(q_value):
    """The deterministic policy (..., S, A) that takes the best action, of equals the first."""
    return np.eye(q_value.shape[-1])[q_value.argmax(-1)]

def fixed_point(operator, shape, sweeps=100_000):
    """Applies `operator` from 0 until nothing moves by more than 1e-12 of its size, or raises ValueError."""
    q_value = np.zeros(shape)
    for _ in range(sweeps):
        previous, q_value = q_value, operator(q_value)
        if (np.abs(q_value - previous) <= 1e-12 * (1 + np.abs(q_value))).all():
            return q_value
    raise ValueError(f"no fixed point in {sweeps} sweeps: gamma must be below 1, or every policy must come to an end")

def evaluate_policy(mdp, policy, beta):
    """Risk-sensitive policy evaluation (Thm. 4.1): Q of `policy` (..., S, A)."""
    return fixed_point(lambda q: backup(mdp, state_value(q, policy, beta), beta), np.shape(beta) + mdp.reward.shape)

def soft_value_iteration(mdp, beta):
    """Q of the optimal risk-sensitive policy (..., S, A), the fixed point of the operator in Lemma 4.1."""
    return fixed_point(lambda q: backup(mdp, q.max(-1), beta), np.shape(beta) + mdp.reward.shape)

def value_iteration(mdp):
    """Q of the ordinary, risk-neutral optimum (S, A): the limit of `soft_value_iteration` as β → ∞."""
    flow = mdp.gamma * mdp.probability
    return fixed_point(lambda q: mdp.reward + (flow * q.max(-1)[mdp.successor]).sum(-1), mdp.reward.shape)

def policy_iteration(mdp, beta, policy=None):
    """Policy iteration (Thm. 4.3): the last policy (..., S, A), its Q, and the state values of all on the way."""
    shape = np.shape(beta) + mdp.reward.shape
    policy = np.full(shape, 1 / shape[-1]) if policy is None else np.broadcast_to(policy, shape)
    values = []
    while True:
        q_value = evaluate_policy(mdp, policy, beta)
        values.append(state_value(q_value, policy, beta))
        # a choice within rounding of the best one stays, so that ties cannot make the iteration cycle
        improved = greedy(q_value + 1e-9 * (1 + np.abs(q_value)) * policy)  # Thm. 4.2
        if (improved == policy).all():
            return policy, q_value, values
        policy = improved

def log_marginal(mdp, policy, beta, horizon):
    """β log p_π(O_1:T; β) of `horizon` undiscounted steps, (...), and its stage values (horizon + 1, ..., S)."""
    values = [np.zeros(np.shape(beta) + (len(mdp.start),))]
    for _ in range(horizon):
        q_value = mdp.reward + posterior_dynamics(mdp, values[0], beta)[1]  # eq. (3)
        values.insert(0, state_value(q_value, policy, beta))
    return twist(values[0], mdp.start, lift(beta, 1))[1], np.stack(values)  # eq. (6)

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
    """What `policy` (..., S, A) comes to in a real episode, computed, not sampled: discounted return, falls, and steps
    at the edge (where a fall is one step away), each (...)."""
    often, soon = visits(mdp, policy), visits(mdp, policy, mdp.gamma)
    fall = (mdp.probability * mdp.hazard[mdp.successor]).sum(-1)
    gains = (soon * mdp.reward, often * fall, often * (fall.max(-1, keepdims=True) > 0))
    return [gain.sum((-1, -2)) for gain in gains]

# ---------------------------------------------------------------- learners from sampled episodes
def draw(prob, uniform):
    """One place per column from probabilities (K, walkers)."""
    total, place = prob[0].copy(), np.zeros(prob.shape[1], int)
    for slot in range(1, len(prob)):
        place += uniform >= total
        total += prob[slot]
    return place

def learn(mdp, method, episodes, trials=10, beta=1.0, kl_budget=0.001, q_init=0.0, seed=1, actors=100, rollout=1,
          sampled=False, reward_units=False, learning_rate=0.01, beta_lr=5e-4, explore=EXPLORE, evals=40):
    """Runs "q-learning", "vmbpo", "beta-vmbpo" or "mnm" for `episodes` in each of `trials` trials, all in one array.

    `beta`, `kl_budget` and `q_init` are numbers or one per trial (`beta` is fixed, but in β-VMBPO it is the start).
    In every step an actor acts in the real world; the model-based methods count what follows, and take one step in
    their imagination, with the posterior of the counted model, which restarts at the real state every `rollout` steps.
    Returns arrays: "episode" (evals + 1,); of the greedy policy in the real world "return", "falls" and "edge"; "beta";
    and "kl", the mean over imagined steps that eq. (9) sees, all (evals + 1, trials); and "q" (trials, S, A).
    Raises ValueError if MnM meets a reward that is not positive.
    """
    states, choices, places = mdp.successor.shape
    rows, pairs, gamma = trials * states, trials * states * choices, mdp.gamma
    rng = np.random.default_rng(seed)
    # successor places come first in these tables: sums over a leading axis are what NumPy does fastest
    successor, probability = (table.reshape(-1, places).T.copy() for table in (mdp.successor, mdp.probability))
    reward = mdp.reward.ravel()
    if method == "mnm":
        if (mdp.reward[~mdp.terminal] <= 0).any():
            raise ValueError("MnM takes the logarithm of the reward: every reward must be positive")
        reward = (1 - gamma) * np.log(np.where(mdp.terminal[:, None], 1.0, mdp.reward)).ravel()
    q_value = np.where(mdp.terminal, 0.0, lift(np.broadcast_to(q_init, trials), 1)).ravel() * np.ones((choices, 1))
    flat_q, value, counts = q_value.reshape(-1), q_value[0].copy(), np.zeros((places, pairs))
    log_beta, kl = np.log(np.ones(trials) * (np.nan if method == "q-learning" else beta)), np.zeros(trials)
    trial, walker = np.repeat(np.arange(trials), actors), np.arange(trials * actors)
    base = trial * states
    worlds = 1 if method == "q-learning" else 2  # real, imagined
    history = {key: [] for key in ("episode", "return", "falls", "edge", "beta", "kl")}
    for done in range(0, episodes + 1, actors):
        # evaluate
        if done // actors in np.linspace(0, episodes // actors, evals + 1).astype(int):
            policy = greedy(q_value.reshape(choices, trials, states).transpose(1, 2, 0))
            for key, entry in zip(history, (done, *real_outcome(mdp, policy), np.exp(log_beta), kl)):
                history[key].append(entry)
            if done == episodes:
                break
        first = mdp.start.cumsum().searchsorted(rng.random(len(walker)), side="right").clip(max=states - 1)
        state = np.stack([first] * worlds)
        beta_now, kl_sum, kl_count = np.exp(log_beta)[trial], np.zeros(trials), np.zeros(trials)
        # eq. (5) divides the reward by β; Appendix C.3 multiplies the KL by it instead
        scale, weight = (1.0, beta_now) if reward_units or method == "q-learning" else (beta_now, 1.0)
        for step, (luck, wind) in enumerate(rng.random((HORIZON, 2, worlds, len(walker)), dtype=np.float32)):
            if step % rollout == 0:
                state[-1] = state[0]
            # act: luck decides what is done, wind what follows
            best = q_value.take(base + state, axis=1)
            choice = (best == best.max(0)).argmax(0)
            choice = np.where(luck < explore, (luck * (choices / explore)).astype(int).clip(max=choices - 1), choice)
            pair = state * choices + choice
            place = draw(probability.take(pair[0], axis=1), wind[0])
            after, known = successor[place, pair[0]][None], 1.0
            if method == "q-learning":
                future = value[base + after[0]]
            else:
                # remember
                np.add.at(counts.reshape(-1), place * pairs + base * choices + pair[0], 1.0)
                # imagine; a choice that was never tried has no model: nothing is learned and the walker begins anew
                prior = counts.take(base * choices + pair[1], axis=1)
                total = prior.sum(0)
                known = total > 0
                prior[0] += ~known
                follow = successor.take(pair[1], axis=1)
                posterior, soft, kl = twist(value.take(base + follow), prior / np.maximum(total, 1), weight, axis=0)
                dream = np.where(known, follow[draw(posterior, wind[1]), walker], first)
                future = value[base + dream] - weight * kl if sampled else soft  # soft is the mean over q of the former
                after = np.stack([after[0], dream])
                kl_sum += kl.reshape(trials, actors).sum(1)
                kl_count += known.reshape(trials, actors).sum(1)
            # learn
            row = base + state[-1]
            entry = choice[-1] * rows + row
            error = reward[pair[-1]] / scale + gamma * future - flat_q[entry]  # eq. (12)
            np.add.at(flat_q, entry, learning_rate * known * error)
            value[row] = q_value.take(row, axis=1).max(0)
            state = after
        kl = kl_sum / np.maximum(kl_count, 1)
        if method == "beta-vmbpo":
            # the gradient of eq. (9) is ε - KL: descent raises β where the posterior has strayed too far
            log_beta = log_beta + beta_lr * actors * np.clip(kl / kl_budget - 1, -1, 1)  # eq. (9)
            log_beta = log_beta.clip(np.log(1e-2), np.log(1e7))
    history = {key: np.array(entries) for key, entries in history.items()}
    return history | {"q": q_value.reshape(choices, trials, states).transpose(1, 2, 0)}

# ---------------------------------------------------------------- figures
@dataclass
class Args:
    """Small decision processes, solved and learned: the tabular figures of the beta-VMBPO paper."""

    figure: Literal[(*FIGURES, "all")] = "risky-arm"  # Fig. 1, 2, 3, 6 of the paper, a sweep over beta, or all of them
    mdp: str = ""  # .npz file with the arrays of make_mdp: a process of one's own, for learning or beta-sweep
    out_dir: str = ""  # folder for results/*.csv and figures/*.png; empty: runs/tabular_risk/FIGURE_sSEED_DATE-TIME
    overwrite: bool = False  # replace results that out-dir already holds
    seed: int = 1  # seed of all random numbers
    trials: int = 10  # independent trials of each learner
    episodes: int = 40_000  # episodes of 200 steps per trial, a multiple of actors (risk test of mnm: a tenth of them)
    beta: tuple[float, ...] = ()
    """values in the risky-arm table (empty: 1 2.5 5 10 50), panels of dynamics (1 100), starts of dual descent in
    learning (100 1 10 1000; the first meets the other learners) and, one, in mnm and beta-sweep (100)"""
    kl_budget: tuple[float, ...] = ()  # epsilon of eq. (8), nats a step: .001; beta-sweep .0005 .001 .0025 .01 .05
    actors: int = 100  # episodes that run side by side in a trial and share its Q; 1 is the sequential algorithm (slow)

LOOK = {"q-learning": ("Q-learning", "tab:blue"), "vmbpo": ("VMBPO (β = 1)", "tab:red"),
        "beta-vmbpo": ("β-VMBPO", "tab:green"), "mnm": ("MnM", "tab:orange")}
CURVES = ("return", "falls", "edge", "beta", "kl")
CURVE_HEADER = ["world", "method", "beta_start", "episode", *(f"{key}_{x}" for key in CURVES for x in ("mean", "std"))]
SYMLOG = SymmetricalLogScale(None, linthresh=0.2)  # linear near the optimum, logarithmic where policies fall

def spread(runs, digits=3):
    return "" if np.isnan(runs).any() else f"{np.mean(runs):.{digits}f} ± {np.std(runs):.{digits}f}"

def band(axis, history, key, label, colour):
    """Mean and one standard deviation over the trials."""
    episode, mean, std = history["episode"] / 1000, history[key].mean(1), history[key].std(1)
    axis.plot(episode, mean, color=colour, label=label)
    axis.fill_between(episode, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel="thousand episodes", ylabel={"beta": "β"}.get(key, "return of the greedy policy"))

def curve_rows(history, *names):
    """The csv lines of one learner: mean and standard deviation over the trials at every evaluation."""
    ends = [end for key in CURVES for end in (history[key].mean(1), history[key].std(1))]
    return [[*names, *row] for row in zip(history["episode"], *ends)]

def plot_risky_arm(args, mdp):
    """Fig. 1: the two soft Q-values in S, and the posterior of what follows 'right', against β."""
    arm, flip, header = risky_arm(), 5 / np.log(9), ["beta", "q_left", "q_right", "p_a", "p_b", "kl", "choice"]
    beta = np.array([*np.geomspace(0.5, 50, 200), *(args.beta or (1, 2.5, 5, 10, 50))])
    q_value = soft_value_iteration(arm, beta)
    posterior, _, kl = posterior_dynamics(arm, q_value.max(-1), beta)
    to_a = posterior[:, 0, 1, list(arm.successor[0, 1]).index(1)]
    curves = [beta, *q_value[:, 0].T, to_a, 1 - to_a, kl[:, 0, 1]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    labels = "left: −5 for certain", "right: −10 (0.9) or 0 (0.1)", "to A (−10)", "to B (0)"
    for index, (curve, label) in enumerate(zip(curves[1:], labels)):
        axes[index // 2].plot(beta[:200], curve[:200], color=f"C{index}", label=label)
    axes[0].set(ylabel="soft Q in S, reward units", title=f"risky below β = 5 / ln 9 = {flip:.4f}")
    axes[1].set(ylabel="posterior of the step after 'right'", title="small β: optimism (in truth A 0.9, B 0.1)")
    for axis, place in zip(axes, ("upper right", "center left")):
        axis.axvspan(0.5, flip, color="mistyrose")
        axis.axvspan(flip, 50, color="honeydew")
        axis.set(xlabel="β", xscale="log", xlim=(0.5, 50))
        axis.legend(loc=place)
    rows = [[*row, "right" if row[2] > row[1] else "left"] for row in zip(*curves)]
    return figure, header, rows[:200], header, rows[200:]

def plot_dynamics(args, mdp):
    """Fig. 2: the dynamics of the action 'right', real and twisted, with the path of the greedy policy."""
    grid, landing, betas = grid_world(cliff=True), grid_landing(cliff=True), np.array(args.beta or (1.0, 100.0))
    q_value = np.concatenate([value_iteration(grid)[None], soft_value_iteration(grid, betas)])
    posterior, _, kl = posterior_dynamics(grid, q_value[1:].max(-1), betas)
    posterior, policy = np.concatenate([grid.probability[None], posterior]), greedy(q_value)
    kl = [0.0, *(visits(grid, policy[1:]) * kl).sum((-1, -2)) / HORIZON]
    figure, axes = plt.subplots(1, len(q_value), figsize=(4 * len(q_value), 4.2), layout="constrained")
    rows, table, free = [], [], CELLS[~BLOCK]
    panels = zip(axes, [np.inf, *betas], posterior, policy, *real_outcome(grid, policy), kl)
    for axis, beta, after, plan, *outcome in panels:
        leads = (grid.successor[CELLS, 3][:, None] == landing[:, :, None]) & (landing != CELLS[:, None])[:, :, None]
        moved = (after[CELLS, 3][:, None] * leads).sum(-1)[free]  # (free cells, 4): probability of each way
        for way, falls in itertools.product(range(4), (False, True)):
            chosen = (landing[free, way] == len(CELLS)) == falls
            down, right = 0.85 * MOVES[way][:, None] * moved[chosen, way]
            axis.quiver(COL[free][chosen], ROW[free][chosen], right, down, angles="xy", scale_units="xy", scale=1,
                        width=0.006, minlength=0.3, color="red" if falls else "dimgrey")
        path = [0]  # the cells that the intended moves visit, up to the goal or a cell met before
        while path[-1] != GOAL and (ahead := landing[path[-1], plan[path[-1]].argmax()]) not in (*path, len(CELLS)):
            path.append(ahead)
        axis.plot(COL[path], ROW[path], color="tab:blue", linewidth=5, alpha=0.35)
        axis.add_patch(plt.Rectangle((3.5, -0.5), 2, 6, color="black", alpha=0.75))
        for x, y, text, colour in ((4.5, 2.5, "cliff", "white"), (0, -0.75, "S", "black"), (9, -0.75, "G", "black")):
            axis.text(x, y, text, color=colour, ha="center", va="center", weight="bold")
        axis.set(title="real dynamics" if np.isinf(beta) else f"posterior dynamics, β = {beta:g}", aspect="equal",
                 xticks=[], yticks=[], xlim=(-0.7, 9.7), ylim=(9.6, -1.2))
        table.append([beta, *outcome, len(path) - 1, path[-1] == GOAL])
        rows += [[beta, ROW[c], COL[c], *move, plan[c].argmax(), c in path] for c, move in zip(free, moved)]
    header = ["beta", "row", "column", "p_up", "p_left", "p_down", "p_right", "greedy_action", "on_path"]
    return figure, header, rows, ["beta", "return", "falls", "edge", "kl", "path", "to_goal"], table

def plot_learning(args, mdp):
    """Fig. 3: three learners; β-VMBPO from several starts of β; β itself."""
    mdp, starts, trials = mdp or grid_world(cliff=True), args.beta or (100.0, 1.0, 10.0, 1000.0), args.trials
    common = {"kl_budget": (args.kl_budget or (0.001,))[0], "seed": args.seed, "actors": args.actors}
    runs = [(method, start, learn(mdp, method, args.episodes, trials, **common))
            for method, start in (("q-learning", ""), ("vmbpo", 1.0))]
    ours = learn(mdp, "beta-vmbpo", args.episodes, trials * len(starts), np.repeat(starts, trials), **common)
    for index, start in enumerate(starts):
        own = {key: ours[key][:, index * trials : (index + 1) * trials] for key in CURVES}
        runs.append(("beta-vmbpo", start, own | {"episode": ours["episode"]}))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    best = [float(entry) for entry in real_outcome(mdp, greedy(value_iteration(mdp)))]
    rows, table = [], [["risk-neutral optimum", "", best[0], 0.0, *best[1:], ""]]
    for index, (method, start, history) in enumerate(runs):
        end = history["return"][-1]
        table.append([LOOK[method][0], start, spread(end, 4), 100 * (best[0] - end.mean()) / (abs(best[0]) or 1),
                      *(spread(history[key][-1]) for key in ("falls", "edge", "beta"))])
        rows += curve_rows(history, args.mdp or "cliff", method, start)
        if index <= 2:
            band(axes[0], history, "return", *LOOK[method])
        if index >= 2:
            band(axes[1], history, "return", f"from β = {start:g}", f"C{index + (index > 2)}")
            band(axes[2], history, "beta", f"from β = {start:g}", f"C{index + (index > 2)}")
    for axis, title in zip(axes, ("three learners", "β-VMBPO", f"dual descent, ε = {common['kl_budget']:g}")):
        if axis is not axes[2]:
            axis.axhline(best[0], color="black", linestyle=":", label="risk-neutral optimum")
        axis.set_yscale("log" if axis is axes[2] else SYMLOG)
        axis.set_title(title)
        axis.legend(fontsize=9, loc=(0.5, 0.2) if axis is axes[0] else None)
    return figure, CURVE_HEADER, rows, ["method", "from_beta", "return", "gap_%", "falls", "edge", "beta"], table

def plot_mnm(args, mdp):
    """Fig. 6: four learners on the MnM grid, from an optimistic Q and from 0; and on MnM's risk test."""
    start, budget = (args.beta or (100.0,))[0], (args.kl_budget or (0.001,))[0]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    grid, tenth, rows, table = grid_world(cliff=False), -(-args.episodes // 10 // args.actors) * args.actors, [], []
    for axis, name, world, q_init, episodes in zip(axes, ("MnM grid",) * 2 + ("risk test",), (grid, grid, risk_line()),
                                                   (0.1, 0.0, 0.0), (args.episodes, args.episodes, tenth)):
        axis.set_title(f"{name}, initial Q = {q_init:g}")
        best = float(real_outcome(world, greedy(value_iteration(world)))[0])
        axis.axhline(best, color="black", linestyle=":", label="risk-neutral optimum")
        table.append([axis.get_title(), best])
        for method, look in LOOK.items():
            beta = {"beta-vmbpo": start, "q-learning": np.nan}.get(method, 1.0)
            history = learn(world, method, episodes, args.trials, beta, budget, q_init, args.seed, args.actors)
            band(axis, history, "return", *look)
            rows += curve_rows(history, axis.get_title(), method, beta)
            table[-1].append(spread(history["return"][-1]))
    axes[0].legend(loc="lower right", fontsize=9)
    return figure, CURVE_HEADER, rows, ["world", "optimum", *(name for name, _ in LOOK.values())], table

def plot_beta_sweep(args, mdp):
    """Return, falls and KL of the exact solution against β, and what dual descent finds for several budgets."""
    mdp, size, start = mdp or grid_world(cliff=True), np.geomspace(0.1, 1e4, 61), (args.beta or (100.0,))[0]
    budgets, rows, table = args.kl_budget or (0.0005, 0.001, 0.0025, 0.01, 0.05), [], []
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for sign, name, look in ((-1, "risk-averse, β < 0", "C4--"), (1, "risk-seeking, β > 0", "C2-")):
        q_value = soft_value_iteration(mdp, sign * size)
        kl, policy = posterior_dynamics(mdp, q_value.max(-1), sign * size)[2], greedy(q_value)
        # eq. (9) sees the KL in the real states of an actor that explores
        explorer = (1 - EXPLORE) * policy + EXPLORE / policy.shape[-1]
        curves = [*real_outcome(mdp, policy), (visits(mdp, explorer) * kl).sum((-1, -2)) / HORIZON]
        rows += [["exact", *row, ""] for row in zip(sign * size, *curves)]
        for axis, index in zip(axes, (0, 1, 3)):
            axis.plot(size, curves[index], look, label=name)
    limits = np.repeat(budgets, args.trials)
    history = learn(mdp, "beta-vmbpo", args.episodes, len(limits), start, limits, seed=args.seed, actors=args.actors)
    for index, budget in enumerate(budgets):
        found, *end = (history[key][-1].reshape(-1, args.trials)[index] for key in ("beta", *CURVES[:3], "kl"))
        for axis, runs in zip(axes, (end[0], end[1], end[3])):
            axis.plot(found, runs, "o", color=plt.cm.plasma(index / len(budgets)), alpha=0.6, label=f"ε = {budget:g}")
        exact = np.interp(np.log(budget), np.log(curves[3][::-1] + 1e-300), np.log(size[::-1]), np.inf, -np.inf)
        table.append([budget, np.median(found), found.min(), found.max(), np.exp(exact), *map(spread, end[:2])])
        rows += [["dual descent", *row, budget] for row in zip(found, *end)]
    for axis, label in zip(axes, ("return of the greedy policy", "falls per episode", "KL(q‖p), nats per real step")):
        axis.set(xlabel="|β|", ylabel=label, xscale="log")
    axes[0].set_yscale(SYMLOG)
    axes[2].set_yscale("log" if kl.max() > 0 else "linear")
    axes[2].legend(fontsize=9)
    header = ["kind", "beta", "return", "falls", "edge", "kl", "kl_budget"]
    return figure, header, rows, ["kl_budget", "beta_median", "min", "max", "beta_exact", "return", "falls"], table

PLOTS = dict(zip(FIGURES, (plot_risky_arm, plot_dynamics, plot_learning, plot_mnm, plot_beta_sweep)))

# ---------------------------------------------------------------- the command
def fail(message):
    """Print one line and exit with code 2."""
    print(f"{SCRIPT}.py: error: {message}", file=sys.stderr)
    sys.exit(2)

def parse_args(argv):
    """Read the command line and refuse what cannot work: the flags, the user's process, if any, the paths to write."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as text:
            args = tyro.cli(Args, args=argv)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in text.getvalue().splitlines()[1:]]  # a box; one line of it is the message
        fail(" ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines)) + " (see --help)")
    sign = abs if args.figure in ("risky-arm", "dynamics") else float
    for flag, good, allowed in (
        ("seed", args.seed >= 0, "0 or more"),
        ("trials", 1 <= args.trials <= 1000, "1 to 1000"),
        ("actors", 1 <= args.actors <= 100, "1 to 100: together their steps of 0.01 must not exceed 1"),
        ("episodes", args.episodes > 0 == args.episodes % max(1, args.actors), "a positive multiple of --actors"),
        ("beta", all(1e-2 <= sign(x) <= 1e7 for x in args.beta), "0.01 to 1e7 (risky-arm, dynamics: or negative)"),
        ("kl-budget", all(0 < x < np.inf for x in args.kl_budget), "positive and finite"),
        ("mdp", args.figure in ("learning", "beta-sweep") or not args.mdp, "empty unless for learning or beta-sweep"),
    ):
        if not good:
            fail(f"--{flag} {getattr(args, flag.replace('-', '_'))}: must be {allowed}")
    folder = Path(args.out_dir or f"runs/{SCRIPT}/{args.figure}_s{args.seed}_{time.strftime('%Y%m%d-%H%M%S')}")
    stems = {x: f"tabular_{x.replace('-', '_')}" for x in (FIGURES if args.figure == "all" else [args.figure])}
    paths = {name: (folder / f"results/{stem}.csv", folder / f"figures/{stem}.png") for name, stem in stems.items()}
    try:
        mdp = load_mdp(args.mdp) if args.mdp else None
        for path in itertools.chain(*paths.values()):
            if path.exists() and not args.overwrite:
                fail(f"--out-dir {folder}: holds {path} already; choose another folder or give --overwrite")
            path.parent.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        fail(f"--mdp {args.mdp}: must be an .npz file with the arrays of make_mdp ({error})")
    except OSError as error:
        fail(f"--out-dir {folder}: must be a folder that can be written ({error.strerror})")
    return args, mdp, paths

def main(argv):
    args, mdp, paths = parse_args(argv)
    for name, (csv_path, png_path) in paths.items():
        begun = time.perf_counter()
        figure, *tables = PLOTS[name](args, mdp)
        rows, table = ([[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
                       for lines in ([tables[0], *tables[1]], [tables[2], *tables[3]]))
        with open(csv_path, "w", newline="") as file:
            file.write(f"# python tabular_risk.py {' '.join(argv)}\n")
            csv.writer(file, lineterminator="\n").writerows(rows)
        figure.savefig(png_path, dpi=110)
        plt.close(figure)
        widths = [max(map(len, column)) for column in zip(*table)]
        print(f"\n{name} ({time.perf_counter() - begun:.1f} s): {png_path}, {csv_path}")
        for line in table:
            print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths)), flush=True)

if __name__ == "__main__":
    main(sys.argv[1:])
