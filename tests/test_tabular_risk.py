"""Checks tabular_risk.py against closed forms, brute force over policies and trajectories, and plain dense loops."""

import itertools
import math
import subprocess
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
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    transition[transition < 0.02] = 0  # some successors are impossible
    transition /= transition.sum(-1, keepdims=True)
    return tr.make_mdp(rng.uniform(-1, 1, (states, actions)), rng.dirichlet(np.ones(states)), transition, gamma=gamma)


def random_policy(rng, mdp):
    return rng.dirichlet(np.ones(mdp.reward.shape[1]), len(mdp.start))


def plain_evaluation(mdp, policy, beta, sweeps=400):
    """V of eq. (15) on dense arrays with scaled rewards, as the paper writes it; returned in reward units."""
    transition, q = mdp.transition, np.zeros(mdp.reward.shape)
    for _ in range(sweeps):
        expected = np.einsum("sat,tb,tb->sa", transition, policy, np.exp(q))
        q = mdp.reward / beta + mdp.gamma * np.log(expected)
    return beta * np.log((policy * np.exp(q)).sum(1))


def plain_value_iteration(mdp, sweeps=600):
    value = np.zeros(len(mdp.start))
    for _ in range(sweeps):
        value = (mdp.reward + mdp.gamma * mdp.transition @ value).max(1)
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
    out = np.zeros(mdp.transition.shape)
    for s, a, k in np.ndindex(q.shape):
        out[s, a, mdp.successor[s, a, k]] += q[s, a, k]
    return out


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
    np.testing.assert_allclose(tr.value_iteration(mdp).max(-1), optimum, atol=1e-9)
    for beta in (1e7, -1e7):
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


