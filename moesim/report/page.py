"""An executed notebook as one HTML page: no code, no scripts, nothing fetched from elsewhere, fit for print."""

from __future__ import annotations

import copy
import html
import re
from pathlib import Path
from typing import Any

from moesim.door import write_text_atomically

CSS = """
:root { --ink: #222; --quiet: #666; --line: #ddd; --accent: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, li { max-width: 46rem; }
p { margin: .5rem 0; }
nav { margin: 1.2rem 0 0; font-size: .92rem; columns: 2; column-gap: 2rem; }
nav a { display: block; padding: .1rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font-size: .9em; background: #f4f4f4; padding: .1em .3em; border-radius: 3px; }
pre { overflow-x: auto; background: #f7f7f7; padding: .8rem 1rem; border-radius: 6px; font-size: .85rem; }
figure { margin: 1.1rem 0 .4rem; }
svg { display: block; width: 100%; height: auto; }
.gt_table { font-variant-numeric: tabular-nums; margin-left: 0 !important; font-family: inherit !important; }
.gt_table * { font-family: inherit !important; }
@media (max-width: 40rem) { nav { columns: 1; } main { padding: 1.2rem .9rem 3rem; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 10.5pt; } nav { display: none; }
  h2, h3 { break-after: avoid; }
  svg, table, .takeaway { break-inside: avoid; } }
"""


def write_page(notebook: Path, target: Path) -> None:
    """Write an executed notebook as one self-contained HTML page: prose, tables and figures, without code."""
    import nbformat

    write_text_atomically(target, page_of(nbformat.read(notebook, as_version=4)))


def page_of(notebook: Any) -> str:
    """The HTML page of a notebook node: titled by its subject or first heading; second-level headings as contents."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        template_name="basic",
        config=Config({"HTMLExporter": {"exclude_anchor_links": True}}),
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body = _bare(exporter.from_notebook_node(_for_readers(notebook))[0])
    title = _text(
        _first(r'<p class="subject"[^>]*>(.*?)</p>', body) or _first(r"<h1[^>]*>(.*?)</h1>", body) or "Report"
    )
    sections = re.findall(r'<h2[^>]*id="([^"]+)"[^>]*>(.*?)</h2>', body, flags=re.S)
    contents = "".join(f'<a href="#{name}">{_text(words)}</a>' for name, words in sections)
    first = body.find("<h2")
    head, rest = (body[:first], body[first:]) if first >= 0 else (body, "")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{head}\n"
        + (f'<nav aria-label="Contents">{contents}</nav>\n' if contents else "")
        + f"{rest}\n</main>\n</body>\n</html>\n"
    )


def _for_readers(notebook: Any) -> Any:
    """A copy with SVGs as HTML, to stand inline, and without what cells print on the way (progress, warnings)."""
    kept = copy.deepcopy(notebook)
    for cell in kept.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/svg+xml" in data:
                output.data = type(data)({"text/html": f"<figure>{data['image/svg+xml']}</figure>"})
    return kept


def _bare(body: str) -> str:
    """The exporter's body without scripts, foreign style sheets and empty lines."""
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.S | re.I)
    body = re.sub(r"<link\b[^>]*>", "", body, flags=re.I)
    body = re.sub(r' id="cell-id=[^"]*"', "", body)
    body = re.sub(r"<h([23])>(.*?)</h\1>", lambda m: f'<h{m[1]} id="{_slug(m[2])}">{m[2]}</h{m[1]}>', body, flags=re.S)
    return re.sub(r"\n\s*\n+", "\n", body).strip()


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, flags=re.S)
    return match[1] if match else None


def _slug(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", _text(words)).strip("-").lower()


def _text(fragment: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", fragment)).strip()
