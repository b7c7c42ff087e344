"""A feature as one file, and its examples as a table: whole, safe, and with the numbers of the store."""

from __future__ import annotations

import csv
import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

import saebench as sb
from saebench.activations import ActivationStream
from saebench.features import FeatureStore, index, quantile_groups, top_examples
from saebench.features.labelling.labels import Label
from saebench.figures.feature_page import examples_csv, feature_page, key_figures, label_line

SITE = "blocks.1.hook_resid_post"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def store(tiny_lm, contexts, tmp_path_factory) -> FeatureStore:
    stream = ActivationStream(tiny_lm, contexts, [SITE])
    sae = sb.train(sb.TopK(d_sae=40, k=4, site=SITE), stream, sb.TrainConfig(num_tokens=32 * 60, batch_size=32, lr=5e-3))
    store = index(sae, stream, tmp_path_factory.mktemp("page") / "sae", lm=tiny_lm)
    store.token_strings[int(store.ids_T[1])] = HOSTILE
    return store


@pytest.fixture(scope="module")
def latent(store) -> int:
    return int(np.argmax(store.counts_F))


class Parsed(HTMLParser):
    def __init__(self, body: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(body)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_and_asks_for_nothing(store, latent):
    examples, groups = top_examples(store, latent, 5), quantile_groups(store, latent)
    body = feature_page(
        store, latent, name=f"run {HOSTILE}", examples=examples, groups=groups, label=Label(latent, f"label {HOSTILE}", "own"),
        note=HOSTILE, labels={other: HOSTILE for other in range(40)},
    )  # fmt: skip
    found = Parsed(body)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "a", "form"}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attributes in found.tags for name in attributes)
    assert "url(" not in body and "@import" not in body
    text = unescape(re.sub(r"<[^>]*>", "", body))
    assert f"{latent}: label {HOSTILE}" in text and text.count(HOSTILE) > 10
    for _, value in key_figures(store, latent):
        assert value in text
    shown = [attributes for tag, attributes in found.tags if tag == "i"]
    told = [value for example in (*examples, *(e for g in groups for e in g.examples)) for value in example.values if value]
    assert [attributes["data-v"] for attributes in shown] == [f"{value:.4g}" for value in told]
    details = store.details(latent)
    for other, cosine in details.neighbours:
        assert f"{other} {HOSTILE} cosine {cosine:.2f}" in text
    assert sum(tag == "rect" for tag, _ in found.tags) == len(details.histogram) + len(details.positions)


def test_a_latent_that_never_fires_has_a_page(store):
    dead = [latent for latent in range(40) if store.counts_F[latent] == 0]
    if not dead:
        pytest.skip("all fire")
    body = feature_page(store, dead[0], name="run", examples=[], groups=[])
    assert f"Feature {dead[0]}" in body and "<svg" not in body


def test_examples_as_a_table(store, latent):
    examples = top_examples(store, latent, 7)
    rows = list(csv.DictReader(io.StringIO(examples_csv(store, {"strongest": examples}))))
    assert [float(row["value"]) for row in rows] == pytest.approx([e.values[e.focus] for e in examples], rel=1e-5)
    for row, example in zip(rows, examples, strict=True):
        text = "".join(store.token_strings[i] for i in example.ids)
        assert json.loads(row["before"]) + json.loads(row["token"]) + json.loads(row["after"]) == text
        assert int(row["token_number"]) == int(row["context"]) * store.context_size + int(row["position"])
        assert json.loads(row["document"]) == example.document
        assert not any(cell.startswith(("=", "+", "@", "\t")) for cell in row.values())


def test_where_labels_come_from_is_said():
    assert label_line(None) == "no label"
    assert label_line(Label(1, "x", "own")) == "your label"
    assert "0.83" in label_line(Label(1, "x", "offline", score=0.83))
