"""Fit the step's constants (moesim/catalog/step.yaml): Megatron-LM's on the training rows that
moesim.study.accuracy_step names, DeepSeek's on kernels of its trace (moesim.study.accuracy_trace); and predict each
release with the constants that the others give (moesim/catalog/left_out.csv).

Run from the repository: python tools/make_step_constants.py, then tools/make_accuracy.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moesim.catalog.step import FILE, LEFT_OUT, ConstantName, StepConstant, all_step_constants
from moesim.door import write_text_atomically
from moesim.door.records import read_records
from moesim.study.accuracy import CARRIED, carried_cases
from moesim.study.accuracy_step import FITS, cases_of, fitted_constants, key_of, left_out_errors
from moesim.study.accuracy_trace import fitted_on_trace
from moesim.units import MICRO

HEAD = """# What a whole step loses against its best kernels, by GPU and software. Made by tools/make_step_constants.py:
# megatron's fitted on the steps that moesim.study.accuracy_step names (moesim/catalog/measurements/training.csv),
# deepseek's on kernels of its published trace (trace.csv), all tested on the others (docs/accuracy.md). Each GPU takes
# the entries that name it; what a software has no entry for is megatron's.
schema: 1
constants:
"""
TRACE = "kernels of DeepSeek's published trace, one rank of 64 H800 in FP8: predicted of kernels alone over measured"


def written(constant: StepConstant) -> str:
    """One entry of the file."""
    value = float(constant.value)
    shown = (f"{value / MICRO:.4g}", "us") if constant.name in ("issue_s", "step_s") else (f"{value:.4g}", "fraction")
    rule = next((fit.rule for fit in FITS if key_of(constant) in fit.keys), "")
    source = f"{len(constant.fitted_on)} rows: {rule}" if constant.software == "megatron" else TRACE
    lines = [
        f"- name: {constant.name}",
        f"  software: {constant.software}",
        f"  gpus: [{', '.join(constant.gpus)}]",
        f'  meaning: "{constant.meaning}"',
        f'  value: {{value: {shown[0]}, unit: {shown[1]}, kind: measured, source: "{source}", date: 2026-11}}',
    ]
    lines += ["  fitted_on:", *(f'  - "{row}"' for row in constant.fitted_on)]
    return "\n".join(lines)


def of_deepseek(constant: StepConstant, found: Mapping[str, tuple[ConstantName, float]]) -> StepConstant:
    """A constant of DeepSeek's software as its trace says."""
    kind, value = next((kind, value) for kind, (name, value) in found.items() if name == constant.name)
    return replace(constant, value=replace(constant.value, value=value), fitted_on=(kind,))


if __name__ == "__main__":
    cases = cases_of(carried_cases("training"))
    known = all_step_constants()
    constants = fitted_constants([constant for constant in known if constant.software == "megatron"], cases)
    trace = fitted_on_trace(read_records(CARRIED / "trace.csv"))
    own = [of_deepseek(constant, trace) for constant in known if constant.software == "deepseek"]
    write_text_atomically(FILE, HEAD + "\n".join(written(constant) for constant in (*constants, *own)) + "\n")
    errors = left_out_errors(constants, cases)
    lines = ["id,error_fraction", *(f'"{name}",{error:.4f}' for name, error in sorted(errors.items()))]
    write_text_atomically(LEFT_OUT, "\n".join(lines) + "\n")
    for constant in (*constants, *own):
        print(
            constant.software,
            constant.name,
            ", ".join(constant.gpus),
            constant.value,
            f"on {len(constant.fitted_on)} rows",
        )
