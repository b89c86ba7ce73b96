"""The exact world of risk-sensitive VMBPO: small decision processes solved to the last digit, and learned from episodes."""

import csv
import shlex
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

SIZE, GOAL, HORIZON = 10, 9, 200  # side of the grid, index of its goal (row 0, column 9), steps of an episode
MOVES = np.array([[-1, 0], [0, -1], [1, 0], [0, 1]])  # up, left, down, right as (row, column)


# ---------------------------------------------------------------- decision processes as arrays
@dataclass(frozen=True)
class Mdp:
    """A finite Markov decision process (paper, Section 2). Built by `make_mdp`, which checks it.

    Transitions are lists of successors, because ten thousand states squared do not fit in memory: `successor`
    (S, A, K) holds states, `probability` (S, A, K) their probabilities; spare places have probability 0.
    `reward` (S, A) in the task's units, `start` (S,) probabilities, `terminal` (S,) and `hazard` (S,) bool, where
    entering a hazard counts as a fall; `gamma` in [0, 1].
    """

    successor: np.ndarray
    probability: np.ndarray
    reward: np.ndarray
    start: np.ndarray
    terminal: np.ndarray
    hazard: np.ndarray
    gamma: float

    @property
    def transition(self):
        """The dense array p(s'|s,a), (S, A, S): for reading and for tests."""
        dense = np.zeros((*self.reward.shape, len(self.start)))
        np.add.at(dense, (*np.indices(self.successor.shape)[:2], self.successor), self.probability)
        return dense


def make_mdp(reward, start, transition=None, successor=None, probability=None, terminal=None, hazard=None, gamma=0.9):
    """An `Mdp` from a dense `transition` (S, A, S), or from `successor` and `probability` (S, A, K).

    `start` is a state or a distribution (S,). Terminal states are made absorbing with reward 0.
    Raises ValueError with one line that says which array is wrong and what is allowed.
    """

    def need(condition, message):
        if not condition:
            raise ValueError(message)

    reward = np.array(reward, float)
    need(reward.ndim == 2 and reward.size, f"reward must have shape (states, actions), not {reward.shape}")
    need(np.isfinite(reward).all(), "reward must be finite")
    (states, actions), pairs = reward.shape, reward.size
    if transition is not None:
        need(successor is None and probability is None, "give transition, or successor and probability, not both")
        transition = np.asarray(transition, float)
        need(transition.shape == (states, actions, states),
             f"transition must have shape {(states, actions, states)} to fit reward, not {transition.shape}")
        pair, target = np.nonzero(transition.reshape(pairs, states))
        count = np.bincount(pair, minlength=pairs)
        place = np.arange(len(pair)) - np.repeat(count.cumsum() - count, count)
        successor, probability = np.zeros((2, pairs, max(1, count.max())))
        successor[pair, place], probability[pair, place] = target, transition.reshape(pairs, states)[pair, target]
        successor, probability = successor.reshape(states, actions, -1), probability.reshape(states, actions, -1)
    need(successor is not None and probability is not None, "transition, or successor and probability, must be given")
    successor, probability = np.array(successor), np.array(probability, float)
    need(successor.ndim == 3 and successor.shape[:2] == reward.shape and successor.shape == probability.shape,
         f"successor and probability must have shape {(states, actions)} + (successors,), to fit reward")
    need(np.isfinite(probability).all() and (probability >= 0).all(), "probabilities must be finite and not negative")
    need(np.allclose(probability.sum(-1), 1, rtol=0, atol=1e-6), "every row of probabilities must sum to 1")
    need((successor == successor.astype(int)).all() and (successor >= 0).all() and (successor < states).all(),
         f"successor must hold states 0 to {states - 1}")
    start = np.asarray(start)
    if start.ndim == 0:
        need(start == start.astype(int) and 0 <= start < states, f"start must be a state 0 to {states - 1}")
        start = np.arange(states) == start
    need(start.shape == (states,) and np.isfinite(start).all() and (start >= 0).all() and abs(start.sum() - 1) < 1e-6,
         f"start must be a state 0 to {states - 1}, or {states} probabilities that sum to 1")
    masks = [np.zeros(states, bool) if mask is None else np.asarray(mask) for mask in (terminal, hazard)]
    need(all(mask.shape == (states,) and np.isin(mask, (0, 1)).all() for mask in masks),
         f"terminal and hazard must be {states} values 0 or 1")
    terminal, hazard = (mask.astype(bool) for mask in masks)
    gamma = np.asarray(gamma, float)
    need(gamma.ndim == 0 and 0 <= gamma <= 1, "gamma must be a number in [0, 1]")
    successor = successor.astype(int)
    successor[terminal], probability[terminal], reward[terminal] = np.nonzero(terminal)[0][:, None, None], 0.0, 0.0
    probability[terminal, :, 0] = 1.0
    probability /= probability.sum(-1, keepdims=True)
    return Mdp(successor, probability, reward, start / start.sum(), terminal, hazard, float(gamma))


