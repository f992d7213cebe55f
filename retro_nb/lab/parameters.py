"""Types and limits of the notebooks' parameters, which `start` checks before anything is computed."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, NamedTuple

WORDS = {
    "text": "text in quotes, not blank",
    "any text": "text in quotes, which may be empty",
    "pattern": "a regular expression in quotes, which may be empty",
    "switch": "True or False",
}


class Limits(NamedTuple):
    """The values that a parameter may have."""

    kind: str = "whole"  # "whole" or "real" number, or a key of WORDS
    least: float = 1
    most: float = math.inf
    multiple: int = 1  # of which a whole number must be a multiple
    or_zero: bool = False  # whether 0 is allowed below `least`, for "all"

    def allow(self, value: Any) -> bool:
        """Whether a parameter may have this value."""
        if self.kind in WORDS:
            return isinstance(value, bool if self.kind == "switch" else str) and self._allow_text(value)
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind == "whole" else Real):
            return False
        with suppress(OverflowError):  # an integer of hundreds of digits
            number = float(value)
            inside = math.isfinite(number) and self.least <= number <= self.most
            return (self.or_zero and number == 0) or (inside and (self.kind == "real" or number % self.multiple == 0))
        return False

    def _allow_text(self, value: Any) -> bool:
        with suppress(re.error, RecursionError, OverflowError):
            return bool(re.compile(value)) if self.kind == "pattern" else self.kind != "text" or bool(value.strip())
        return False

    def __str__(self) -> str:
        if self.kind in WORDS:
            return WORDS[self.kind]
        words = "a whole number" if self.kind == "whole" else "a number"
        words += f" of at least {self.least:g}" + ("" if math.isinf(self.most) else f" and at most {self.most:g}")
        words += f", a multiple of {self.multiple}" if self.multiple > 1 else ""
        return words + (", or 0 for all" if self.or_zero else "")


COUNT, SEED, TEXT = Limits(), Limits(least=0, most=2**32 - 2**20), Limits("text")
ANY_TEXT, PATTERN = Limits("any text"), Limits("pattern")
CHARACTERS = Limits(least=500)  # of a document: fewer than a chunk's 64 tokens leave nothing to learn
LIMITS = {
    "about": PATTERN, "asked": COUNT, "batch_size": COUNT, "characters": CHARACTERS, "chunk_size": COUNT,
    "corpus": TEXT, "crowd_size": Limits(least=1000), "depth": COUNT, "dim": Limits(least=32, multiple=32),
    "documents": Limits(least=2), "gpus": COUNT, "handful": COUNT, "index": ANY_TEXT, "k": COUNT, "knn": COUNT,
    "live": Limits("switch"), "long_chunks": COUNT, "long_speech": TEXT, "lr": Limits("real", 1e-8, 1),
    "max_chars": CHARACTERS._replace(or_zero=True), "max_documents": Limits(least=2, or_zero=True), "new_tokens": COUNT,
    "opening": CHARACTERS, "opening_chars": CHARACTERS, "prompt": TEXT, "question": TEXT, "questions": COUNT,
    "rate": TEXT, "samples": COUNT, "seconds": Limits("real", 1), "seed": SEED, "sentence": TEXT, "seq_len": COUNT,
    "share": Limits("real", 1e-6, 1), "speech": TEXT, "speech_a": TEXT, "speech_b": TEXT, "steps": COUNT,
    "temperature": Limits("real", 0), "tokens": COUNT, "town_seed": SEED, "towns": Limits(least=2),
    "train_steps": COUNT, "until": Limits(least=0), "width": COUNT, "word": TEXT,
}  # fmt: skip


class ParameterError(ValueError):
    """A notebook's parameter has an impossible value. IPython shows its message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"ParameterError: {self}"]


def check_parameters(given: Mapping[str, Any]) -> None:
    """Reject values of parameters that the notebooks cannot work with; names without limits pass.

    Raises:
        ParameterError: names the first such parameter, its value and its limits.
    """
    for name, value in given.items():
        if name in LIMITS and not LIMITS[name].allow(value):
            raise ParameterError(f"{name} is {_shown(value)}, a {type(value).__name__}: pass {LIMITS[name]}")


def _shown(value: Any) -> str:
    """A value in one line of at most 80 characters."""
    try:
        return " ".join(f"{value!r:.80}".split())
    except ValueError:  # an integer of thousands of digits
        return "too long to show"
