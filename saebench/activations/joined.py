"""Several sources over the same tokens as one: activations of two models, or of two harvests of one model.

Sites get the name of their source in front: `base/blocks.2.hook_resid_post`, `chat/blocks.2.hook_resid_post`. A dictionary that names
both is a crosscoder over models.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from saebench.activations.batches import Source
from saebench.activations.encoding import Encoded
from saebench.activations.statistics import SiteStatistics
from saebench.errors import UserError
from saebench.files import identity
from saebench.lm.sites import SEPARATOR
from saebench.lm.tokens import Contexts


class JoinedSource:
    """Sources over identical contexts, side by side; itself a source, with sites `NAME/SITE`."""

    def __init__(self, sources: Mapping[str, Source]):
        """Raises UserError for no sources, a name with a slash, or sources that differ in their tokens or in what they skip."""
        if not sources:
            raise UserError("nothing to join: give sources by name")
        for name in sources:
            if not name or SEPARATOR in name:
                raise UserError(f"source name {name!r} must be a word without {SEPARATOR!r}: it stands in front of its sites")
        self.sources = dict(sources)
        first, *others = self.sources
        one = self.sources[first]
        for name in others:
            other = self.sources[name]
            if (
                (one.num_contexts, one.context_size) != (other.num_contexts, other.context_size)
                or one.ordered != other.ordered
                or one.contexts.identity != other.contexts.identity
            ):
                raise UserError(
                    f"sources {first!r} and {name!r} are not over the same tokens ({one.num_contexts} and {other.num_contexts} contexts of "
                    f"{one.context_size} and {other.context_size}): harvest both from one text, packed by one tokenizer"
                )
            if one.skip != other.skip:
                raise UserError(f"sources {first!r} and {name!r} skip {one.skip} and {other.skip} positions: they must agree")
        self.skip, self.ordered = one.skip, one.ordered
        self.competes = any(source.competes for source in self.sources.values())
        self.num_contexts, self.context_size = one.num_contexts, one.context_size
        self.widths = {
            SEPARATOR.join((name, site)): width for name, s in self.sources.items() for site, width in s.widths.items()
        }

    def __repr__(self) -> str:
        return f"JoinedSource({', '.join(self.widths)}; {self.num_tokens:,} tokens)"

    @property
    def contexts(self) -> Contexts:
        return next(iter(self.sources.values())).contexts

    @property
    def identity(self) -> str:
        return identity({name: source.identity for name, source in self.sources.items()})

    @property
    def num_tokens(self) -> int:
        return self.num_contexts * self.context_size

    def verify(self) -> None:
        """Verify every source. Raises UserError naming the first damaged file."""
        for source in self.sources.values():
            source.verify()

    def check_sites(self, sites: list[str]) -> None:
        for site in sites:
            if site not in self.widths:
                raise UserError(f"site {site!r} is not among the joined activations: they hold {', '.join(self.widths)}")

    def fetch(self, contexts_N: Tensor, sites: list[str], out: dict[str, Encoded] | None = None) -> dict[str, Encoded]:
        """The activations of some contexts, in the order given: values [N, S, D]. Written into `out`, the result of an earlier call,
        where sources can."""
        self.check_sites(sites)
        fetched: dict[str, Encoded] = {}
        for name, source in self.sources.items():
            prefix = name + SEPARATOR
            own = [site.removeprefix(prefix) for site in sites if site.startswith(prefix)]
            memory = out and {site.removeprefix(prefix): kept for site, kept in out.items() if site.startswith(prefix)}
            if own:
                fetched |= {prefix + site: encoded for site, encoded in source.fetch(contexts_N, own, memory or None).items()}
        return {site: fetched[site] for site in sites}

    def statistics(self, site: str) -> SiteStatistics:
        """Those of the source that has the site. Raises UserError for an unknown one."""
        self.check_sites([site])
        name, _, own = site.partition(SEPARATOR)
        return self.sources[name].statistics(own)
