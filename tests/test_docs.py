"""README.md and docs/ against the scripts: equations, functions, flags, lines, links and the diff."""

import ast
import difflib
import re

import pytest
from conftest import ROOT
from test_copies import FENCE

PAGES = {"tabular_risk": "tabular_risk.py", "mbpo": "baselines/mbpo.py", "vmbpo": "vmbpo.py",
         "beta_vmbpo": "beta_vmbpo.py", "sac_iterative": "sac_iterative.py", "active_vem": "active_vem.py"}
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py"), *ROOT.glob("benchmarks/*.py")]
OTHERS = {"--script", "--help"}  # flags of uv, and of every command


def tags(text):
    """Equations, theorems and lemmas in a comment or a table: "(8, 9), Thm. 4.1" -> {"8", "9", "Thm. 4.1"}."""
    numbers = re.findall(r"\((\d+(?:, \d+)*)\)", text)
    theorems = re.findall(r"(?:Thm\.|Lemma) \d\.\d", text)
    return {number for group in numbers for number in group.split(", ")} | set(theorems)


def functions(source):
    """(name, first line, last line) of every function of a script."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [(node.name, node.lineno, node.end_lineno) for node in found]


def computed(source):
    """(equation, function) for every comment `# eq. (n)`, by the innermost function around it."""
    found = set()
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"# .*\b(eq\.|Thm\.|Lemma)", line):
            around = [(first, name) for name, first, last in functions(source) if first <= number <= last]
            found |= {(tag, name) for _, name in sorted(around)[-1:] for tag in tags(line.partition("# ")[2])}
    return found


def table(page):
    """(equation, function) of the rows of a page's table, the equation as it stands there."""
    rows = re.findall(r"^\| (.+?) \| .+ \| `(\w+)` \|$", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE)
    assert rows, f"docs/{page}.md has no table of equations"
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_functions_in_the_table_exist(page):
    names = {name for name, *_ in functions((ROOT / PAGES[page]).read_text())}
    assert {name for _, name in table(page)} <= names


@pytest.mark.parametrize("page", PAGES)
def test_every_equation_of_the_script_is_in_the_table(page):
    named = {(tag, name) for equation, name in table(page) for tag in tags(equation)}
    source = (ROOT / PAGES[page]).read_text()
    assert computed(source) <= named
    assert {tag for tag, _ in named} == {tag for tag, _ in computed(source)}, "an equation that no line computes"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_flags_exist(path):
    """As a field of some command's arguments: a flag that is gone is not spoken of."""
    fields = {node.target.id for code in CODE for node in ast.walk(ast.parse(code.read_text()))
              if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text())) - OTHERS
    assert sorted(flag for flag in named if flag[2:].replace("-", "_") not in fields) == []


def test_readme_is_short_and_without_commits():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert not re.search(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7}\b", text)


def test_readme_counts_the_lines_of_the_scripts():
    counts = {}
    for name in PAGES.values():
        above, fence, _ = (ROOT / name).read_text().partition(FENCE)
        total = (ROOT / name).read_text().count("\n")
        counts[name] = f"{total}, {above.count(chr(10))}" if fence else f"{total}"
    rows = re.findall(r"^\| `(.+?\.py)` \| .+ \| ([\d, ]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(rows) == counts


def test_readme_shows_the_real_diff():
    shown = re.search(r"```diff\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].splitlines()
    scripts = [(ROOT / name).read_text() for name in ("vmbpo.py", "beta_vmbpo.py")]
    agents = [script.partition("class Agent")[2].splitlines() for script in scripts]
    real = [line for line in difflib.unified_diff(*agents, n=0) if not line.startswith(("@@", "---", "+++"))]
    assert [line for line in shown if not line.startswith("@@")] == real


def test_readme_test_command_is_that_of_ci():
    command = "pip install -r requirements.txt -r requirements-optional.txt -r benchmarks/requirements.txt"
    command += " && python -m pytest"
    assert f"    {command}\n" in (ROOT / "README.md").read_text()
    assert command.replace("install", "install -q") in (ROOT / ".ci/run").read_text()
