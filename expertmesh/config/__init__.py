"""What a model is, and how an engine runs it: both frozen."""

from expertmesh.config.demo import demo_model, name_of_model
from expertmesh.config.engine import EngineConfig, cache_bytes_per_token
from expertmesh.config.model import ARCHITECTURES, ModelConfig, Yarn, read_object

__all__ = [
    "ARCHITECTURES",
    "EngineConfig",
    "ModelConfig",
    "Yarn",
    "cache_bytes_per_token",
    "demo_model",
    "name_of_model",
    "read_object",
]
