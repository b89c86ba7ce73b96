"""Checks tabular_risk.py against closed forms, brute force over policies and trajectories, and plain dense loops."""

import csv
import inspect
import io
import itertools
import json
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tabular_risk as tr  # noqa: E402

BETAS = (-30.0, -2.0, -0.5, 0.3, 1.0, 4.0, 100.0)


def random_mdp(seed, states=5, actions=3, gamma=0.9):
    rng = np.random.default_rng(seed)
    after = rng.dirichlet(np.full(states, 0.5), (states, actions))
    after[after < 0.02] = 0  # some successors are impossible
    after /= after.sum(-1, keepdims=True)
    return tr.make_mdp(rng.uniform(-1, 1, (states, actions)), rng.dirichlet(np.ones(states)), after, gamma=gamma)


def random_policy(rng, mdp):
    return rng.dirichlet(np.ones(mdp.reward.shape[1]), len(mdp.start))


def plain_evaluation(mdp, policy, beta, sweeps=400):
    """V of eq. (15) on dense arrays with scaled rewards, as the paper writes it; returned in reward units."""
    dynamics, q = transition(mdp), np.zeros(mdp.reward.shape)
    for _ in range(sweeps):
        expected = np.einsum("sat,tb,tb->sa", dynamics, policy, np.exp(q))
        q = mdp.reward / beta + mdp.gamma * np.log(expected)
    return beta * np.log((policy * np.exp(q)).sum(1))


def plain_value_iteration(mdp, sweeps=600):
    value, dynamics = np.zeros(len(mdp.start)), transition(mdp)
    for _ in range(sweeps):
        value = (mdp.reward + mdp.gamma * dynamics @ value).max(1)
    return value


def trajectories(mdp, dynamics, policy, horizon):
    """All (probability, undiscounted return, states and actions) of `horizon` steps; `dynamics(t)` is (S, A, S)."""
    states, actions = mdp.reward.shape
    found = [(p, 0.0, (s,)) for s, p in enumerate(mdp.start)]
    for t in range(horizon):
        found = [
            (p * policy[path[-1], a] * dynamics(t)[path[-1], a, s], total + mdp.reward[path[-1], a], (*path, a, s))
            for p, total, path in found for a in range(actions) for s in range(states)
            if policy[path[-1], a] * dynamics(t)[path[-1], a, s] > 0
        ]
    return found


def dense(mdp, q):
    """Posterior over successor places (S, A, K) as a dense array (S, A, S)."""
    out = np.zeros((*mdp.reward.shape, len(mdp.start)))
    for s, a, k in np.ndindex(q.shape):
        out[s, a, mdp.successor[s, a, k]] += q[s, a, k]
    return out


def transition(mdp):
    return dense(mdp, mdp.probability)


# ---------------------------------------------------------------- the risky arm (Fig. 1)
def test_arm_flips_at_five_over_log_nine():
    arm, low, high = tr.risky_arm(), 1.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        left, right = tr.soft_value_iteration(arm, middle)[0]
        low, high = (middle, high) if right > left else (low, middle)
    assert abs(low - 5 / math.log(9)) < 1e-9


def test_arm_posterior():
    arm, table = tr.risky_arm(), {1: 0.0004, 2.5: 0.1415, 5: 0.5491, 10: 0.7680, 50: 0.8805}
    q = tr.soft_value_iteration(arm, np.array(list(table)))
    posterior = tr.posterior_dynamics(arm, q.max(-1), np.array(list(table)))[0]
    for (beta, rounded), row in zip(table.items(), posterior):
        p_a = row[0, 1, list(arm.successor[0, 1]).index(1)]
        assert p_a == pytest.approx(0.9 * math.exp(-10 / beta) / (0.9 * math.exp(-10 / beta) + 0.1), rel=1e-12)
        assert round(p_a, 4) == rounded


