"""The text preprocessing of the ImageCLEFmedical Caption organisers, in their order."""

from __future__ import annotations

import re
import string

DIGITS = re.compile(r"\d+")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SIGNATURE = "lower+number+punct"
"""How signatures name it."""


def preprocess(caption: str) -> str:
    """Lower the case, put "number" for every run of digits, delete ASCII punctuation (without a space in its place).

    White space and Unicode punctuation stay. Source: the organisers' evaluators of 2023 to 2026.
    """
    return DIGITS.sub("number", caption.lower()).translate(NO_PUNCTUATION)
