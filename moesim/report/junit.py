"""Gates as JUnit XML, which CI servers show: a test case for each gate; a warning passes and says so."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from moesim.study.validate import Gate, Validation


def junit_xml(validation: Validation) -> str:
    """The test suite of one design. Nothing of when or where it ran.

    >>> junit_xml(validation)[:5]  # doctest: +SKIP
    '<?xml'
    """
    failed = [gate for gate in validation.gates if gate.status == "fail"]
    suite = ElementTree.Element(
        "testsuite",
        name=f"moesim validate {validation.design.name}",
        tests=str(len(validation.gates)),
        failures=str(len(failed)),
        errors="0",
    )
    for gate in validation.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=validation.design.name, name=gate.name)
        if gate.status == "fail":
            failure = ElementTree.SubElement(case, "failure", message=gate_words(gate))
            failure.text = gate.fix or "no fix was found"
        elif gate.status == "warn":
            ElementTree.SubElement(case, "system-out").text = f"warning: {gate_words(gate)}. {gate.fix}".strip()
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def gate_words(gate: Gate) -> str:
    """A gate's number beside its limit: ``19.2% of all assignments, limit at most 5.0%``."""
    bound = gate.limit if gate.status == "fail" or gate.warn is None else gate.warn
    asked = "" if bound is None else f", {'limit' if gate.status == 'fail' else 'wanted'} at {gate.sense} "
    asked += "" if bound is None else value_words(gate, bound)
    return f"{value_words(gate, gate.value)} {gate.unit}{asked}"


def value_words(gate: Gate, value: float) -> str:
    """A gate's number as a reader wants it: shares in per cent, large numbers without decimals."""
    if gate.unit.startswith("of "):
        if abs(value) < 1e-6:
            return "none"
        return f"{value:.1%}" if abs(value) >= 1e-3 else f"{value:.4%}"
    return f"{value:,.0f}" if abs(value) >= 100 or gate.unit == "reasons" else f"{value:,.2f}"
