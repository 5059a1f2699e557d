"""Says what a long study is doing, in one line that is gone when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def working(title: str = "Simulating") -> Iterator[Callable[[str], None]]:
    """A function to call with what comes next; shows a count, the time gone and those words, then nothing.

    >>> with working() as say:  # doctest: +SKIP
    ...     planning_study(scenario, 15e12, say)
    """
    from tqdm import tqdm

    with tqdm(desc=title, unit=" steps", leave=False, bar_format="{desc}: {n} done, {elapsed}{postfix}") as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield say
