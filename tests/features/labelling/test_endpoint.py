"""Labels from a chat endpoint, against a server on this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import planted
import pytest
from chat_server import Server, asks_for_label, honest, question, snippets_of
from planted import CALL, DEAD, EARLY, SELDOM, SELF, UNIT

from saebench.errors import UserError
from saebench.features import FeatureStore
from saebench.features.labelling.asking import CLOSE, OPEN, Asker
from saebench.features.labelling.chat import LONGEST_ANSWER
from saebench.features.labelling.endpoint import Endpoint, estimate, label_by_endpoint
from saebench.features.labelling.labels import Labels, kept_labels
from saebench.features.labelling.scoring import halves

KEY = "sk-test-1234567890-secret"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def store(store, tmp_path):
    """One of its own for every test."""
    shutil.copytree(store.path, tmp_path / "planted")
    return FeatureStore(tmp_path / "planted")


def endpoint(server, **options) -> Endpoint:
    return Endpoint(server.url, "stub", KEY, **{"wait": 0.01, "timeout": 10.0, "retries": 3, **options})


def fails(store, server, latents=(SELF,), **options) -> str:
    with pytest.raises(UserError) as caught:
        label_by_endpoint(store, endpoint(server, **options), latents, workers=1)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    return str(caught.value)


# --- what is asked ---


def test_labels_with_scores(store, server, capfd):
    found = label_by_endpoint(store, endpoint(server), [SELF, UNIT, DEAD, SELDOM])
    assert set(found) == {SELF, UNIT}
    label = found[SELF]
    assert (label.text, label.source, label.model) == ("the word self", "endpoint", "stub")
    fires, named = [], []
    asker = Asker(store)
    snippets = asker.snippets(SELF)
    for text, fire in zip(snippets.texts, snippets.fires, strict=True):
        fires.append(fire)
        named.append("self" in text)
    fires, named = np.array(fires), np.array(named)
    assert label.recall == 1.0 and label.positives == fires.sum() == 10 and label.negatives == (~fires).sum() == 10
    assert label.score == pytest.approx((1 + (~named[~fires]).mean()) / 2) and label.score == 1.0
    assert found[UNIT].score == pytest.approx(0.5, abs=0.3)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "stub" and body["temperature"] == 0
    labels = Labels.open(store)
    assert labels.of(SELF) == label and labels.search("WORD self") == [SELF]
    assert KEY not in "".join(capfd.readouterr()) and KEY not in repr(endpoint(server)) and KEY not in str(vars(labels))
    for path in store.path.parent.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_examples_for_labels_and_for_scores_are_from_different_halves(store, server):
    label_by_endpoint(store, endpoint(server), [SELF, CALL, UNIT, EARLY])
    rows, _ = planted.corpus()
    labelling_C, scoring_C = halves(len(rows), 0)
    texts = ["".join(row).replace("\n", "↵") for row in rows]
    assert len(server.requests) == 8
    for _, _, body in server.requests:
        if asks_for_label(body):
            stretches = re.findall(r"^strength \d+ of 10: (.*)$", question(body), re.MULTILINE)
            assert len(stretches) == 12 and all(text.count(OPEN) == text.count(CLOSE) == 1 for text in stretches)
            stretches, wrong_C = [text.replace(OPEN, "").replace(CLOSE, "") for text in stretches], scoring_C
        else:
            stretches, wrong_C = list(snippets_of(body).values()), labelling_C
            assert len(stretches) == 20
        for text in stretches:
            places = [number for number, whole in enumerate(texts) if text in whole]
            assert places and not all(wrong_C[places]), text


# --- what it will cost ---


def test_the_estimate_is_what_comes_and_sends_nothing(store, server):
    latents = [SELF, UNIT, CALL, DEAD]
    found = estimate(store, latents, prompt_price=2.0, answer_price=10.0)
    assert not server.requests and not kept_labels(store).path.exists()
    label_by_endpoint(store, endpoint(server), latents)
    assert found.calls == len(server.requests) == 6 and found.latents == 4
    characters = sum(len(message["content"]) for _, _, body in server.requests for message in body["messages"])
    assert found.prompt_tokens == pytest.approx(characters / 3, rel=0.05)
    assert found.cost == pytest.approx((2 * found.prompt_tokens + 10 * found.answer_tokens) / 1e6)
    assert str(found).startswith("4 latents: up to 6 calls, about ") and "at the given prices" in str(found)
    again = estimate(store, latents, model="stub")
    assert (again.latents, again.calls, again.labelled, again.cost) == (1, 0, 3, None)
    with pytest.raises(UserError, match="latent 14 is not one of the 14"):
        estimate(store, [14])
    assert estimate(store, []).calls == 0


def test_an_estimate_for_many_looks_at_some(store, monkeypatch):
    looked_at = []
    whole = Asker.label_question
    monkeypatch.setattr(Asker, "label_question", lambda self, latent: looked_at.append(latent) or whole(self, latent))
    monkeypatch.setattr("saebench.features.labelling.endpoint.LOOKED_AT", 3)
    found = estimate(store, [SELF, UNIT, CALL, EARLY, 4, 8, 9, 10, 11])
    assert len(looked_at) == 3 and found.calls == 16


# --- what goes wrong ---


def after(*answers):
    """Give these answers first, then honest ones."""
    left = list(answers)
    lock = threading.Lock()

    def reply(body):
        with lock:
            return left.pop(0) if left else honest(body)

    return reply


def test_a_busy_server_is_asked_again(store, server):
    server.reply = after((429, b"slow down", {"Retry-After": "0.3"}), (503, b"", {}), None)
    started = time.monotonic()
    assert label_by_endpoint(store, endpoint(server), [SELF], workers=1)[SELF].score == 1.0
    assert len(server.requests) == 5 and time.monotonic() - started > 0.3


def test_a_server_that_stays_busy(store, server):
    server.reply = lambda body: (500, {"error": {"message": "out\nof memory"}}, {})
    assert fails(store, server) == "127.0.0.1 is busy or out of order (500): out of memory"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY}."}},
            "refuses the key (401): Incorrect API key provided: •••.",
        ),
        (403, b"<html>Forbidden</html>", "refuses the key (403)"),
        (404, {"error": "model not found"}, "(404): model not found: a base URL mostly ends in /v1"),
        (400, {"message": "context too long"}, "refuses the request (400): context too long"),
        (413, b"", "refuses the request (413)"),
    ],
)
def test_refusals_are_said_at_once(store, server, status, content, said):
    server.reply = lambda body: (status, content, {})
    assert said in fails(store, server)
    assert len(server.requests) == 1


def test_a_key_is_not_sent_on_to_another_address(store, server):
    other = Server()
    try:
        for status in (301, 302, 307, 308):
            server.reply = lambda body, status=status: (status, b"", {"Location": f"{other.url}/chat/completions"})
            assert f"({status}), where a key is not sent: give that address" in fails(store, server)
        assert not other.requests
    finally:
        other.close()


@pytest.mark.parametrize(
    "content",
    [b"not json", b"", {"choices": []}, {"choices": [{"message": {"content": None}}]}, "   ", b"[" * 100_000, b"\xff\xfe", {"choices": 3}],
    ids=["text", "nothing", "no choice", "null", "blank", "nested", "bytes", "number"],
)  # fmt: skip
def test_malformed_answers(store, server, content, capsys):
    """Asked again; a latent that gets none is counted, and several in a row end it."""
    server.reply = after(*[(200, content, {})] * 4)
    found = label_by_endpoint(store, endpoint(server), [SELF, UNIT], workers=1)
    assert set(found) == {UNIT} and len(server.requests) == 6
    assert "1 of 2 latents have no label or no score" in capsys.readouterr().err
    server.reply = lambda body: (200, content, {})
    assert "answered what is no chat completion" in fails(store, server, [0, 1, 3, 4, 5, 8, 9], retries=0)


def test_an_endless_answer_is_cut_off(store, server):
    server.reply = lambda body: (200, b"x" * (LONGEST_ANSWER + 10), {})
    assert "no chat completion" in fails(store, server, [0, 1, 2, 3, 4, 5, 8], retries=0)


def test_slow_answers(store, server):
    def slow(body):
        time.sleep(1.0)
        return honest(body)

    server.reply = slow
    assert fails(store, server, timeout=0.2, retries=1) == "127.0.0.1 did not answer within 0.2 s"
    assert len(server.requests) == 2
    server.reply = honest
    assert SELF in label_by_endpoint(store, endpoint(server), [SELF])


def test_nobody_there(store):
    server = Server()
    server.close()
    assert "cannot reach 127.0.0.1: " in fails(store, server, retries=1)


def test_answers_beside_the_question(store, server):
    """A label without numbers is kept, and only its score is asked for the next time."""
    server.reply = lambda body: honest(body) if asks_for_label(body) else "I would say the third and maybe 7."
    found = label_by_endpoint(store, endpoint(server), [SELF])
    assert found[SELF].text == "the word self" and found[SELF].score is None and len(server.requests) == 3
    server.reply, server.requests = honest, []
    assert estimate(store, [SELF], model="stub").calls == 1
    assert label_by_endpoint(store, endpoint(server), [SELF])[SELF].score == 1.0
    assert len(server.requests) == 1 and not asks_for_label(server.requests[0][2])


def test_what_a_model_does_not_take_is_left_out(store, server):
    def strict(body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model."}}, {}
        return honest(body)

    server.reply = strict
    assert label_by_endpoint(store, endpoint(server), [SELF], workers=1)[SELF].score == 1.0
    assert len(server.requests) == 4


def test_given(monkeypatch, server):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    monkeypatch.setenv("OTHER", "from-another")
    assert Endpoint.given(server.url, "m").key == "from-the-environment"
    assert Endpoint.given(server.url, "m", variable="OTHER").key == "from-another"
    assert Endpoint.given(server.url, "m", key="mine").key == "mine"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert Endpoint.given(server.url, "m").key is None
    Endpoint.given(server.url, "m").ask([{"role": "system", "content": ""}, {"role": "user", "content": ""}])
    assert "Authorization" not in server.requests[0][1]
    for url in ("", "127.0.0.1:80/v1", "file:///etc/passwd", "ftp://host/v1", "http://", f"http://me:{KEY}@host/v1"):
        with pytest.raises(UserError, match="is no base URL") as caught:
            Endpoint(url, "m")
        assert KEY not in str(caught.value)
    for key in (f"{KEY}\n", f"{KEY} x", "schlüssel"):
        with pytest.raises(UserError, match="the key has white space or other characters") as caught:
            Endpoint(server.url, "m", key)
        assert key.strip() not in str(caught.value)


# --- nothing is lost ---


def test_a_stopped_call_goes_on_where_it_was(store, server):
    server.reply = after(*["a label", "[1]"] * 2, *[(500, b"", {})] * 4)
    fails(store, server, [SELF, UNIT, CALL, EARLY])
    assert set(kept_labels(store).read()) == {SELF, UNIT}
    server.reply, server.requests = honest, []
    found = label_by_endpoint(store, endpoint(server), [SELF, UNIT, CALL, EARLY])
    assert set(found) == {SELF, UNIT, CALL, EARLY} and len(server.requests) == 4
    assert found[SELF].text == "a label"
    server.requests = []
    assert label_by_endpoint(store, endpoint(server), [SELF, UNIT])[SELF] == found[SELF] and not server.requests
    assert label_by_endpoint(store, endpoint(server), [SELF], again=True)[SELF].text == "the word self"
    other = Endpoint(server.url, "another", KEY)
    assert label_by_endpoint(store, other, [SELF])[SELF].model == "another" and len(server.requests) == 4


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from saebench.errors import Interrupted
from saebench.features import FeatureStore
from saebench.features.labelling.endpoint import Endpoint, label_by_endpoint
try:
    label_by_endpoint(FeatureStore(sys.argv[1]), Endpoint(sys.argv[2], "stub", sys.argv[3]), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11], workers=2)
except Interrupted as stopped:
    print(stopped)
    sys.exit(130)
"""


