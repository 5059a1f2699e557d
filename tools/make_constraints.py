"""Resolve constraints.txt again: ``make constraints``, or ``ARGS=--upgrade`` for the newest versions. Needs uv.

Without arguments every pin stays that still fits pyproject.toml.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "# What was tested, for every platform and Python (made by: make constraints). "
    "torch: pip takes a CPU wheel where one is offered, the CUDA build on a GPU box.\n"
)
# What only CUDA builds of torch ask for, which pin it themselves.
OF_CUDA = re.compile(r"(nvidia-|cuda-|triton\b)")


def resolve(arguments: list[str]) -> str:
    """The pins of all extras, one a line, on any platform and Python that pyproject.toml allows."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--all-extras"]
    command += ["--no-header", "--no-annotate", "--quiet", "--output-file", "constraints.txt", *arguments]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return HEADER + "".join(f"{line}\n" for line in sorted(lines) if not OF_CUDA.match(line) and line[:1] != "#")


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(resolve(sys.argv[1:]), encoding="utf-8")
