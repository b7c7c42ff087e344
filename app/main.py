"""The feature browser: `streamlit run app/main.py -- RUN...`, which `saebench browse RUN...` does.

Pages are functions in `views/`, thin: numbers come from `saebench.features`, figures from `saebench.figures`. What a page shows is in the
query string (`address.py`), what it opens is opened once for all visitors (`opening.py`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import streamlit as st
from loading import load

ICONS = {
    "overview": ":material/monitoring:",
    "features": ":material/table_rows:",
    "feature": ":material/highlight:",
    "prompt": ":material/edit_note:",
    "steering": ":material/tune:",
    "circuit": ":material/account_tree:",
    "compare": ":material/compare_arrows:",
    "corpus": ":material/library_books:",
}


def main() -> None:
    st.set_page_config(page_title="saebench", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
    pages = {
        name: st.Page(_page(name), title=name.capitalize(), icon=icon, url_path=name, default=name == "overview")
        for name, icon in ICONS.items()
    }
    page = st.navigation(list(pages.values()))
    try:
        with st.spinner("Opening saebench", show_time=True):  # the first time it takes seconds
            layout = load("layout")
    except Exception as error:
        traceback.print_exc()
        st.error("The browser cannot start. The terminal shows why.")
        raise SystemExit from error
    with layout.guarded():
        layout.begin(pages, page.url_path)
        page.run()


def _page(name: str) -> Callable[[], None]:
    return lambda: load(f"views.{name}").show()


main()
