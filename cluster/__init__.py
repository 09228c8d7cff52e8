"""Where the work runs: connecting to Ray, capacity, leases of worker processes, jobs.

Knows nothing of speech: it calls a function named by a dotted path with a JSON payload.
"""
