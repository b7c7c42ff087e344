import builtins
import html
import math

import pytest
import torch

import saebench as sb
from saebench.errors import UserError
from saebench.figures.steering_panel import SideBySide, SteeringPanel
from saebench.steering import samples
from saebench.steering.edits import add
from saebench.steering.measures import side_effect
from saebench.steering.samples import Sample

ipywidgets = pytest.importorskip("ipywidgets")
UNIT = 2.0


@pytest.fixture
def sae(tiny_lm):
    made = sb.TopK(d_sae=32, k=4).for_sites({"blocks.1.hook_resid_post": 32}).build().eval().requires_grad_(False)
    made.W_dec.copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture
def panel(tiny_lm, contexts, sae):
    made = SteeringPanel(tiny_lm, sae, [3, 7], unit=UNIT, neutral=contexts.ids_NS[:4].long(), labels={3: "a <b> label"})
    made.prompt.value, made.new_tokens.value = "def area", 8
    return made


def hooks(lm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def test_the_button_writes_what_samples_write_says(panel, tiny_lm, sae):
    panel.sliders[3].value, panel.sliders[7].value = 6.0, -2.0
    panel.positions.value, panel.temperature.value, panel.seed.value = "generated", 0.5, 4
    shown = []
    panel.shown.observe(lambda change: shown.append(change.new), "value")
    before = hooks(tiny_lm)
    panel.button.click()

    edits = [add(sae, latent, strength, unit=UNIT, positions="generated") for latent, strength in ((3, 6.0), (7, -2.0))]
    expected = [samples.write(tiny_lm, some, "def area", 8, temperature=0.5, seed=4) for some in ([], edits)]
    assert [(s.text, s.perplexity, s.repetition) for s in panel.written.samples] == [
        (s.text, s.perplexity, s.repetition) for s in expected
    ]
    assert expected[0].text != expected[1].text
    kl_C, size_C = side_effect(tiny_lm, edits, panel.neutral_CS)
    assert panel.written.kl == pytest.approx(kl_C.mean()) and panel.written.kl > 0
    assert panel.written.size == pytest.approx(size_C.mean())
    assert hooks(tiny_lm) == before
    assert not panel.button.disabled
    assert len(shown) > 3  # piece by piece
    assert "<th>steered" not in shown[0] and "<th>steered" in shown[-1]


def test_sliders_at_zero_change_nothing(panel):
    assert panel.edits == []
    panel.button.click()
    untouched, steered = panel.written.samples
    assert untouched.text == steered.text
    assert panel.written.kl == 0.0


@pytest.mark.parametrize(
    ("name", "value", "said"), [("prompt", "  ", "the prompt is empty"), ("new_tokens", 64, "exceed the model's 64 positions")]
)
def test_an_error_is_shown_in_one_line(panel, tiny_lm, name, value, said):
    panel.sliders[3].value = 4.0
    panel.button.click()
    before = hooks(tiny_lm)
    getattr(panel, name).value = value
    panel.button.click()
    assert said in html.unescape(panel.shown.value) and "<table>" not in panel.shown.value
    assert "\n" not in panel.shown.value
    assert panel.written is None
    assert hooks(tiny_lm) == before
    assert not panel.button.disabled


def test_no_hook_is_left_where_writing_breaks_off(panel, tiny_lm):
    """Jupyter's stop button raises KeyboardInterrupt in the middle of a text."""
    panel.sliders[3].value = 4.0
    before, told = hooks(tiny_lm), []

    def stop(change):
        told.append(change.new)
        if "<th>steered" in change.new:
            raise KeyboardInterrupt

    panel.shown.observe(stop, "value")
    with pytest.raises(KeyboardInterrupt):
        panel.write()
    assert told
    assert hooks(tiny_lm) == before
    assert not panel.button.disabled


def test_what_is_written_is_escaped():
    sample = Sample("<script>x</script>", 2.0, 0.5, 3, 0.1)
    page = SideBySide("<i>", [sample, sample], 0.25, 0.4)._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<i>" not in page and "&lt;i&gt;" in page


def test_labels_are_escaped(panel):
    row = panel.box.children[0]
    assert row.children[0] is panel.sliders[3]
    assert row.children[1].value == "a &lt;b&gt; label"


def test_figures_as_text():
    first, second = Sample(" one", 2.5, 0.0, 1, 0.1), Sample("", math.nan, 0.0, 0, math.nan)
    assert repr(SideBySide("So", [first, second], 0.1234, 0.4)).split("\n") == [
        "--- untouched", "So one", "--- steered", "So", "---", "perplexity: 2.5 | ", "repetition: 0% | 0%",
        "KL on neutral text: 0.123 nats a token", "size of the edit: 40% of the activations' length",
    ]  # fmt: skip


def test_a_page_without_widgets_gets_the_texts(panel):
    before = panel._repr_mimebundle_()
    assert before["text/plain"] == "SteeringPanel of latents 3, 7" and "text/html" not in before
    panel.button.click()
    bundle = panel._repr_mimebundle_()
    assert bundle["text/html"] == panel.written._repr_html_()
    assert bundle["text/plain"] == repr(panel.written)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id


@pytest.mark.parametrize("latents", [[], [32], [3, 3]])
def test_wrong_latents_are_told_at_once(tiny_lm, contexts, sae, latents):
    with pytest.raises(UserError):
        SteeringPanel(tiny_lm, sae, latents, unit=UNIT, neutral=contexts.ids_NS[:4].long())


def test_without_ipywidgets(tiny_lm, contexts, sae, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "saebench\[notebooks\]"'):
        SteeringPanel(tiny_lm, sae, 3, unit=UNIT, neutral=contexts.ids_NS[:4].long())
