"""The command line, with workers that fail as planned (`faulty.py`) and a driver that looks more often."""

from functools import partial

from orchestrator import execute, runs
from orchestrator.cli import main
from orchestrator.driver import loop, retries

execute.Place = partial(execute.Place, target="faulty:run_attempt")
runs.HEARTBEAT_SECONDS = 0.5
loop.LOOK_SECONDS = 0.5
retries.BACKOFF_SECONDS = 0.2
main()
