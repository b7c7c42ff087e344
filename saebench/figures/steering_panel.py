"""Steering live in a notebook: a slider for each latent, and what the model writes untouched and steered, as it writes it.

ipywidgets draws it and Jupyter shows it; nothing here needs a browser, so that a notebook that runs unattended keeps the texts as a table.
Shape suffixes: `C` contexts, `S` positions.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saebench.dictionaries import Dictionary
from saebench.errors import UserError
from saebench.figures.notebook import CELL
from saebench.lm import LanguageModel
from saebench.steering import samples
from saebench.steering.choosing import by_hand
from saebench.steering.edits import Edit, add
from saebench.steering.hooks import check_edit
from saebench.steering.measures import side_effect
from saebench.steering.positions import KINDS
from saebench.steering.samples import Sample

STRONGEST, STEP = 12.0, 0.5  # of the sliders, in units
MOST_TOKENS = 200
NAMES = ("untouched", "steered")
TEXT = CELL + ";font-family:monospace;width:50%"


@dataclass(frozen=True)
class SideBySide:
    """The two continuations of a prompt with their figures: Jupyter draws a table, everything else prints text."""

    prompt: str
    samples: Sequence[Sample]
    """Untouched and steered, as far as they are written."""
    kl: float | None = None
    """KL(untouched || steered) on neutral text, nats per token."""
    size: float | None = None
    """Of the edit there, as a share of the activations' length."""

    def figures(self) -> list[tuple[str, list[str]]]:
        """Names and values of what was measured: a value for each text, or one for both."""
        rows = [
            ("perplexity", ["" if math.isnan(s.perplexity) else f"{s.perplexity:.1f}" for s in self.samples]),
            ("repetition", ["" if math.isnan(s.repetition) else f"{s.repetition:.0%}" for s in self.samples]),
        ]
        rows = [row for row in rows if any(row[1])]
        if self.kl is not None:
            rows.append(("KL on neutral text", [f"{self.kl:.3f} nats a token"]))
        if self.size is not None:
            rows.append(("size of the edit", [f"{self.size:.0%} of the activations' length"]))
        return rows

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{name}</th>" for name in ("", *NAMES[: len(self.samples)]))
        prompt = f"<b>{html.escape(self.prompt)}</b>"
        texts = "".join(f'<td style="{TEXT}">{prompt}{html.escape(sample.text)}</td>' for sample in self.samples)
        rows = "".join(
            f'<tr><td style="{CELL}">{name}</td>'
            + "".join(f'<td style="{CELL}" colspan="{1 if len(values) == len(self.samples) else 2}">{v}</td>' for v in values)
            + "</tr>"
            for name, values in self.figures()
        )
        return f"<table><tr>{heads}</tr><tr><td></td>{texts}</tr>{rows}</table>"

    def __repr__(self) -> str:
        texts = [f"--- {name}\n{self.prompt}{sample.text}" for name, sample in zip(NAMES, self.samples, strict=False)]
        return "\n".join([*texts, "---", *(f"{name}: {' | '.join(values)}" for name, values in self.figures())])


class SteeringPanel:
    """Sliders, settings and a button; below them both texts, or in one line why there are none.

    The widgets are attributes, so that code can set what a hand would: `sliders` by latent, `positions`, `temperature`, `new_tokens`,
    `seed`, `prompt`, `button`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dictionary: Dictionary,
        latents: int | Sequence[int],
        *,
        unit: float,
        neutral: Tensor,
        labels: Mapping[int, str] | None = None,
    ):
        """`unit` is the length that a strength of 1 adds (`baselines.unit_of`), `neutral` are token contexts [C, S] that KL is measured on.
        Raises UserError without ipywidgets, and for latents that the dictionary does not have or that do not fit the model."""
        widgets = _ipywidgets()
        self.lm, self.dictionary, self.unit, self.neutral_CS = lm, dictionary, unit, neutral
        self.latents = by_hand(dictionary, latents).latents
        for latent in self.latents:
            check_edit(lm, add(dictionary, latent, unit=unit))
        self.written: SideBySide | None = None
        """What was written last."""

        named = {"style": {"description_width": "6rem"}}
        self.sliders = {
            latent: widgets.FloatSlider(
                0.0, min=-STRONGEST, max=STRONGEST, step=STEP, description=str(latent), continuous_update=False, **named
            )
            for latent in self.latents
        }
        self.positions = widgets.Dropdown(options=KINDS, description="positions", **named)
        self.temperature = widgets.BoundedFloatText(0.8, min=0.0, max=3.0, step=0.1, description="temperature", **named)
        self.new_tokens = widgets.BoundedIntText(60, min=1, max=MOST_TOKENS, description="new tokens", **named)
        self.seed = widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **named)
        self.prompt = widgets.Textarea(
            placeholder="Text that the model goes on from", description="prompt", layout={"width": "40rem"}, **named
        )
        self.button = widgets.Button(description="Write", button_style="primary")
        self.button.on_click(lambda _: self.write())
        self.shown = widgets.HTML()
        rows = [
            widgets.HBox([slider, widgets.HTML(html.escape((labels or {}).get(latent, "")))])
            for latent, slider in self.sliders.items()
        ]
        settings = widgets.HBox([self.positions, self.temperature, self.new_tokens, self.seed], layout={"flex_flow": "wrap"})
        self.box = widgets.VBox([*rows, settings, self.prompt, self.button, self.shown])

    @property
    def edits(self) -> list[Edit]:
        """What the sliders say: an addition for each that is not at 0."""
        return [
            add(self.dictionary, latent, slider.value, unit=self.unit, positions=self.positions.value)
            for latent, slider in self.sliders.items()
            if slider.value
        ]

    def write(self) -> None:
        """What the button does: continue the prompt, untouched and then steered, and measure. A UserError is shown, not raised."""
        self.button.disabled, self.written = True, None
        try:
            self.written = self._write()
            self.shown.value = self.written._repr_html_()
        except UserError as error:
            self.shown.value = f"<p>{html.escape(str(error))}</p>"
        finally:
            self.button.disabled = False

    def _write(self) -> SideBySide:
        prompt, edits = self.prompt.value, self.edits
        done: list[Sample] = []
        for some in ([], edits):
            pieces: list[str] = []

            def tell(piece: str, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                growing = Sample("".join(pieces), math.nan, math.nan, 0, math.nan)
                self.shown.value = SideBySide(prompt, [*done, growing])._repr_html_()

            options = {"temperature": self.temperature.value, "seed": self.seed.value, "on_text": tell}
            done.append(samples.write(self.lm, some, prompt, self.new_tokens.value, **options))
        kl_C, size_C = side_effect(self.lm, edits, self.neutral_CS)
        return SideBySide(prompt, done, float(kl_C.mean()), float(size_C.mean()))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Live in Jupyter; where widgets are not drawn, what was written last."""
        found = self.box._repr_mimebundle_(**options) or {}
        found["text/plain"] = repr(self) if self.written is None else repr(self.written)
        return found | ({"text/html": self.shown.value} if self.shown.value else {})

    def __repr__(self) -> str:
        return f"SteeringPanel of latents {', '.join(map(str, self.latents))}"


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise UserError('the panel needs the ipywidgets package: pip install "saebench[notebooks]"') from None
    return ipywidgets
