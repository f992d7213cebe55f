"""What is installed with the package, and what comes with its extras: pip install 'retro-nb[notebooks,data,scale]'."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that an extra brings: where one is missing, the error says which extra that is.

    Args:
        name: of the extra, as in pyproject.toml.

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
