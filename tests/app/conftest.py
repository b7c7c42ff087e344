"""One small run with hostile texts for all tests of pages."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def hostile_run(tiny_lm_directory, tmp_path_factory):
    from page_run import hostile_model, make_run

    lm = hostile_model(tiny_lm_directory, tmp_path_factory.mktemp("model") / "hostile")
    return make_run(tmp_path_factory.mktemp("shown") / "small", lm)


@pytest.fixture
def opened(hostile_run, monkeypatch) -> Callable[..., object]:
    """Opens a page of the app, on the run or on others, as its address says, without a browser."""
    pytest.importorskip("streamlit")
    from page_run import APP, add_app_to_path
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    add_app_to_path()

    def open_page(name: str, *, runs: list | None = None, **params: object) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, runs or [hostile_run.path])])
        test = AppTest.from_file(str(APP / "main.py"), default_timeout=120)
        test.query_params.update({key: str(value) for key, value in params.items()})
        test._page_hash = calc_hash(name)
        test.run()
        assert not test.exception, [one.value for one in test.exception]
        return test

    return open_page
