"""Calling foreign code: quietly, and with its failures as one sentence."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

from shear_ir.errors import LoadError


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a ``LoadError``: ``what``, and the first sentence of the failure."""
    try:
        yield
    except LoadError:
        raise
    except Exception as failure:
        raise LoadError(f"{what}: {sentence(failure)}") from failure


def sentence(failure: Exception) -> str:
    """The first sentence of a failure's text, or its class."""
    text = ""
    for line in filter(None, map(str.strip, str(failure).splitlines())):
        text = f"{text} {line}".lstrip()
        if not text.endswith(":"):
            break
    return re.split(r"(?<=\w\w[`'\")]|\w\w\w)\. (?=[A-Z])", text)[0] or type(failure).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, log lines and warnings of transformers."""
    from transformers import utils

    logging: Any = utils.logging  # its functions have no types
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
