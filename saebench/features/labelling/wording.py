"""A rule as a person would write it: a few words instead of its conditions.

‘pro…’ is a token that begins words, ‘…me’ one that ends them, ‘…ec…’ one from inside; line ends and indentation are called so. Long lists
are cut: the rule itself has all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from saebench.features.labelling.corpus import PLACE_TRAITS, Corpus
from saebench.features.labelling.rules import Among, Around, Condition, Early, Rule, Trait

LISTED = 5  # values of a list
TOPIC_LISTED = 6
OFTEN = 0.8  # from which share on a token is said to begin, or continue, words
PLURAL = {
    "number": "numbers", "capitalised word": "capitalised words", "capitals": "capitals", "letters": "letters",
    "punctuation": "punctuation", "opening bracket": "opening brackets", "closing bracket": "closing brackets",
    "quotation mark": "quotation marks", "line end": "line ends", "spaces": "spaces", "white space": "white space",
    "token that is not ASCII": "tokens that are not ASCII", "token after a space": "tokens after a space",
    PLACE_TRAITS[0]: "the rest of words", PLACE_TRAITS[1]: "text that repeats what stood before",
}  # fmt: skip
ASIDE = {"token after a space": "after a space", PLACE_TRAITS[0]: "inside a word", PLACE_TRAITS[1]: "repeating what stood before"}
"""The same, told of a token that is named."""
UNCOUNTED = {"capitals", "letters", "punctuation", "spaces", "white space"}


def wording(rule: Rule, corpus: Corpus, promoted: Sequence[int] = ()) -> str:
    """One line that says what a rule says. `promoted` are tokens that the latent makes likelier: where the rule is about the next token and
    they agree, it says that the latent predicts it."""
    return _Words(rule.conditions, corpus, promoted).line()


def kind(rule: Rule) -> str:
    """What a rule is about in one word: token, phrase, word, class, next, line, topic, position or repeat."""
    first, *more = rule.conditions
    if isinstance(first, Early):
        return "position"
    if isinstance(first, Around):
        return "topic"
    if isinstance(first, Trait):
        return "repeat" if first.name == PLACE_TRAITS[1] else "class"
    if first.column in ("token", "before"):
        if first.at > 0:
            return "next"
        return "token" if first.column == "token" and first.at == 0 and not more else "phrase"
    return "line" if first.column == "line" else "word"


class _Words:
    """The words for conditions that hold together."""

    def __init__(self, conditions: Sequence[Condition], corpus: Corpus, promoted: Sequence[int]):
        self.conditions, self.corpus, self.promoted = conditions, corpus, set(promoted)

    def line(self) -> str:
        subject, places = self.subject(), self.places()
        if not subject and places[0].startswith("near: "):
            places[0] = f"words around: {places[0].removeprefix('near: ')}"
        following = self.among("token", 1)
        if not subject and following and places[0].startswith("before ") and self.promoted & set(following.values):
            places[0] = f"predicts {places[0].removeprefix('before ')}"
        if not subject and len(places) == 1:
            places[0] = places[0].removeprefix("among ").removeprefix("as ")
        return " ".join([subject, *places] if subject else places)

    def subject(self) -> str:
        """What the token itself is, or nothing where the rule does not say."""
        tokens, word = self.among("token"), self.among("word")
        traits = [
            c.name for c in self.conditions if isinstance(c, Trait) and c.at == 0 and not (tokens and self.implied(c, tokens))
        ]
        affixes = [self.affix(column) for column in ("begin", "end") if self.all_among(column)]
        words = "" if word is None else self.words(word.values)
        if tokens is not None:
            subject = self.tokens(tokens.values)
            alone = {self.corpus.strings[int(number)].strip().lower() for number in tokens.values}
            if word is not None and not set(map(str, word.values)) <= alone:
                subject += f" of {words}"
        elif word is not None:
            subject = words
        elif affixes:
            subject = affixes.pop(0)
        elif traits:
            subject = PLURAL[traits.pop(0)]
        else:
            return ""
        told = [ASIDE.get(name, PLURAL[name]) for name in traits] + affixes
        return f"{subject} ({', '.join(told)})" if told else subject

    def places(self) -> list[str]:
        """Where it stands."""
        found = []
        one, two, before, following = (
            self.among("token", -1),
            self.among("token", -2),
            self.among("before"),
            self.among("token", 1),
        )
        line = self.among("line")
        if one and two and len(one.values) == len(two.values) == 1:
            found.append(f"after {self.phrase((two.values[0], one.values[0]))}")
        else:
            found += [self.after(one.values)] if one else []
            found += [f"two tokens after {self.tokens(two.values)}"] if two else []
        found += [f"after {self.words(before.values)}"] if before else []
        found += [f"before {self.tokens(following.values)}"] if following else []
        found += [f"in lines that begin {self.tokens(line.values)}"] if line else []
        told = {c.at for c in self.conditions if isinstance(c, Among)} | ({-1} if before else set())
        for condition in self.conditions:
            if isinstance(condition, Trait) and condition.at and condition.at not in told:
                told.add(condition.at)
                name = condition.name if condition.name in UNCOUNTED else _one(condition.name)
                found.append(f"{'after' if condition.at < 0 else 'before'} {name}")
            elif isinstance(condition, Around):
                found.append(self.around(condition))
            elif isinstance(condition, Early):
                found.append(_early(condition))
        return found

    def implied(self, trait: Trait, tokens: Among) -> bool:
        """Whether all of some tokens have a trait anyway."""
        traits = self.corpus.traits
        return trait.name in traits.names and bool(traits[trait.name][list(map(int, tokens.values))].all())

    # --- single conditions ---

    def all_among(self, column: str) -> list[Among]:
        return [c for c in self.conditions if isinstance(c, Among) and c.column == column]

    def among(self, column: str, at: int = 0) -> Among | None:
        return next((c for c in self.all_among(column) if c.at == at), None)

    def affix(self, column: str) -> str:
        values = [value for c in self.all_among(column) for value in c.values]
        shown = self.listed([quoted(f"{value}-" if column == "begin" else f"-{value}") for value in values])
        return f"words {'beginning' if column == 'begin' else 'ending'} {shown}"

    def around(self, condition: Around) -> str:
        words = list(condition.words)
        if condition.after == 0:
            return f"shortly after {self.words(words)}"
        return f"near: {', '.join([self.corpus.form(word) for word in words[:TOPIC_LISTED]])}"

    def words(self, words: Sequence[int | str]) -> str:
        return self.listed([quoted(self.corpus.form(str(word))) for word in words])

    def after(self, ids: Sequence[int | str]) -> str:
        """What stands right after some tokens."""
        if all("\n" in self.corpus.strings[int(number)] for number in ids):
            return "at the beginning of a line"
        return f"after {self.tokens(ids)}"

    def tokens(self, ids: Sequence[int | str]) -> str:
        """A list of tokens, those that differ in case or a space only once."""
        breaks = [
            number for number in ids if not self.corpus.strings[int(number)].strip() and "\n" in self.corpus.strings[int(number)]
        ]
        shown: dict[str, str] = {}
        for number in ids:
            text = "line ends" if len(breaks) > 1 and number in breaks else self.token(int(number))
            shown.setdefault(text.lower(), text)
        return self.listed(list(shown.values()))

    def token(self, number: int) -> str:
        if number in self.corpus.separators:
            return "the start of a text"
        text = self.corpus.strings[number]
        if not text.strip():
            return _blank(text)
        continues, continued = self.corpus.joins_V[number] > OFTEN
        return quoted("…" * bool(continues) + text.strip() + "…" * bool(continued))

    def phrase(self, ids: Sequence[int | str]) -> str:
        text = "".join(self.corpus.strings[int(number)] for number in ids)
        return quoted(text.strip()) if text.strip() else " and ".join(self.token(int(number)) for number in ids)

    @staticmethod
    def listed(values: Sequence[str]) -> str:
        return ", ".join(values[:LISTED]) + (" …" if len(values) > LISTED else "")


def quoted(text: str) -> str:
    return f"\u2018{visible(text)}\u2019"


def visible(text: str) -> str:
    """Token text in one line, with its line ends and tabs to be seen and control characters replaced."""
    shown = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(shown.get(c, c if c.isprintable() else "�") for c in text)


def _blank(text: str) -> str:
    """The name of white space."""
    if not text:
        return "an empty token"
    lines, _, indentation = text.rpartition("\n")
    spaces = f"{len(indentation)} spaces" if set(indentation) <= {" "} else "indentation"
    if "\n" not in text:
        return "a space" if text == " " else spaces
    name = "empty line" if "\n" in lines else "line end"
    return f"{name} and {spaces}" if indentation else name


def _one(name: str) -> str:
    name = name.replace("token after a space", "token that follows a space")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _early(condition: Early) -> str:
    where = f"of a {condition.of}"
    return f"as the first token {where}" if condition.last == 1 else f"among the first {condition.last} tokens {where}"
