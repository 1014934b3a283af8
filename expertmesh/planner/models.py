"""Models by name, or from a config.json."""

from pathlib import Path

from expertmesh.config import ModelConfig
from expertmesh.config.model import read_object
from expertmesh.errors import InputError
from expertmesh.planner.facts import fitting, folder, plain, unknown

# Other names of the same shapes. What follows a known name after a dash (-0528, -w8a8) is a version of it.
ALIASES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v3/r1": "deepseek-v3",
    "deepseek-v2.5": "deepseek-v2",
    "dsr1": "deepseek-v3",
    "dsv3": "deepseek-v3",
    "kimi-k2.5": "kimi-k2",
    "moonlight": "moonlight-16b-a3b",
}
# Named, for they look like models that are known.
OTHERS = {
    "deepseek-v3.2": "its attention is sparse (DSA), which this cost model does not describe",
    "deepseek-v4": "its attention is not the MLA that this cost model describes",
    "glm": "its attention is not the MLA that this cost model describes",
    "qwen": "its attention is not the MLA that this cost model describes",
}


def known_models() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in folder("models").glob("*.json")))


def model(name: str) -> ModelConfig:
    """The configuration of a model: a name, a config.json, or a folder with one.

    InputError with the nearest names where there is none, or with the reason where it cannot be described.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"{name}: no such file; give the path of a config.json")
        return ModelConfig.from_dict(read_object(path), name)
    if path.is_dir():
        return ModelConfig.from_folder(path)
    text = plain(name)
    for prefix, reason in OTHERS.items():
        if text.startswith(prefix):
            raise InputError(f"model {name!r} cannot be planned: {reason}")
    names = {known: known for known in known_models()} | ALIASES
    found = fitting(text, names)
    if found is None:
        raise unknown("model", name, names)
    file = folder("models") / f"{names[found]}.json"
    return ModelConfig.from_dict(read_object(file), str(file))
