"""Labels of latents that were made to fire on known things, their scores by brute force, and what keeping them must withstand."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
import torch
from planted import CALL, CASES, DEAD, EARLY, LINE, NEXT, NOISE, REPEAT, SELDOM, SELF, SIZE, TOPIC, TWO, UNIT, WORD

from saebench.errors import UserError
from saebench.features.labelling import labels as labels_module
from saebench.features.labelling.corpus import POOL, Corpus
from saebench.features.labelling.firings import FIRINGS
from saebench.features.labelling.labels import NEVER, NO_PATTERN, Labels, label_offline, labels_path, promoted_tokens
from saebench.features.labelling.labels import SELDOM as TOO_SELDOM
from saebench.features.labelling.rules import Rule
from saebench.features.labelling.scoring import halves
from saebench.files import locked


def test_what_was_planted_is_said(labels):
    said = {latent: labels.of(latent).text for latent in range(planted.LATENTS)}
    assert said[SELF] == "‘self’"  # noqa: RUF001
    assert said[CALL] == "‘(’ after ‘init’"  # noqa: RUF001
    assert said[UNIT] == "numbers before ‘px’"  # noqa: RUF001
    assert said[TOPIC].startswith("partly: words around: ")
    assert set(said[TOPIC].partition("around: ")[2].split(", ")) == set(planted.SUBJECT)
    assert said[EARLY] == "the first 2 tokens of a context"
    assert said[NEXT] == "before ‘:’"  # noqa: RUF001
    assert said[WORD] in ("‘…cess’ after ‘pro…’", "‘…cess’ of ‘process’")  # noqa: RUF001
    assert said[REPEAT] == "text that repeats what stood before"
    assert said[CASES] == "‘the’"  # noqa: RUF001
    assert said[LINE] == "in lines that begin ‘import’"  # noqa: RUF001
    assert said[TWO] == "‘)’, ‘self’"  # noqa: RUF001
    assert (said[NOISE], said[DEAD], said[SELDOM]) == (NO_PATTERN, NEVER, TOO_SELDOM)
    assert {labels.of(latent).kind for latent in (NOISE, DEAD, SELDOM)} == {"none"}
    assert [labels.of(latent).kind for latent in (SELF, UNIT, TOPIC, EARLY, NEXT, REPEAT, LINE)] == [
        "token", "next", "topic", "position", "next", "repeat", "line",
    ]  # fmt: skip


def test_scores_by_brute_force(text, store, labels):
    """Of every token of the held-out contexts: the corpus is small enough to be looked at as a whole."""
    rows, codes = text[0], planted.codes(text[0])
    _, scoring_C = halves(len(rows), 0)
    places = [(context, at) for context in np.flatnonzero(scoring_C).tolist() for at in range(1, SIZE)]
    assert len(places) <= POOL
    for latent in range(planted.LATENTS):
        label = labels.of(latent)
        if not label.rule:
            assert label.score is None and label.positives == 0
            continue
        fires = np.array([codes[place][latent] > 0 for place in places])
        named = np.array([planted.true_at(label.rule, rows, *place) for place in places])
        values = np.array([codes[place][latent] for place in places]) * fires
        assert label.negatives == (~fires).sum()
        if fires.sum() > FIRINGS:  # a sample of them
            assert label.positives == FIRINGS
            assert label.recall == pytest.approx(named[fires].mean(), abs=0.1)
            continue
        recall, left_out = named[fires].mean(), (~named[~fires]).mean()
        assert label.positives == fires.sum()
        assert label.recall == pytest.approx(recall)
        assert label.score == pytest.approx((recall + left_out) / 2)
        assert label.recall_by_value == pytest.approx(values[named].sum() / values.sum(), rel=1e-3)
        if named.sum() <= 150:  # all of them are looked at
            assert label.precision == pytest.approx(fires[named].mean())
        elif named.any():
            assert label.precision == pytest.approx(fires[named].mean(), abs=0.1)


def test_rules_say_the_same_in_plain_python(text, store, labels):
    """At every token of the corpus, and after a round trip through JSON."""
    corpus = Corpus(store)
    everything = corpus.view(np.arange(len(store.ids_T)))
    for latent in range(planted.LATENTS):
        rule = labels.of(latent).rule
        if rule:
            assert Rule.parse(rule).json() == rule
            here = Rule.parse(rule).holds(everything).reshape(-1, SIZE)
            for context in range(0, len(text[0]), 7):
                for at in range(1, SIZE):
                    assert here[context, at] == planted.true_at(rule, text[0], context, at), (latent, rule, context, at)


def test_a_label_is_made_from_one_half_and_scored_on_the_other(text, labels, tmp_path):
    """What a latent does in the held-out half changes its score and not its rule; the other way round the rule."""
    rows, names = text
    labelling_C, scoring_C = halves(len(rows), 0)
    assert not (labelling_C & scoring_C).any() and (labelling_C | scoring_C).all()
    codes = planted.codes(rows)
    changed = codes.copy()
    changed[scoring_C, :, SELF] = codes[scoring_C, :, UNIT]
    changed[labelling_C, :, CALL] = codes[labelling_C, :, UNIT]
    found = label_offline(planted.make(tmp_path / "changed", rows, names, changed), [SELF, CALL])
    assert found.of(SELF).rule == labels.of(SELF).rule
    assert found.of(SELF).score == pytest.approx(0.5, abs=0.05)
    assert found.of(SELF).text == NO_PATTERN
    assert found.of(CALL).rule == labels.of(UNIT).rule
    assert found.of(CALL).text == NO_PATTERN


def test_halves_are_even_and_depend_on_the_seed_alone():
    labelling_C, _ = halves(20_000, 3)
    assert abs(labelling_C.mean() - 0.5) < 0.02
    assert (halves(500, 3)[0] == labelling_C[:500]).all()
    assert 0.4 < (halves(20_000, 4)[0] == labelling_C).mean() < 0.6


def test_noise_is_never_dressed_up(text, tmp_path):
    """Of forty latents that fire anywhere none gets a label: choosing among many rules does not make one."""
    rows, names = text
    generator = np.random.default_rng(1)
    rates = np.repeat([0.01, 0.03, 0.1, 0.3], 10)
    codes = (generator.random((len(rows), SIZE, 40)) < rates) * (1 + generator.random((len(rows), SIZE, 40)))
    codes[:, 0] = 0
    found = label_offline(planted.make(tmp_path / "noise", rows, names, codes.astype(np.float32)))
    texts = [found.of(latent).text for latent in range(40)]
    assert sum(text == NO_PATTERN for text in texts[:30]) >= 29
    scores = np.array([found.of(latent).score for latent in range(40)])
    assert abs(scores.mean() - 0.5) < 0.02


def test_a_latent_that_predicts(text, tmp_path):
    """The same rule is worded as a prediction where the latent raises that token."""
    rows, names = text
    store = planted.make(tmp_path / "predicts", rows, names, planted.codes(rows))
    colon, comma = planted.ID[":"], planted.ID[","]
    labels = label_offline(store, [NEXT])
    corpus = Corpus(store)
    rule = Rule.parse(labels.of(NEXT).rule)
    assert labels_module.wording(rule, corpus, [colon]) == "predicts ‘:’"  # noqa: RUF001
    assert labels_module.wording(rule, corpus, [comma]) == "before ‘:’"  # noqa: RUF001
    assert promoted_tokens(store, [0, NEXT]) == [[], []]  # the site is no part of a residual stream


def test_promoted_tokens_are_those_of_the_details(small):
    latents = small.alive[:5]
    assert promoted_tokens(small.store, latents) == [
        [token for token, _ in small.store.details(latent).promoted] for latent in latents
    ]


def test_every_kind_of_dictionary(small, tmp_path):
    """Scores of real latents: rules evaluated at every held-out token, against the codes by brute force."""
    labels = label_offline(small.store, overwrite=True)
    corpus = Corpus(small.store)
    held_out = corpus.scoring.everything
    dense_TF = small.dense_TF[held_out.places_P]
    assert len(held_out) <= POOL
    scored = 0
    for latent in range(small.store.d_sae):
        label = labels.of(latent)
        if latent not in small.alive:
            assert label.text == NEVER
        if not label.rule:
            continue
        fires, named = dense_TF[:, latent] != 0, Rule.parse(label.rule).holds(held_out)
        if fires.sum() <= FIRINGS:
            scored += 1
            assert label.score == pytest.approx((named[fires].mean() + (~named[~fires]).mean()) / 2)
            values = np.abs(dense_TF[:, latent])
            assert label.recall_by_value == pytest.approx(values[named & fires].sum() / values[fires].sum(), rel=1e-3)
    assert scored >= 5


# --- keeping them ---


def test_some_at_a_time_as_all_at_once(fresh, labels, monkeypatch):
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", 300)
    label_offline(fresh, [UNIT, SELF])
    assert len(Labels.open(fresh)) == 2
    label_offline(fresh, [TOPIC, DEAD, UNIT])
    label_offline(fresh)
    assert [Labels.open(fresh).of(latent) for latent in range(planted.LATENTS)] == [
        labels.of(latent) for latent in range(planted.LATENTS)
    ]


def test_stopped_and_taken_up(fresh, labels, monkeypatch):
    """A stop in the middle keeps what was done, and only the rest is done afterwards."""
    monkeypatch.setattr("saebench.features.scanning.BLOCK_ENTRIES", 300)
    whole = labels_module._labelled
    done = []

    def stopping(store, wanted_F, seed):
        done.append(wanted_F.sum())
        for number, some in enumerate(whole(store, wanted_F, seed)):
            if len(done) == 1 and number == 4:
                raise KeyboardInterrupt
            yield some

    monkeypatch.setattr(labels_module, "_labelled", stopping)
    with pytest.raises(KeyboardInterrupt):
        label_offline(fresh)
    kept = len(Labels.open(fresh))
    assert 0 < kept < planted.LATENTS
    found = label_offline(fresh)
    assert done == [planted.LATENTS, planted.LATENTS - kept]
    assert [found.of(latent) for latent in range(planted.LATENTS)] == [labels.of(latent) for latent in range(planted.LATENTS)]


def test_labels_are_kept_as_plain_parquet_beside_the_store(fresh):
    before = {path.name: path.stat().st_mtime_ns for path in fresh.path.iterdir()}
    label_offline(fresh)
    assert {path.name: path.stat().st_mtime_ns for path in fresh.path.iterdir()} == before
    fresh.verify()
    path = labels_path(fresh)
    assert path == fresh.path.parent / "planted.labels.parquet"
    table = pq.read_table(path)
    assert table["latent"].to_pylist() == list(range(planted.LATENTS))
    assert table.schema.metadata[b"format"] == b"saebench-labels"
    assert json.loads(table["rule"][SELF].as_py()) == [
        {"kind": "among", "column": "token", "values": [planted.ID[" self"]], "at": 0}
    ]


def test_labels_of_another_store_or_seed_do_not_count(text, fresh, tmp_path):
    label_offline(fresh, [SELF])
    other = planted.codes(text[0], seed=9)
    changed = planted.make(tmp_path / "other", *text, other)
    labels_path(changed).write_bytes(labels_path(fresh).read_bytes())
    assert Labels.open(changed).of(SELF) is None
    assert label_offline(changed, [CALL]).of(SELF) is None
    assert label_offline(fresh, [CALL], seed=1).of(SELF) is None
    assert label_offline(fresh, [CALL], seed=1).of(CALL) is not None


def test_overwriting_some_keeps_the_others(fresh, monkeypatch):
    label_offline(fresh)
    asked = []
    whole = labels_module._labelled
    monkeypatch.setattr(
        labels_module, "_labelled", lambda store, wanted_F, seed: asked.append(wanted_F.sum()) or whole(store, wanted_F, seed)
    )
    assert len(label_offline(fresh, [SELF, UNIT])) == planted.LATENTS and not asked
    assert len(label_offline(fresh, [SELF, UNIT], overwrite=True)) == planted.LATENTS and asked == [2]


def test_what_is_wrong_is_named(fresh):
    with pytest.raises(UserError, match="latent 99 is not one of the 14"):
        label_offline(fresh, [99])
    labels_path(fresh).write_bytes(b"PAR1 not quite")
    for use in (Labels.open, label_offline):
        with pytest.raises(UserError, match="planted.labels.parquet is damaged .* remove it and label again"):
            use(fresh)
    assert labels_path(fresh).read_bytes() == b"PAR1 not quite"


def test_two_processes_do_not_label_at_once(fresh):
    with locked(labels_module.lock_path(fresh)), pytest.raises(UserError, match="another process is labelling"):
        label_offline(fresh, [SELF])
    assert label_offline(fresh, [SELF]).of(SELF) is not None


@pytest.mark.slow
def test_killed_at_any_moment(fresh, labels):
    """A process that is killed while labelling leaves nothing that stands in the way."""
    script = (
        "import sys; from saebench.features import FeatureStore, scanning; from saebench.features.labelling import labels\n"
        "labels.SAVE_SECONDS = 0.0; scanning.BLOCK_ENTRIES = 100\n"
        "print('ready', flush=True); labels.label_offline(FeatureStore(sys.argv[1]))"
    )
    for delay in (0.02, 0.08, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(fresh.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        Labels.open(fresh)
    found = label_offline(fresh)
    assert [found.of(latent) for latent in range(planted.LATENTS)] == [labels.of(latent) for latent in range(planted.LATENTS)]


# --- any store ---


def test_one_context_and_a_store_without_firings(tmp_path):
    """Nothing to label from is no error."""
    rows, names = planted.corpus(1)
    codes = planted.codes(rows)
    one = label_offline(planted.make(tmp_path / "one", rows, names, codes))
    assert {one.of(latent).text for latent in range(planted.LATENTS)} == {NEVER, TOO_SELDOM}
    none = label_offline(planted.make(tmp_path / "none", rows, names, np.zeros_like(codes)))
    assert {none.of(latent).text for latent in range(planted.LATENTS)} == {NEVER}


def test_hostile_text_is_only_text(tmp_path):
    """Token texts with markup, control characters and no text at all."""
    strings = [
        "<start>",
        "<script>alert(1)</script>",
        "\x00",
        "",
        "\t",
        "\r\n",
        "\U0001d4b3",
        "]]>",
        "'; DROP",
        " ",
        "\n\n    ",
        "\u202e",
    ]
    rows = [["<start>", *(strings[1 + (context * 7 + at * (context % 3 + 1)) % 11] for at in range(40))] for context in range(60)]
    codes = np.stack([[[row[at] == text for text in strings] for at in range(41)] for row in rows]).astype(np.float32)
    codes[:, 0] = 0
    found = label_offline(planted.make(tmp_path / "hostile", rows, ["d"] * 60, codes, strings))
    texts = [found.of(latent).text for latent in range(len(strings))]
    assert texts[0] == NEVER
    assert texts[1] == "‘<script>alert(1)</script>’"  # noqa: RUF001
    assert all(text.isprintable() for text in texts)
    assert all(found.of(latent).score > 0.99 for latent in range(1, len(strings)))


def test_a_vocabulary_without_spaces(text, tmp_path):
    """Where tokens do not show the spaces between words, a token is a word of its own."""
    rows, names = text
    bare = [[token.strip() or token for token in row] for row in rows]
    strings = list(dict.fromkeys(token for row in bare for token in row))
    codes = planted.codes(rows)
    store = planted.make(tmp_path / "bare", bare, names, codes, strings)
    assert not Corpus(store).joined_T.any()
    assert label_offline(store, [SELF]).of(SELF).text == "‘self’"  # noqa: RUF001


def test_a_value_below_zero_is_a_firing(text, tmp_path):
    rows, names = text
    codes = planted.codes(rows)
    store = planted.make(tmp_path / "negative", rows, names, codes)
    corpus = Corpus(store)
    tokens, values = store.postings(SELF)
    starts = np.array([0, len(tokens)])
    both = [labels_module.Firings.of(corpus.labelling, starts, tokens, sign * values) for sign in (1, -1)]
    assert np.array_equal(both[0].rows.share_P, both[1].rows.share_P)


def test_random_stores_do_not_break(tmp_path):
    """Rare and dense latents over text without structure, contexts of 2 tokens and up."""
    for seed, (contexts, size) in enumerate([(3, 2), (40, 3), (17, 9), (5, 64)]):
        generator = np.random.default_rng(seed)
        strings = ["<s>", *(f" w{n}" for n in range(20)), "\n", "x", "Y", "7", "(", ")"]
        rows = [["<s>", *(strings[1 + n] for n in generator.integers(0, 26, size - 1))] for _ in range(contexts)]
        codes = (generator.random((contexts, size, 12)) < np.linspace(0, 1, 12)) * generator.random((contexts, size, 12))
        codes[:, 0] = 0
        store = planted.make(tmp_path / f"random{seed}", rows, ["d"] * contexts, codes.astype(np.float32), strings)
        found = label_offline(store)
        assert len(found) == 12
        for latent in range(12):
            label = found.of(latent)
            assert label.score is None or 0 <= label.score <= 1
            assert replace(label, latent=latent) == label
    assert torch.get_default_dtype() == torch.float32
