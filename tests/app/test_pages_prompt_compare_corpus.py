"""Prompt, Compare and Corpus without a browser: every number that they show against dense arithmetic, and texts that are markup."""

from __future__ import annotations

import re
import shutil
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("streamlit")

from page_run import HOSTILE, LABELLED, NAME, SCRIPT, dense
from torch.nn import functional

from saebench.dictionaries import load_dictionary
from saebench.features import FeatureStore
from saebench.features.contrast import contrast, document_sets
from saebench.lm import load_lm

TEXT = f"def value_3(x):\n    return {HOSTILE}"


@pytest.fixture(scope="module")
def run(hostile_run):
    return hostile_run


@pytest.fixture(scope="module")
def lm(run):
    return load_lm(run.record["model"]["name"])


@pytest.fixture(scope="module")
def stores(run):
    return [FeatureStore(run.features(name)) for name in ("a", "b")]


@pytest.fixture
def page(opened):
    """Opens a page as its address says."""
    return lambda name, **params: Page(opened(name, **params))


class Page:
    """What a page shows."""

    def __init__(self, test):
        self.test = test
        self.html = "\n".join(element.value for element in test.html if "<style" not in element.value)
        self.text = unescape(re.sub(r"<[^>]*>", "", self.html))

    def tables(self) -> list[list[list[str]]]:
        """Tables as rows of texts."""
        reader = Tables()
        reader.feed(self.html)
        return reader.found

    def table(self, *heads: str) -> list[list[str]]:
        """The rows of the table whose heads begin like that."""
        for found in self.tables():
            if found[0][: len(heads)] == list(heads):
                return found[1:]
        raise AssertionError(f"no table {heads} among {[found[0] for found in self.tables()]}")

    def figures(self) -> dict[str, str]:
        """The first box of each name."""
        found = re.findall(r'<div class="sb-figure"><small>(.*?)</small><b>(.*?)</b>', self.html, re.DOTALL)
        return {unescape(name): unescape(value) for name, value in reversed(found)}


class Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
            self.inside = True
        elif tag == "br" and self.inside:
            self.found[-1][-1][-1] += " "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1][-1][-1] += data


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%")) / (100 if text.endswith("%") else 1)


def safe(page: Page) -> None:
    """Nothing that is data became markup: no element or handler that the pages do not write themselves."""
    assert (
        "<img" not in page.html
        and "<script" not in page.html
        and "onmouseover=alert" not in re.sub(r"&lt;.*?&gt;", "", page.html)
    )
    allowed = {"div", "span", "small", "b", "i", "u", "a", "br", "table", "thead", "tbody", "tr", "th", "td", "h1", "code", "p"}
    assert set(re.findall(r"<(\w+)", page.html)) <= allowed
    shown = [*page.test.markdown, *page.test.caption, *page.test.title, *page.test.header]
    assert not any(HOSTILE in element.value or NAME in element.value for element in shown)


# --- prompt ---


