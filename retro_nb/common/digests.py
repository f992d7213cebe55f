"""Short digests of values."""

import hashlib
import json
from typing import Any


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hexadecimal digits of the SHA-256 of a JSON-able value; the order of mappings is ignored."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
