"""Data files of this package, by name: cards and models."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from expertmesh.errors import InputError


def folder(name: str) -> Path:
    return Path(__file__).parent / name


def plain(name: str) -> str:
    """A name as it is compared: "Ascend 910C (Atlas 800 A3)" is ascend-910c."""
    return "-".join(name.split("(")[0].lower().replace("_", " ").replace("-", " ").split())


def fitting(text: str, known: Iterable[str]) -> str | None:
    """The longest known name that this is, or is a version of: what follows a dash."""
    found = [name for name in known if text == name or text.startswith(f"{name}-")]
    return max(found, key=len) if found else None


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not known, with the nearest of those that are."""
    names = sorted(known)
    near = get_close_matches(plain(name), names, 3, 0.5)
    advice = f"nearest are {', '.join(near)}" if near else f"known are {', '.join(names)}"
    return InputError(f"{what} {name!r} is not known; {advice}; or give the path of a file")
