"""One file per command: `arguments(parser)` adds its options, `run(args)` does the work and returns what `--json` prints.

Heavy imports stand inside `run`, so that `saebench --help` is quick.
"""