def load_mdp(path):
    """An `Mdp` from an .npz file that holds the arguments of `make_mdp` by name. Raises ValueError, one line."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot be read as an .npz file: {' '.join(str(error).split())}") from None
    allowed = ["reward", "start", "transition", "successor", "probability", "terminal", "hazard", "gamma"]
    if set(arrays) - set(allowed) or not {"reward", "start"} <= set(arrays):
        raise ValueError(f"must hold reward and start, and of the rest only {', '.join(allowed[2:])};"
                         f" it holds {', '.join(sorted(arrays))}")
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        raise ValueError("must hold real numbers only")
    mdp = make_mdp(**arrays)
    if mdp.gamma >= 1:
        raise ValueError("gamma must be in [0, 1): only then do all solvers converge")
    return mdp


def risky_arm():
    """Fig. 1: S goes left to L (-5 follows), or right to A with probability .9 (-10 follows) or B (0); gamma 1."""
    start, arm_a, arm_b, arm_l, end = range(5)
    transition = np.zeros((5, 2, 5))
    transition[start, 0, arm_l] = 1
    transition[start, 1, [arm_a, arm_b]] = 0.9, 0.1
    transition[[arm_a, arm_b, arm_l, end], :, end] = 1
    reward = np.outer([0, -10, 0, -5, 0], [1, 1])
    return make_mdp(reward, start, transition, terminal=np.arange(5) == end, gamma=1.0)


def grid_world(cliff):
    """The 10x10 grid of Eysenbach et al. (2022); with `cliff`, that of Fig. 2 and 3.

    An action moves its way with probability .5, else any of four ways. A block (rows 0-5, columns 4-5) is a wall;
    or a cliff: stepping in leads to state 100, "fallen", which costs -100 and leads to the start. So the reward is
    a function of state and action, as the paper has it, and the whole risk sits in the dynamics.
    """
    cells = SIZE * SIZE
    rows, cols = np.divmod(np.arange(cells), SIZE)
    block = (rows <= 5) & (cols >= 4) & (cols <= 5)
    landing = (np.clip(rows[:, None] + MOVES[:, 0], 0, SIZE - 1) * SIZE
               + np.clip(cols[:, None] + MOVES[:, 1], 0, SIZE - 1))  # (cells, 4)
    landing = np.where(block[landing], cells if cliff else np.arange(cells)[:, None], landing)
    one_hot = np.eye(cells + cliff)[landing]
    transition = 0.5 * one_hot + 0.5 * one_hot.mean(1, keepdims=True)
    reward = np.full((cells + cliff, 4), 0.001)
    reward[GOAL] = 10
    if cliff:
        transition = np.concatenate([transition, np.broadcast_to(np.eye(cells + 1)[0], (1, 4, cells + 1))])
        reward[cells] = -100
    return make_mdp(reward, 0, transition, hazard=np.arange(cells + cliff) == cells)


def risk_line():
    """The 1x3 risk test of Eysenbach et al. (2022, Fig. 3a), start in the middle: the left end pays 50 and holds,
    the right end pays 51 but slips back to the middle with probability .5; the middle pays .001."""
    transition = np.zeros((3, 2, 3))
    transition[[0, 0, 1, 1, 2], [0, 1, 0, 1, 0], [0, 1, 0, 2, 1]] = 1
    transition[2, 1, [1, 2]] = 0.5
    return make_mdp(np.outer([50, 0.001, 51], [1, 1]), 1, transition)


# ---------------------------------------------------------------- exact solvers
# Values are in the task's reward units: Q here is β times the paper's Q of eq. (5) and (15), the Q_2 of its Appendix
# C.3. Greedy is then an argmax for either sign of β, and β → ∞ is ordinary value iteration. `beta` is a number or an
# array (...); results carry its shape in front, so that a whole sweep over β is one call.
def lift(beta, axes):
    """`beta` with as many axes of length one behind it."""
    beta = np.asarray(beta, float)
    return beta.reshape(beta.shape + (1,) * axes)


def twist(value, prob, beta, axis=-1):
    """Exponential twisting of `prob` by `value` along `axis`, for a risk parameter `beta` of either sign.

    Returns the posterior q ∝ p exp(v/β), the certainty equivalent β log E_p exp(v/β), and KL(q‖p) in nats.
    Stable for |β| from 1e-2 to 1e7: the largest exponent is taken out, and the sum is kept as its difference from
    one, because at large β everything that distinguishes q from p lies behind 1.000000.
    """
    gap = value / beta
    top = np.where(prob > 0, gap, -np.inf).max(axis, keepdims=True)
    gap = np.minimum(gap - top, 0)
    shrink = prob * np.expm1(gap)
    excess = shrink.sum(axis, keepdims=True)
    posterior = (prob + shrink) / (1 + excess)
    log_mean = np.log1p(excess)
    kl = (posterior * gap).sum(axis) - log_mean.squeeze(axis)
    return posterior, (beta * (top + log_mean)).squeeze(axis), np.maximum(kl, 0)


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


def fixed_point(operator, q_value, sweeps=100_000):
    """Applies `operator` until no entry moves by more than 1e-12 of its size. Raises ValueError if it never settles."""
    for _ in range(sweeps):
        previous, q_value = q_value, operator(q_value)
        if (np.abs(q_value - previous) <= 1e-12 * (1 + np.abs(q_value))).all():
            return q_value
    raise ValueError(f"no fixed point in {sweeps} sweeps: gamma must be below 1, or every policy must come to an end")


def evaluate_policy(mdp, policy, beta):
    """Risk-sensitive policy evaluation (Thm. 4.1): Q of `policy` (..., S, A)."""
    zero = np.zeros(np.shape(beta) + mdp.reward.shape)
    return fixed_point(lambda q: backup(mdp, state_value(q, policy, beta), beta), zero)


def soft_value_iteration(mdp, beta):
    """Q of the optimal risk-sensitive policy (..., S, A), the fixed point of the operator in Lemma 4.1."""
    return fixed_point(lambda q: backup(mdp, q.max(-1), beta), np.zeros(np.shape(beta) + mdp.reward.shape))


def value_iteration(mdp):
    """Q of the ordinary, risk-neutral optimum (S, A): the limit of `soft_value_iteration` as β → ∞."""
    return fixed_point(
        lambda q: mdp.reward + mdp.gamma * (mdp.probability * q.max(-1)[mdp.successor]).sum(-1), 0.0 * mdp.reward
    )


def policy_iteration(mdp, beta, policy=None):
    """Risk-sensitive policy iteration (Thm. 4.3) from `policy`, by default the uniform one.

    Returns the final policy (..., S, A), its Q, and the list of state values (..., S) of all policies on the way.
    """
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


def real_outcome(mdp, policy, horizon=HORIZON):
    """What `policy` (..., S, A) earns in the real dynamics: discounted return and falls per episode, both (...)."""
    value = falls = np.zeros(policy.shape[:-1])
    for _ in range(horizon):
        value = (policy * (mdp.reward + mdp.gamma * (mdp.probability * value[..., mdp.successor]).sum(-1))).sum(-1)
        after = mdp.hazard[mdp.successor] + falls[..., mdp.successor]
        falls = (policy * (mdp.probability * after).sum(-1)).sum(-1)
    return value @ mdp.start, falls @ mdp.start


def visits(mdp, dynamics, policy, horizon=HORIZON):
    """The share of an episode's steps spent in each pair (..., S, A) under `dynamics` (..., S, A, K) and `policy`."""
    batch = policy.shape[:-2]
    count, states = int(np.prod(batch)), len(mdp.start)
    target = np.arange(count)[:, None] * states + mdp.successor.ravel()
    flow = (policy[..., None] * dynamics).reshape(count, states, -1)
    share, total = np.tile(mdp.start, (count, 1)), np.zeros((count, states))
    for _ in range(horizon):
        total += share / horizon
        share = np.bincount(target.ravel(), (share[..., None] * flow).ravel(), count * states).reshape(count, states)
    return total.reshape(*batch, states, 1) * policy


