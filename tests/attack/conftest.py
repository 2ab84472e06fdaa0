"""What attacks on the product have in common: how an answer is judged, and the tally of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

Kind = Literal["right", "sentence", "bare", "wrong"]
"""An answer is right (the run may start), one sentence that names what is wrong, a traceback that
is no sentence, or wrong (accepted although it has no meaning, or a sentence about something else).
"""


@pytest.fixture
def tally() -> Callable[[str, str, Kind, str], None]:
    """Keeps a verdict (row, case, kind, words) for ``scripts/attack``."""
    file = os.environ.get("FUSION_ATTACK_TALLY")

    def keep(row: str, case: str, kind: Kind, said: str) -> None:
        if file:
            told = {"row": row, "case": case, "kind": kind, "said": said}
            with Path(file).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(told) + "\n")

    return keep
