"""A name means one thing: what two scripts both define under one name has one source, comments included."""

import ast
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [path.relative_to(ROOT) for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])]
TRAINING = [path for path in SCRIPTS if path.name != "tabular_risk.py"]
FENCE = "# " + "-" * 118 + "\n# Below: the same in every script."

# Names above the fence whose source is the algorithm's own, with the reason. Methods are compared as Class.method.
DIFFERS = {
    "train": "the algorithm's loop",
    "Agent": "names the script's own steps",
}
# Its methods that are the algorithms themselves.
AGENT = {"__init__", "act", "assess", "fit_model", "learn", "model_loss", "predict", "update", "value"}


def half(path, below):
    """The script's text below the fence, or above it."""
    above, fence, rest = (ROOT / path).read_text().partition(FENCE)
    assert fence, f"{path} has no fence"
    return rest if below else above


def test_text_below_the_fence_is_the_same():
    """But for the evaluation of active VEM, which carries a latent state, evaluates two policies and stands above."""
    *others, reference = (half(path, below=True) for path in TRAINING if path.name != "active_vem.py")
    before, begin, rest = reference.partition("@torch.no_grad()\ndef evaluate(")
    _, end, after = rest.partition("\n\n\n")
    assert begin and end and half(Path("active_vem.py"), below=True) == before + after
    assert all(other == reference for other in others)


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_loop_is_short(path):
    (train,) = [node for node in ast.parse((ROOT / path).read_text()).body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno < 45


@pytest.mark.parametrize("path", TRAINING, ids=str)
def test_inline_metadata_are_the_requirements(path):
    """A script that is copied elsewhere still knows what it needs: all but what logs online, what tests, and trees."""
    text = (ROOT / path).read_text()
    first, *lines = text.splitlines()
    block = [line.removeprefix("#").strip() for line in lines[: lines.index("# ///")]]
    pins = tomllib.loads("\n".join(block))["dependencies"]
    required = (ROOT / "requirements.txt").read_text().split()
    assert first == "# /// script"
    unneeded = {"wandb", "pytest", "pytest-xdist"} | (set() if "sklearn" in text else {"scikit-learn"})
    assert pins == [pin for pin in required if pin.partition("==")[0] not in unneeded]


def sources(path):
    """Name -> source (with comments) of every definition above the fence; of a class, its methods and what is left of it."""
    text = half(path, below=False) if path in TRAINING else (ROOT / path).read_text()
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
    left, right = sources(one), sources(other)
    different = {name for name in left.keys() & right.keys() if left[name] != right[name]}
    allowed = DIFFERS.keys() | {f"Agent.{name}" for name in AGENT}
    assert not different - allowed, f"{one} and {other} disagree on {sorted(different - allowed)}"


PAIRS = [*combinations(TRAINING, 2)]
FLAG_DIFFERS = {"target_entropy": "−|A| in SAC, half of it in the model-based scripts",
                "beta": "fixed in VMBPO, a start in β-VMBPO",
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
    for name in [*DIFFERS, *(f"Agent.{name}" for name in AGENT)]:
        assert len({source[name] for source in seen if name in source}) > 1, f"{name} is the same everywhere: drop it"


def test_no_script_imports_a_sibling():
    names = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not names & {str(name).split(".")[0] for name in imported}, path
