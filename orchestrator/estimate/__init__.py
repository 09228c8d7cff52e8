"""What a plan will take before it is run: memory, time, whether it fits, and what sharing saves.

All of it from configuration files, headers of weight files and what the store remembers; nothing
is loaded, and torch is not imported.
"""
