"""Whether a dictionary fits a language model: asked before it is spliced in, or its latents are changed."""

from __future__ import annotations

from typing import Any

from saebench.dictionaries.base import Dictionary
from saebench.errors import UserError
from saebench.lm.sites import SEPARATOR


def check_model(dictionary: Dictionary, lm: Any) -> None:
    """Raises UserError where a dictionary reads or writes what the model does not have, in another width, or of other weights."""
    config = dictionary.config
    if not config.reads:
        raise UserError("the dictionary names no site, so it cannot be spliced in: train it on activations of a site")
    if joined := [site for site in config.sites if SEPARATOR in site]:
        raise UserError(
            f"the dictionary reads several models ({joined[0]!r}), and only one can be run: measure it by "
            "saebench.evaluation.reconstruction(dictionary, joined source)"
        )
    for sites, widths in ((config.reads, config.blocks_in), (config.writes, config.blocks_out)):
        if sum(lm.width(site) for site in sites) != sum(widths):
            raise UserError(
                f"the dictionary is {sum(widths)} wide at {' + '.join(sites)}, model {lm.name!r} is "
                f"{sum(lm.width(site) for site in sites)}: wrong model?"
            )
    trained_on = dictionary.trained_on.get("model")
    if trained_on is not None and "unknown" not in (trained_on, lm.fingerprint) and trained_on != lm.fingerprint:
        raise UserError(
            f"the dictionary was trained on a model with other weights ({trained_on}) than {lm.name!r} has ({lm.fingerprint}): "
            "load the model that it was trained on"
        )
