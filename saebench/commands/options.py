"""Options that several commands share."""

from __future__ import annotations

import argparse


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a toml file, or the name of a recipe that ships with saebench")
    setting_argument(parser)


def setting_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, such as training.lr=0.001",
    )
