"""Texts token by token, histograms of nearest latents, and contrasts: what the figures hold, and that texts stay texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from saebench.features.contrast import Difference
from saebench.figures.contrast import POINTS, volcano
from saebench.figures.matching import BINS, nearest_histogram
from saebench.figures.prompt import Shown, html_key, html_tokens, shaded

HOSTILE = "<img src=x onerror=\"alert('1')\">"


def test_tokens_are_text_whatever_they_say():
    tokens = [Shown(HOSTILE, 0.5, [(HOSTILE, HOSTILE), ("b", HOSTILE)], f"prompt?at={HOSTILE}"), Shown("a\nb", -0.25), Shown("c")]
    found = html_tokens(tokens)
    assert "<img" not in found and found.count("<") == found.count("</") * 2 + 1  # the break of the line has no end
    assert 'class="shaded" style="--a:0.50"' in found and 'class="cold shaded" style="--a:0.25"' in found
    assert "a↵<br>b" in found and "<span>c</span>" in found
    assert re.search(r'data-d="b &lt;img', found)


def test_shades_go_from_zero_to_the_largest():
    assert shaded([0.0, 1.0, 4.0, float("nan"), -2.0]) == ([0.0, 0.25, 1.0, 0.0, 0.0], 4.0)
    assert shaded([1.0, -4.0], diverging=True) == ([0.25, -1.0], 4.0)
    assert shaded([1.0, -9.0], diverging=True, strongest=2.0) == ([0.5, -1.0], 2.0)
    assert shaded([0.0, float("nan")]) == ([0.0, 0.0], 0.0)
    assert "-3 " in html_key(3.0, "loss", diverging=True) and "&lt;b&gt; 0 " in html_key(3.0, "<b>")


def test_the_histogram_counts_every_latent_once():
    rng = np.random.default_rng(0)
    sides = [rng.random(100), np.append(rng.random(40), [1.0, 0.0])]
    figure = nearest_histogram(sides, ["<b>a</b>", "b"], "cosine", 0.7)
    assert figure.data[0].name == "&lt;b&gt;a&lt;/b&gt;"
    for trace, values in zip(figure.data, sides, strict=True):
        counts = np.array(trace.customdata)[:-1, 1]
        assert counts.tolist() == [
            ((values >= i / BINS) & (values < (i + 1) / BINS)).sum() + (i == BINS - 1) * (values == 1).sum() for i in range(BINS)
        ]
        assert np.array(trace.y)[:-1] == pytest.approx(counts / len(values))


def difference(latent: int, z: float, q: float) -> Difference:
    return Difference(latent, 5, 5, 2, 2, 0.1, 0.2, latent / 100, z, q, q)


def test_contrasts_are_coloured_by_side_and_by_what_may_be_chance():
    found = [difference(0, 3.0, 0.01), difference(1, -3.0, 0.05), difference(2, 2.0, 0.06), difference(3, 0.0, 1.0)]
    figure = volcano(found, ("<b>a</b>", "b"), lambda latent: f"<i>{latent}")
    assert [list(trace.customdata) for trace in figure.data] == [[0], [1], [2, 3]]
    assert figure.data[0].name == "more in &lt;b&gt;a&lt;/b&gt;" and figure.data[0].text == ("&lt;i&gt;0",)
    many = [difference(i, 1 + i / 1000, 0.01) for i in range(POINTS + 500)]
    kept = volcano(many, ("a", "b"), str).data[0].customdata
    assert len(kept) == POINTS and min(kept) == 500
