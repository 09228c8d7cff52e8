"""What to do, in which order, and what it means: sweep file, plan, driver, results, report, CLI."""