# ---------------------------------------------------------------- Section 4
@pytest.mark.parametrize("beta", BETAS)
def test_operators_contract_with_modulus_gamma(beta):
    rng, gamma = np.random.default_rng(0), 0.9
    for seed in range(20):
        mdp = random_mdp(seed, gamma=gamma)
        policy, (one, two) = random_policy(rng, mdp), rng.normal(0, 3, (2, *mdp.reward.shape))
        for value in (lambda q: tr.state_value(q, policy, beta), lambda q: q.max(-1)):  # Thm. 4.1, Lemma 4.1
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
        value = tr.state_value(tr.evaluate_policy(mdp, policy, beta), policy, beta)
        np.testing.assert_allclose(value, plain_evaluation(mdp, policy, beta), atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_greedy_policy_improves_everywhere(beta):
    rng = np.random.default_rng(2)
    for seed in range(20):
        mdp = random_mdp(seed)
        policy = random_policy(rng, mdp)
        improved = tr.greedy(tr.evaluate_policy(mdp, policy, beta))
        gain = plain_evaluation(mdp, improved, beta) - plain_evaluation(mdp, policy, beta)
        assert gain.min() >= -1e-9 and gain.max() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_policy_iteration_beats_every_deterministic_policy(beta):
    rng = np.random.default_rng(3)
    for seed in range(4):
        mdp = random_mdp(seed, states=4, actions=2)
        policy, q, values = tr.policy_iteration(mdp, beta, random_policy(rng, mdp))
        assert set(np.unique(policy)) == {0.0, 1.0} and (policy.sum(1) == 1).all()
        assert (np.diff(values, axis=0) >= -1e-9).all()
        everyone = [plain_evaluation(mdp, np.eye(2)[list(c)], beta, 250) for c in itertools.product(range(2), repeat=4)]
        np.testing.assert_allclose(values[-1], np.max(everyone, axis=0), atol=1e-7)  # best in all states at once
        np.testing.assert_allclose(tr.soft_value_iteration(mdp, beta), q, atol=1e-8)


def test_negative_beta_needs_the_minimum_in_lemma_4_1():
    """Counterexample to Lemma 4.1 read literally at β < 0: max exp(Q) over scaled Q = r/β picks the worst action."""
    mdp = tr.make_mdp([[1.0, 0.0]], 0, np.ones((1, 2, 1)), gamma=0.5)
    scaled = np.zeros(2)
    for _ in range(100):
        scaled = mdp.reward[0] / -2.0 + 0.5 * np.log(np.exp(scaled).max())
    assert scaled.argmax() == 1 and -2.0 * scaled.max() == pytest.approx(0)
    assert tr.soft_value_iteration(mdp, -2.0).max() == pytest.approx(2)


# ---------------------------------------------------------------- likelihood and its bound, by enumeration
@pytest.mark.parametrize("beta", (-2.0, 0.5, 1.0, 5.0))
def test_log_marginal_is_the_sum_over_trajectories(beta):
    mdp, horizon = random_mdp(7, states=3, actions=2), 5
    policy = random_policy(np.random.default_rng(4), mdp)
    found = trajectories(mdp, lambda t: mdp.transition, policy, horizon)
    assert math.fsum(p for p, _, _ in found) == pytest.approx(1)
    brute = beta * math.log(math.fsum(p * math.exp(total / beta) for p, total, _ in found))
    assert tr.log_marginal(mdp, policy, beta, horizon)[0] == pytest.approx(brute, abs=1e-10)


def test_discounted_operator_is_not_the_log_marginal():
    """Counterexample: with γ < 1 the value of eq. (15) exceeds β log E exp(Σ γ^t r / β), by Jensen for β > 0."""
    beta, gamma = 1.0, 0.5
    transition = np.zeros((4, 1, 4))
    transition[0, 0, [1, 2]], transition[[1, 2, 3], 0, 3] = 0.5, 1
    mdp = tr.make_mdp([[0.0], [2.0], [0.0], [0.0]], 0, transition, terminal=[0, 0, 0, 1], gamma=gamma)
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
                    ratio = math.log(q / (policy[s, a] * mdp.transition[s, a, after]))
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
    mdp = tr.make_mdp(mdp.reward, start, mdp.transition)
    marginal, values = tr.log_marginal(mdp, policy, beta, horizon)
    q_values = [mdp.reward + tr.posterior_dynamics(mdp, v, beta)[1] for v in values[1:]]
    q_policies = [tr.posterior_policy(q, policy, beta) for q in q_values]
    q_dynamics = [dense(mdp, tr.posterior_dynamics(mdp, v, beta)[0]) for v in values[1:]]
    tight = elbo(mdp, q_dynamics.__getitem__, q_policies.__getitem__, policy, beta, horizon)
    assert tight == pytest.approx(marginal, abs=1e-10)
    for _ in range(20):
        mix = rng.uniform(0.05, 1)
        other = mdp.transition * rng.uniform(0.2, 1, mdp.transition.shape)
        other /= other.sum(-1, keepdims=True)
        bound = elbo(mdp, lambda t: (1 - mix) * q_dynamics[t] + mix * other,
                     lambda t: (1 - mix) * q_policies[t] + mix * policy, policy, beta, horizon)
        assert (marginal - bound) * np.sign(beta) > 0  # for β < 0 eq. (7) bounds from above


def test_elbo_is_not_tight_for_a_random_start():
    """Counterexample to 'tight at the posterior' in Section 3.2: eq. (7) fixes q(s_1) = p(s_1)."""
    mdp = tr.make_mdp([[1.0], [0.0]], [0.5, 0.5], np.eye(2)[:, None])
    marginal, _ = tr.log_marginal(mdp, np.ones((2, 1)), 1.0, 1)
    best = elbo(mdp, lambda t: mdp.transition, lambda t: np.ones((2, 1)), np.ones((2, 1)), 1.0, 1)
    assert best == pytest.approx(0.5) and marginal == pytest.approx(math.log((math.e + 1) / 2)) and marginal > best + 0.1


def test_optimal_pair_is_equal_and_deterministic():
    """Thm. 4.4 on a layered process, where the best policy does not depend on the stage."""
    rng, horizon, beta = np.random.default_rng(6), 3, 0.7
    transition = np.zeros((5, 2, 5))  # 0 → {1, 2} → {3} → 4, the end
    transition[0, :, [1, 2]] = [[0.3, 0.8], [0.7, 0.2]]
    transition[[1, 2], :, 3], transition[[3, 4], :, 4] = 1, 1
    transition[1, 0, [2, 3]] = 0.5
    reward = rng.uniform(-1, 1, (5, 2))
    mdp = tr.make_mdp(reward, 0, transition, terminal=np.arange(5) == 4, gamma=1.0)
    horizon = 4
    policy, q, _ = tr.policy_iteration(mdp, beta)
    q_policy = tr.posterior_policy(q, policy, beta)
    np.testing.assert_array_equal(q_policy, policy)
    posterior = dense(mdp, tr.posterior_dynamics(mdp, q.max(-1), beta)[0])
    optimum = elbo(mdp, lambda t: posterior, lambda t: policy, policy, beta, horizon)
    assert optimum == pytest.approx(q[0].max(), abs=1e-9)
    live = slice(0, 4)
    everyone = [tr.log_marginal(mdp, np.eye(2)[[*c, 0]], beta, horizon)[0] for c in itertools.product(range(2), repeat=4)]
    assert optimum == pytest.approx(max(everyone), abs=1e-9)
    for _ in range(30):
        prior = random_policy(rng, mdp)
        other_policy, other = random_policy(rng, mdp), mdp.transition * rng.uniform(0.2, 1, mdp.transition.shape)
        prior[4], other_policy[4] = 0.5, 0.5
        mix = rng.uniform()
        other = (1 - mix) * posterior + mix * other / other.sum(-1, keepdims=True)
        assert elbo(mdp, lambda t: other, lambda t: other_policy, prior, beta, horizon) < optimum
        assert elbo(mdp, lambda t: other, lambda t: policy, policy, beta, horizon) < optimum
        assert elbo(mdp, lambda t: posterior, lambda t: prior, prior, beta, horizon) < optimum
        assert (prior[live] > 0).all()


# ---------------------------------------------------------------- worlds and exact outcomes
def test_mnm_grid_constants():
    mdp = tr.grid_world(cliff=False)
    assert round(tr.value_iteration(mdp)[0].max(), 4) == 1.3875
    assert round(float(tr.real_outcome(mdp, np.full((100, 4), 0.25))[0]), 4) == 0.0101
    assert set(np.unique(mdp.transition[0, 3].round(3))) == {0.0, 0.125, 0.25, 0.625}  # corner: two blocked moves stay


def test_cliff_pays_through_the_fallen_state():
    mdp, edge = tr.grid_world(cliff=True), 3  # row 0, column 3: the cliff is to the right
    assert mdp.transition[edge, 3, 100] == pytest.approx(0.625) and mdp.transition[edge, 1, 100] == pytest.approx(0.125)
    assert (mdp.transition[100, :, 0] == 1).all() and (mdp.reward[100] == -100).all()
    assert mdp.reward[:100].min() == 0.001 and mdp.transition[:100].sum(0).sum(0)[[4, 5, 54, 55]].max() <= 4


def test_real_outcome_and_visits_match_matrix_powers():
    mdp = tr.grid_world(cliff=True)
    policy = random_policy(np.random.default_rng(9), mdp)
    matrix = np.einsum("sa,sat->st", policy, mdp.transition)
    state, total, falls, share = mdp.start, 0.0, 0.0, np.zeros(101)
    for t in range(200):
        total += mdp.gamma**t * state @ (policy * mdp.reward).sum(1)
        share += state / 200
        state = state @ matrix
        falls += state[100]
    got = tr.real_outcome(mdp, policy)
    assert got[0] == pytest.approx(total, abs=1e-10) and got[1] == pytest.approx(falls, abs=1e-10)
    np.testing.assert_allclose(tr.visits(mdp, mdp.probability, policy), share[:, None] * policy, atol=1e-12)


def test_real_value_on_the_cliff_never_falls_as_beta_grows():
    mdp = tr.grid_world(cliff=True)
    value, falls = tr.real_outcome(mdp, tr.greedy(tr.soft_value_iteration(mdp, np.geomspace(0.1, 1e4, 60))))
    assert (np.diff(value) >= -1e-12).all() and (np.diff(falls) <= 1e-12).all() and value[-1] - value[0] > 6


def test_risk_line_fools_vmbpo_only():
    mdp = tr.risk_line()
    assert tr.value_iteration(mdp)[1].argmax() == 0 and tr.value_iteration(mdp)[1, 0] == pytest.approx(450.001)
    wrong = tr.greedy(tr.soft_value_iteration(mdp, 1.0))
    assert wrong[1].argmax() == 1 and tr.real_outcome(mdp, wrong)[0] < 330


def test_ten_thousand_states():
    rng, states = np.random.default_rng(10), 10_000
    mdp = tr.make_mdp(rng.uniform(0, 1, (states, 4)), 0, successor=rng.integers(0, states, (states, 4, 16)),
                      probability=rng.dirichlet(np.ones(16) * 3, (states, 4)), gamma=0.5)
    q = tr.soft_value_iteration(mdp, 5.0)
    s, a = 1234, 2
    by_hand = 5 * math.log(sum(p * math.exp(q[t].max() / 5) for t, p in zip(mdp.successor[s, a], mdp.probability[s, a])))
    assert q[s, a] == pytest.approx(mdp.reward[s, a] + 0.5 * by_hand, abs=1e-9)
    history = tr.learn(mdp, "beta-vmbpo", episodes=20, trials=1, actors=10, evals=1, horizon=5)
    assert np.isfinite(history["q"]).all() and (history["q"] != 0).any()
