"""Concepts that a model's text contains, as examples of both kinds: imports and docstrings of Python, speech and animals in stories."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from saebench.lm import Document
from saebench.steering.targets import Pattern, Target

LINES, LEAST_LETTERS = 24, 80


@dataclass(frozen=True)
class Concept:
    """Examples with and without it. `target` measures it in a text; None for the likeness to the examples."""

    name: str
    positives: list[str]
    negatives: list[str]
    target: Target | None = None


def of_python(documents: Iterable[Document], seed: int = 0) -> list[Concept]:
    """Import statements, and the prose of docstrings, both against code without either."""
    imports, docstrings, code = [], [], []
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        lines, told = document.text.split("\n"), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                told |= set(range(node.lineno - 1, node.end_lineno or node.lineno))
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = node.body[0]
                told |= set(range(first.lineno - 1, first.end_lineno or first.lineno))
                if len(text) >= LEAST_LETTERS:
                    docstrings.append(text)
        own = [lines[node.lineno - 1] for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        if len(own) >= 3:
            imports.append("\n".join(own))
        code += list(
            _runs([line for number, line in enumerate(lines) if number not in told and not line.lstrip().startswith("#")])
        )
    pattern = Pattern.of(r"^\s*(from\s+\S+\s+import\b|import\s+\w)", "share of lines that import")
    mixed = random.Random(seed)
    for texts in (imports, docstrings, code):
        mixed.shuffle(texts)
    return [Concept("imports", imports, code, pattern), Concept("docstrings", docstrings, code)]


def of_stories(documents: Iterable[Document], seed: int = 0) -> list[Concept]:
    """Sentences with speech, and sentences with animals, each against sentences without."""
    sentences = [
        part.strip() for document in documents for part in re.split(r"\n+", document.text) if len(part.strip()) > LEAST_LETTERS
    ]
    random.Random(seed).shuffle(sentences)
    animals = re.compile(
        r"\b(dog|cat|bird|bear|rabbit|fish|frog|duck|mouse|bunny|lion|puppy|kitty|squirrel|animals?)s?\b", re.IGNORECASE
    )
    speech = re.compile(r'["“”]')
    return [
        Concept(
            name,
            [s for s in sentences if pattern.search(s)],
            [s for s in sentences if not pattern.search(s)],
            Pattern(said, pattern),
        )
        for name, pattern, said in (
            ("speech", speech, "share of lines with speech"),
            ("animals", animals, "share of lines with animals"),
        )
    ]


def _runs(lines: list[str]) -> Iterator[str]:
    for start in range(0, min(len(lines), 5 * LINES) - LINES, LINES):
        yield "\n".join(lines[start : start + LINES])
