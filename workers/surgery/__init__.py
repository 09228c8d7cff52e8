"""Cutting layers out of decoders: in memory and undone again (`cut`), or from folder to folder (`prune`)."""
