"""Which scorers a calibration tried, what each came to, and which it took: `extra["scorers"]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCORERS = "scorers"
DIVERGENCE = "divergence"
PREDICTED_ERROR = "predicted error"


@dataclass(frozen=True)
class ScorerChoice:
    """What a calibration chose a scorer by.

    Attributes:
        winner: name of the scorer that the profile is of.
        decided_by: `DIVERGENCE`, in nats, of the held-back samples with the budgets that each
            scorer ended with; or `PREDICTED_ERROR`, the relative error of a head's attention output
            that its error curve predicts, the mean over heads and samples.
        tried: name of a scorer -> ratio -> what it came to.
        left_out: name of a scorer that the model cannot have -> why.
    """

    winner: str
    decided_by: str
    tried: Mapping[str, Mapping[float, float]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object for `Profile.extra`."""
        return {
            "winner": self.winner,
            "decided_by": self.decided_by,
            "tried": [
                {"scorer": name, "ratios": list(found), "found": list(found.values())}
                for name, found in self.tried.items()
            ],
            "left_out": dict(self.left_out),
        }

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> ScorerChoice | None:
        """What a profile's `extra` tells; None where it tells nothing, or what is no choice."""
        try:
            plain = extra[SCORERS]
            tried = {
                str(each["scorer"]): dict(
                    zip(map(float, each["ratios"]), map(float, each["found"]), strict=True)
                )
                for each in plain["tried"]
            }
            left_out = {str(name): str(reason) for name, reason in plain["left_out"].items()}
            return cls(str(plain["winner"]), str(plain["decided_by"]), tried, left_out)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def __str__(self) -> str:
        """In a few words: `learned, of learned, key_diff by divergence`."""
        return f"{self.winner}, of {', '.join(self.tried)} by {self.decided_by}"
