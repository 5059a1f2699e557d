"""Says in a notebook what a long study is doing, in one line that is gone when it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def working(title: str = "Simulating") -> Iterator[Callable[[str], None]]:
    """A function to call with what comes next; shows a count, the time gone and those words, then nothing.

    >>> with working() as say:  # doctest: +SKIP
    ...     planning_study(scenario, 15e12, say)
    """
    import sys

    from tqdm import tqdm

    words = "{desc}: {n} done, {elapsed}{postfix}"
    # On stdout: what a notebook prints on stderr stays behind as a red stripe, even when it is empty.
    with tqdm(desc=title, leave=False, bar_format=words, file=sys.stdout) as bar:

        def say(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield say
