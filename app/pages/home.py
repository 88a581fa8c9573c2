"""What the server runs for every visit: the pages, and the banner above each of them.

It lies among the pages and not above them, or Streamlit would serve a folder called pages by itself, without a banner.
"""

from __future__ import annotations

import streamlit as st

from app import screen

PAGES = ("Cases", "Review", "Compare", "Train", "Reports", "About")

screen.look()
page = st.navigation(
    [st.Page(f"{name.lower()}.py", title=name, default=name == PAGES[0]) for name in PAGES], position="top"
)
with screen.sentences():
    page.run()
