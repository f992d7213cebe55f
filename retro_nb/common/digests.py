"""Short identities of values."""

import hashlib
import json
from typing import Any


def digest(value: Any, length: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of anything JSON can write; the order of a mapping does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
