"""Command-line flags out of a shell script or a mapping: what a launcher's file says, before anybody judges it.

A script is read, never run: variables are those that it assigns plainly, or that the caller defines. Names are given
without leading dashes, words joined by hyphens.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import InputError, check

Values = tuple[str, ...]
MAX_FLAGS = 10_000
_ASSIGNMENT = re.compile(r"(?:export\s+|local\s+|declare\s+)?([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_LAUNCHERS = ("srun", "sbatch", "mpirun", "mpiexec", "docker", "nohup", "exec")
_PROGRAMS = ("bash", "sh", "python", "python3", "torchrun")
_COMMAND = re.compile(r"(python3?|torchrun|bash)\s.*--", re.DOTALL)  # in quotes, as bash -c takes it
_VARIABLE = re.compile(r"\$\{(\w+)(?::?[-=]([^{}]*))?\}|\$(\w+)")
_SUM = re.compile(r"\$\(\(([\w\s$*/+-]+)\)\)")
_ENDS = (")", ");", ";", "&&", "||", "|", "&", "}", "fi", "done")
_LABEL = re.compile(r"\(?--[\w-]+(=\*)?(\|--?[\w-]+(=\*)?)*\).*")  # of a case statement
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags in the order of the file; a flag without a value has none. ``owner`` names the file in refusals."""

    owner: str
    values: Mapping[str, Values] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def one(self, name: str) -> str | None:
        """The single value of a flag; None where it is not given. Raises InputError for none, or several."""
        if name not in self.values:
            return None
        values = self.values[name]
        check(len(values) == 1, self.owner, f"--{name}", "must have one value", " ".join(values))
        return values[0]

    def whole(self, name: str, default: int | None = None) -> int | None:
        """The whole number of a flag, or the default. Raises InputError."""
        text = self.one(name)
        if text is None:
            return default
        hint = "Say it with --define NAME=VALUE." if "$" in text else ""
        if not re.fullmatch(r"-?\d{1,15}", text):
            raise InputError(self.owner, f"--{name}", "must be a whole number", text, hint)
        return int(text)


def flags_of_script(text: str, owner: str, defined: Mapping[str, str] | None = None) -> Flags:
    """The flags of a shell script, or of any text of flags. Raises InputError for a flag given twice with other values.

    defined: variables that stand over those that the script assigns.

    >>> flags_of_script("TP=4\\npython pretrain_gpt.py --tensor-model-parallel-size $TP --bf16", "run.sh").values
    {'tensor-model-parallel-size': ('4',), 'bf16': ()}
    """
    variables: dict[str, str] = {}
    fixed = dict(defined or {})
    found: dict[str, Values] = {}
    for number, line in _logical_lines(text):
        assignments = _assignments(line)
        if assignments:
            for name, value in assignments:
                variables[name] = _expanded(value, variables | fixed)
            continue
        for name, values in _flags_of_line(line, owner, number):
            spelt = tuple(_expanded(value, variables | fixed) for value in values)
            _add(found, name, spelt, owner)
    return Flags(owner=owner, values=found)


def flags_of_mapping(raw: object, owner: str, defined: Mapping[str, str] | None = None) -> Flags:
    """The flags of a YAML or JSON file of arguments: names with or without dashes, in sections or not.

    true is a flag without a value, in a script too; false and null are none. Names all in capitals are variables.
    Raises InputError.
    """
    check(isinstance(raw, Mapping), owner, "", "must be a mapping of flags to values", type(raw).__name__)
    variables: dict[str, str] = {}
    found: dict[str, Values] = {}

    def walk(section: Mapping[str, Any]) -> None:
        for key, value in section.items():
            name = str(key)
            if isinstance(value, Mapping):
                walk(value)
            elif name.isupper():
                variables[name] = str(value)
            elif value is not None and value is not False:
                items = value if isinstance(value, list) else [] if value is True else [value]
                spelt = tuple(_expanded(str(item), variables | dict(defined or {})) for item in items)
                _add(found, name.lstrip("-"), spelt, owner)

    assert isinstance(raw, Mapping)
    walk(raw)
    return Flags(owner=owner, values=found)


def _add(found: dict[str, Values], name: str, values: Values, owner: str) -> None:
    name = name.replace("_", "-")
    if values in (("false",), ("False",)):
        return
    values = () if values in (("true",), ("True",)) else values
    given = found.setdefault(name, values)
    rule = "stands twice with different values, such as in two branches of the script"
    check(given == values, owner, f"--{name}", rule, f"{' '.join(given)} and {' '.join(values)}")
    check(len(found) <= MAX_FLAGS, owner, "", f"must hold at most {MAX_FLAGS} flags", len(found))


