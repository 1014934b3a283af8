"""The page in a real browser: what it shows, what it answers to, and that nothing is complained of."""

import json
from collections.abc import Callable

import pytest

from tests.server.conftest import NAME
from tests.server.dashboard.conftest import MadeUp, running
from tests.support.browser import Page
from tests.support.states import state_of

LIVE = "document.getElementById('health').innerText === 'healthy'"
V3 = {"nodes": 8, "cards": 8, "layers": tuple(range(3, 61)), "experts": 256, "redundant": 64}
COLOURS = """(() => { const c = document.querySelector('#%s canvas');
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set();
    for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
    return seen.size; })()"""
PANELS = ("trends", "cluster", "traffic", "cards", "experts", "steps")


def seen(page: Page, made: MadeUp, theme: str = "light", width: int = 1500, **shape: object) -> Page:
    """The page before an engine of this shape."""
    made.publish(state_of(**shape))  # type: ignore[arg-type]
    page.open(made.url, theme=theme, width=width)
    page.until(LIVE)
    page.until(
        "document.querySelectorAll('.card .load').length && document.querySelector('#experts .readout').innerText"
    )
    return page


def test_an_engine_of_the_size_of_v3_is_shown(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up, **V3)
    assert page.text("#shape") == "8 nodes × 8 cards · attention TP 8 · two_tier"
    assert page.js("document.querySelectorAll('.node').length") == 8
    assert page.js("document.querySelectorAll('.card').length") == 64
    assert page.js("document.querySelectorAll('.card.slowest').length") == 1
    assert page.text("#cluster .readout").startswith("Slowest now: rank ")
    assert page.js("document.querySelectorAll('.matrix td').length") == 64
    assert page.js("document.querySelectorAll('#steps rect').length") == 64 * 6
    for name in ("cards", "experts"):  # as many loads as that have many colours
        assert page.js(COLOURS % name) > 60
    assert page.text("#experts .note") == "256 experts in 320 slots of a layer"


def test_figures_are_those_of_the_engine(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up)
    values = page.js("[...document.querySelectorAll('.tile .value')].map((v) => v.innerText)")
    assert values[:4] == ["400 tokens/s", "100 tokens/s", "10 running", "200 ms"]
    assert page.text("#experts .readout").startswith("Hottest: layer ")
    assert page.js("document.querySelectorAll('#requests tbody tr').length") == 12
    assert page.js("document.querySelector('#log li span').innerText") == "Experts moved: 4"


def test_it_follows_the_engine(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up)
    later = state_of(seed=1)
    later["recent"]["generated_tokens"] = 7770
    made_up.publish(later)
    page.until("document.querySelector('.tile .number').innerText", lambda text: text == "777")
    before = page.js(COLOURS % "experts")
    assert before > 20
    made_up.fail("rank 3 died")
    page.until("document.getElementById('health').innerText", lambda text: text == "failed")
    assert page.text("#alarm") == "rank 3 died"


