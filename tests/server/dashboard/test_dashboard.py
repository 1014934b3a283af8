"""The page's files: what is served, and what is not."""

import re

import httpx

from tests.server.dashboard.conftest import MadeUp


def test_the_page_and_all_that_it_names(made_up: MadeUp) -> None:
    page = httpx.get(made_up.url)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="dashboard/([^"]+)"', page.text))
    assert "main.js" in named
    while named:
        name = named.pop()
        answer = httpx.get(f"{made_up.url}/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if name.endswith(".js"):
            assert answer.headers["Content-Type"].startswith("text/javascript")
            named |= set(re.findall(r'from "\./([^"]+)"', answer.text))


def test_nothing_from_elsewhere_is_allowed_or_asked_for(made_up: MadeUp) -> None:
    page = httpx.get(made_up.url)
    rules = dict(rule.strip().split(" ", 1) for rule in page.headers["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert {rules[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    assert "http:" not in page.text and "https:" not in page.text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text)


def test_only_its_own_files(made_up: MadeUp) -> None:
    for name in ("nothing.js", "..%2f__init__.py", "%2e%2e/feed.py", "__init__.py", ""):
        answer = httpx.get(f"{made_up.url}/{name}")
        assert answer.status_code == (404 if name else 307), name
    assert httpx.get(f"{made_up.url}/", follow_redirects=True).status_code == 200
