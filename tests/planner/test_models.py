"""Models by name, version and file."""

from pathlib import Path

import pytest

from expertmesh.errors import InputError
from expertmesh.planner.facts import folder
from expertmesh.planner.models import ALIASES, known_models, model


@pytest.mark.parametrize("name", [*known_models(), *ALIASES])
def test_all_that_are_known_can_be_read(name: str) -> None:
    assert model(name).moe_layers


@pytest.mark.parametrize(
    "name", ["DeepSeek-V3/R1", "DeepSeek-R1", "deepseek-r1-0528", "DeepSeek-V3.1", "DeepSeek-R1-0528-W8A8"]
)
def test_versions_of_deepseek_v3(name: str) -> None:
    found = model(name)
    assert (found.hidden_size, found.n_routed_experts, found.num_nextn_predict_layers) == (7168, 256, 1)


def test_from_a_file_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text((folder("models") / "kimi-k2.json").read_text())
    assert model(str(path)) == model(str(tmp_path)) == model("Kimi-K2")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sparse \(DSA\)"):
        model("DeepSeek-V3.2-Exp")
    with pytest.raises(InputError, match=r"'deepseek-v5' is not known; nearest are deepseek"):
        model("deepseek-v5")
    with pytest.raises(InputError, match="no such file"):
        model(str(tmp_path / "config.json"))
