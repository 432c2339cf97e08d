"""What chat templates are told beside the messages: the same messages give the same text."""

from __future__ import annotations

from datetime import date
from typing import Any

TODAY = date(2025, 1, 1)


def fixed_clock(tokenizer: Any) -> dict[str, Any]:
    """A `strftime_now` by which it is always `TODAY`, for a template that asks for one.

    Others may refuse what they lack.
    """
    asked = "strftime_now" in str(getattr(tokenizer, "chat_template", None))
    return {"strftime_now": TODAY.strftime} if asked else {}
