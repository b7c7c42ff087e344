"""Steering in headless Chromium, from a feature's page to a shared link. What fails every test of these is in conftest.py."""

from __future__ import annotations

import re

import numpy as np
import pytest
from page_run import HOSTILE, LABELLED, settle

from saebench.features import FeatureStore

pytestmark = pytest.mark.slow
PROMPT = f"{HOSTILE} 17"
SHARED = f"edits={LABELLED}_add_5~11_clamp_1_2&where=generated&tokens=9&seed=4&prompt=return%2017"


def texts(page) -> list[str]:
    return page.locator(".sb-written").all_inner_texts()


def write(page) -> list[str]:
    page.get_by_role("button", name="Write", exact=True).click()
    page.get_by_text("On neutral text").wait_for()
    settle(page)
    return texts(page)


def test_from_a_feature_to_a_shared_link(visit, hostile_run):
    kept = hostile_run.path / "steering" / "from chromium.json"
    page = visit(f"feature?run=small&dictionary=a&feature={LABELLED}")
    page.locator(".sb-chip", has_text="Steer with it").click()
    page.wait_for_url(re.compile(r"/steering\?.*edits=3"))
    settle(page)
    assert HOSTILE in page.locator(".sb-steered").inner_text()

    page.get_by_role("slider", name="Strength").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("edits=3_add_5"))
    page.get_by_label("Prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_url(re.compile("prompt="))
    page.get_by_label("New tokens").fill("9")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("tokens=9"))
    untouched, steered = write(page)
    assert untouched.startswith(PROMPT) and steered.startswith(PROMPT) and untouched != steered

    page.get_by_role("button", name="Presets").click()
    page.get_by_label("Save these edits as").fill("from chromium")
    page.keyboard.press("Enter")
    settle(page)
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_url(re.compile("length="))
    settle(page)
    assert kept.exists()
    page.keyboard.press("Escape")

    again = visit(page.url.split("/", 3)[3])
    assert write(again) == [untouched, steered]
    again.get_by_text("The same in the terminal").click()
    assert "--preset 'from chromium'" in again.locator(".stCode").inner_text()
    kept.unlink()


def test_features_by_search(visit):
    page = visit("steering?run=small&dictionary=a")
    page.get_by_label("Add a feature").fill("11")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("edits=11_add_4"))
    settle(page)
    page.get_by_label("Add a feature").fill("onmouseover")
    page.keyboard.press("Enter")
    page.locator(".sb-chips .sb-chip").first.click()
    page.wait_for_url(re.compile(f"edits=11_add_4~{LABELLED}_add_4"))
    settle(page)
    assert page.locator(".sb-steered").count() == 2 and "add=" not in page.url
    page.get_by_role("button", name="Remove").first.click()
    page.wait_for_url(re.compile(rf"edits={LABELLED}_add_4(&|$)"))
    settle(page)
    assert page.locator(".sb-steered").count() == 1
    page.go_back()
    page.wait_for_url(re.compile("edits=11_add_4~"))
    settle(page)
    assert page.locator(".sb-steered").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window(visit, scheme):
    page = visit(f"steering?run=small&dictionary=a&{SHARED}", viewport={"width": 430, "height": 800}, color_scheme=scheme)
    assert len(write(page)) == 2
    assert page.evaluate("document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth") <= 1


def test_a_dose_response_is_measured_without_stopping_others(visit, hostile_run):
    latent = int(np.argmax(FeatureStore(hostile_run.features("a")).counts_F))
    page = visit(f"steering?run=small&dictionary=a&edits={latent}_add_4&prompt=return")
    page.get_by_role("button", name="Measure", exact=True).click()
    page.locator(".sb-job").wait_for()
    other = visit(f"steering?run=small&dictionary=b&{SHARED}")
    assert len(write(other)) == 2
    page.locator(".js-plotly-plot").wait_for(timeout=300_000)
    settle(page)
    assert "random direction 1" in page.locator(".sb-table").inner_text()
    assert list((hostile_run.path / "steering" / "doses").glob("*.json"))
