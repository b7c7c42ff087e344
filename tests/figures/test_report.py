"""The report, the plots and the highlighted tokens of a small made-up run."""

import json
import re
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from saebench.features import Example, Feature
from saebench.figures.plots import density_histogram, training_curves
from saebench.figures.report import FIGURES, health, write_report
from saebench.figures.tokens import headline, html_line, terminal_line, visible
from saebench.runs import Run

ATTACK = "<script>alert(1)</script>"
TOKENS = [" the", ATTACK, "\n", '"><img src=x onerror=alert(2)>', "\x1b[31mred", "   ", "&amp;"]
EXAMPLE = Example(ids=[0, 1, 2, 3, 4, 5, 6], values=[0.0, 2.0, 0.0, 1.0, 0.5, 0.0, 0.0], focus=1, document=f"{ATTACK}.py")
FEATURE = Feature(latent=17, density=0.0123, mean_value=1.17, max_value=2.0, examples=[EXAMPLE], top_tokens=[(1, 0.6), (3, 0.4)])
FIGURE_VALUES = {key: 0.1234 + number for number, (key, *_) in enumerate(FIGURES)}
EVALUATION = {
    **FIGURE_VALUES,
    "site": f"blocks.0{ATTACK}",
    "tokens": 5000,
    "density": [0.0, 0.0, 1e-3, 2e-2, 1.0],
    "intervals_95": {"ce_increase": [0.11, 0.22]},
}
ROWS = [
    {"step": step, "tokens": step * 100, "dictionary": name, "lr": 1e-3, "fvu": 1 / step, "l0": 4.0, "dead": 0.01 * step}
    for step in (10, 20, 30)
    for name in (f"sae{ATTACK}", "other")
]


