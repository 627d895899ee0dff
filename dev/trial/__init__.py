"""Is one change better? Paired seeds, interleaved, with a sequential test: `python -m dev.trial`."""
