"""The house's rules, kept as tests: units in one file, light imports, clean notebooks, one list of dependencies."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "moesim").rglob("*.py"))
HEAVY = {"torch", "transformers", "numba", "seaborn", "matplotlib", "papermill", "pandas", "simpy", "great_tables"}
MAX_IMPORT_S = 0.5
CONDA_NAMES = {"torch": "pytorch"}

# Factors that convert units. 1e-3 is left out: it is more often a tolerance.
UNIT_FACTORS = {1e3, 1e6, 1e9, 1e12, 1e15, 1e-6, 1e-9, 1024}
UNIT_EXPONENTS = {2: {10, 20, 30, 40, 50}, 10: {3, 6, 9, 12, 15, -3, -6, -9}, 1024: {1, 2, 3, 4}}


def constant(node: ast.AST) -> float | None:
    """The number that an expression spells out, if it is one."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = constant(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    return None


def unit_powers(tree: ast.AST) -> Iterator[int]:
    """Lines where a unit's factor is multiplied, divided by, or spelled as a power."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.BinOp):
            continue
        left, right = constant(node.left), constant(node.right)
        converts = isinstance(node.op, (ast.Mult, ast.Div, ast.FloorDiv)) and {left, right} & UNIT_FACTORS
        is_power = isinstance(node.op, ast.Pow) and left is not None and right in UNIT_EXPONENTS.get(int(left), ())
        if converts or is_power:
            yield node.lineno


@pytest.mark.parametrize(
    "code", ["x / 1e9", "1e-6 * x", "n / 1024**3", "2**30", "10**9 * n", "s * 1000", "x / (2 ** 40)"]
)
def test_the_search_for_unit_powers_finds_them(code: str) -> None:
    assert list(unit_powers(ast.parse(code)))


@pytest.mark.parametrize("code", ["x / 8", "2 * x", "x**2", "abs(x) < 1e-9", "range(1024)", "1e-3 * x", "limit = 1000"])
def test_the_search_for_unit_powers_leaves_other_numbers_alone(code: str) -> None:
    assert not list(unit_powers(ast.parse(code)))


def test_powers_of_ten_and_two_stand_only_in_units() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if path.name != "units.py"
        for line in unit_powers(ast.parse(path.read_text()))
    ]
    assert found == []


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_moesim_never_imports_torch_and_only_the_cli_knows_the_reference_model() -> None:
    for path in SOURCES:
        names = imported_names(ast.parse(path.read_text()))
        assert not names & {"torch", "transformers"}, path
        assert "reference_model" not in names or "cli" in path.parts, path


def test_only_the_door_opens_user_files() -> None:
    opens = re.compile(
        r"(?<![\w.])open\(|json\.load\(|yaml\.(safe_)?load\(|np\.load\(|(?<!os)\.open\(|read_csv\(|fromfile\("
    )
    own = {"door", "_notebooks"}
    found = [str(path) for path in SOURCES if not own & set(path.parts) and opens.search(path.read_text())]
    assert found == []


@pytest.mark.parametrize("module", ["moesim", "moesim.cli"])
def test_importing_takes_under_half_a_second_and_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import time; start = time.process_time(); import {module}; took_s = time.process_time() - start; import sys; "
        f"print(took_s, *sorted({HEAVY!r} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(run[0]) for run in runs) < MAX_IMPORT_S
    assert runs[0][1:] == []


def test_describing_a_model_on_a_cluster_loads_nothing_heavy() -> None:
    code = (
        "import sys, moesim; moesim.describe(moesim.load_model('deepseek-v3')); moesim.load_cluster('h800-8x-ib400'); "
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []


def test_notebooks_lie_in_git_without_outputs() -> None:
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [], path
                assert cell["execution_count"] is None, path


def requirement(text: str) -> tuple[str, str]:
    """(name in conda-forge's spelling, version range) of a requirement such as ``torch>=2.11``."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[^]]*\])?\s*([<>=!~].*)?", text.strip())
    assert match, text
    name = match[1].lower().replace("_", "-")
    return CONDA_NAMES.get(name, name), match[3] or ""


def test_environment_yml_says_what_pyproject_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(requirement(text) for text in project["dependencies"])
    for extra in ("dask", "dev", "hf"):
        wanted |= dict(requirement(text) for text in project["optional-dependencies"][extra])
    wanted["python"] = project["requires-python"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    listed = dict(requirement(item) for item in environment["dependencies"] if isinstance(item, str) and item != "pip")
    assert listed == wanted
    for text in project["optional-dependencies"]["measured"]:  # pip only
        assert f'pip install "{text}"' in (ROOT / "environment.yml").read_text()
    assert environment["channels"] == ["conda-forge"]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins: dict[str, set[str]] = {}
    for line in filter(None, lines):
        pin = Requirement(line)
        pins.setdefault(canonicalize_name(pin.name), set()).update(spec.version for spec in pin.specifier)
    extras = [text for extra in ("dask", "dev", "hf", "measured") for text in project["optional-dependencies"][extra]]
    for text in [*project["dependencies"], *extras]:
        wanted = Requirement(text)
        versions = pins.get(canonicalize_name(wanted.name), set())
        assert versions, f"{wanted.name} is not pinned"
        assert all(wanted.specifier.contains(version) for version in versions), text
    assert pins["torch"] == {"2.13.0"}
