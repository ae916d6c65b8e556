"""Packages that only some commands need, and what to install for them."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from snp_llm.runtime.errors import SnpError, reason


def needed(name: str, extra: str) -> ModuleType:
    """A package of an extra.

    Raises:
        SnpError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SnpError(f"{name} is needed and not there ({reason(error)}): pip install 'snp-llm[{extra}]'") from error


def is_there(name: str) -> bool:
    """Whether a package is installed."""
    return find_spec(name) is not None
