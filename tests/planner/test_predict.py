"""Published rows: how their layouts are read, that each is answered or refused, signs of published pairs, a command."""

import csv
from pathlib import Path
from statistics import mean, median

import pytest

from expertmesh.cli import main
from expertmesh.planner.predict import COLUMNS, predict
from expertmesh.planner.rows import Shape, about, case, number, shape

FOLDER = Path(__file__).parents[2] / "benchmarks" / "planner"
ROWS = {row["id"]: row for row in csv.DictReader((FOLDER / "published.csv").read_text().splitlines())}
RESULTS = ("tok_s_per_card", "tok_s_per_node", "ttft_ms", "tpot_ms")
REFUSED = {
    "ds-online-prefill": "lengths are blank", "huawei-cm384-ep144": "lengths are blank",
    "huawei-a2-ep32-808": "lengths are blank", "cann-a3-v32-256-64k": "sparse", "cann-a3-v32-512-64k": "sparse",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ranks", "found"),
    [
        ("DP72/EP72, 288 physical experts", 72, Shape(1, 72, 72)),
        ("1x(TP1 DP32 EP32)", 40, Shape(1, 32, 32, 1)),
        ("9x(TP8 DP1 EP8)", 80, Shape(8, 1, 8, 9)),
        ("TP8 DP1 EP1", 8, Shape(8, 1, 1)),
        ("TP8", 8, Shape(8, 1, None)),
        ("TP16 with DP attention, per 2 nodes", 16, Shape(1, 16, 1)),
        ("TP8 DP8 EP8", 8, Shape(1, 8, 8)),
        ("DP32 TP1 EP32 (32 dies)", 64, Shape(1, 32, 32)),
        ("DP16 TP2 EP32", 64, Shape(2, 16, 32)),
        ("4 instances x (DP2/EP2), weight offload 1/2", 2, Shape(1, 2, 2, 4)),
        ("MLA-DP32 + MoE-EP32", 32, Shape(1, 32, 32)),
        ("EP320 (320 dies, 1 expert/die: 256 routed+32 redundant+32 shared), DP320", 320, Shape(1, 320, 320)),
        ("128 dies DP128/EP128", 128, Shape(1, 128, 128)),
        ("4 nodes EP32", 32, Shape(1, 32, 32)),
        ("2 x (DP64 TP2 EP128), 256 dies", 256, Shape(2, 64, 128, 2)),
        ("2x(DEP16)", 40, Shape(1, 16, 16, 2)),
        ("TEP8", 8, Shape(8, 1, 8)),
        ("DP8TP2EP16", 16, Shape(2, 8, 16)),
        ("mixed", 8, None),
    ],
)
def test_layouts_are_read(text: str, ranks: int, found: Shape | None) -> None:
    assert shape(text, ranks) == found


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_answered_or_refused(name: str) -> None:
    """From what is known before: results blank."""
    row = ROWS[name] | dict.fromkeys(RESULTS, "")
    found = predict(row)
    assert set(found.columns()) == set(COLUMNS)
    if name in REFUSED:
        assert REFUSED[name] in found.refused and found.tok_s_per_card is None
        return
    assert not found.refused and found.bound_by and found == predict(ROWS[name])
    assert found.tok_s_per_card and found.tok_s_per_card > 0
    assert (found.tpot_ms is None) == (row["phase"] == "prefill")


def test_scores() -> None:
    """Of rows whose batch is published: what benchmarks/planner/fit.py prints in full."""
    errors: dict[str, list[float]] = {"decode": [], "wide": [], "prefill": []}
    for row in ROWS.values():
        found = predict(row)
        name = "tpot_ms" if number(row["tpot_ms"]) else "tok_s_per_card"
        measured, answer = number(row[name]), getattr(found, name)
        if not measured or not answer or "not given" in found.assumed:
            continue
        error = abs(answer / measured - 1)
        errors["prefill" if row["phase"] == "prefill" else "decode"].append(error)
        if row["phase"] != "prefill" and case(row).service.decode.ranks >= 32:
            errors["wide"].append(error)
    assert len(errors["decode"]) > 100 and len(errors["wide"]) > 20 and len(errors["prefill"]) > 7
    assert median(errors["decode"]) < 0.10 and mean(errors["decode"]) < 0.16
    assert mean(errors["wide"]) < 0.10 and mean(errors["prefill"]) < 0.10


