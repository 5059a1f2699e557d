"""Fit the step's constants (moesim/catalog/step.yaml) on the training rows that moesim.study.accuracy_step names, and
predict each release with the constants that the others give (moesim/catalog/left_out.csv).

Run from the repository: python tools/make_step_constants.py, then tools/make_accuracy.py.
"""

from __future__ import annotations

from moesim.catalog.step import FILE, LEFT_OUT, StepConstant, all_step_constants
from moesim.door import write_text_atomically
from moesim.study.accuracy import carried_cases
from moesim.study.accuracy_step import FITS, cases_of, fitted_constants, key_of, left_out_errors
from moesim.units import MICRO

HEAD = """# What a whole step loses against its best kernels, by GPU. Made by tools/make_step_constants.py: fitted on
# the rows that moesim.study.accuracy_step names (moesim/catalog/measurements/training.csv), tested on all others
# (docs/accuracy.md). Each GPU takes the entries that name it.
schema: 1
constants:
"""


def written(constant: StepConstant) -> str:
    """One entry of the file."""
    value = float(constant.value)
    shown = (f"{value / MICRO:.4g}", "us") if constant.name in ("issue_s", "step_s") else (f"{value:.4g}", "fraction")
    rule = next((fit.rule for fit in FITS if key_of(constant) in fit.keys), constant.value.source)
    num = len(constant.fitted_on)
    source = f"{num} rows: {rule}" if num else rule
    kind = "measured" if num else constant.value.kind
    lines = [
        f"- name: {constant.name}",
        f"  gpus: [{', '.join(constant.gpus)}]",
        f'  meaning: "{constant.meaning}"',
        f'  value: {{value: {shown[0]}, unit: {shown[1]}, kind: {kind}, source: "{source}", date: 2026-11}}',
    ]
    if constant.fitted_on:
        lines += ["  fitted_on:", *(f'  - "{row}"' for row in constant.fitted_on)]
    return "\n".join(lines)


if __name__ == "__main__":
    cases = cases_of(carried_cases("training"))
    constants = fitted_constants(all_step_constants(), cases)
    write_text_atomically(FILE, HEAD + "\n".join(written(constant) for constant in constants) + "\n")
    errors = left_out_errors(constants, cases)
    lines = ["id,error_fraction", *(f'"{name}",{error:.4f}' for name, error in sorted(errors.items()))]
    write_text_atomically(LEFT_OUT, "\n".join(lines) + "\n")
    for constant in constants:
        print(constant.name, ", ".join(constant.gpus), constant.value, f"on {len(constant.fitted_on)} rows")
