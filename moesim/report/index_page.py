"""The page over many reports: a row each, with settings, headline numbers and a link; failures with their reason."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moesim.report.page import CSS
from moesim.report.runner import PAGE
from moesim.units import format_bytes, format_seconds

# Numbers of which the smallest, or the largest, is the best.
_LEAST = ("step_s", "peak_bytes", "exposed_comm_s", "wait_s", "bubble_fraction", "drop_fraction", "max_mean_load")
_MOST = ("tokens_per_s_per_gpu", "mfu", "headroom_bytes")
_CSS = """
main { max-width: none; }
.runs { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: right; vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var(--ink); }
th, td { padding: .35rem .7rem; }
td { text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.word, .reason { text-align: left; }
.reason, td.text { white-space: normal; text-align: left; min-width: 12rem; }
.asked { background: #f7f7f7; }
.best { font-weight: 700; }
.quiet { color: var(--quiet); }
"""


def index_of(title: str, rows: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of an index: rows of name (the report's folder), settings, result; failed of settings, kind, error.

    The best of a column is bold where a reader would agree on what is better.
    """
    total = len(rows) + len(failed)
    plural = "s" if total != 1 else ""
    told = f"{len(rows)} of {total} report{plural} rendered." + (
        " Bold: the best of its column." if len(rows) > 1 else ""
    )
    body = f"<h1>{html.escape(title)}: {total} parameter set{plural}</h1>\n<p class='quiet'>{told}</p>\n"
    if rows:
        body += f"<div class='runs'>{_table(rows)}</div>\n"
    if failed:
        body += f"<h2>Without a report</h2>\n<div class='runs'>{_failures(failed)}</div>\n"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}{_CSS}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    settings = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    numbers = list(dict.fromkeys(name for row in rows for name in row["result"]))
    best = {name: _best([row["result"].get(name) for row in rows], name) for name in numbers}
    head = "".join(
        ["<th class='word'>Report</th>", *(f"<th class='asked'>{_words(name)}</th>" for name in settings)]
        + [f"<th>{_words(name)}</th>" for name in numbers]
    )
    lines = []
    for row in rows:
        link = html.escape(f"{row['name']}/{PAGE}", quote=True)
        cells = [f"<td class='word'><a href=\"{link}\">open</a></td>"]
        cells += [f"<td class='asked'>{_setting(row['settings'].get(name))}</td>" for name in settings]
        for name in numbers:
            value = row["result"].get(name)
            is_best = best[name] is not None and value == best[name]
            kind = " class='best'" if is_best else " class='text'" if isinstance(value, str) else ""
            cells.append(f"<td{kind}>{html.escape(shown(name, value))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _failures(failed: Sequence[Mapping[str, Any]]) -> str:
    settings = list(dict.fromkeys(name for row in failed for name in row["settings"]))
    head = "".join(f"<th class='asked'>{_words(name)}</th>" for name in settings)
    lines = []
    for row in failed:
        cells = "".join(f"<td class='asked'>{_setting(row['settings'].get(name))}</td>" for name in settings)
        lines.append(
            f"<tr>{cells}<td class='word'>{row['kind']}</td><td class='reason'>{html.escape(row['error'])}</td></tr>"
        )
    head += "<th class='word'>Kind</th><th class='word'>Why</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _best(values: Sequence[Any], name: str) -> float | None:
    known = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(set(known)) < 2 or name not in (*_LEAST, *_MOST):
        return None
    return min(known) if name in _LEAST else max(known)


def shown(name: str, value: Any) -> str:
    """A number as a reader wants it, by the unit in its name.

    >>> shown("step_s", 1.5), shown("drop_fraction", 0.012), shown("fits", True)
    ('1.50 s', '1.2%', 'yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_fraction") or name == "mfu":
        return f"{value:.1%}"
    if "_per_s" in name or isinstance(value, int):
        return f"{value:,.0f}"
    return format_seconds(value) if name.endswith("_s") else f"{value:.4g}"


def _setting(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value))


def _words(name: str) -> str:
    for suffix in ("_fraction", "_bytes", "_s"):
        name = name.removesuffix(suffix) if not name.endswith("_per_s") else name
    return html.escape(name.replace("_per_s", "/s").replace("_per_", "/").replace("_", " "))