def _assignments(line: str) -> list[tuple[str, str]]:
    """The plain assignments that a line consists of, several after export or between semicolons; none of any other
    line, nor of one that assigns an array or flags.
    """
    whole = _ASSIGNMENT.fullmatch(line)
    if whole is None or "--" in line or whole[2].startswith("("):
        return []
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    parts = [word.rstrip(";") for word in words if word not in ("export", "local", "declare", ";")]
    found = [_ASSIGNMENT.fullmatch(part) for part in parts]
    if all(found):
        return [(match[1], match[2]) for match in found if match]
    return [(whole[1], " ".join(shlex.split(whole[2], comments=True)))]


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """(number, line) with continued lines and open quotes joined; comments and empty lines left out."""
    lines: list[tuple[int, str]] = []
    waiting, started = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        started = started if waiting else number
        if waiting.endswith(" ") and line.lstrip().startswith("#"):  # a comment among continued lines
            continue
        waiting += line.strip()
        if waiting.endswith("\\"):
            waiting = waiting[:-1] + " "
            continue
        if waiting.count('"') % 2 and len(waiting) < 100_000:  # a text of several lines
            waiting += " "
            continue
        if waiting and not waiting.startswith("#"):
            lines.append((started, waiting))
        waiting = ""
    return [*lines, (started, waiting)] if waiting.strip() else lines


def _flags_of_line(line: str, owner: str, number: int) -> list[tuple[str, list[str]]]:
    """Flags that stand on one line with their values; words before the first flag mean nothing."""
    if "--" not in line or _LABEL.fullmatch(line.strip()):
        return []
    line = re.sub(r"^[A-Za-z_]\w*\+?=\(?", " ", line)  # NAME=( ... and NAME="...
    for quote in "\"'":  # a text of flags in quotes is flags
        if line.strip().startswith(quote) and line.strip().endswith(quote) and line.count(quote) == 2:
            line = line.replace(quote, " ")
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        raise InputError(owner, f"line {number}", "must close its quotes", line[:60]) from None
    if words and words[0] in _LAUNCHERS:  # whose own flags come first
        begins = (i for i, word in enumerate(words) if word in _PROGRAMS or word.endswith(".py"))
        words = words[next(begins, len(words)) :]
    words = [own for word in words for own in (word.split() if _COMMAND.match(word) else [word])]
    found: list[tuple[str, list[str]]] = []
    is_open = False  # whether the next word may be a value of the last flag
    for word in words:
        if word.startswith("--") and word.count(")") > word.count("("):  # the array's own parenthesis
            word = word.rstrip(";").removesuffix(")")
        is_variable = re.fullmatch(r"\$\{?\w+(\[@\])?\}?", word) is not None
        if (match := _FLAG.fullmatch(word)) is not None:
            found.append((match[1], [] if match[2] is None else [match[2]]))
            is_open = match[2] is None
        elif not is_open or word in _ENDS or word.endswith(".py") or word.startswith(("2>", ">", "$@")):
            is_open = False
        elif is_variable:  # a value, or an array of further flags
            found[-1][1].extend([] if found[-1][1] or "[@]" in word else [word])
            is_open = False
        else:
            closes = word.count(")") > word.count("(")  # the array's own parenthesis
            found[-1][1].append(word.rstrip(";").removesuffix(")") if closes else word)
            is_open = not closes
    return found


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """Variables put in as far as they are known, sums of them worked out."""

    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, match[0] if default is None else default)

    for _ in range(4):
        after = _SUM.sub(_worked_out(variables), _VARIABLE.sub(value, text))
        if after == text:
            break
        text = after[:10_000]
    return text


def _worked_out(variables: Mapping[str, str]) -> Any:
    """What stands in place of ``$((a * b - 1))``: whole numbers, *, /, + and -, the first two before the others."""

    def value(match: re.Match[str]) -> str:
        words = [variables.get(w.lstrip("$"), w) for w in re.findall(r"\$?\w+|[*/+-]", match[1])]
        shape = "".join("n" if w.isdecimal() and len(w) < 12 else w if w in "*/+-" else "?" for w in words)
        if not re.fullmatch(r"n([*/+-]n)*", shape):
            return match[0]
        total, product, sign = 0, int(words[0]), 1
        for operator, word in zip(words[1::2], words[2::2], strict=True):
            if operator in "*/":
                if operator == "/" and int(word) == 0:
                    return match[0]
                product = product * int(word) if operator == "*" else product // int(word)
            else:
                total, product, sign = total + sign * product, int(word), 1 if operator == "+" else -1
        return str(total + sign * product)

    return value
