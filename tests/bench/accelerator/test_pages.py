"""What pages say of the command is what it has, and Chinese pages are in step with the English ones."""

import re
from pathlib import Path

import pytest

from expertmesh.bench.accelerator.ticks import TICKS
from expertmesh.cli import COMMANDS

ROOT = Path(__file__).parents[3]
PAGES = ("README{}.md", "docs/accelerators{}.md")
ROWS = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


def read(page: str, language: str) -> str:
    return (ROOT / page.format(language)).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines of code blocks, without what is said of them."""
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    fenced = re.findall(r"^```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.partition(" # ")[0].strip() for line in [*indented, *"\n".join(fenced).splitlines()]]


def numbers(text: str) -> list[str]:
    """All that stand in tables of measurements."""
    tables = [line for line in text.splitlines() if line.startswith("|")]
    return re.findall(r"\d+(?:\.\d+)?", " ".join(tables))


@pytest.mark.parametrize("language", ["", ".zh"])
def test_the_list_to_tick_off_is_that_of_the_command(language: str) -> None:
    table = read(PAGES[1], language).partition("<!-- ticks -->")[2].partition("<!-- end -->")[0]
    assert ROWS.findall(table) == [tick.id for tick in TICKS]


def test_the_readme_has_the_same_commands_and_measurements_in_both_languages() -> None:
    english, chinese = (read(PAGES[0], language) for language in ("", ".zh"))
    assert commands(chinese) == commands(english)
    assert numbers(chinese) == numbers(english)
    for headline in ("1e-4", "1.74", "1.10", "92.5 GB", "31.2 GB", "5.1", "0.13 ms"):
        assert headline in english and headline in chinese


def test_the_page_of_accelerators_has_the_same_commands_in_both_languages() -> None:
    """The Chinese one has some of them, in their order."""
    theirs = commands(read(PAGES[1], ""))
    assert [line for line in commands(read(PAGES[1], ".zh")) if line not in theirs] == []
    doctor = [line for line in theirs if line.startswith("expertmesh doctor")]
    assert doctor and set(doctor) <= set(commands(read(PAGES[1], ".zh")))


@pytest.mark.parametrize("page", PAGES)
def test_the_languages_link_to_each_other(page: str) -> None:
    name = Path(page).name
    assert f"]({name.format('.zh')})" in read(page, "")[:300]
    assert f"]({name.format('')})" in read(page, ".zh")[:300]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("language", ["", ".zh"])
def test_files_that_are_linked_are_there(page: str, language: str) -> None:
    text = read(page, language)
    folder = (ROOT / page.format(language)).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert links and [link for link in links if not (folder / link).exists()] == []
    known = {line.split()[1] for line in commands(text) if line.startswith("expertmesh ")}
    assert known <= set(COMMANDS)
