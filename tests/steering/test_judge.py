"""The judge against a server on this machine, and harmonic means by hand."""

import numpy as np
import pytest
from features.chat_server import Server, question

from saebench.errors import UserError
from saebench.features.labelling.chat import Endpoint
from saebench.steering.judge import Judge, harmonic


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def rating(body):
    """By the length of the text, other for each question."""
    asked, _, text = question(body).partition("\n\nThe text:\n")
    if "concept" in asked:
        return "2" if "import" in text else "0"
    return f" {min(2, len(text.split()))}."


def test_every_text_is_asked_about_three_times(server):
    server.reply = rating
    judge = Judge(Endpoint.given(server.url, "stub"), "imports")
    texts = ["import os", "x = 1", "import"]
    assert judge.calls(3) == 9 and not server.requests
    found = judge.score(texts)
    np.testing.assert_allclose(found, [2.0, 0.0, 3 / (1 / 2 + 1 + 1)])
    assert len(server.requests) == 9
    assert all("'imports'" in question(body) for _, _, body in server.requests if "concept" in question(body))


def test_harmonic_means():
    np.testing.assert_allclose(harmonic(np.array([[2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 2.0, 2.0]])), [2.0, 1.5, 0.0])


def test_an_answer_that_is_no_digit_is_one_line(server):
    server.reply = lambda body: "rather good"
    with pytest.raises(UserError, match="was asked for 0, 1 or 2 and answered 'rather good'"):
        Judge(Endpoint.given(server.url, "stub"), "imports").score(["x"])
    with pytest.raises(UserError, match="cannot reach"):
        Judge(Endpoint("http://127.0.0.1:9/v1", "stub", retries=0), "imports").score(["x"])
