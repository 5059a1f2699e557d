"""The command line: ``moesim VERB``. Results on stdout, messages on stderr; exit status 0, 1, 2, 3 or 130."""

from moesim.cli import accuracy as _accuracy  # noqa: F401 - a verb joins the others when its file is imported
from moesim.cli import alltoall as _alltoall  # noqa: F401
from moesim.cli import calibrate as _calibrate  # noqa: F401
from moesim.cli import catalog as _catalog  # noqa: F401
from moesim.cli import exchange as _exchange  # noqa: F401
from moesim.cli import goodput as _goodput  # noqa: F401
from moesim.cli import place as _place  # noqa: F401
from moesim.cli import plan as _plan  # noqa: F401
from moesim.cli import report as _report  # noqa: F401
from moesim.cli import routing_verbs as _routing_verbs  # noqa: F401
from moesim.cli import selfcheck as _selfcheck  # noqa: F401
from moesim.cli import simulate as _simulate  # noqa: F401
from moesim.cli import sweep as _sweep  # noqa: F401
from moesim.cli import uncertainty as _uncertainty  # noqa: F401
from moesim.cli import validate as _validate  # noqa: F401
from moesim.cli.app import app


def main() -> None:
    """Run the command line on ``sys.argv``."""
    app()


__all__ = ["app", "main"]
