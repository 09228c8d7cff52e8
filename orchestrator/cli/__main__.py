"""`python -m orchestrator.cli`, for checkouts that are not installed."""

from orchestrator.cli import main

main()
