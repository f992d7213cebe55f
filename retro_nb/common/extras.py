"""Imports of optional packages, from the extras: pip install 'retro-nb[notebooks,data,scale]'."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of an extra's packages: if one is missing, raise an error that names the extra.

    Args:
        name: the extra's name in pyproject.toml.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise ModuleNotFoundError(
            f"{package} is not installed, it comes with the extra {name!r}: pip install 'retro-nb[{name}]', "
            f"or in a clone pip install -e '.[{name}]'",
            name=error.name,
        ) from error