def test_names_and_sources_do_not_matter() -> None:
    for row in ROWS.values():
        assert predict(row | {"id": "x", "engine": "", "source": "", "trust": "", "net": ""}) == predict(row)


def test_what_is_taken_for_granted_is_said() -> None:
    assert predict(ROWS["vllm-gb200-decode"]).assumed == "batch not given: full memory"
    assert "drafts not stated" in predict(ROWS["ix-080"]).assumed


def test_cards_of_two_dies_count_once() -> None:
    found = case(ROWS["cann-a3-decode"])
    assert (found.service.decode.ranks, found.cards) == (128, 64)
    assert found.service.decode.drafts == 1 and found.batch == 48
    answer = predict(ROWS["cann-a3-decode"])
    assert answer.tok_s_per_card and answer.tpot_ms
    assert answer.tok_s_per_card * answer.tpot_ms / 1e3 == pytest.approx(2 * 48)


def test_prefill_takes_the_cards_that_do_not_decode() -> None:
    found = case(ROWS["ix-053"]).service
    assert found.prefill and (found.instances, found.decode.ranks) == (1, 32)
    assert (found.prefill_instances, found.prefill.ranks, found.ranks) == (2, 8, 48)
    assert case(ROWS["ix-079"]).service.prefill is None


@pytest.mark.parametrize(
    "pair", list(csv.DictReader((FOLDER / "pairs.csv").read_text().splitlines())), ids=str
)
def test_the_better_of_a_published_pair(pair: dict[str, str]) -> None:
    better, worse = (predict(ROWS[pair[side]]).tok_s_per_card for side in ("better", "worse"))
    assert better and worse and better > worse


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hw": ""}, "needed fields are blank: hw"),
        ({"hw": "H900"}, "'H900' is not known; nearest are"),
        ({"model": "llama"}, "model 'llama' is not known"),
        ({"weight_prec": "fp3"}, "weight precision 'fp3'"),
        ({"phase": "training"}, "phase 'training' is not one of"),
        ({"cards": "many"}, "cards is 'many', not a count"),
        ({"tp_decode": "3.5"}, "tp_decode is '3.5', not a count"),
        ({"isl": "", "osl": "", "kv_len": ""}, "lengths are blank"),
        ({"ep_decode": "", "dp_decode": "", "tp_decode": "", "decode_layout": ""}, "decode_layout is blank"),
        ({"dp_decode": "500"}, "takes 500 ranks of 72"),
        ({"mtp_draft": "1", "accept_len": "7"}, "it must be from 1 to 2"),
    ],
)
def test_rows_that_cannot_be_answered(change: dict[str, str], reason: str) -> None:
    assert reason in predict(ROWS["sgl-h100-decode-2k-256"] | change).refused


def test_numbers() -> None:
    assert [number(text) for text in ("3", " 2.5 ", "", None, "<70 (SLA)", "45-50")] == [
        3,
        2.5,
        None,
        None,
        None,
        None,
    ]


def test_amounts() -> None:
    texts = ("64.0", "~32", "1.8-1.9", "max 16 seqs per DP", "16384 tokens", "~64k tokens", "")
    assert [about(text) for text in texts] == [64, 32, pytest.approx(1.85), 16, None, None, None]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert main(["plan", "predict", str(FOLDER / "published.csv"), "--out", str(out)]) == 0
    written = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["id"] for row in written] == list(ROWS) and all(
        row["refused"] or row["bound_by"] for row in written
    )
    assert main(["plan", "predict", str(FOLDER / "published.csv")]) == 0
    assert capsys.readouterr().out == out.read_text()


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,model\n1,x\n")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for arguments, message in (
        ([str(path)], "columns are missing: hw, cards, phase, weight_prec"),
        ([str(tmp_path / "none.csv")], "No such file or directory"),
        ([str(binary)], "not a CSV file in UTF-8"),
        (
            [str(FOLDER / "published.csv"), "--out", str(tmp_path / "no" / "out.csv")],
            "give a file that can be written",
        ),
    ):
        assert main(["plan", "predict", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
