"""The documents keep up with the code: anchors, links, file names, README lines that run, the figure's numbers."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import yaml

import moesim
from moesim.catalog.design import model_from_design
from moesim.catalog.hardware import load_cluster
from moesim.metrics.step import StepResult
from moesim.units import format_seconds

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODEL = ROOT / "docs" / "model.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted([*(ROOT / "moesim").rglob("*.py"), *(ROOT / "reference_model").rglob("*.py")])


def anchor(heading: str) -> str:
    """GitHub's rule: lower case, nothing but letters, digits, hyphens, underscores; each space a hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> tuple[str, ...]:
    """The anchors of a page's headings in order; GitHub numbers repeated ones from 1."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        name = anchor(heading)
        found.append(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return tuple(found)


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that lie in the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target]


def referenced_by_code() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in re.findall(r"docs/model\.md#([\w-]+)", path.read_text()):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Busiest port", "busiest-port"),
        ("FLOPs", "flops"),
        ("What's *here*, now?", "whats-here-now"),
        ("a - b", "a---b"),
    ],
)
def test_anchors_follow_githubs_rule(heading: str, expected: str) -> None:
    assert anchor(heading) == expected


def test_every_equation_that_the_code_refers_to_has_its_section() -> None:
    referenced = referenced_by_code()
    assert len(referenced) >= 20
    assert {name: where for name, where in referenced.items() if name not in anchors(MODEL)} == {}


def test_every_section_of_the_model_is_referred_to_by_code_or_by_a_page_and_stands_once() -> None:
    linked = {target.partition("#")[2] for page in PAGES for target in links(page)} | set(referenced_by_code())
    sections = anchors(MODEL)[1:]  # without the page's title
    assert len(set(sections)) == len(sections)
    assert [name for name in sections if name not in linked] == []


def test_every_section_of_the_model_names_a_file_that_exists() -> None:
    sections = re.split(r"^## ", MODEL.read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        name = section.partition("\n")[0]
        assert name == "Left out" or re.search(r"moesim/[\w/]+\.py", section), name
    for page in PAGES:
        for path in re.findall(r"`((?:moesim|reference_model|tests|notebooks|docs)/[\w/.-]+\.\w+)`", page.read_text()):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, name = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if name:
            assert name in anchors(there), f"{page.name}: {target}"


def test_the_readmes_python_lines_run() -> None:
    (lines,) = blocks(README, "python")
    assert len(lines.strip().splitlines()) == 3
    setting, _, last = lines.strip().rpartition("\n")
    names: dict[str, object] = {}
    exec(setting, names)
    result = eval(last, names)
    assert isinstance(result, StepResult)
    assert result.step_s > 0
    scenario = names["scenario"]
    assert isinstance(scenario, moesim.Scenario)
    assert scenario.with_(ep=4, recompute="full").parallel.ep == 4


def test_the_readmes_design_and_cluster_load_and_run_as_its_command_says(tmp_path: Path) -> None:
    design, cluster = blocks(README, "yaml")
    assert model_from_design(yaml.safe_load(design), owner="README.md").moe_layers == tuple(range(1, 32, 2))
    (tmp_path / "my-moe.yaml").write_text(design)
    (tmp_path / "my-cluster.yaml").write_text(cluster)
    assert load_cluster(str(tmp_path / "my-cluster.yaml")).num_gpus == 64
    (command,) = re.findall(r"`moesim simulate (--model my-moe\.yaml [^`]+)`", README.read_text())
    words = command.split()
    leaves = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    files = {name: str(tmp_path / leaves.pop(name)) for name in ("model", "cluster")}
    scenario = moesim.Scenario.make(**files, **{name: int(value) for name, value in leaves.items()})
    assert scenario.parallel.ep == 16


def test_the_readme_names_every_verb_and_only_targets_that_exist() -> None:
    from moesim.cli.app import app

    text = README.read_text()
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == set(re.findall(r"`moesim ([a-z-]+)", text)) & verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text.replace("make.", ""))) <= targets


def test_the_readme_names_every_notebook() -> None:
    names = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert names == set(re.findall(r"`([0-9]{2}_\w+)`", README.read_text()))


def test_the_refusal_in_the_readme_is_what_a_reader_gets() -> None:
    (shown,) = blocks(README, "text")
    with pytest.raises(moesim.errors.InputError) as refused:
        moesim.Scenario.make(model="deepseek-v3", cluster="h800-8x-ib400", num_gpus=2048, pp=16, ep=7)
    assert shown.strip() == f"moesim: error: {refused.value}"


def test_the_changelog_has_an_entry_for_this_version() -> None:
    assert anchor(moesim.__version__) in anchors(ROOT / "CHANGELOG.md")


def test_the_readmes_figure_shows_what_the_engine_says_today() -> None:
    """Where this fails, the engine's answer has moved: draw the figure again with docs/figures/make.py."""
    made = runpy.run_path(str(ROOT / "docs" / "figures" / "make.py"))
    figure = made["FIGURE"].read_text()
    step = moesim.simulate(made["QUESTION"])
    assert f"One step takes {format_seconds(step.step_s)}" in figure
    assert not re.search(r"(?:href|src)=\"https?://", figure)
    assert str(made["FIGURE"].relative_to(ROOT)) in links(README)
