"""The command line: `layersweep`. Parses, prints, and sets the exit status; the work is elsewhere.

Exit status: 0 all done, 1 some stage failed, 2 usage or configuration, 3 another driver holds the
run, 130 interrupted.
"""

import errno
import sys

from orchestrator.cli import sweeps as sweeps  # isort: skip - the order of the help
from orchestrator.cli import submit as submit  # isort: skip
from orchestrator.cli import runs as runs  # isort: skip
from orchestrator.cli import compare as compare
from orchestrator.cli import maps as maps
from orchestrator.cli import prune as prune
from orchestrator.cli.options import app as app


def main() -> None:
    """Entry point: turns errors a user can mend into one message and an exit status."""
    from cluster.connection import BadAddress, ClusterUnreachable
    from cluster.jobs import JobsError
    from orchestrator.runs import RunHeld, RunTaken
    from orchestrator.store import StoreUnreachable
    from workers.errors import InvalidInput

    try:
        app()
    except (InvalidInput, BadAddress, JobsError) as error:
        _complain(str(error), 2)
    except ClusterUnreachable as error:
        _complain(f"{error}; `layersweep doctor` says more", 2)
    except StoreUnreachable as error:
        _complain(f"{error}; nothing is lost, run the same command again when it does", 2)
    except (RunHeld, RunTaken) as error:
        _complain(str(error), 3)
    except KeyboardInterrupt:
        _complain("interrupted", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror}: make room, and run the same command again", 2)


def _complain(message: str, status: int) -> None:
    for line in message.splitlines():
        print(f"layersweep: {line}", file=sys.stderr)
    sys.exit(status)
