"""Overview, Features and Feature without a browser: what they show against dense arithmetic, what they keep, what they refuse."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("streamlit")

from page_run import HOSTILE, LABELLED, dense

from saebench.features import FeatureStore
from saebench.features.labelling.notes import Notes
from saebench.figures.features import position_rates


def html_of(test) -> str:
    return "\n".join(element.value for element in test.html if "<style" not in element.value)


def text_of(test) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html_of(test)))


def problems(test) -> list[str]:
    return [unescape(re.sub(r"<[^>]*>", "", e.value)) for e in test.html if 'role="alert"' in e.value]


def parameter(test, key: str) -> str:
    """Of the query string."""
    value = test.query_params[key]
    return value[0] if isinstance(value, list) else value


def figures(test) -> dict[str, str]:
    return dict(re.findall(r'sb-figure"><small>(.*?)</small><b>(.*?)</b>', html_of(test)))


def rows(test) -> list[tuple[float, list[tuple[int, float]]]]:
    """Contexts as shown: the value at the firing, and (position, value) of every token that is marked."""
    found = []
    for part in html_of(test).split('<div class="sb-row"')[1:]:
        marked = re.findall(r'<i[^>]*data-v="([^"]*)" data-p="([^"]*)"', part)
        found.append((float(re.search(r"<b>(.*?)</b>", part)[1]), [(int(p), float(v)) for v, p in marked]))
    return found


@pytest.fixture(scope="module")
def stores(hostile_run):
    return {name: FeatureStore(hostile_run.features(name)) for name in ("a", "b")}


@pytest.fixture(scope="module")
def denses(stores):
    return {name: dense(store) for name, store in stores.items()}


# --- Feature ---


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_figures_of_a_feature(opened, stores, denses, name):
    store, dense_TF = stores[name], denses[name]
    latent = int(np.argsort(-store.counts_F)[3])
    shown = figures(opened("feature", dictionary=name, feature=latent))
    values_T = dense_TF[:, latent]
    firing = values_T != 0
    ids = store.ids_T[firing]
    sums = np.bincount(ids, weights=values_T[firing])
    assert shown["fires on"] == f"{firing.sum() / (store.num_contexts * (store.context_size - 1)):.4%}"
    assert shown["firings"] == f"{firing.sum():,}"
    assert shown["contexts"] == f"{firing.reshape(-1, store.context_size).any(1).sum():,}"
    assert float(shown["largest value"]) == pytest.approx(values_T.max(), abs=6e-4)
    assert float(shown["mean value"]) == pytest.approx(values_T[firing].mean(), abs=6e-4)
    assert shown["different tokens"] == f"{len(set(ids.tolist())):,}"
    assert shown["share of top token"] == f"{sums.max() / sums.sum():.1%}"


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_strongest_contexts_are_the_strongest(opened, stores, denses, name):
    store, dense_TF = stores[name], denses[name]
    latent = int(np.argsort(-store.counts_F)[2])
    by_context = dense_TF[:, latent].reshape(-1, store.context_size)
    best = np.sort(by_context.max(1))[::-1]
    found = rows(opened("feature", dictionary=name, feature=latent))
    assert len(found) == min(12, (best > 0).sum())
    np.testing.assert_allclose([value for value, _ in found], best[: len(found)], atol=6e-3)
    contexts = [{p: float(f"{v:.4g}") for p, v in enumerate(row) if v} for row in by_context]
    for value, marked in found:
        (focus,) = {p for p, v in marked if abs(v - value) <= 6e-3 and v == max(v for _, v in marked)}
        until = focus + 12  # tokens behind the firing that are shown
        assert dict(marked) in [{p: v for p, v in context.items() if p <= until} for context in contexts]


def test_examples_on_a_token_and_with_a_text(opened, stores, denses):
    store = stores["a"]
    latent = int(np.argmax([len(store.details(i).tokens) for i in range(store.d_sae)]))
    token, count, _ = store.details(latent).tokens[1]
    on = denses["a"][:, latent] * (store.ids_T == token)
    found = rows(opened("feature", dictionary="a", feature=latent, on=token, count=400))
    assert (on > 0).sum() == count
    assert len(found) == (on.reshape(-1, store.context_size).max(1) > 0).sum()
    test = opened("feature", dictionary="a", feature=latent, **{"with": "the text that is nowhere"})
    assert "None of the 500 strongest contexts has this text." in text_of(test)


def test_examples_of_every_strength(opened, stores, denses):
    store = stores["b"]
    latent = int(np.argmax(store.counts_F))
    test = opened("feature", dictionary="b", feature=latent, show="strengths")
    values = np.sort(denses["b"][:, latent][denses["b"][:, latent] != 0])
    heads = re.findall(r'sb-head">(-?[\d.]+) to (-?[\d.]+)<small>([\d,]+) firings', html_of(test))
    assert len(heads) == 5
    assert sum(int(count.replace(",", "")) for *_, count in heads) == len(values)
    assert float(heads[0][1]) == pytest.approx(values[-1], abs=6e-3)
    assert float(heads[-1][0]) == pytest.approx(values[0], abs=6e-3)


def test_examples_that_two_share(opened, stores, denses):
    store, dense_TF = stores["a"], denses["a"]
    a, b = np.argsort(-store.counts_F)[:2].tolist()
    test = opened("feature", dictionary="a", feature=a, show="both", other=b)
    fires_a, fires_b = dense_TF[:, a] != 0, dense_TF[:, b] != 0
    encoded = np.arange(len(dense_TF)) % store.context_size > 0
    both = (fires_a & fires_b).sum()
    phi = np.corrcoef(fires_a[encoded], fires_b[encoded])[0, 1]
    assert f"{both:,} tokens on which both fire" in text_of(test)
    assert f"φ {phi:.3f}, Jaccard {both / (fires_a | fires_b).sum():.3f}" in text_of(test)


def test_what_stands_beside_the_contexts(opened, stores):
    store = stores["a"]
    latent = int(np.argmax(store.counts_F))
    details = store.details(latent)
    text = text_of(opened("feature", dictionary="a", feature=latent))
    for _, figure in details.promoted[:12]:
        assert f"{figure:+.2f}" in text
    for other, cosine in details.neighbours[:12]:
        assert f"{other}" in text and f"cos {cosine:.2f}" in text
    for _, _, phi, _ in details.coactive[:12]:
        assert f"φ {phi:.2f}" in text


def test_own_text_is_read_by_the_model(opened, stores, hostile_run):
    from saebench.dictionaries import load_dictionary
    from saebench.lm import load_lm

    store = stores["a"]
    latent = int(np.argmax(store.counts_F))
    text = "def value_3(x):\n    return x * 3"
    lm, dictionary = load_lm(hostile_run.record["model"]["name"]), load_dictionary(hostile_run.path / "dictionaries" / "a")
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text)["input_ids"]]
    x_SD = lm.read(np_to_ids(ids), ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][0]
    expected = dictionary.encode(x_SD).to_dense()[:, latent]
    expected[0] = 0
    test = opened("feature", dictionary="a", feature=latent, **{"try": text})
    shown = re.search(r'data-n="activation">(.*?)</div>', html_of(test), re.DOTALL)[1]
    marked = {int(p): float(v) for v, p in re.findall(r'data-v="([^"]*)" data-p="([^"]*)"', shown)}
    assert marked == {i: pytest.approx(float(v), rel=1e-3) for i, v in enumerate(expected.tolist()) if v}


def np_to_ids(ids):
    import torch

    return torch.tensor([ids])


def test_bookmark_label_and_note_are_kept_beside_the_store(opened, stores, hostile_run):
    notes = Notes.open(stores["b"])
    test = opened("feature", dictionary="b", feature=7)
    test.button(key="bookmark").click().run()
    assert notes.of(7).bookmark
    next(box for box in test.text_input if box.label == "Your label").set_value("what I call it")
    next(box for box in test.text_area if box.label == "Note").set_value("seen <b>often</b>")
    next(button for button in test.button if button.label == "Save").click().run()
    assert (notes.of(7).label, notes.of(7).note) == ("what I call it", "seen <b>often</b>")
    assert "what I call it" in text_of(test)
    found = opened("features", dictionary="b", starred=1)
    assert "1 of 40 latents" in text_of(found)
    test = opened("feature", dictionary="b", feature=7)
    test.button(key="bookmark").click().run()
    notes.change(7, label="", note="")
    assert 7 not in notes.all()


def test_next_and_previous_go_along_the_filtered(opened, stores):
    latents = np.flatnonzero(stores["a"].counts_F > 0)
    test = opened("feature", dictionary="a", feature=int(latents[2]))
    test.button(key="step-Next").click().run()
    assert parameter(test, "feature") == str(latents[3])
    test.button(key="step-Previous").click().run()
    test.button(key="step-Previous").click().run()
    assert parameter(test, "feature") == str(latents[1])
    assert opened("feature", dictionary="a", feature=int(latents[0])).button(key="step-Previous").disabled


@pytest.mark.parametrize("latent", [-1, 48, 10**9])
def test_a_latent_that_is_none(opened, latent):
    assert any("There is no latent" in text for text in problems(opened("feature", dictionary="a", feature=latent)))


# --- Features ---


def test_filters_list_what_passes(opened, stores):
    store = stores["a"]
    alive = store.counts_F > 0
    largest = store.latents["max"].to_numpy()
    assert f"{alive.sum()} of 48 latents" in text_of(opened("features", dictionary="a"))
    assert "48 of 48 latents" in text_of(opened("features", dictionary="a", dead=1))
    bound = float(np.median(largest[alive]).round(1))
    assert f"{(alive & (largest >= bound)).sum()} of 48" in text_of(opened("features", dictionary="a", strongest=bound))
    rare = alive & (store.density_F >= 10**-1.5)
    assert f"{rare.sum()} of 48" in text_of(opened("features", dictionary="a", rare=-1.5))
    top = store.latents["top_token"].to_pylist()
    token = store.token_strings[top[int(np.argmax(store.counts_F))]]
    count = sum(t is not None and store.token_strings[t].strip().casefold().startswith(token.strip().casefold()) for t in top)
    assert f"{count} of 48" in text_of(opened("features", dictionary="a", token=token))
    assert "1 of 48 latents" in text_of(opened("features", dictionary="a", find=LABELLED, dead=1))
    assert "No latent passes" in text_of(opened("features", dictionary="a", find="no such label"))


def test_the_table_that_is_sent(opened, stores):
    """Every number of the table, as the browser unpacks it."""
    opened("features", dictionary="a")  # puts the app on the path
    import grid
    import opening
    from views import features

    store = stores["a"]
    entry = next(iter(opening.runs().values())).entries["a"]
    table = features._columns.__wrapped__("key", (), entry, store)
    columns = [column for column in features.COLUMNS if column.name in table.column_names]
    packed = grid.pack(table, columns, "feature?x=", "these")
    length = int.from_bytes(packed[:4], "little")
    header = json.loads(packed[4 : 4 + length])
    assert header["rows"] == 48
    for column in header["columns"]:
        first, *rest = (4 + length + place for place in column["places"])
        assert first % 8 == 0 or column["kind"] == "text"
        if column["kind"] == "number":
            found = np.frombuffer(packed, np.float32, 48, first)
            expected = table[column["name"]].to_pandas().to_numpy(dtype=np.float32)
            np.testing.assert_array_equal(found, expected)
        else:
            ends = np.frombuffer(packed, np.uint32, 49, first)
            found = [packed[rest[0] + a : rest[0] + b].decode() for a, b in itertools.pairwise(ends)]
            assert found == [text or "" for text in table[column["name"]].to_pylist()]
    np.testing.assert_allclose(table["density"].to_numpy(), store.density_F, rtol=1e-6)
    assert HOSTILE in table["label"].to_pylist()[LABELLED]


# --- Overview, and what cannot be opened ---


def test_the_overview_names_every_dictionary_and_what_it_lacks(opened, hostile_run):
    text = text_of(opened("overview"))
    assert "1 run, 3 dictionaries" in text
    for word in ("0.2500", "0.9000", "topk", "jumprelu", "transcoder", "not indexed", "saebench index"):
        assert word in text
    assert text_of(opened("overview", dictionary="other")).count("other") >= 2


def test_a_dictionary_without_a_store_says_what_to_do(opened, hostile_run):
    assert any(f"saebench index {hostile_run.path}" in text for text in problems(opened("features", dictionary="other")))
    assert any(
        f"saebench index {hostile_run.path}" in text for text in problems(opened("feature", dictionary="other", feature=1))
    )


@pytest.fixture
def damaged(hostile_run, tmp_path):
    """A copy of the run whose store b lacks a piece."""
    path = tmp_path / "damaged"
    shutil.copytree(hostile_run.path, path)
    victim = next((path / "features" / "b").glob("postings-*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-10])
    return path


def test_a_damaged_store_is_named_and_the_others_open(opened, damaged):
    assert any(
        "postings-00000.parquet" in text and "damaged" in text
        for text in problems(opened("features", runs=[damaged], dictionary="b"))
    )
    assert not problems(opened("features", runs=[damaged], dictionary="a"))
    assert "damaged: index it again" in text_of(opened("overview", runs=[damaged]))


def test_a_run_that_is_none_is_named_and_the_others_open(opened, hostile_run, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    test = opened("overview", runs=[tmp_path / "nowhere", tmp_path / "broken", hostile_run.path])
    assert [text.split(" ")[0] for text in problems(test)] == ["nowhere", "broken"]
    assert "1 run" not in text_of(test) and "3 dictionaries" in text_of(test)


def test_only_the_runs_given_are_reachable(opened, hostile_run, tmp_path):
    other = tmp_path / "secret"
    shutil.copytree(hostile_run.path, other)
    for name in ("secret", "../secret", str(other)):
        test = opened("features", run=name, dictionary="a")
        assert any("There is no run" in text for text in problems(test))
        assert parameter(test, "run") == hostile_run.path.name


def test_runs_of_one_name_are_told_apart(opened, hostile_run, tmp_path):
    other = tmp_path / "again" / hostile_run.path.name
    shutil.copytree(hostile_run.path, other)
    text = text_of(opened("overview", runs=[hostile_run.path, other]))
    assert f"again/{hostile_run.path.name}" in text and "2 runs, 6 dictionaries" in text


def test_a_store_that_is_replaced_is_opened_anew(opened, damaged):
    assert "48 latents" in text_of(opened("features", runs=[damaged], dictionary="a"))
    shutil.rmtree(damaged / "features" / "b")
    (damaged / "features" / "a").rename(damaged / "features" / "b")
    test = opened("features", runs=[damaged], dictionary="b")
    assert not problems(test) and "48 latents" in text_of(test)
    assert any("saebench index" in text for text in problems(opened("features", runs=[damaged], dictionary="a")))


def test_damaged_figures_and_notes_are_named(opened, damaged):
    (damaged / "evals" / "core.json").write_text("[]")
    test = opened("overview", runs=[damaged])
    assert any("core.json is damaged" in text for text in problems(test)) and "Training of" in text_of(test)
    (damaged / "features" / "a.notes.json").write_text("{")
    assert any("a.notes.json" in text for text in problems(opened("feature", runs=[damaged], dictionary="a", feature=1)))


@pytest.mark.parametrize("page", ["overview", "features", "feature"])
@pytest.mark.parametrize(
    "params",
    [
        {"feature": "abc", "count": "-3", "on": "99999", "show": "?"},
        {"feature": "2", "show": "both", "other": "100000"},
        {"rare": "x", "frequent": "9", "strongest": "-1", "view": "<b>", "sort": "nothing-", "find": "<b>", "token": "("},
        {"run": "", "dictionary": "../../a", "compared": "x", "try": "\x00", "with": "(["},
    ],
)
def test_no_address_breaks_a_page(opened, page, params):
    test = opened(page, **({"dictionary": "a"} | params))
    assert not any("stopped at an error" in text for text in problems(test))


def test_hostile_texts_are_text(opened, stores):
    """No tag, handler or link of the data survives in what is sent as HTML."""
    for name in ("a", "b"):
        for params in ({"feature": LABELLED}, {"feature": int(np.argmax(stores[name].counts_F))}):
            body = html_of(opened("feature", dictionary=name, **params))
            assert "&lt;img src=x" in body
            Harmless().feed(body)


class Harmless(HTMLParser):
    """Fails for what the pages never write themselves."""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert name != "href" or re.match(r"(feature|features|corpus|steering)\?", value), value


TAGS = {
    "div",
    "h1",
    "span",
    "small",
    "b",
    "br",
    "i",
    "a",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "details",
    "summary",
}
ATTRIBUTES = {"class", "style", "href", "title", "role", "data-go", "data-v", "data-p", "data-d", "data-n"}


def test_position_rates_are_shares_of_the_tokens_of_each_bin(stores, denses):
    store = stores["a"]
    latent = int(np.argmax(store.counts_F))
    rates = position_rates(store.details(latent), store.position_edges(), store.num_contexts)
    fires = (denses["a"][:, latent] != 0).reshape(-1, store.context_size)
    assert store.context_size == len(rates)  # a bin is one position
    np.testing.assert_allclose(rates, [0, *fires.mean(0)[1:]])
