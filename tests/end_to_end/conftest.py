"""One finished smoke sweep, run once through the command line, that the tests read and copy."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
PROGRAM = Path(sys.executable).parent / "layersweep"


def layersweep(folder: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run the command in `folder`, as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [PROGRAM, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class Finished:
    """A finished run and what the command printed."""

    folder: Path
    process: subprocess.CompletedProcess

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "smoke"

    def copy_to(self, folder: Path, *kinds: str) -> Path:
        """A folder whose store has this run's artefacts of some kinds."""
        for kind in kinds:
            shutil.copytree(self.folder / "store" / kind, folder / "store" / kind)
        return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("smoke")
    return Finished(folder, layersweep(folder, "run", str(CONFIGS / "smoke.yaml")))
