"""Cards: every number is there, plausible and sourced; users' own files; what is refused."""

import re
from pathlib import Path

import pytest

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import NUMBERS, OPTIONAL, Card, card, known_cards, read_card
from expertmesh.planner.costs import decode_step
from expertmesh.planner.deployment import Decode, Deployment
from expertmesh.planner.facts import folder
from expertmesh.planner.models import model

ASKED = {
    "ascend-910b", "ascend-910b-376t", "ascend-910b-280t", "ascend-910c", "h800", "h100", "h20", "h200", "b200",
    "gb200", "gb300", "mi300x",
}  # fmt: skip


def test_the_cards_that_are_known() -> None:
    assert set(known_cards()) >= ASKED


@pytest.mark.parametrize("name", known_cards())
def test_every_number_has_a_source(name: str) -> None:
    found = card(name)
    assert set(NUMBERS) - set(OPTIONAL) <= set(found.sources) <= set(NUMBERS) and all(found.sources.values())
    assert 10 < found.memory_gb < 1000 and 500 < found.memory_gbs < 20_000
    assert found.node_gbs >= found.across_gbs
    assert found.bf16_tflops <= max(found.int8_tflops, found.fp8_tflops)
    assert found.domain_ranks >= found.ranks_per_node


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100-80G", "h100"), ("H200-141G", "h200"), ("GB200", "gb200"), ("H20-96G", "h20"), ("H800", "h800"),
        ("Ascend 910C (CloudMatrix384)", "ascend-910c"), ("Ascend 910B (Atlas 800I A2 64G)", "ascend-910b"),
        ("910B2", "ascend-910b-376t"), ("ascend_910b", "ascend-910b"),
        ("NVIDIA GB300 NVL72", "gb300"), ("H20-141G", "h20-141g"), ("AMD Instinct MI300X", "mi300x"),
        ("910B3", "ascend-910b"),
    ],
)  # fmt: skip
def test_other_names(text: str, name: str) -> None:
    assert card(text).name == name


def test_names_are_of_one_card() -> None:
    aliases = [alias for name in known_cards() for alias in _aliases(name)]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & set(known_cards())


def _aliases(name: str) -> list[str]:
    import tomllib

    found: list[str] = tomllib.loads((folder("cards") / f"{name}.toml").read_text())["aliases"]
    return found


def test_arithmetic_that_the_hardware_lacks_is_bfloat16() -> None:
    found = card("ascend-910b")
    assert found.tflops("fp8") == found.bf16_tflops < found.tflops("int8")


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    text = (folder("cards") / "h100.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("value = 3350", "value = 1000"))
    mine = card(str(path))
    assert isinstance(mine, Card) and (mine.name, mine.memory_gbs) == ("mine", 1000)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_gbs = { value = 3350,", "memory_gbs = { value = 0,", "memory_gbs is 0, not a number above 0"),
        ("memory_gbs = { value = 3350,", "memory_gbs = { value = true,", "memory_gbs is True"),
        ("memory_gbs = { value = 3350,", "memory_gbs = { value = nan,", "memory_gbs is nan"),
        ("cards_per_node = { value = 8,", "cards_per_node = { value = 1.5,", "cards_per_node is 1.5, not a count"),
        ("memory_gbs = {", "memory = {", "memory_gbs is not of the form"),
        ("memory_gbs = {", "memory = {", "memory is no field of a card"),
        ("title =", "title", "not valid TOML"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((folder("cards") / "h100.toml").read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        card(str(path))


def test_unknown_names_say_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'h10' is not known; nearest are .*h100"):
        card("h10")
    with pytest.raises(InputError, match="known are"):
        card("qqqqqq")
    with pytest.raises(InputError, match="No such file"):
        card(str(tmp_path / "none.toml"))


def test_parameters_of_a_card_of_ones_own(tmp_path: Path) -> None:
    text = (folder("cards") / "h800.toml").read_text()
    own, source = tmp_path / "own.toml", 'source = "measured here"'
    own.write_text(f"{text}\n[parameters]\nmemory_efficiency = {{ value = 0.9, {source} }}\n")
    known = read_card(own)
    assert (
        known.parameters == {"memory_efficiency": 0.9}
        and known.sources["memory_efficiency"] == "measured here"
    )
    model_ = model("deepseek-v3")
    times = [
        decode_step(Deployment(model_, c, Topology(4, 8, 1)), Decode(64, 4000)).seconds
        for c in (known, card("h800"))
    ]
    assert times[0] < times[1]
    for entry, message in (
        ("speed = { value = 1, source = 's' }", "speed is no parameter of the cost model"),
        ("link_efficiency = { value = 0, source = 's' }", "link_efficiency is 0, not a number above 0"),
        ("passes = 3", 'passes is not of the form { value = 1, source = "..." }'),
    ):
        own.write_text(f"{text}\n[parameters]\n{entry}\n")
        with pytest.raises(InputError, match=re.escape(message)):
            read_card(own)