@contextmanager
def labelling(store, server):
    command = [sys.executable, "-c", SCRIPT, str(store.path), server.url, KEY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_ctrl_c_and_again(store, server):
    """What was asked before the key was pressed is kept, answers on the way included."""
    gate, once = threading.Semaphore(7), threading.Semaphore(1)

    def held(body):
        if not gate.acquire(timeout=0):
            if once.acquire(timeout=0):  # a second press would end the process at once
                os.kill(process.pid, signal.SIGINT)
            time.sleep(0.5)
        return honest(body)

    server.reply = held
    with labelling(store, server) as process:
        out, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "call again to go on" in out and "Traceback" not in error
    answered = sum(asks_for_label(body) for _, _, body in server.requests)
    kept = kept_labels(store).read()
    assert 3 <= answered == len(kept) < 9
    server.reply, asked = honest, len(server.requests)
    found = label_by_endpoint(store, endpoint(server), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11])
    assert len(found) == 10 and all(label.score is not None for label in found.values())
    assert len(server.requests) == 20 and asked < 20


def test_a_line_that_a_kill_cut_short(store, server):
    label_by_endpoint(store, endpoint(server), [SELF, UNIT])
    kept = kept_labels(store)
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole + b'{"format": "saebench-endpo')
    assert set(kept.read()) == {SELF, UNIT}
    label_by_endpoint(store, endpoint(server), [CALL])
    assert set(kept.read()) == {SELF, UNIT, CALL} and kept.path.read_bytes().startswith(whole)


