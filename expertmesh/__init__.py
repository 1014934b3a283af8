"""ExpertMesh: inference for DeepSeek-V3/R1-class mixture-of-experts models over many cards on many machines."""

from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.mesh.topology import Topology
from expertmesh.request import Output, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "InputError", "ModelConfig", "Output", "SamplingParams", "Topology"]
