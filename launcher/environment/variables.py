"""Numbers in variables of the environment, refused by name where they are none."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.failures import LaunchError


def integer(environ: Mapping[str, str], name: str) -> int | None:
    """None where the variable is not set or empty.

    Raises:
        LaunchError: it is no integer.
    """
    value = environ.get(name)
    if value is None or value == "":
        return None
    try:
        return int(value)
    except ValueError:
        raise LaunchError(f"{name} must be an integer, but is {value!r}; unset it.") from None


def positive(environ: Mapping[str, str], name: str) -> int | None:
    """As `integer`, from 1."""
    value = integer(environ, name)
    if value is not None and value < 1:
        raise LaunchError(f"{name} must be at least 1, but is {value}; unset it.")
    return value


def port(environ: Mapping[str, str], name: str) -> int:
    """A TCP port; the variable must be set."""
    value = integer(environ, name)
    if value is None or not 0 < value < 65536:
        raise LaunchError(f"{name} must be a port from 1 to 65535, but is {environ[name]!r}.")
    return value
