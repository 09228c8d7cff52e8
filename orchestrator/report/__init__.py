"""The report of a sweep: tables in, one page with a decision out."""

from orchestrator.report.page import Report, build_report
from orchestrator.report.summary import Failure, RunSummary
from orchestrator.report.tables import (
    CONSENSUS_COLUMNS,
    MAPS_COLUMNS,
    PROFILE_COLUMNS,
    RESULTS_COLUMNS,
    TABLES,
    VALIDATION_COLUMNS,
    typed,
    write_tables,
)

__all__ = [
    "CONSENSUS_COLUMNS",
    "MAPS_COLUMNS",
    "PROFILE_COLUMNS",
    "RESULTS_COLUMNS",
    "TABLES",
    "VALIDATION_COLUMNS",
    "Failure",
    "Report",
    "RunSummary",
    "build_report",
    "typed",
    "write_tables",
]
