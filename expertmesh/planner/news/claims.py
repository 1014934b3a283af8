"""What was announced beside what is found: a claim, findings under one assumption or another, and a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

# How a value reads. change: of -1 to 1, a decrease below 0; factor: of the value before; limit: a spread that is not
# to be exceeded.
Kind: TypeAlias = Literal["change", "factor", "limit"]
# Half of the last digit that announcements give: -60% and x3.2.
ROUNDING = {"change": 0.005, "factor": 0.05, "limit": 0.0}


@dataclass(frozen=True)
class Finding:
    """A value of the claim's kind, and what has to be assumed for it; "" where it follows from the claim alone."""

    value: float
    assumption: str = ""


@dataclass(frozen=True)
class Claim:
    """announced: a value of `kind`, None where nothing was announced; findings: those with the least assumed first;
    figures: what the values are made of, with their units in the names; assumes: what is assumed in all findings;
    built: whether the project has what the claim is about."""

    name: str
    kind: Kind
    announced: float | None
    findings: tuple[Finding, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    assumes: str = ""
    built: bool = True
    nearest: str = ""  # what comes nearest, where there is no finding
    otherwise: Mapping[str, str] = field(default_factory=dict)  # verdicts under what else is as likely

    @property
    def reached(self) -> Finding | None:
        """The first finding that is as good as what was announced, to the digits that were."""
        return next((found for found in self.findings if self._reaches(found)), None)

    @property
    def best(self) -> Finding:
        """The one nearest to what was announced, or beyond it."""
        return min(self.findings, key=self._shortfall)

    @property
    def verdict(self) -> str:
        """holds, holds if ..., or by how much it is not reached; "" where nothing was announced."""
        if not self.built:
            return "not built yet"
        if self.announced is None:
            return ""
        if not self.findings:
            return f"not reached by any; nearest: {self.nearest}"
        if all(self._reaches(found) for found in self.findings):
            return "holds"
        if self.reached:
            return "holds" + (f" if {self.reached.assumption}" if self.reached.assumption else "")
        missing = self._shortfall(self.best)
        short = f"{missing:.2f}" if self.kind == "factor" else f"{missing * 100:.1f} points"
        under = f" ({self.best.assumption})" if self.best.assumption else ""
        return f"not reached: at best {self.text(self.best.value)}{under}, {short} short"

    def agrees(self, other: "Claim") -> bool:
        """Whether the verdict is the same but for its figures."""
        return self._standing == other._standing

    @property
    def _standing(self) -> tuple[bool, int | None]:
        """Whether all findings are as good as what was announced, and which is the first one."""
        reached = [self._reaches(found) for found in self.findings]
        return bool(reached) and all(reached), reached.index(True) if any(reached) else None

    @property
    def announced_text(self) -> str:
        """As it was announced."""
        value = self.announced or 0.0
        if self.kind == "factor":
            return f"x{value:g}"
        return f"{value * 100:+.0f}%" if self.kind == "change" else f"< {value * 100:.0f}%"

    def text(self, value: float) -> str:
        """A value as it is read."""
        if self.kind == "factor":
            return f"x{value:.2f}"
        return f"{value * 100:+.1f}%" if self.kind == "change" else f"{value * 100:.1f}%"

    def _reaches(self, found: Finding) -> bool:
        return self._shortfall(found) <= ROUNDING[self.kind]

    def _shortfall(self, found: Finding) -> float:
        """How much less than announced: of decreases and limits less is better, of all else more."""
        announced = self.announced or 0.0
        less = self.kind == "limit" or announced < 0
        return found.value - announced if less else announced - found.value
