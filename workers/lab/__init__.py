"""The embedded default: models and speech made on the spot, with nothing to download."""