def test_a_hidden_tab_is_sent_nothing(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up)
    assert made_up.states.followers == 1
    hide = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true}); document.dispatchEvent("
    page.js(hide % "true" + "new Event('visibilitychange'))")
    page.until("true", lambda _: made_up.states.followers == 0)
    page.js(hide % "false" + "new Event('visibilitychange'))")
    page.until("true", lambda _: made_up.states.followers == 1)


def test_every_picture_has_a_table(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up)
    for name in PANELS:
        page.click(f"#{name} .switch")
        assert page.js(f"document.querySelector('#{name} .switch').getAttribute('aria-pressed')") == "true"
        assert page.js(f"document.querySelectorAll('#{name} .alt tbody tr').length") > 0, name
        assert page.js(f"getComputedStyle(document.querySelector('#{name} .view')).display") == "none"
        page.click(f"#{name} .switch")
        assert page.js(f"document.querySelector('#{name} .alt').hidden")


def test_the_keyboard_reaches_everything(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up)
    page.press("Tab")
    assert page.js("document.activeElement.className") == "skip"
    page.press("Enter")
    assert page.js("document.activeElement.id") == "main"
    page.js("document.querySelector('.card').focus()")
    page.press("ArrowRight")
    assert page.text("#cluster .readout").startswith("rank 1, node 0 card 1, TP group 0")
    page.press("End")
    assert page.text("#cluster .readout").startswith("rank 7, node 1 card 3")
    page.js("document.querySelector('#experts canvas').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.press(key)
    assert page.text("#experts .readout").startswith("layer 2, expert 1: ")
    assert page.js("document.querySelectorAll('.card.marked').length") >= 1
    page.press("Escape")
    assert page.text("#experts .readout").startswith("Hottest: ")


def test_themes(made_up: MadeUp, page: Page) -> None:
    """The system's, until another one is chosen, which stays."""
    back = "getComputedStyle(document.body).backgroundColor"
    seen(page, made_up, "dark")
    dark = page.js(back)
    page.click("#theme")
    light = page.js(back)
    assert dark != light
    assert page.js("document.documentElement.dataset.theme") == "light"
    page.open(made_up.url, theme="dark")
    page.until(LIVE)
    assert page.js(back) == light
    page.js("localStorage.clear()")
    page.open(made_up.url, theme="dark")
    page.until(LIVE)
    assert page.js(back) == dark


def test_it_fits_a_phone(made_up: MadeUp, page: Page) -> None:
    seen(page, made_up, width=375, **V3)
    assert page.js("document.documentElement.scrollWidth") <= 375
    assert len(page.picture()) > 10_000


def ask(page: Page, question: str) -> None:
    page.js("document.getElementById('question').focus()")
    page.write(question)
    page.press("Enter")


def test_a_conversation(made_up: MadeUp, page: Page) -> None:
    """Text is text, whatever is in it; reasoning is folded."""
    seen(page, made_up)
    ask(page, "A tale?")
    page.until(
        "document.querySelector('.said.assistant > .text')?.innerText",
        lambda t: t == "There was a fox <b>&</b> a hen.",
    )
    assert page.js("document.querySelector('.said details').open") is False
    assert page.js("document.querySelector('.said details .text').textContent") == "A fox is asked for."
    page.until("!document.getElementById('send').hidden")
    ask(page, "A plain one?")
    page.until(
        "[...document.querySelectorAll('.said.assistant > .text')][1]?.innerText", "There was one.".__eq__
    )
    assert (
        page.js("[...document.querySelectorAll('.said details .text')][1].textContent")
        == "A fox is asked for."
    )
    page.until("!document.getElementById('send').hidden")
    ask(page, "A long one?")
    page.until("document.querySelectorAll('.said.assistant > .text').length === 3")
    page.until(
        "!document.getElementById('stop').hidden && document.querySelectorAll('.said details').length === 3"
    )
    page.click("#stop")
    page.until("document.querySelector('.said:last-child .dim')?.innerText", lambda text: text == "stopped")
    roles = [message["role"] for message in made_up.questions[2]["messages"]]
    assert roles == ["user", "assistant"] * 2 + ["user"]
    assert made_up.questions[1]["model"] == "made-up"
    page.click("#clear")
    assert page.js("document.querySelectorAll('.said').length") == 0


def test_a_key_is_asked_for(page: Page) -> None:
    with running(MadeUp(key="sesame")) as made:
        made.publish(state_of())
        page.open(made.url)
        page.until("document.getElementById('key').open")
        page.write("wrong")
        page.press("Enter")
        page.until(
            "document.getElementById('key').open && document.getElementById('key-text').innerText",
            lambda text: "refused" in str(text),
        )
        page.write("sesame")
        page.press("Enter")
        page.until(LIVE)
        assert page.js("sessionStorage.getItem('expertmesh.key')") == "sesame"
        ask(page, "A tale?")
        page.until("document.querySelector('.said.assistant > .text')?.innerText", bool)
        page.tell("Page.navigate", url="about:blank")
        # The browser itself notes what was refused.
        page.complaints = [c for c in page.complaints if "401" not in c]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("tables", [False, True])
def test_accessible_by_axe(made_up: MadeUp, page: Page, axe: str, theme: str, tables: bool) -> None:
    seen(page, made_up, theme)
    ask(page, "A tale?")
    page.until(
        "document.querySelector('.said.assistant')?.textContent.length > 40"
    )  # it may be reasoning alone
    if tables:
        page.js("document.querySelectorAll('.switch').forEach((button) => button.click())")
    page.js(axe + "; true")
    rules = json.dumps({"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]})
    found = page.js(
        f"axe.run({rules}).then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 200))]))"
    )
    assert found == []


def test_a_real_engine_is_seen_and_answers(url: str, page: Page) -> None:
    page.open(f"{url}/dashboard")
    page.until(LIVE)
    assert page.text("#model") == NAME
    assert page.text("#shape") == "one card"
    ask(page, "Once upon a time")
    page.until(
        "document.querySelector('.said.assistant')?.textContent.length > 40"
    )  # it may be reasoning alone
    page.until("!document.getElementById('send').hidden")
    page.until("document.querySelector('.tile .sub').innerText", lambda text: not text.startswith("0 "))
    page.until(
        "document.querySelector('#experts .readout').innerText",
        lambda text: text.startswith("Hottest: layer 1"),
    )
    page.until("document.querySelectorAll('.tile .number')[3].innerText", lambda text: text != "–")


def test_pages_share_what_was_made_for_one(made_up: MadeUp, new_page: Callable[[], Page]) -> None:
    first, second = new_page(), new_page()
    seen(first, made_up)
    seen(second, made_up)
    assert made_up.states.followers == 2
    for each in (first, second):
        each.tell("Page.navigate", url="about:blank")
        assert each.complaints == []
