"""What does not fit a cluster is refused before anything is started."""

from dataclasses import replace

import pytest

from expertmesh import InputError, ModelConfig, Topology
from expertmesh.mesh.layout import Layout
from tests.support.files import official_config


def test_experts_of_a_token_that_a_message_cannot_count() -> None:
    """One rank sends none."""
    v3 = ModelConfig.from_dict(official_config("deepseek-v3"))
    many = replace(v3, num_experts_per_tok=256, topk_group=8, num_hidden_layers=4)
    with pytest.raises(InputError, match="256 experts a token, but between ranks at most 255"):
        Layout.of(many, Topology(1, 2), "flat", 0)
    for model, cards in ((many, 1), (replace(many, num_experts_per_tok=255), 2)):
        assert Layout.of(model, Topology(1, cards), "flat", 0).placement.experts == 256