def read(lm, dictionary, text):
    """Loss, spliced loss, relative error and codes of every token of a text, by plain PyTorch, for a dictionary of the site."""
    ids_S = torch.tensor([lm.tokenizer.bos_token_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
    block = lm.hf.transformer.h[1]
    seen = {}

    def look(module, args, output):
        seen["x"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    def replace(module, args, output):
        value = output[0] if isinstance(output, tuple) else output
        value = value.clone()
        value[0, 1:] = dictionary(value[0, 1:])
        return (value, *output[1:]) if isinstance(output, tuple) else value

    losses = []
    for hook in (look, replace):
        handle = block.register_forward_hook(hook)
        with torch.no_grad():
            logits_SV = lm.hf(ids_S[None]).logits[0]
        handle.remove()
        losses.append(functional.cross_entropy(logits_SV[:-1], ids_S[1:], reduction="none").numpy())
    x_SD = seen["x"][0, 1:].double()
    error = (x_SD - dictionary(x_SD.float()).double()).square().sum(1) / (x_SD - x_SD.mean(0)).square().sum(1).mean()
    return ids_S, losses[0], losses[1], error.numpy(), dictionary.encode(x_SD.float()).to_dense().numpy()


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_number_of_the_prompt_page(page, run, lm, name):
    shown = page("prompt", dictionary=name, text=TEXT)
    dictionary = load_dictionary(run.path / "dictionaries" / name)
    ids_S, loss_S, spliced_S, error_S, codes_SF = read(lm, dictionary, TEXT)
    figures = shown.figures()
    assert figures["tokens"] == str(len(ids_S) - 1)
    for label, expected in (
        ("loss", loss_S.mean()), ("loss with the dictionary", spliced_S.mean()), ("difference", (spliced_S - loss_S).mean()),
        ("FVU of this text", error_S.mean()), ("active features per token", (codes_SF != 0).sum(1).mean()),
    ):  # fmt: skip
        assert number(figures[label]) == pytest.approx(expected, abs=0.06 if "active" in label else 6e-4), label
    rows = shown.table("", "Token", "Loss", "With", "Difference", "Error", "Active", "Strongest features")
    assert len(rows) == len(loss_S)
    for place, row in enumerate(rows):
        figures = [loss_S[place], spliced_S[place], spliced_S[place] - loss_S[place], error_S[place]]
        assert [number(cell) for cell in row[2:6]] == pytest.approx(figures, abs=6e-3)
        assert int(row[6]) == (codes_SF[place] != 0).sum()
    strongest = [int(codes_SF[place].argmax()) for place in range(len(rows))]
    assert [int(re.match(r"\d+", row[7])[0]) for row in rows if row[7]] == [
        latent for latent, c in zip(strongest, codes_SF, strict=True) if c.any()
    ]
    safe(shown)


def test_a_token_shows_all_its_features_and_their_shares(page, run, lm, stores):
    at = 4
    shown = page("prompt", dictionary="a", text=TEXT, at=at)
    dictionary = load_dictionary(run.path / "dictionaries" / "a")
    *_, codes_SF = read(lm, dictionary, TEXT)
    values_F = codes_SF[at - 1]
    largest_F = np.abs(dense(stores[0])).max(0)
    order = np.argsort(-values_F)[: (values_F > 0).sum()]
    rows = shown.table("Feature", "Label", "Value", "Of its largest", "Share of the reconstruction")
    assert [int(row[0]) for row in rows] == order.tolist()
    added_ND = values_F[order, None] * dictionary.W_dec.detach().double().numpy()[order]
    whole_D = added_ND.sum(0)
    for row, latent, added_D in zip(rows, order, added_ND, strict=True):
        assert number(row[2]) == pytest.approx(values_F[latent], abs=6e-4)
        if largest_F[latent]:
            assert number(row[3]) == pytest.approx(values_F[latent] / largest_F[latent], abs=6e-3)
        assert number(row[4]) == pytest.approx(added_D @ whole_D / (whole_D @ whole_D), abs=6e-4)
    assert shown.figures()["active features"] == str(len(order))
    safe(shown)


def test_features_of_a_text_and_the_text_coloured_by_one(page, run, lm):
    shown = page("prompt", dictionary="a", text=TEXT, listed="features", shade="feature", shown=LABELLED)
    *_, codes_SF = read(lm, load_dictionary(run.path / "dictionaries" / "a"), TEXT)
    rows = shown.table("Feature", "Label", "Largest value", "Tokens")
    assert [number(row[2]) for row in rows] == pytest.approx(np.sort(codes_SF.max(0))[::-1][: len(rows)], abs=6e-4)
    for row in rows:
        assert int(row[3]) == (codes_SF[:, int(row[0])] != 0).sum()
    shaded = [float(value) for value in re.findall(r'data-n="activation" data-v="([^"]+)"', shown.html)]
    assert shaded == pytest.approx(codes_SF[:, LABELLED], rel=1e-3)
    assert f"{LABELLED} {HOSTILE}" in shown.text.replace(f"{LABELLED}{HOSTILE}", f"{LABELLED} {HOSTILE}")
    safe(shown)


def test_a_transcoder_without_a_store_is_read_as_well(page):
    shown = page("prompt", dictionary="other", text=TEXT)
    assert np.isfinite(number(shown.figures()["loss with the dictionary"]))
    assert "Strongest by" not in [control.label for control in shown.test.get("button_group")]
    safe(shown)


def test_before_a_text_and_with_a_strange_one(page):
    empty = page("prompt", dictionary="a")
    assert "Type a text above" in empty.text and "prompt?text=" in empty.html
    safe(empty)
    odd = page("prompt", dictionary="a", text="x", at="999", shown="77777", shade="nothing")
    assert "loss" in odd.figures() and "at" not in odd.test.query_params
    far = page("prompt", dictionary="a", text="x", shade="feature", shown="77777")
    assert "of 1 tokens" in far.text and "77777" not in far.html


# --- compare ---


def brute_pairs(similarity_AB, alive_a, alive_b, least):
    allowed = np.where(alive_a[:, None] & alive_b & (similarity_AB > 0), similarity_AB, -1)
    pairs = [(i, int(allowed[i].argmax())) for i in range(len(allowed)) if allowed[i].max() > 0]
    return {(i, j): allowed[i, j] for i, j in pairs if allowed[:, j].argmax() == i and allowed[i, j] >= least}, allowed


def similarity(by, run, stores):
    if by == "writing":
        unit = [functional.normalize(load_dictionary(run.path / "dictionaries" / name).W_dec.double(), dim=1) for name in "ab"]
        return (unit[0] @ unit[1].T).detach().numpy()
    fires = [(dense(store) != 0).reshape(-1, store.context_size, store.d_sae)[:, 1:].reshape(-1, store.d_sae) for store in stores]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.corrcoef(fires[0].T, fires[1].T)[: fires[0].shape[1], fires[0].shape[1] :])


@pytest.mark.parametrize(("by", "least"), [("writing", 0.45), ("firing", 0.25)])
def test_matched_and_unmatched_features(page, run, stores, by, least):
    options = {"dictionary": "a", "dictionary2": "b", "by": by, f"least-{by}": least}
    shown = page("compare", **options)
    alive = [store.counts_F > 0 for store in stores]
    similarity_AB = similarity(by, run, stores)
    pairs, allowed_AB = brute_pairs(similarity_AB, *alive, least)
    assert pairs
    best = [np.maximum(allowed_AB.max(axis), 0)[alive[side]] for side, axis in ((0, 1), (1, 0))]
    summary = {row[0].split()[0]: row[1:] for row in shown.table("", "a", "b")}
    for side in (0, 1):
        unmatched = int((best[side] < least).sum())
        assert summary["Matched"][side].split()[0] == str(len(pairs))
        assert summary["Unmatched"][side].split()[0] == str(unmatched)
        assert summary["Shared"][side].split()[0] == str(alive[side].sum() - unmatched - len(pairs))
        assert number(summary["Matched"][side].split()[1]) == pytest.approx(len(pairs) / alive[side].sum(), abs=6e-4)
        assert number(summary["Mean"][side]) == pytest.approx(best[side].mean(), abs=6e-4)
    measure = {"writing": "cosine", "firing": "phi"}[by]
    listed = {}
    for row in shown.table("a", "b", measure, "First fires on", "Second fires on"):
        a, b = (int(re.match(r"\d+", cell)[0]) for cell in row[:2])
        listed[a, b] = number(row[2])
        assert [number(cell) for cell in row[3:5]] == pytest.approx([stores[0].density_F[a], stores[1].density_F[b]], abs=6e-6)
    assert listed == pytest.approx(dict(sorted(pairs.items(), key=lambda p: -p[1])[: len(listed)]), abs=6e-4)
    only = page("compare", **options, kind="first").table("a", "b", measure)
    without = [latent for latent in np.flatnonzero(alive[0]) if allowed_AB[latent].max() < least]
    assert len(only) == min(25, len(without)) and {int(re.match(r"\d+", row[0])[0]) for row in only} <= set(without)
    safe(shown)


def test_a_pair_side_by_side(page, run, stores):
    shown = page("compare", dictionary="a", dictionary2="b", pair=f"{LABELLED}-{LABELLED}")
    figures = shown.figures()
    fires = [dense(store)[:, LABELLED] != 0 for store in stores]
    assert number(figures["cosine"]) == pytest.approx(similarity("writing", run, stores)[LABELLED, LABELLED], abs=6e-4)
    assert number(figures["phi"]) == pytest.approx(similarity("firing", run, stores)[LABELLED, LABELLED], abs=6e-4)
    assert int(figures["tokens on which both fire"]) == (fires[0] & fires[1]).sum()
    assert number(figures["Jaccard"]) == pytest.approx(
        (fires[0] & fires[1]).sum() / max(1, (fires[0] | fires[1]).sum()), abs=6e-4
    )
    safe(shown)


def test_what_cannot_be_compared_is_said(page):
    shown = page("compare", dictionary="a", dictionary2="other")
    assert "they write different sites" in shown.text and "saebench index" in shown.text
    safe(shown)
    assert "The same dictionary stands on both sides" in page("compare", dictionary="a", dictionary2="a").text
    assert "has no latent 99" in page("compare", dictionary="a", dictionary2="b", pair="99-1").text
    chosen = page("compare", dictionary="a")
    assert "small / a against small / b" in chosen.text  # another of the run that is indexed


def test_the_same_text_through_both(page, run, lm):
    shown = page("compare", dictionary="a", dictionary2="b", about="prompt", text=TEXT)
    _, loss_S, spliced_a, error_a, codes_a = read(lm, load_dictionary(run.path / "dictionaries" / "a"), TEXT)
    _, _, spliced_b, error_b, codes_b = read(lm, load_dictionary(run.path / "dictionaries" / "b"), TEXT)
    rows = shown.table("", "Token", "Loss", "With first", "With second", "Error first", "Error second")
    assert len(rows) == len(loss_S)
    for place, row in enumerate(rows):
        expected = [values[place] for values in (loss_S, spliced_a, spliced_b, error_a, error_b)]
        assert [number(cell) for cell in row[2:7]] == pytest.approx(expected, abs=6e-3)
        for cell, codes_SF in ((row[7], codes_a), (row[8], codes_b)):
            if codes_SF[place].any():
                assert int(re.match(r"\d+", cell)[0]) == codes_SF[place].argmax()
    boxes = re.findall(r"<small>FVU of this text</small><b>(.*?)</b>", shown.html)
    assert [number(box) for box in boxes] == pytest.approx([error_a.mean(), error_b.mean()], abs=6e-4)
    safe(shown)


# --- corpus ---


@pytest.mark.parametrize("part", ["themes", "contrast"])
def test_rates_of_two_sets_of_documents(page, stores, part):
    store = stores[0]
    shown = page("corpus", dictionary="a", corpus=part, set="markup", set2="sums")
    mask = document_sets(store, "markup")
    documents_NS, fires_TF = store.contexts.documents_NS.numpy(), dense(store) != 0
    inner_T = (np.arange(documents_NS.size) % store.context_size > 0) & (documents_NS.ravel() >= 0)
    in_a_T = inner_T & mask[documents_NS.ravel()]
    in_b_T = inner_T & ~mask[documents_NS.ravel()]
    tokens = [np.bincount(documents_NS[documents_NS >= 0], minlength=len(mask))[chosen].sum() for chosen in (mask, ~mask)]
    assert shown.figures()["markup"] == f"12 documents, {tokens[0]:,} tokens"
    rows = shown.table("Feature", "in markup")
    expected = {one.latent: one for one in contrast(store, mask, ~mask, store.d_sae)}
    assert len(rows) == min(50, sum(one.z > 0 for one in expected.values()))
    for row in rows:
        latent = int(re.match(r"\d+", row[0])[0])
        fires_T = fires_TF[:, latent]
        rates = [1000 * fires_T[in_T].sum() / in_T.sum() for in_T in (in_a_T, in_b_T)]
        assert [number(cell) for cell in row[1:3]] == pytest.approx(rates, abs=6e-3)
        low, high = (float(value) for value in re.findall(r"[+-][\d.]+", row[4])[1:])
        assert float(re.match(r"[+-][\d.]+", row[4])[0]) == pytest.approx(rates[0] - rates[1], abs=6e-3)
        assert low <= rates[0] - rates[1] + 6e-3 and high >= rates[0] - rates[1] - 6e-3
        documents = [len(set(documents_NS.ravel()[in_T & fires_T].tolist())) for in_T in (in_a_T, in_b_T)]
        assert row[5:7] == [f"{documents[0]} of 12", f"{documents[1]} of 12"]
        assert float(row[7].split()[0]) == pytest.approx(expected[latent].q, rel=0.06)
        assert ("may be chance" in row[7]) == (expected[latent].q > 0.05)
    sure = sum(one.q <= 0.05 for one in expected.values())
    assert f"Of {len(expected):,} features that fire often enough, {sure:,} differ" in shown.text
    safe(shown)


def test_differences_that_may_be_chance_carry_a_caution(page):
    shown = page(
        "corpus", dictionary="a", corpus="contrast", set="markup*/2|markup*/4|markup*/6", set2="markup*/8|markup*/10|markup*/12"
    )
    assert "Caution: of" in shown.text and "none differs by more than chance" in shown.text
    assert "one set has only 3 documents" in shown.text
    by_context = page("corpus", dictionary="a", set="markup", unit="context")
    assert "not for others like them" in by_context.text


def test_examples_of_either_set(page, stores):
    shown = page("corpus", dictionary="a", corpus="contrast", set="markup", set2="sums", look=LABELLED)
    values = [float(value) for value in re.findall(r'<div class="sb-row" data-d="[^"]*"><b>([-\d.]+)</b>', shown.html)]
    store = stores[0]
    mask, documents_T = document_sets(store, "markup"), store.contexts.documents_NS.numpy().ravel()
    expected = []
    for chosen in (mask, ~mask):
        values_T = np.where((documents_T >= 0) & chosen[documents_T], dense(store)[:, LABELLED], 0)
        best_N = np.sort(values_T.reshape(store.num_contexts, -1).max(1))[::-1][:6]
        expected += best_N[best_N > 0].tolist()
    assert values == pytest.approx(expected, abs=6e-3)
    safe(shown)


def test_sets_that_are_none(page):
    assert "No document is in the set nowhere" in page("corpus", dictionary="a", set="nowhere").text
    both = page("corpus", dictionary="a", corpus="contrast", set="markup", set2="markup")
    assert "12 documents are in both sets" in both.text
    start = page("corpus", dictionary="a")
    assert "Say which documents" in start.text and "sums" in start.text
    safe(start)


def test_two_texts_are_contrasted_live(page, run, lm):
    texts = [[f"return {i} + {i}" for i in range(6)], [f"{HOSTILE} {i} {HOSTILE} {HOSTILE}" for i in range(6)]]
    shown = page("corpus", dictionary="a", corpus="texts", texts1="\n\n".join(texts[0]), texts2="\n\n".join(texts[1]))
    dictionary = load_dictionary(run.path / "dictionaries" / "a")
    fires = [np.concatenate([read(lm, dictionary, text)[4] != 0 for text in side]) for side in texts]
    rows = shown.table("Feature", "in the first", "in the second")
    assert rows
    for row in rows:
        latent = int(re.match(r"\d+", row[0])[0])
        assert [number(cell) for cell in row[1:3]] == pytest.approx([1000 * side[:, latent].mean() for side in fires], abs=6e-3)
    assert "One text cannot be told from chance" in page("corpus", dictionary="a", corpus="texts", texts1="x", texts2="y").text
    safe(shown)


def test_documents_their_contexts_and_contexts_like_one(page, stores):
    store = stores[0]
    listed = page("corpus", dictionary="a", corpus="documents").table("Document", "Tokens")
    documents_NS = store.contexts.documents_NS.numpy()
    assert {row[0]: int(row[1].replace(",", "")) for row in listed} == {
        name: int((documents_NS == i).sum()) for i, name in enumerate(store.contexts.names)
    }
    one = page("corpus", dictionary="a", corpus="documents", document=2)
    contexts = [c for c in range(store.num_contexts) if 2 in documents_NS[c]]
    assert [int(c) for c in re.findall(r">context (\d+)<", one.html)] == contexts[:12]
    assert f"{len(contexts)} contexts of up to {store.context_size - 1} tokens" in one.text
    shown = page("corpus", dictionary="a", context=contexts[0], seen=LABELLED)
    values_S = dense(store)[contexts[0] * 16 : (contexts[0] + 1) * 16, LABELLED]
    main = shown.html[: shown.html.index("What stands out")]
    assert [float(v) for v in re.findall(r'data-n="activation" data-v="([^"]+)"', main)] == pytest.approx(
        values_S[values_S != 0], rel=1e-3
    )
    for found in (one, shown):
        safe(found)
    assert "context 99999 is not one of" in page("corpus", dictionary="a", context=99999).text
    assert SCRIPT.replace("'", "&#x27;") not in shown.html


def test_a_dictionary_without_a_store_says_what_to_do(page):
    assert "saebench index" in page("corpus", dictionary="other").text


def test_a_damaged_store_is_named_and_the_rest_goes_on(opened, run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run.path, damaged)
    (damaged / "features" / "a" / "tokens.parquet").unlink()
    for name in ("prompt", "compare", "corpus"):
        shown = Page(opened(name, runs=[damaged], dictionary="a", dictionary2="b", text=TEXT))
        assert "tokens.parquet is missing" in shown.text
        safe(shown)
    shown = Page(opened("prompt", runs=[damaged], dictionary="a", text=TEXT))
    assert "loss with the dictionary" in shown.figures() and shown.table("", "Token")
    shown = Page(opened("compare", runs=[damaged], dictionary="a", dictionary2="b"))
    assert shown.table("", "a", "b") and "Features cannot be matched by when they fire" in shown.text
