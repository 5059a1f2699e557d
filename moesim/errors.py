"""The user's errors: each says owner, field, rule and value got. Our own mistakes are assertions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoesimError(Exception):
    """Any error that a user can mend. The CLI prints it in one line and exits with status 2."""


class InputError(MoesimError):
    """A value that breaks a rule.

    owner: who holds the field (``scenario.parallel``, a file's path); field: its name; rule: what must hold;
    got: the value. ``hint`` adds what to do about it.
    """

    def __init__(self, owner: str, field: str, rule: str, got: object, hint: str = "") -> None:
        self.owner, self.field, self.rule, self.got, self.hint = owner, field, rule, got, hint
        text = repr(got)
        shown = text if len(text) <= 120 else text[:117] + "..."
        place = f"{owner}: {field}" if field else owner
        super().__init__(f"{place}: {rule}; got {shown}" + (f". {hint}" if hint else ""))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, object, str]]:
        return type(self), (self.owner, self.field, self.rule, self.got, self.hint)


class NotModelledError(MoesimError):
    """The input is well formed, but moesim does not model what it asks for: ``what`` names it."""


def near_match(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known ones, or all of them when none is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.55)
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    return "Known: " + ", ".join(options) if options else ""


def check(condition: bool, owner: str, field: str, rule: str, got: object, hint: str = "") -> None:
    """Raise InputError unless the condition holds."""
    if not condition:
        raise InputError(owner, field, rule, got, hint)
