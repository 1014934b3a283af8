"""ExpertMesh: inference for DeepSeek-V3/R1-class mixture-of-experts models over many cards on many machines."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.config import EngineConfig, ModelConfig
    from expertmesh.errors import InputError, RankFailure
    from expertmesh.llm import LLM
    from expertmesh.mesh.balance import balance
    from expertmesh.mesh.loads import Loads
    from expertmesh.mesh.placement import Placement
    from expertmesh.mesh.topology import Topology
    from expertmesh.request import Output, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EngineConfig",
    "InputError",
    "Loads",
    "ModelConfig",
    "Output",
    "Placement",
    "RankFailure",
    "SamplingParams",
    "Topology",
    "balance",
]

_HOMES = {
    "LLM": "llm",
    "EngineConfig": "config",
    "InputError": "errors",
    "Loads": "mesh.loads",
    "ModelConfig": "config",
    "Output": "request",
    "Placement": "mesh.placement",
    "RankFailure": "errors",
    "SamplingParams": "request",
    "Topology": "mesh.topology",
    "balance": "mesh.balance",
}


def __getattr__(name: str) -> Any:
    """Names come when they are asked for: `expertmesh --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"expertmesh.{_HOMES[name]}"), name)