class Page(HTMLParser):
    """The tags of a page, its visible text, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    recipe = {"model": {"name": f"m{ATTACK}"}, "text": {"source": f"t{ATTACK}"}, "training": {"num_tokens": 3000}}
    run = Run.begin(tmp_path_factory.mktemp("runs") / "run&co", recipe)
    run.record |= {"seconds": {"training": 12.0}, "activations": {"tokens": 4000, "identity": "abc"}}
    run.save()
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = write_report(run, {f"sae{ATTACK}": EVALUATION}, {f"sae{ATTACK}": [FEATURE]}, TOKENS.__getitem__)
    assert path == run.path / "report.html"
    return path.read_text()


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


def test_the_report_loads_nothing(written, page):
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base", "source", "video")]
    assert not [attributes for _, attributes in page.tags if {"src", "href", "srcset", "data"} & set(attributes)]
    own = written.replace(get_plotlyjs(), "")
    assert len(own) < 100_000
    assert not re.search(r"https?://|@import|url\(", own)


def test_hostile_text_stays_text(written, page):
    own = written.replace(get_plotlyjs(), "")
    assert "<script>alert" not in own
    assert "<img" not in own
    assert "\x1b" not in own
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert not [script for script in page.scripts if script.strip().startswith("alert")]
    assert page.text.count(ATTACK) >= 5  # token, document, dictionary, site, model, text


def test_the_figures_are_shown(page):
    text = " ".join(page.text.split())
    assert "run&co" in text
    for key, heading, form, meaning in FIGURES:
        assert f"{heading}{FIGURE_VALUES[key]:{form}}{meaning}" in text
    assert "95 %: +0.1100 to +0.2200" in text
    assert "1 characteristic features" in text
    assert "feature 17" in text
    assert "fires on 1.230% of tokens, mean 1.17, max 2.00" in text
    assert "3,000 training tokens" in text
    assert "4,000 tokens, identity abc" in text
    plots = [script for script in page.scripts[1:] if "Plotly.newPlot" in script]
    assert ["never fired" in plot for plot in plots] == [True, False]
    assert ["learning rate" in plot for plot in plots] == [False, True]


def test_a_report_without_metrics_or_features(tmp_path):
    recipe = {"model": {"name": "m"}, "text": {"source": "t"}, "training": {"num_tokens": 3000}}
    run = Run.begin(tmp_path / "bare", recipe)
    run.save()
    page = Page(write_report(run, {"sae": EVALUATION | {"intervals_95": {}}}, {}, TOKENS.__getitem__).read_text())
    assert "characteristic" not in page.text
    assert "Training" not in page.text


def test_html_lines_shade_what_fires_and_outline_the_focus():
    line = html_line(EXAMPLE, 2.0, TOKENS.__getitem__)
    page = Page(line)
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    assert [span["title"] for span in spans] == ["2.000", "1.000", "0.500"]
    assert [span.get("class") for span in spans] == ["focus", None, None]
    alphas = [float(re.search(r"([\d.]+)\)$", span["style"]).group(1)) for span in spans]
    assert alphas == pytest.approx([0.9, 0.525, 0.34], abs=0.01)
    assert page.text == "".join(visible(token) for token in TOKENS)


def test_terminal_lines_show_every_token_and_colour_what_fires():
    line = terminal_line(EXAMPLE, 2.0, TOKENS.__getitem__)
    assert line.plain == "".join(visible(token) for token in TOKENS)
    assert all(c.isprintable() for c in line.plain)
    styled = {line.plain[span.start : span.end]: str(span.style) for span in line.spans if str(span.style)}
    assert set(styled) == {visible(TOKENS[token]) for token in (1, 3, 4)}
    assert styled[ATTACK] == "black on rgb(213,94,0) bold underline"
    assert "bold" not in styled[TOKENS[3]]
    silent = Example(ids=[0, 2], values=[0.0, 0.0], focus=0, document="")
    assert not [span for span in terminal_line(silent, 0.0, TOKENS.__getitem__).spans if str(span.style)]


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", " the"), ("   ", "···"), ("\n", "↵"), ("a\tb\r", "a→b␍"), ("\x1b[31m", "�[31m"), ("", ""), ("é漢", "é漢")],
)
def test_white_space_is_made_visible(token, shown):
    assert visible(token) == shown


def test_headlines_name_tokens_and_shares():
    assert headline(FEATURE, ["a", " b", "c", "\n"].__getitem__) == "' b' 60%   '↵' 40%"


def test_training_curves_hold_the_logged_rows():
    figure = training_curves(ROWS)
    assert len(figure.data) == 8
    for place, metric in enumerate(("fvu", "l0", "dead", "lr")):
        for number, name in enumerate((f"sae{ATTACK}", "other")):
            trace = figure.data[2 * place + number]
            assert trace.name == name
            assert list(trace.x) == [1000, 2000, 3000]
            assert list(trace.y) == [row[metric] for row in ROWS if row["dictionary"] == name]
            assert bool(trace.showlegend) == (place == 0)
    assert figure.layout.yaxis.type == "log"
    assert not any(trace.showlegend for trace in training_curves([row for row in ROWS if row["dictionary"] == "other"]).data)


def test_the_density_histogram_counts_every_latent():
    density = [0.0, 0.0, 0.0, 1e-9, 1e-3, 1.05e-3, 0.02, 1.0]
    figure = density_histogram(density, 123_456)
    bars = figure.data[0]
    assert sum(bars.y) == 5
    assert "8 latents over 123,456 held-out tokens; 3 never fired" in figure.layout.title.text
    counted = {round(float(x), 2): int(y) for x, y in zip(bars.x, bars.y, strict=True) if y}
    half = 6.5 / 60 / 2
    for value, count in ((-6.5, 1), (-3.0, 2), (-1.7, 1), (0.0, 1)):
        (near,) = [x for x in counted if abs(x - value) <= half + 0.01]
        assert counted[near] == count
    assert sum(density_histogram([0.0, 0.0], 10).data[0].y) == 0


def test_health_tells_the_dead_and_what_helps():
    figures = {"density": [0.0, 0.0, 5e-6, 0.1], "tokens": 1_000_000, "gamma": {"a": 3.0}}
    text = health(figures)
    assert text.startswith("2 of 4 latents never fired on 1,000,000 held-out tokens, 1 on fewer than one in 100,000.")
    assert "a 3.00" in text and "centre = true" in text
    assert "active_subspace" in health({**figures, "gamma": {"a": 0.2}})
    assert "Many" not in health({**figures, "density": [0.1] * 4})
