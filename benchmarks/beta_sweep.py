"""Return, falls and KL of the exact solution against β, and what dual descent finds for several budgets.

    python benchmarks/beta_sweep.py                        # on the cliff: results/tabular_beta_sweep.csv and its figure
    python benchmarks/beta_sweep.py --mdp my.npz --out my  # on a process of one's own, as in tabular_risk.py

The KL is that of the exploring actor's steps, the one that dual descent sees.
"""

import dataclasses
import sys

import numpy as np
import tyro
from common import at_least, fail, group, load_script, publish

TABULAR = load_script("tabular_risk")
BUDGETS = 0.0005, 0.001, 0.0025, 0.01, 0.05  # ε of eq. (8), nats a step
PANELS = {"return": "return of the greedy policy", "falls": "falls per episode", "kl": "KL(q‖p), nats per real step"}


@dataclasses.dataclass
class Args:
    mdp: str = ""  # .npz file with the arrays of tabular_risk.py's make_mdp; default: the cliff
    out: str = "tabular_beta_sweep"  # name of the csv and the figure
    trials: int = 10  # of dual descent per budget
    episodes: int = 40_000  # per trial, a multiple of 100
    from_csv: bool = False  # draw from the csv


def measure(args):
    """Rows kind, budget, beta, return, falls, kl; an exact one per β, a learned one per budget and trial."""
    mdp = TABULAR.load_mdp(args.mdp) if args.mdp else TABULAR.grid_world(cliff=True)
    size = np.geomspace(3.2, 1e4, 61)  # below, choices on the cliff lie closer than doubles hold
    for beta in (-size, size):
        q_value = TABULAR.soft_value_iteration(mdp, beta)
        _, _, kl = TABULAR.posterior_dynamics(mdp, q_value.max(-1), beta)
        policy = TABULAR.greedy(q_value)
        explorer = (1 - TABULAR.EXPLORE) * policy + TABULAR.EXPLORE / policy.shape[-1]
        mean_kl = (TABULAR.visits(mdp, explorer) * kl).sum((-1, -2)) / TABULAR.HORIZON
        for row in zip(beta, *TABULAR.real_outcome(mdp, policy), mean_kl):
            yield {"kind": "exact", "budget": "", **dict(zip(("beta", *PANELS), row))}
    for budget in BUDGETS:
        found = TABULAR.learn(mdp, "beta-vmbpo", args.episodes, args.trials, 100.0, budget, evals=1)
        for row in zip(*(found[key][-1] for key in ("beta", *PANELS))):
            yield {"kind": "learned", "budget": budget, **dict(zip(("beta", *PANELS), row))}


def draw(rows, figure):
    axes, exact = figure.subplots(1, 3), [row for row in rows if row["kind"] == "exact"]
    number = lambda rows, key: np.array([float(row[key]) for row in rows])
    averse, seeking = exact[: len(exact) // 2], exact[len(exact) // 2 :]
    learned = group([row for row in rows if row["kind"] == "learned"], "budget")
    for axis, (key, label) in zip(axes, PANELS.items()):
        axis.plot(-number(averse, "beta"), number(averse, key), "C4--", label="exact, β < 0: risk-averse")
        axis.plot(number(seeking, "beta"), number(seeking, key), "C2-", label="exact, β > 0: risk-seeking")
        for index, (budget, ends) in enumerate(learned.items()):
            style = {"color": f"C{index + 5}", "alpha": 0.6, "label": f"learned, ε = {budget}"}
            axis.plot(number(ends, "beta"), number(ends, key), "o", **style)
        axis.set(xlabel="|β|", ylabel=label, xscale="log")
    axes[0].set_yscale("symlog", linthresh=0.2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    beta, kl = np.log(number(seeking, "beta")), np.log(number(seeking, "kl") + 1e-300)
    axes[2].set_yscale("log" if kl.max() > np.log(1e-300) else "linear")
    for budget, ends in learned.items():
        meets = np.exp(np.interp(np.log(float(budget)), kl[::-1], beta[::-1], np.inf, -np.inf))  # KL falls as β grows
        end = number(ends, "beta").mean()
        yield f"ε = {budget}: dual descent ends at β = {end:.4g}, the exact KL meets ε at {meets:.4g}"
    trials = max(len(ends) for ends in learned.values())
    title = f"Lines: the exact solution. Dots: where dual descent ends, {trials} trials for each ε."
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title=title)


def main(args):
    at_least(args, trials=1, episodes=100)
    if args.episodes % 100:
        fail(f"--episodes {args.episodes}: must be a multiple of 100")
    return publish(args.out, None if args.from_csv else measure(args), draw, (14, 5.6), "Return, falls and KL by β")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__.splitlines()[0])))