def test_a_damaged_line_is_named(store, server):
    label_by_endpoint(store, endpoint(server), [SELF, UNIT], workers=1)
    path = kept_labels(store).path
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (b"{nonsense\n", b"[]\n", b"{}\n", lines[1].replace(b'"text"', b'"words"')):
        content = b"".join([lines[0], line, *lines[2:]])
        path.write_bytes(content)
        for use in (lambda: Labels.open(store), lambda: label_by_endpoint(store, endpoint(server), [CALL])):
            with pytest.raises(UserError, match="planted.endpoint.jsonl is damaged in line 2: remove that line"):
                use()
        assert path.read_bytes() == content
    path.write_bytes(lines[0].replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(UserError, match="line 1: not of format saebench-endpoint-labels, version 1"):
        Labels.open(store)


def test_labels_outlive_their_store_and_those_of_another_dictionary_stay_and_do_not_count(store, server, tmp_path):
    label_by_endpoint(store, endpoint(server), [SELF])
    rows, names = planted.corpus()
    other = planted.make(tmp_path / "other", rows, names, planted.codes(rows, seed=8))
    kept_labels(other).path.write_bytes(kept_labels(store).path.read_bytes())
    assert other.identity != store.identity and set(kept_labels(other).read()) == {SELF}
    other.config["dictionary"] = "another"
    assert kept_labels(other).read() == {}
    assert set(label_by_endpoint(other, endpoint(server), [UNIT])) == {UNIT}
    assert len(kept_labels(other).path.read_bytes().splitlines()) == 4


def test_two_do_not_write_at_once(store, server):
    with kept_labels(store).writing(), pytest.raises(UserError, match="another process is labelling into"):
        label_by_endpoint(store, endpoint(server), [SELF])
    assert not server.requests
