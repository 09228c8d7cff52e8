"""Which code this is: the git commit of the checkout, told along where the code is shipped."""

import os
import subprocess
from pathlib import Path

VARIABLE = "LAYERSWEEP_COMMIT"
"""Names the commit where the code lies without its repository: in a job on a cluster."""
UNKNOWN = "unknown"


def commit() -> str:
    """The commit, with `-dirty` behind it where files differ from it; `unknown` outside a checkout."""
    told = os.environ.get(VARIABLE)
    if told:
        return told
    # A package installed into somebody's project must not pass that project's commit for ours.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return UNKNOWN
    head = _git("rev-parse", "HEAD")
    if head is None:
        return UNKNOWN
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/")
    return head if changed == "" else f"{head}-dirty"


def _git(*arguments: str) -> str | None:
    """What git answers about this file's folder; None if it cannot."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
