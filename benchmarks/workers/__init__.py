"""One module per peer, each run as its own process: `python -m benchmarks.workers.NAME` in that peer's environment."""