# ---------------------------------------------------------------- limits and signs of β
@pytest.mark.parametrize("seed", range(5))
def test_large_beta_is_value_iteration(seed):
    mdp = random_mdp(seed)
    optimum = plain_value_iteration(mdp)
    np.testing.assert_allclose(tr.soft_value_iteration(mdp, np.inf).max(-1), optimum, atol=1e-9)
    for beta in (1e7, -1e7, -np.inf):
        np.testing.assert_allclose(tr.soft_value_iteration(mdp, beta).max(-1), optimum, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_risk_seeking_above_neutral_above_risk_averse(seed):
    mdp = random_mdp(seed)
    neutral = plain_value_iteration(mdp)
    values = tr.soft_value_iteration(mdp, np.array([-0.3, -1, -10, 10, 1, 0.3])).max(-1)
    assert (values[:3] < neutral).all() and (values[3:] > neutral).all()
    assert (np.diff(values, axis=0) > 0).all()  # -0.3 < -1 < -10 < neutral < 10 < 1 < 0.3


def test_extreme_beta_is_finite_and_between_its_limits():
    mdp = tr.grid_world(cliff=True)
    q = tr.soft_value_iteration(mdp, np.array([1e-2, 1e7]))
    assert np.isfinite(q).all()
    best = np.zeros(len(mdp.start))  # β → 0: the agent believes that it may choose among the possible successors
    for _ in range(600):
        best = (mdp.reward + mdp.gamma * np.where(mdp.probability > 0, best[mdp.successor], -np.inf).max(-1)).max(-1)
    smallest = mdp.probability[mdp.probability > 0].min()
    assert (q[0].max(-1) <= best + 1e-9).all()
    assert (q[0].max(-1) >= best - 1e-2 * math.log(1 / smallest) * mdp.gamma / (1 - mdp.gamma)).all()


def test_twist_keeps_its_digits_at_large_beta():
    value, prob, beta = np.array([3.0, -1.0, 0.5]), np.array([0.2, 0.5, 0.3]), 1e7
    mean = prob @ value
    variance = prob @ (value - mean) ** 2
    posterior, soft, kl = tr.twist(value, prob, beta)
    assert soft == pytest.approx(mean + variance / (2 * beta), abs=1e-14)  # second-order expansion in 1/β
    assert kl == pytest.approx(variance / (2 * beta**2), rel=1e-5)
    assert posterior.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("beta", (-0.01, 0.01, 1.0, np.inf))
def test_what_is_impossible_changes_nothing_whatever_its_value(beta):
    for value in (-1e6, 1e6):
        posterior, soft, kl = tr.twist(np.array([2.0, value]), np.array([1.0, 0.0]), beta)
        assert posterior.tolist() == [1, 0] and soft == pytest.approx(2) and kl == 0


@pytest.mark.parametrize("infinite", (np.inf, -np.inf))
def test_infinite_beta_is_exact_and_quick(infinite):
    """Risk-neutral evaluation and optimum, beside finite β in one call; the posterior is the prior, to the bit."""
    mdp, rng = random_mdp(3), np.random.default_rng(12)
    policy = random_policy(rng, mdp)
    value = np.linalg.solve(np.eye(5) - mdp.gamma * np.einsum("sa,sat->st", policy, transition(mdp)),
                            (policy * mdp.reward).sum(1))
    q = tr.soft_value_iteration(mdp, infinite, policy, sweeps=400)
    np.testing.assert_allclose(tr.posterior_policy(q, policy, infinite)[1], value, atol=1e-10)
    q = tr.soft_value_iteration(mdp, np.array([infinite, 2.0]), sweeps=400)
    np.testing.assert_allclose(q[0].max(-1), plain_value_iteration(mdp), atol=1e-10)
    np.testing.assert_allclose(q[1], tr.soft_value_iteration(mdp, 2.0), atol=1e-10)
    posterior, _, kl = tr.posterior_dynamics(mdp, q.max(-1), np.array([infinite, 2.0]))
    assert (posterior[0] == mdp.probability).all() and (kl[0] == 0).all() and kl[1].max() > 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("beta", (0.0, np.nan))
def test_impossible_beta_is_named_at_once(beta):
    with pytest.raises(ValueError, match="beta must not be 0 or nan"):
        tr.soft_value_iteration(random_mdp(0), beta)


# ---------------------------------------------------------------- Section 4
@pytest.mark.parametrize("beta", BETAS)
def test_operators_contract_with_modulus_gamma(beta):
    rng, gamma = np.random.default_rng(0), 0.9
    for seed in range(20):
        mdp = random_mdp(seed, gamma=gamma)
        policy, (one, two) = random_policy(rng, mdp), rng.normal(0, 3, (2, *mdp.reward.shape))
        for value in (lambda q: tr.posterior_policy(q, policy, beta)[1], lambda q: q.max(-1)):  # Thm. 4.1, Lemma 4.1
            image = tr.backup(mdp, value(one), beta) - tr.backup(mdp, value(two), beta)
            assert np.abs(image).max() <= gamma * np.abs(one - two).max() + 1e-12
            shifted = tr.backup(mdp, value(one + 2), beta) - tr.backup(mdp, value(one), beta)
            np.testing.assert_allclose(shifted, gamma * 2, atol=1e-12)  # the modulus is attained, so no smaller one holds


def test_without_discount_the_operator_does_not_contract():
    arm = tr.risky_arm()  # Thm. 4.1 as stated names no condition on γ; at γ = 1, as in Fig. 1, it fails
    q = np.zeros(arm.reward.shape)
    shifted = tr.backup(arm, (q + 3).max(-1), 1.0) - tr.backup(arm, q.max(-1), 1.0)
    assert np.abs(shifted).max() == pytest.approx(3)
    loop = tr.make_mdp([[1.0]], 0, [[[1.0]]], gamma=1.0)
    with pytest.raises(ValueError, match="no fixed point"):
        tr.soft_value_iteration(loop, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_policy_evaluation_matches_plain_loops(beta):
    rng = np.random.default_rng(1)
    for seed in range(5):
        mdp = random_mdp(seed)
        policy = random_policy(rng, mdp)
        value = tr.posterior_policy(tr.soft_value_iteration(mdp, beta, policy), policy, beta)[1]
        np.testing.assert_allclose(value, plain_evaluation(mdp, policy, beta), atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_greedy_policy_improves_everywhere(beta):
    rng = np.random.default_rng(2)
    for seed in range(20):
        mdp = random_mdp(seed)
        policy = random_policy(rng, mdp)
        improved = tr.greedy(tr.soft_value_iteration(mdp, beta, policy))
        gain = plain_evaluation(mdp, improved, beta) - plain_evaluation(mdp, policy, beta)
        assert gain.min() >= -1e-9 and gain.max() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_policy_iteration_beats_every_deterministic_policy(beta):
    rng = np.random.default_rng(3)
    for seed in range(4):
        mdp = random_mdp(seed, states=4, actions=2)
        steps = [*tr.policy_iteration(mdp, beta, random_policy(rng, mdp))]
        values = [tr.posterior_policy(q, policy, beta)[1] for policy, q in steps]
        policy, q = steps[-1]
        assert set(np.unique(policy)) == {0.0, 1.0} and (policy.sum(1) == 1).all()
        assert (np.diff(values, axis=0) >= -1e-9).all()
        everyone = [plain_evaluation(mdp, np.eye(2)[list(c)], beta, 250) for c in itertools.product(range(2), repeat=4)]
        np.testing.assert_allclose(values[-1], np.max(everyone, axis=0), atol=1e-7)  # best in all states at once
        np.testing.assert_allclose(tr.soft_value_iteration(mdp, beta), q, atol=1e-8)


def test_negative_beta_needs_a_minimum_over_the_paper_s_q():
    """Counterexample to Lemma 4.1 and Thm. 4.2 read literally at β < 0: the maximum of Q = r/β is the worst action."""
    mdp = tr.make_mdp([[1.0, 0.0]], 0, np.ones((1, 2, 1)), gamma=0.5)
    scaled = np.zeros(2)
    for _ in range(100):
        scaled = mdp.reward[0] / -2.0 + 0.5 * np.log(np.exp(scaled).max())
    assert scaled.argmax() == 1 and -2.0 * scaled.max() == pytest.approx(0)
    assert tr.soft_value_iteration(mdp, -2.0).max() == pytest.approx(2)
    half = np.array([[0.5, 0.5]])
    literal = np.eye(2)[[(tr.soft_value_iteration(mdp, -2.0, half)[0] / -2.0).argmax()]]  # Thm. 4.2's π'
    assert plain_evaluation(mdp, literal, -2.0) < plain_evaluation(mdp, half, -2.0) - 0.1


# ---------------------------------------------------------------- likelihood and its bound, by enumeration
@pytest.mark.parametrize("beta", (-2.0, 0.5, 1.0, 5.0))
def test_log_marginal_is_the_sum_over_trajectories(beta):
    mdp, horizon = random_mdp(7, states=3, actions=2), 5
    policy = random_policy(np.random.default_rng(4), mdp)
    found = trajectories(mdp, lambda t: transition(mdp), policy, horizon)
    assert math.fsum(p for p, _, _ in found) == pytest.approx(1)
    brute = beta * math.log(math.fsum(p * math.exp(total / beta) for p, total, _ in found))
    assert tr.log_marginal(mdp, policy, beta, horizon)[0] == pytest.approx(brute, abs=1e-10)


def test_discounted_operator_is_not_the_log_marginal():
    """Counterexample: with γ < 1 the value of eq. (15) exceeds β log E exp(Σ γ^t r / β), by Jensen for β > 0."""
    beta, gamma = 1.0, 0.5
    after = np.zeros((4, 1, 4))
    after[0, 0, [1, 2]], after[[1, 2, 3], 0, 3] = 0.5, 1
    mdp = tr.make_mdp([[0.0], [2.0], [0.0], [0.0]], 0, after, gamma=gamma)
    value = tr.soft_value_iteration(mdp, beta)[0, 0]
    assert value == pytest.approx(gamma * math.log((math.exp(2) + 1) / 2))
    assert value > math.log((math.exp(2 * gamma) + 1) / 2) + 0.09


def elbo(mdp, q_dynamics, q_policy, policy, beta, horizon):
    """Eq. (7) by enumeration; `q_dynamics(t)` and `q_policy(t)` may depend on the stage."""
    total = 0.0
    paths = [(p, 0.0, 0.0, s) for s, p in enumerate(mdp.start)]
    for t in range(horizon):
        step = []
        for p, reward, log_ratio, s in paths:
            for a, after in itertools.product(range(mdp.reward.shape[1]), range(len(mdp.start))):
                q = q_policy(t)[s, a] * q_dynamics(t)[s, a, after]
                if q > 0:
                    ratio = math.log(q / (policy[s, a] * transition(mdp)[s, a, after]))
                    step.append((p * q, reward + mdp.reward[s, a], log_ratio + ratio, after))
        paths = step
    total = math.fsum(p * (reward - beta * log_ratio) for p, reward, log_ratio, _ in paths)
    return total


@pytest.mark.parametrize("beta", (-2.0, 0.5, 1.0, 5.0))
def test_elbo_bounds_the_log_marginal_and_meets_it_at_the_posterior(beta):
    mdp, horizon = random_mdp(8, states=3, actions=2), 4
    rng = np.random.default_rng(5)
    policy = random_policy(rng, mdp)
    start = np.eye(3)[0]  # q(τ) keeps p(s_1) in eq. (7), so the bound is tight for a single start state only
    mdp = tr.make_mdp(mdp.reward, start, transition(mdp))
    marginal, values = tr.log_marginal(mdp, policy, beta, horizon)
    q_values = [mdp.reward + tr.posterior_dynamics(mdp, v, beta)[1] for v in values[1:]]
    q_policies = [tr.posterior_policy(q, policy, beta)[0] for q in q_values]
    q_dynamics = [dense(mdp, tr.posterior_dynamics(mdp, v, beta)[0]) for v in values[1:]]
    tight = elbo(mdp, q_dynamics.__getitem__, q_policies.__getitem__, policy, beta, horizon)
    assert tight == pytest.approx(marginal, abs=1e-10)
    for _ in range(20):
        mix = rng.uniform(0.05, 1)
        other = transition(mdp) * rng.uniform(0.2, 1, transition(mdp).shape)
        other /= other.sum(-1, keepdims=True)
        bound = elbo(mdp, lambda t: (1 - mix) * q_dynamics[t] + mix * other,
                     lambda t: (1 - mix) * q_policies[t] + mix * policy, policy, beta, horizon)
        assert (marginal - bound) * np.sign(beta) > 0  # for β < 0 eq. (7) bounds from above


def test_elbo_is_not_tight_for_a_random_start():
    """Counterexample to 'tight at the posterior' in Section 3.2: eq. (7) fixes q(s_1) = p(s_1)."""
    mdp = tr.make_mdp([[1.0], [0.0]], [0.5, 0.5], np.eye(2)[:, None])
    marginal, _ = tr.log_marginal(mdp, np.ones((2, 1)), 1.0, 1)
    best = elbo(mdp, lambda t: transition(mdp), lambda t: np.ones((2, 1)), np.ones((2, 1)), 1.0, 1)
    assert best == pytest.approx(0.5) and marginal == pytest.approx(math.log((math.e + 1) / 2)) and marginal > best + 0.1


def test_optimal_pair_is_equal_and_deterministic():
    """Thm. 4.4 on a layered process, where the best policy does not depend on the stage."""
    rng, horizon, beta = np.random.default_rng(6), 4, 0.7
    after = np.zeros((5, 2, 5))  # 0 → {1, 2} → {3} → 4, the end
    after[0, :, [1, 2]] = [[0.3, 0.8], [0.7, 0.2]]
    after[[1, 2], :, 3], after[[3, 4], :, 4] = 1, 1
    after[1, 0, [2, 3]] = 0.5
    reward = rng.uniform(-1, 1, (5, 2))
    reward[4] = 0
    mdp = tr.make_mdp(reward, 0, after, gamma=1.0)
    *_, (policy, q) = tr.policy_iteration(mdp, beta, np.full((5, 2), 0.5))
    q_policy = tr.posterior_policy(q, policy, beta)[0]
    np.testing.assert_array_equal(q_policy, policy)
    posterior = dense(mdp, tr.posterior_dynamics(mdp, q.max(-1), beta)[0])
    optimum = elbo(mdp, lambda t: posterior, lambda t: policy, policy, beta, horizon)
    assert optimum == pytest.approx(q[0].max(), abs=1e-9)
    everyone = [tr.log_marginal(mdp, np.eye(2)[[*c, 0]], beta, horizon)[0] for c in itertools.product(range(2), repeat=4)]
    assert optimum == pytest.approx(max(everyone), abs=1e-9)
    for _ in range(30):
        prior = random_policy(rng, mdp)
        other_policy, other = random_policy(rng, mdp), transition(mdp) * rng.uniform(0.2, 1, transition(mdp).shape)
        prior[4], other_policy[4] = 0.5, 0.5
        mix = rng.uniform()
        other = (1 - mix) * posterior + mix * other / other.sum(-1, keepdims=True)
        assert elbo(mdp, lambda t: other, lambda t: other_policy, prior, beta, horizon) < optimum
        assert elbo(mdp, lambda t: other, lambda t: policy, policy, beta, horizon) < optimum
        assert elbo(mdp, lambda t: posterior, lambda t: prior, prior, beta, horizon) < optimum


# ---------------------------------------------------------------- worlds and exact outcomes
def test_mnm_grid_constants():
    mdp = tr.grid_world(cliff=False)
    dynamics = transition(mdp)
    assert round(tr.soft_value_iteration(mdp, np.inf)[0].max(), 4) == 1.3875
    assert round(float(tr.real_outcome(mdp, np.full((100, 4), 0.25))[0]), 4) == 0.0101
    assert set(np.unique(dynamics[0, 3].round(3))) == {0.0, 0.125, 0.25, 0.625}  # corner: two blocked moves stay


def test_cliff_pays_through_the_fallen_state():
    mdp, edge = tr.grid_world(cliff=True), 3  # row 0, column 3: the cliff is to the right
    dynamics, inside = transition(mdp), [10 * row + col for row in range(6) for col in (4, 5)]
    outside = np.setdiff1d(np.arange(101), inside)
    assert dynamics[edge, 3, 100] == pytest.approx(0.625) and dynamics[edge, 1, 100] == pytest.approx(0.125)
    assert (dynamics[100, :, 0] == 1).all() and (mdp.reward[100] == -100).all() and mdp.reward[:100].min() == 0.001
    assert dynamics[np.ix_(outside, range(4), inside)].sum() == 0  # nobody ever stands in the cliff
    assert mdp.reward[9].tolist() == [10] * 4 and (np.delete(mdp.reward[:100], 9, axis=0) == 0.001).all()


def test_real_outcome_and_visits_match_matrix_powers():
    mdp = tr.grid_world(cliff=True)
    policy = random_policy(np.random.default_rng(9), mdp)
    matrix = np.einsum("sa,sat->st", policy, transition(mdp))
    state, total, falls, visits = mdp.start, 0.0, 0.0, np.zeros(101)
    for t in range(200):
        total += mdp.gamma**t * state @ (policy * mdp.reward).sum(1)
        visits = visits + state
        state = state @ matrix
        falls += state[100]
    np.testing.assert_allclose(tr.real_outcome(mdp, policy), [total, falls], rtol=1e-10)
    np.testing.assert_allclose(tr.visits(mdp, policy), visits[:, None] * policy, atol=1e-10)


def test_real_value_on_the_cliff_never_falls_as_beta_grows():
    mdp = tr.grid_world(cliff=True)
    policy = tr.greedy(tr.soft_value_iteration(mdp, np.geomspace(0.1, 1e4, 60)))
    value, falls = tr.real_outcome(mdp, policy)
    assert (np.diff(value) >= -1e-12).all() and (np.diff(falls) <= 1e-12).all() and value[-1] - value[0] > 6
    assert falls[0] > 1 and falls[-1] < 0.2


def test_risk_line_fools_vmbpo_only():
    mdp = tr.risk_line()
    right = tr.soft_value_iteration(mdp, np.inf)
    assert right[1].argmax() == 0 and right[1, 0] == pytest.approx(450.001)
    wrong = tr.greedy(tr.soft_value_iteration(mdp, 1.0))
    assert wrong[1].argmax() == 1 and tr.real_outcome(mdp, wrong)[0] < 330


def test_ten_thousand_states():
    rng, states = np.random.default_rng(10), 10_000
    mdp = tr.Mdp(rng.integers(0, states, (states, 4, 16)), rng.dirichlet(np.ones(16) * 3, (states, 4)),
                 rng.uniform(0, 1, (states, 4)), np.eye(states)[0], np.zeros(states, bool), gamma=0.5)
    q = tr.soft_value_iteration(mdp, 5.0)
    s, a = 1234, 2
    after = zip(mdp.successor[s, a], mdp.probability[s, a])
    by_hand = 5 * math.log(sum(p * math.exp(q[t].max() / 5) for t, p in after))
    assert q[s, a] == pytest.approx(mdp.reward[s, a] + 0.5 * by_hand, abs=1e-9)
    history = tr.learn(mdp, "beta-vmbpo", episodes=10, trials=1, actors=10, evals=1)
    assert np.isfinite(history["q"]).all() and (history["q"] != 0).any()


# ---------------------------------------------------------------- learners
def small_world():
    rng = np.random.default_rng(11)
    return tr.make_mdp(rng.uniform(-1, 1, (3, 2)), 0, rng.dirichlet(np.ones(3), (3, 2)), gamma=0.7)


def test_model_based_learner_ends_at_the_exact_solution():
    mdp, beta = small_world(), 0.5
    learned = tr.learn(mdp, "vmbpo", 2000, trials=3, beta=beta, evals=1)["q"] * beta
    exact = tr.soft_value_iteration(mdp, beta)
    assert np.abs(learned - exact).max() < 0.02 and np.abs(exact - tr.soft_value_iteration(mdp, np.inf)).max() > 0.2


def test_learner_matches_plain_loops():
    """β-VMBPO with one actor, trial by trial and number by number, from the same random draws."""
    rng = np.random.default_rng(3)
    states, choices, episodes, trials, rate, budget, beta_lr = 4, 6, 3, 2, 0.1, 0.01, 0.3
    reward, transition = rng.uniform(-1, 1, (states, choices)), rng.dirichlet(np.ones(states), (states, choices))
    mdp = tr.make_mdp(reward, 0, transition, gamma=0.8)
    start_beta = np.array([0.3, 2.0])
    draws = np.random.default_rng(5)
    episode_draws = [(draws.random(trials), draws.random((200, 2, 2, trials), np.float32)) for _ in range(episodes)]
    found = tr.learn(mdp, "beta-vmbpo", episodes, trials, start_beta, budget, 0.0, 5, 1, rate, beta_lr, episodes)
    for trial in range(trials):
        q, counts, beta, kl_seen, untried = np.zeros((states, choices)), {}, start_beta[trial], [], 0
        for _, steps in episode_draws:
            state, kls = 0, []
            for luck, wind in steps[..., trial]:
                real, imagined = [
                    int(draw / tr.EXPLORE * choices) if draw < tr.EXPLORE else int(q[state].argmax()) for draw in luck
                ]
                after = int((wind[0] >= mdp.probability[state, real].cumsum()[:-1]).sum())
                counts.setdefault((state, real), np.zeros(states))[after] += 1
                if (state, imagined) in counts:
                    p = counts[state, imagined] / counts[state, imagined].sum()
                    tilted = p * np.exp(q.max(1))
                    posterior = tilted / tilted.sum()
                    kls.append(sum(b * math.log(b / a) for a, b in zip(p, posterior) if a > 0))
                    target = mdp.reward[state, imagined] / beta + 0.8 * math.log(tilted.sum())
                    q[state, imagined] += rate * (target - q[state, imagined])
                untried += (state, imagined) not in counts
                state = after
            kl_seen.append(np.mean(kls))
            beta *= math.exp(beta_lr * min(max(kl_seen[-1] / budget - 1, -1), 1))
        np.testing.assert_allclose(found["q"][trial], q, rtol=1e-9)
        np.testing.assert_allclose(found["kl"][1:, trial], kl_seen, rtol=1e-9)
        assert found["beta"][-1, trial] == pytest.approx(beta, rel=1e-9)
        assert untried > 3, "every imagined choice was known: the test shows nothing of those that are not"


def test_q_learning_ends_at_value_iteration():
    learned = tr.learn(small_world(), "q-learning", 4000, trials=3, evals=1, learning_rate=0.002)["q"]
    np.testing.assert_allclose(learned, [tr.soft_value_iteration(small_world(), np.inf)] * 3, atol=0.05)


def test_mnm_ends_at_the_soft_solution_of_the_log_reward():
    mdp = small_world()
    paid = mdp._replace(reward=mdp.reward + 2)
    logarithmic = mdp._replace(reward=(1 - mdp.gamma) * np.log(mdp.reward + 2))
    learned = tr.learn(paid, "mnm", 2000, trials=2, evals=1)["q"]
    np.testing.assert_allclose(learned, [tr.soft_value_iteration(logarithmic, 1.0)] * 2, atol=0.02)
    with pytest.raises(ValueError, match="positive"):
        tr.learn(mdp, "mnm", 100)


def test_one_actor_and_many_end_alike():
    mdp = small_world()
    one = tr.learn(mdp, "vmbpo", 100, trials=2, actors=1, evals=1)["q"]
    many = tr.learn(mdp, "vmbpo", 100, trials=2, actors=10, evals=1)["q"]
    assert np.abs(one - many).max() < 0.1 and np.abs(one).max() > 0.5


def test_nothing_is_learned_of_a_choice_that_was_never_tried():
    """Of 5000 choices 200 real steps try about a hundred, and imagination picks about a hundred others."""
    mdp = tr.make_mdp(np.ones((1, 5000)), 0, np.ones((1, 5000, 1)), gamma=0.5)
    learned = tr.learn(mdp, "vmbpo", 1, trials=1, actors=1, evals=1)["q"]
    assert 1 <= np.count_nonzero(learned) < 20


@pytest.mark.parametrize("method", ("q-learning", "vmbpo"))
def test_episodes_begin_in_every_start_state_and_no_other(method):
    mdp = tr.make_mdp(np.ones((3, 2)), [0.5, 0.5, 0], np.eye(3)[:, None].repeat(2, axis=1), gamma=0.5)  # nobody moves
    learned = tr.learn(mdp, method, 10, trials=1, actors=10, evals=1)["q"][0]
    assert (learned[:2] > 0).all() and (learned[2] == 0).all()


def test_evaluations_are_spread_over_the_episodes():
    history = tr.learn(small_world(), "q-learning", 90, trials=2, actors=10, evals=3)
    assert history["episode"].tolist() == [0, 30, 60, 90] and history["return"].shape == (4, 2)


@pytest.mark.parametrize("method", ("q-learning", "vmbpo"))
def test_learners_begin_at_q_init(method):
    assert (tr.learn(small_world(), method, 0, q_init=0.1, evals=1)["q"] == 0.1).all()


def test_learners_report_the_real_outcome_of_their_greedy_policy():
    mdp = tr.grid_world(True)
    history = tr.learn(mdp, "q-learning", 2000, trials=2, evals=1)
    for trial in range(2):
        policy, state, total, falls = np.eye(4)[history["q"][trial].argmax(-1)], mdp.start, 0.0, 0.0
        for t in range(200):
            total += mdp.gamma**t * state @ (policy * mdp.reward).sum(1)
            state = np.einsum("s,sa,sat->t", state, policy, transition(mdp))
            falls += state[100]
        found = history["return"][-1, trial], history["falls"][-1, trial]
        assert found == pytest.approx((total, falls))


def test_beta_stays_between_its_rails():
    ends = tr.learn(small_world(), "beta-vmbpo", 100, 2, kl_budget=[1e-9, 1e9], beta_lr=10.0, evals=1)["beta"][-1]
    np.testing.assert_allclose(ends, [1e7, 1e-2])


def test_no_trial_feels_another():
    one = tr.learn(tr.grid_world(True), "beta-vmbpo", 400, trials=3, beta=[10.0, 10.0, 10.0], evals=2)
    two = tr.learn(tr.grid_world(True), "beta-vmbpo", 400, trials=3, beta=[10.0, 900.0, 10.0], evals=2)
    for key in ("return", "beta", "kl"):
        assert (one[key][:, [0, 2]] == two[key][:, [0, 2]]).all()
    assert (one["q"][[0, 2]] == two["q"][[0, 2]]).all() and (one["q"][1] != two["q"][1]).any()


def test_beta_rises_if_and_only_if_the_kl_exceeds_its_budget():
    history = tr.learn(tr.grid_world(True), "beta-vmbpo", 3000, trials=2, kl_budget=[1e-6, 10.0], beta=5.0, evals=30)
    steps, kl = np.diff(np.log(history["beta"]), axis=0), history["kl"][1:]
    assert (kl[5:, 0] > 1e-6).all() and (steps[5:, 0] > 0).all()
    assert (kl[:, 1] < 10).all() and (steps[:, 1] < 0).all()
    assert np.abs(steps[5:, 0]).max() == pytest.approx(100 * 5e-4)  # the clip: 5e-4 per episode, 100 episodes a round


def test_dual_steps_are_in_proportion_to_the_violation():
    budget = 3e-3
    history = tr.learn(tr.grid_world(True), "beta-vmbpo", 6000, trials=2, kl_budget=budget, beta=30.0, evals=60)
    steps, violation = np.diff(np.log(history["beta"]), axis=0), history["kl"][1:] / budget - 1
    np.testing.assert_allclose(steps, 100 * 5e-4 * np.clip(violation, -1, 1), atol=1e-12)
    assert ((0.1 < abs(violation)) & (abs(violation) < 0.9)).sum() > 5, "every step was clipped: the test shows nothing"


def test_dual_descent_from_four_starts_finds_the_beta_that_meets_the_budget():
    """The mean KL over the real states of the exploring actor, solved exactly and independently, equals ε there."""
    mdp = tr.risk_line()
    found = tr.learn(mdp, "beta-vmbpo", 25_000, 4, [1.0, 10.0, 100.0, 1000.0], 0.01, evals=1)["beta"][-1]
    assert found.max() / found.min() < 1.1
    def seen(beta):
        q = tr.soft_value_iteration(mdp, beta)
        values, policy = q.max(-1), 0.5 * tr.greedy(q) + 0.25
        state, total = np.eye(3)[1], 0.0
        for _ in range(200):
            for s, a in itertools.product(range(3), range(2)):
                p = transition(mdp)[s, a]
                posterior = p * np.exp((values - values.max()) / beta)
                posterior /= posterior.sum()
                live = p > 0
                total += state[s] * policy[s, a] * (posterior[live] * np.log(posterior[live] / p[live])).sum() / 200
            state = np.einsum("s,sa,sat->t", state, policy, transition(mdp))
        return total
    assert seen(found.mean() * 1.1) < 0.01 < seen(found.mean() / 1.1)


# ---------------------------------------------------------------- the page
EQUATION = re.compile(r"\(\d+\)|(?:Thm\.|Lemma) \d\.\d")


def test_every_equation_has_its_function_in_the_docs_and_no_other():
    computed = {(tag, name) for name, function in inspect.getmembers(tr, inspect.isfunction)
                for line in inspect.getsource(function).splitlines() if re.search("# .*(eq|Thm|Lemma)", line)
                for tag in EQUATION.findall(line.partition("#")[2])}
    table = re.findall(r"^\| (.+?) \| .+ \| `(\w+)` \|$", (ROOT / "docs/tabular_risk.md").read_text(), re.MULTILINE)
    named = {(tag, name) for tags, name in table for tag in EQUATION.findall(tags)}
    assert len(named) >= 14 and named == computed


def test_a_copied_script_knows_what_it_needs():
    block = re.search(r"^# dependencies = (\[.*\])$", Path(tr.__file__).read_text(), re.MULTILINE)
    pins = (ROOT / "requirements.txt").read_text().split()
    needed = ("numpy==", "tyro==", "matplotlib==")
    assert sorted(json.loads(block[1])) == sorted(pin for pin in pins if pin.startswith(needed))
    imported = set(re.findall(r"^ *(?:import|from) (\w+)(?=$| as | import |\.)", Path(tr.__file__).read_text(), re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "tyro", "matplotlib"}


# ---------------------------------------------------------------- the command
def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        tr.main(list(argv))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.mark.parametrize("argv, said", [
    (["--trials", "0"], "--trials 0: must be 1 to 1000"), (["--trials", "1001"], "--trials 1001: must be 1 to 1000"),
    (["--episodes", "150"], "--episodes 150: must be a multiple of 100"), (["--seed", "-1"], "--seed -1: must be"),
    (["--episodes", "-100"], "--episodes -100: must be 100 to"), (["--episodes", f"{10**23}"], f"--episodes {10**23}: must be"),
    (["--beta", "0"], "--beta 0.0: must be 0.01 to inf, or -inf to -0.01"), (["--beta", "nan"], "--beta nan: must be"),
    (["--beta", "1", "-0.001"], "--beta 1.0 -0.001: must be 0.01 to inf, or -inf to -0.01"),
    (["--figure", "learning", "--beta", "-1"], "--beta -1.0: must be 0.01 to 1e7"),
    (["--figure", "learning", "--beta", "1", "inf"], "--beta 1.0 inf: must be 0.01 to 1e7"),
    (["--figure", "mnm", "--beta", "1", "2", "3"], "--beta 1.0 2.0 3.0: must be one number with --figure mnm"),
    (["--figure", "all", "--beta", "1", "2"], "--beta 1.0 2.0: must be one number"),
    (["--kl-budget", "-1"], "--kl-budget -1.0: must be"), (["--kl-budget", "inf"], "--kl-budget inf: must be"),
    (["--kl-budget", "nan"], "--kl-budget nan: must be"), (["--kl-budget", "1e-320"], "--kl-budget 1e-320: must be 1e-12 to"),
    (["--out-dir", "a" * 300], f"--out-dir {'a' * 300}: must be a folder to write to"),
    (["--out-dir", "/dev/null"], "--out-dir /dev/null: must be a folder to write to"),
    (["--mdp", "x.npz"], "--mdp x.npz: works with --figure learning"),
    (["--figure", "learning", "--mdp", "x.npz"], "--mdp x.npz: must be"),
])
def test_bad_flags_end_in_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and err.count("\n") == 1 and f"tabular_risk.py: error: {said}" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("argv", (["--figure", "nothing"], ["--trials", "ten"], ["--trials"], ["--kl-budget", "1", "2"]))
def test_flags_that_cannot_be_read_are_named(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and (argv[0] in err or argv[-1] in err) and "Traceback" not in err
    assert not [*tmp_path.iterdir()]


def test_what_the_system_refuses_ends_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, out, err = run(capsys, "--out-dir", str(tmp_path / "file"))
    assert code == 2 and not out and err.count("\n") == 1 and f"--out-dir {tmp_path / 'file'}: must be a folder" in err
    assert (tmp_path / "file").read_text() == "kept"
    for full in ("results/tabular_risky_arm.csv", "figures/tabular_risky_arm.png"):
        folder = tmp_path / full.partition("/")[0] / "full"
        (folder / full).parent.mkdir(parents=True)
        (folder / full).symlink_to("/dev/full")  # every write to it fails: no space left on the device
        code, out, err = run(capsys, "--out-dir", str(folder), "--overwrite")
        assert code == 1 and not out and err.count("\n") == 1 and "No space left" in err


def test_results_are_written_when_nobody_listens(tmp_path, monkeypatch):
    """As with `| head -1`, all figures are still made."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(tr, "PLOTS", {"risky-arm": tr.plot_risky_arm, "dynamics": tr.plot_dynamics})
    tr.main(["--figure", "all", "--out-dir", str(tmp_path)])
    assert len([*tmp_path.rglob("tabular_*")]) == 4


def test_a_missing_matplotlib_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(capsys, "--out-dir", str(tmp_path))
    assert code == 1 and not out and err.count("\n") == 1 and "matplotlib" in err


GOOD = {"reward": [[1.0, 0.0], [0.5, 2.0]], "start": 0, "transition": np.full((2, 2, 2), 0.5), "gamma": 0.9}


@pytest.mark.parametrize("change, said", [
    ({"transition": np.full((2, 2, 2), 0.4)}, "sum to 1"),
    ({"transition": np.full((2, 2, 3), 0.5)}, "transition must be 2 x 2 x 2"),
    ({"transition": np.array([[[1.5, -0.5]] * 2] * 2)}, "not negative"), ({"reward": [[1.0, np.nan], [0, 0]]}, "reward must"),
    ({"transition": np.full((2, 2, 2), np.nan)}, "finite"), ({"reward": [1.0, 2.0]}, "reward must"), ({"start": 2}, "start"),
    ({"start": -1}, "start"), ({"start": [0.5, 0.6]}, "start"), ({"gamma": 1.0}, "gamma"), ({"gamma": -0.1}, "gamma"),
    ({"transition": np.array([[[1 - 1e-12, 1e-12]] * 2] * 2)}, "1e-9"), ({"hazard": [0, 1, 0]}, "hazard must be 2 values"),
    ({"reward": [[1e308, 0.0], [0, 0]]}, "reward must"), ({"colour": 1}, "colour"),
    ({"start": "a"}, "start must hold real numbers"), ({"reward": [["a", "b"]] * 2}, "reward must hold real numbers"),
    ({"start": [0.5 + 1j, 0.5 - 1j]}, "start must hold real numbers"), ({"gamma": "a"}, "gamma must hold real numbers"),
    ({"start": None}, "it holds something else than numbers"),
    ({"start": np.array([{}, 1], object)}, "it holds something else than numbers"),
])
def test_bad_mdp_files_are_refused(change, said, capsys, tmp_path):
    np.savez(tmp_path / "bad.npz", **{**GOOD, **change})
    code, _, err = run(capsys, "--figure", "learning", "--mdp", str(tmp_path / "bad.npz"), "--out-dir", str(tmp_path / "o"))
    assert code == 2 and err.count("\n") == 1 and "--mdp" in err and said in err and "allow_pickle" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x93NUMPY", b"0 1 2\n", pickle.dumps(GOOD)])
def test_files_that_are_no_npz_are_refused(content, capsys, tmp_path):
    (tmp_path / "bad.npz").write_bytes(content)
    code, _, err = run(capsys, "--figure", "learning", "--mdp", str(tmp_path / "bad.npz"), "--out-dir", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "must be an .npz file" in err and "allow_pickle" not in err


@pytest.mark.parametrize("name", tr.PLOTS)
def test_figures_write_what_they_say_and_overwrite_nothing(name, capsys, tmp_path):
    argv = ["--figure", name, "--episodes", "200", "--trials", "2", "--out-dir", str(tmp_path)]
    if name == "learning":
        np.savez(tmp_path / "my.npz", **GOOD)
        argv += ["--mdp", str(tmp_path / "my.npz")]
    tr.main(argv)
    assert name in capsys.readouterr().out
    made = sorted(path for path in tmp_path.rglob("tabular_*"))
    assert [path.suffix for path in made] == [".png", ".csv"] and made[0].stat().st_size > 10_000
    with open(made[1]) as file:
        assert file.readline().startswith(f"# python tabular_risk.py --figure {name}")
        rows = list(csv.reader(file))
    assert len(rows) > 5 and len({len(row) for row in rows}) == 1
    before = [path.read_bytes() for path in made]
    assert run(capsys, *argv)[0] == 2 and [path.read_bytes() for path in made] == before
    tr.main([*argv, "--overwrite"])


def csv_rows(folder, name):
    lines = (folder / f"results/tabular_{name}.csv").read_text().splitlines()
    return [*csv.DictReader(lines[1:])]


def test_the_csv_of_fig_2_holds_both_dynamics_the_plan_and_its_path(capsys, tmp_path):
    tr.main(["--figure", "dynamics", "--beta", "1", "--out-dir", str(tmp_path)])
    rows = csv_rows(tmp_path, "dynamics")
    assert len(rows) == 2 * 88  # all cells but the block's
    ways = ["p_up", "p_left", "p_down", "p_right"]
    at = {(row["beta"], row["row"], row["column"]): row for row in rows}
    assert [at["inf", "0", "3"][way] for way in ways] == ["0", "0.125", "0.125", "0.625"]  # up is the border, right the cliff
    assert [float(at["1", "0", "3"][way]) < 1e-9 for way in ways] == [True, False, False, True]  # -100 is not believed in
    paths = {beta: {key[1:] for key, row in at.items() if key[0] == beta and row["on_path"] == "True"} for beta in ("inf", "1")}
    assert all({("0", "0"), ("0", "9")} <= path for path in paths.values())
    assert ("6", "4") in paths["1"] and not {"4", "5"} & {col for row, col in paths["inf"] if int(row) < 8}
    mdp = tr.grid_world(True)
    q = tr.soft_value_iteration(mdp, 1.0)
    policy, matrix = tr.greedy(q), transition(mdp)
    state, total, kl = mdp.start, 0.0, tr.posterior_dynamics(mdp, q.max(-1), 1.0)[2]
    for _ in range(200):
        total += state @ (policy * kl).sum(1) / 200
        state = np.einsum("s,sa,sat->t", state, policy, matrix)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "1" and float(last[3]) == pytest.approx(total, rel=1e-3)


def test_the_csv_of_fig_1_holds_the_kl(tmp_path):
    tr.main(["--out-dir", str(tmp_path)])
    for row in csv_rows(tmp_path, "risky_arm")[::50]:
        q = float(row["p_a"]), float(row["p_b"])
        kl = sum(x * math.log(x / p) for x, p in zip(q, (0.9, 0.1)) if x > 0)
        assert float(row["kl"]) == pytest.approx(kl, rel=0.02, abs=1e-4)


def test_the_csv_of_learners_holds_means_and_deviations_over_the_trials():
    history = {"episode": np.array([0, 100])} | {key: np.array([[1.0, 3.0], [i, i]]) for i, key in enumerate(tr.CURVES)}
    rows = [dict(zip(tr.HEADER, row)) for row in tr.curve_rows(history, "here", "mnm", 1.0)]
    assert [[*row.values()][:4] for row in rows] == [["here", "mnm", 1.0, 0], ["here", "mnm", 1.0, 100]]
    for i, key in enumerate(("return", "falls", "beta", "kl")):
        assert [(row[f"{key}_mean"], row[f"{key}_std"]) for row in rows] == [(2, 1), (i, 0)]


def test_flags_reach_the_learners(capsys, tmp_path):
    np.savez(tmp_path / "my.npz", **GOOD)
    flags = ["--episodes", "200", "--trials", "1", "--kl-budget", "100", "--out-dir", str(tmp_path)]
    tr.main(["--figure", "learning", "--mdp", str(tmp_path / "my.npz"), "--beta", "5", "50", *flags])
    tr.main(["--figure", "mnm", "--beta", "5", *flags])
    runs = {}
    for name in ("learning", "mnm"):
        for row in csv_rows(tmp_path, name):
            runs.setdefault((row["world"], row["method"], float(row["beta_start"])), []).append(row)
    grids, test = ("MnM grid, initial Q = 0.1", "MnM grid, initial Q = 0"), "risk test, initial Q = 0"
    four = [("q-learning", 1.0), ("vmbpo", 1.0), ("beta-vmbpo", 5.0), ("mnm", 1.0)]
    user = [(str(tmp_path / "my.npz"), *learner) for learner in (*four[:3], ("beta-vmbpo", 50.0))]
    assert [*runs] == [*user, *((world, *learner) for world in (*grids, test) for learner in four)]
    for (world, method, start), rows in runs.items():
        assert [row["episode"] for row in rows] == (["0", "100"] if world == test else ["0", "100", "200"])  # a tenth
        betas = [float(row["beta_mean"]) for row in rows]
        assert betas[0] == start and all(beta < start if method == "beta-vmbpo" else beta == start for beta in betas[1:])


def test_the_sweep_s_dual_descent_ends_where_the_exact_kl_meets_the_budget(capsys, tmp_path, monkeypatch):
    """On the risk test, whose exact KL is in every column of the sweep's csv; drawn again from it alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import beta_sweep
    import common

    monkeypatch.setattr(common, "OUT", tmp_path)
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    transition = np.zeros((3, 2, 3))
    transition[[0, 0, 1, 1, 2], [0, 1, 0, 1, 0], [0, 1, 0, 2, 1]] = 1
    transition[2, 1, [1, 2]] = 0.5
    np.savez(tmp_path / "line.npz", reward=np.outer([50, 0.001, 51], [1, 1]), start=1, transition=transition)
    monkeypatch.setattr(beta_sweep, "BUDGETS", (0.01,))
    args = beta_sweep.Args(mdp=str(tmp_path / "line.npz"), out="line", trials=2, episodes=25_000)
    assert beta_sweep.main(args) == 0
    ends = re.search(r"ends at β = (\S+), the exact KL meets ε at (\S+)", capsys.readouterr().out)
    assert float(ends[1]) == pytest.approx(float(ends[2]), rel=0.1)
    rows = [*csv.DictReader((tmp_path / "results/line.csv").open())]
    assert [row["kind"] for row in rows] == ["exact"] * 122 + ["learned"] * 2
    (tmp_path / "figures/line.png").unlink()
    assert beta_sweep.main(beta_sweep.Args(out="line", from_csv=True)) == 0 and (tmp_path / "figures/line.png").exists()
    with pytest.raises(SystemExit):
        beta_sweep.main(beta_sweep.Args(episodes=150))
    assert "--episodes 150: must be a multiple of 100" in capsys.readouterr().err


def test_default_place_is_new_and_the_arm_table_is_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tr.main(["--beta", "2.27", "2.28", "-5", "inf"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [line[-1] for line in lines] == ["right", "left", "left", "left"]
    assert lines[-1][:5] == ["inf", "-5", "-9", "0.9", "0.1"]
    assert len(list(tmp_path.glob("runs/tabular_risk/*/figures/*.png"))) == 1
