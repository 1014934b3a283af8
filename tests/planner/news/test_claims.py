"""Verdicts: what holds, under which assumption, and what is missing."""

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.planner.news.claims import Claim, Finding

VALUES = st.lists(st.integers(-300, 600).map(lambda n: n / 100), min_size=1, max_size=5)


def claim(kind: str, announced: float | None, *values: float) -> Claim:
    return Claim("it", kind, announced, tuple(Finding(v, f"case {i}") for i, v in enumerate(values)))  # type: ignore[arg-type]


def test_more_or_less_is_better_as_it_was_announced() -> None:
    assert claim("change", -0.6, -0.5, -0.596).verdict == "holds if case 1"
    assert claim("change", 0.4, 0.396, 0.1).verdict == "holds if case 0"
    assert claim("factor", 3.2, 3.16, 4.0).verdict == "holds"
    assert claim("limit", 0.1, 0.2, 0.1).verdict == "holds if case 1"
    assert claim("limit", 0.1, 0.101).verdict.startswith("not reached: at best 10.1% (case 0), 0.1 points")
    assert claim("factor", 3.2, 1.0, 2.7).verdict == "not reached: at best x2.70 (case 1), 0.50 short"
    assert claim("change", -0.5, -0.482).verdict == "not reached: at best -48.2% (case 0), 1.8 points short"
    assert claim("factor", None, 3.4).verdict == ""
    assert Claim("it", "change", 2.0, (), built=False).verdict == "not built yet"


def test_claims_agree_where_the_same_findings_are_good_enough() -> None:
    assert claim("factor", 3.2, 3.3, 1.0).agrees(claim("factor", 3.2, 4.0, 2.0))
    assert not claim("factor", 3.2, 3.3, 1.0).agrees(claim("factor", 3.2, 3.0, 4.0))


def test_values_are_read_as_they_are_announced() -> None:
    assert (
        claim("factor", 3.2, 1.0).announced_text == "x3.2"
        and claim("factor", 4.0, 1.0).text(3.996) == "x4.00"
    )
    assert (
        claim("change", -0.75, 0.0).announced_text == "-75%"
        and claim("change", 0.3, 0.0).text(0.3) == "+30.0%"
    )
    assert (
        claim("limit", 0.1, 0.0).announced_text == "< 10%" and claim("limit", 0.1, 0.0).text(0.061) == "6.1%"
    )


@given(st.sampled_from(["change", "factor", "limit"]), st.sampled_from([-0.5, 0.1, 3.2]), VALUES)
def test_the_best_finding_decides_whether_it_is_reached(
    kind: str, announced: float, values: list[float]
) -> None:
    one = claim(kind, announced, *values)
    less = kind == "limit" or announced < 0
    assert one.best.value == (min if less else max)(values)
    assert (one.reached is not None) == one.verdict.startswith("holds")
    assert (one.reached is None) == one.verdict.startswith("not reached")
