"""The `saebench` command. Parses, hands over to `saebench.commands`, and shows what came of it.

Exit codes: 0 done, 2 wrong input (one line on standard error), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module

from saebench import __version__
from saebench.errors import Interrupted, UserError

COMMANDS = {
    "demo": "the main job on the bundled model and text, end to end",
    "harvest": "run a model over text and store activations",
    "train": "train dictionaries from a recipe",
    "evaluate": "measure the dictionaries of a run",
    "index": "build the feature store of a run's dictionaries: every firing of every latent",
    "browse": "look at the features of runs in a browser on this machine",
    "label": "say in words where latents fire, with a score on text that the words were not made from",
    "steer": "turn features up or down: the text beside untouched text, with what it costs",
    "trace": "a prompt's graph of features, with scores and what interventions say of its edges",
    "plan": "memory and time of a recipe, before running it",
    "doctor": "device, versions, kernels in use, and what is missing",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saebench", description="Train sparse autoencoders on a language model, see what they learned, measure it."
    )
    parser.add_argument("--version", action="version", version=f"saebench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        import_module(f"saebench.commands.{name}").arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = build_parser().parse_args(argv)
    command = import_module(f"saebench.commands.{args.command}")
    try:
        result = command.run(args)
    except UserError as error:
        return _fail(" ".join(str(error).split()), 2, args.json)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue", 130, args.json)
    except Interrupted as stopped:
        return _fail(str(stopped), 130, args.json)
    except Exception as error:
        from saebench.files import is_disk_full

        if is_disk_full(error):
            return _fail(
                f"no space left on the disk ({error}): free some space and run the same command again to continue", 2, args.json
            )
        if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError) and error.filename:
            return _fail(f"cannot use {error.filename}: {(error.strerror or '').lower()}; name another place", 2, args.json)
        raise
    if args.json:
        print(json.dumps(result))
    return 0


def _fail(message: str, code: int, as_json: bool) -> int:
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main())
