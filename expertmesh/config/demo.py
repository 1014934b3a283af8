"""The model that ships with the package: where it is, and what it and others are called."""

from importlib.resources import files
from pathlib import Path


def demo_model() -> Path:
    """Folder of the model that ships with the package."""
    return Path(str(files("expertmesh") / "demo"))


def name_of_model(folder: Path) -> str:
    """What a model is called where nobody says otherwise: its folder."""
    return "expertmesh-demo" if folder == demo_model() else folder.resolve().name
