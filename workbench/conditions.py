"""What a condition is: a text, brought to one form, that decides which weights are generated.

One rule everywhere (recipes, tables, notebooks, pages): Unicode NFC, outer white space removed, and text that
shows nothing is an error. The plain encoder is asked for by ``strength=0``, never by an empty condition.
"""

import re
import unicodedata

from workbench.errors import DataError

_SURROGATE_OR_NUL = re.compile("[\ud800-\udfff\x00]")
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}


def normalise_text(text: object, what: str = "text") -> str:
    """Bring a text to the form that is embedded and that cache keys are made of.

    Args:
        text: any text; composed and decomposed forms of one letter become the same.
        what: how the text is called in a message, for example "sentence1, row 7".

    Returns:
        The text in Unicode NFC without outer white space.

    Raises:
        DataError: not text, a lone surrogate or a NUL (with its position), or nothing visible.
    """
    if not isinstance(text, str):
        raise DataError(f"{what} must be text, got {type(text).__name__}: {text!r}"[:200])
    bad = _SURROGATE_OR_NUL.search(text)
    if bad:
        raise DataError(
            f"{what} holds the character U+{ord(bad.group()):04X} at position {bad.start()}, which no "
            "encoder can read; remove it"
        )
    composed = unicodedata.normalize("NFC", text).strip()
    if all(unicodedata.category(letter) in _INVISIBLE for letter in composed):
        raise DataError(f"{what} is empty or only white space; write the words to compare by")
    return composed


def normalise_condition(condition: object) -> str:
    """Return a condition in its one form.

    Raises:
        DataError: the condition is empty, not text, or holds characters no encoder can read.
    """
    try:
        return normalise_text(condition, "the condition")
    except DataError as problem:
        raise DataError(f"{problem} (for the plain encoder use strength=0)") from None