# ---------------------------------------------------------------- learners from sampled episodes
METHODS = ("q-learning", "vmbpo", "beta-vmbpo", "mnm")


def draw(prob, uniform):
    """One place per column from probabilities (K, walkers)."""
    total, place = prob[0].copy(), np.zeros(prob.shape[1], int)
    for slot in range(1, len(prob)):
        place += uniform >= total
        total += prob[slot]
    return place


def learn(mdp, method, episodes, trials=10, beta=1.0, kl_budget=0.005, q_init=0.0, seed=1, actors=100,
          learning_rate=0.01, beta_lr=2e-3, explore=0.5, sampled=False, horizon=HORIZON, evals=50):
    """Runs one of METHODS for `episodes` episodes in each of `trials` independent trials, all in one array.

    `beta`, `kl_budget`, `q_init` are numbers or one per trial. Per step an actor acts in the real world and, unless
    it is Q-learning, adds what it saw to the counts and takes one imagined step with the posterior of the counted
    model. Returns a dict of arrays: "episode" (evals,), and (evals, trials) "return" and "falls" of the greedy policy,
    computed exactly in the real dynamics, "beta", and "kl", the mean over imagined steps that eq. (9) sees; "q" (trials, S, A).
    Raises ValueError for an unknown method or a reward of MnM that is not positive.
    """
    states, choices, places = mdp.successor.shape
    rows, gamma, pairs = trials * states, mdp.gamma, trials * states * choices
    rng = np.random.default_rng(seed)
    # successor places come first in these tables: sums over a leading axis are what NumPy does fastest
    successor, probability = (table.reshape(-1, places).T.copy() for table in (mdp.successor, mdp.probability))
    reward = mdp.reward.ravel()
    if method == "mnm":
        if (mdp.reward[~mdp.terminal] <= 0).any():
            raise ValueError("MnM takes the logarithm of the reward: every reward must be positive")
        reward = (1 - gamma) * np.log(np.where(mdp.terminal[:, None], 1.0, mdp.reward)).ravel()
    q_value = np.where(mdp.terminal, 0.0, lift(np.broadcast_to(q_init, trials), 1)).ravel() * np.ones((choices, 1))
    value, counts = q_value[0].copy(), np.zeros((places, pairs))
    log_beta = np.log(np.broadcast_to(beta, trials).astype(float))
    trial = np.repeat(np.arange(trials), actors)
    base, walker = trial * states, np.arange(trials * actors)
    sides = 1 if method == "q-learning" else 2  # real walkers, imagined walkers
    history = {key: [] for key in ("episode", "return", "falls", "beta", "kl")}
    rounds, kl = episodes // actors, np.zeros(trials)
    eval_rounds = set(np.linspace(0, rounds, evals + 1).astype(int))

    for done in range(rounds + 1):
        if done in eval_rounds:
            policy = greedy(q_value.reshape(choices, trials, states).transpose(1, 2, 0))
            for key, entry in zip(history, (done * actors, *real_outcome(mdp, policy, horizon), np.exp(log_beta), kl)):
                history[key].append(entry)
        if done == rounds:
            break
        state = mdp.start.cumsum().searchsorted(rng.random(len(walker)), side="right").clip(max=states - 1)
        origin, state = state, np.stack([state] * sides)
        uniform = rng.random((horizon, 2, sides, len(walker)), dtype=np.float32)
        kl_sum, kl_count, beta_now = np.zeros(trials), np.zeros(trials), np.exp(log_beta)[trial]
        for luck, wind in uniform:
            # act: ε-greedy, in the real world and in the imagined one
            best = q_value.take(base + state, axis=1)
            choice = (best == best.max(0)).argmax(0)
            choice = np.where(luck < explore, (luck * (choices / explore)).astype(int).clip(max=choices - 1), choice)
            pair = state * choices + choice
            place = draw(probability.take(pair[0], axis=1), wind[0])
            after = successor[place, pair[0]][None]
            known = 1.0
            if method != "q-learning":
                # remember
                np.add.at(counts.reshape(-1), place * pairs + base * choices + pair[0], 1.0)
                # imagine: a choice never tried in reality has no model yet; that walker begins anew and learns nothing
                prior = counts.take(base * choices + pair[1], axis=1)
                total = prior.sum(0)
                known = total > 0
                prior[0] += ~known
                follow = successor.take(pair[1], axis=1)
                posterior, soft, kl = twist(value.take(base + follow), prior / np.maximum(total, 1), beta_now, axis=0)
                dream = np.where(known, follow[draw(posterior, wind[1]), walker], origin)
                after = np.stack([after[0], dream])
                kl_sum += kl.reshape(trials, actors).sum(1)
                kl_count += known.reshape(trials, actors).sum(1)
            # learn
            target = value[base + after[-1]]
            if method != "q-learning":
                target = target - beta_now * kl if sampled else soft  # soft = E_q V - β KL, without sampling noise
            target = reward[pair[-1]] + gamma * target  # eq. (12)
            row = base + state[-1]
            entry = choice[-1] * rows + row
            np.add.at(q_value.reshape(-1), entry, learning_rate * known * (target - q_value.reshape(-1)[entry]))
            value[row] = q_value.take(row, axis=1).max(0)
            state = after
        kl = kl_sum / np.maximum(kl_count, 1)
        if method == "beta-vmbpo":
            # eq. (9): its gradient is ε - KL, so descent raises β where the posterior has strayed too far
            log_beta = log_beta + beta_lr * actors * np.clip(kl / kl_budget - 1, -1, 1)  # eq. (9)
            log_beta = np.clip(log_beta, np.log(1e-2), np.log(1e7))
    history = {key: np.array(entries) for key, entries in history.items()}
    return history | {"q": q_value.reshape(choices, trials, states).transpose(1, 2, 0)}
