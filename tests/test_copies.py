"""A name means one thing: what two scripts both define under one name has one source, comments included."""

import ast
from itertools import combinations

import pytest
from conftest import ROOT

SCRIPTS = [path.relative_to(ROOT) for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])]

# Names whose source is the algorithm's own, with the reason. Methods are compared one by one as Class.method.
DIFFERS = {
    "RANGE": "lists the limits of the script's own flags",
    "ReplayBuffer": "a row of VMBPO also holds the log-ratio",
    "ReplayBuffer.__init__": "a row of VMBPO also holds the log-ratio",
    "parse_args": "checks the script's own flags",
    "evaluate": "active VEM carries a latent state through an episode and evaluates two policies",
    "Agent": "names the script's own steps",
    "Agent.__init__": "VMBPO adds q_φ and the prior policy to the networks, β-VMBPO the dual variable",
    "Agent.act": "VMBPO acts with its prior policy",
    "Agent.moments": "VMBPO's ensemble is stacked twice, as p and as q",
    "Agent.model_loss": "VMBPO fits q by weighted likelihood",
    "Agent.fit_model": "VMBPO weighs transitions and starts q at p; MBPO can stop early",
    "Agent.hold_out_errors": "VMBPO measures p and q",
    "Agent.assess": "VMBPO also measures the tilt, and β-VMBPO its budget",
    "Agent.predict": "VMBPO imagines next states from q and rewards from p",
    "Agent.imagine": "a row of VMBPO also holds the log-ratio",
    "Agent.value": "SAC infers the policy first, and has the KL to a prior",
    "Agent.critic_loss": "equation numbers of the paper",
    "Agent.actor_loss": "VMBPO's KL to the prior policy",
    "Agent.update": "VMBPO's log-ratio in the target",
    "Agent.learn": "VMBPO copies the actor into the prior policy",
    "main": "β-VMBPO updates its dual variable; a row of VMBPO also holds the log-ratio",
}
TABULAR_ONLY = {"SCRIPT", "Args", "main", "parse_args", "fail"}  # tabular_risk.py has neither networks nor runs to resume


def sources(path):
    """Name -> source (with comments) of every top-level definition; of a class, its methods and what is left of it."""
    text = (ROOT / path).read_text()
    lines, found = text.splitlines(), {}

    def source(node):
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while start and lines[start - 1].strip().startswith("#"):
            start -= 1
        return "\n".join(line.rstrip() for line in lines[start : node.end_lineno])

    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name != "Args":
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": source(method) for method in methods}
            found[node.name] = "\n".join(lines[node.lineno - 1 : methods[0].lineno - 1])
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = source(node)
        elif isinstance(node, ast.Assign):
            found |= {name.id: source(node) for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
    return found


def flags(path):
    """Flag -> (type, help) of the script's Args; a default may differ."""
    text = (ROOT / path).read_text()
    args = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    found = {}
    for node in args[0].body if args else []:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = (ast.unparse(node.annotation), text.splitlines()[node.lineno - 1].partition("  # ")[2])
    return found


@pytest.mark.parametrize("one, other", [*combinations(SCRIPTS, 2)], ids=str)
def test_shared_names_have_one_source(one, other):
    tabular = "tabular_risk.py" in (one.name, other.name)
    left, right = sources(one), sources(other)
    different = {name for name in left.keys() & right.keys() if left[name] != right[name]}
    allowed = DIFFERS.keys() | (TABULAR_ONLY if tabular else set())
    assert not different - allowed, f"{one} and {other} disagree on {sorted(different - allowed)}"


PAIRS = [*combinations([s for s in SCRIPTS if s.name != "tabular_risk.py"], 2)]
FLAG_DIFFERS = {"target_entropy": "−|A| in SAC, half of it in the model-based scripts",
                "epochs": "0 stops early in MBPO alone", "beta": "fixed in VMBPO, a start in β-VMBPO",
                "updates_per_step": "an update of active VEM is of everything, its model too",
                "model_learning_rate": "of active VEM's inference of z too, and by agent"}


@pytest.mark.parametrize("one, other", PAIRS, ids=str)
def test_shared_flags_have_one_type_and_help(one, other):
    left, right = flags(one), flags(other)
    different = {name for name in left.keys() & right.keys() if left[name] != right[name]} - FLAG_DIFFERS.keys()
    assert len(left.keys() & right.keys()) >= 16 and not different, f"{one} and {other} disagree on {sorted(different)}"


def test_every_flag_has_help_and_every_exception_is_needed():
    for path in SCRIPTS:
        assert all(text for _, text in flags(path).values()) or path.name == "tabular_risk.py", path
    seen = [sources(path) for path in SCRIPTS]
    for name in DIFFERS:
        assert len({source[name] for source in seen if name in source}) > 1, f"{name} is the same everywhere: drop it"


def test_no_script_imports_a_sibling():
    names = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not names & {str(name).split(".")[0] for name in imported}, path
