"""The page stands alone: no code, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from moesim.report.page import page_of


def notebook() -> Any:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="3" height="3"/></svg>'
    outputs = [
        nbformat.v4.new_output("display_data", {"image/svg+xml": svg, "text/plain": "Picture(...)"}),
        nbformat.v4.new_output("display_data", {"text/html": "<p class='takeaway'>It fits.</p>"}),
        nbformat.v4.new_output("stream", name="stderr", text="a warning on the way"),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# What does it cost?\n\nA question."),
        nbformat.v4.new_code_cell("secret_code = 1", outputs=outputs),
        nbformat.v4.new_markdown_cell("## Memory\n\nSome $x$ prose."),
        nbformat.v4.new_markdown_cell("## Time"),
    ]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(notebook())


def test_nothing_is_fetched_from_elsewhere(page: str) -> None:
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", page)
    assert not re.search(r"@import|url\(", page)
    assert "<script" not in page
    assert "<link" not in page


def test_code_and_what_it_prints_on_the_way_are_not_shown(page: str) -> None:
    assert "secret_code" not in page
    assert "a warning on the way" not in page
    assert "Picture(...)" not in page


def test_figures_are_inline_and_tables_kept(page: str) -> None:
    assert re.search(r"<figure><svg .*<rect [^>]*width=", page, flags=re.S)
    assert "takeaway" in page


def test_the_title_and_the_contents_come_from_the_headings(page: str) -> None:
    assert "<title>What does it cost?</title>" in page
    assert re.findall(r'<a href="#([^"]+)">([^<]+)</a>', page) == [("memory", "Memory"), ("time", "Time")]
    assert 'id="memory"' in page


def test_the_same_notebook_gives_the_same_page(page: str) -> None:
    assert page_of(notebook()) == page
