"""Number words for the demo model's corpus: "forty-two" for 42, "minus five" for -5, up to 999."""

from __future__ import annotations


def listed(words: str) -> list[str]:
    """Splits words at spaces."""
    return words.split()


_UNITS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(value: int, *, hyphen: str = "-") -> str:
    """Returns `value` (-999..999) in English words. `hyphen` joins tens and units ("-", or " " as some people type)."""
    if value < 0:
        return f"minus {in_words(-value, hyphen=hyphen)}"
    if value < 20:
        return _UNITS[value]
    if value < 100:
        tens, unit = divmod(value, 10)
        return _TENS[tens - 2] + (f"{hyphen}{_UNITS[unit]}" if unit else "")
    hundreds, rest = divmod(value, 100)
    return f"{_UNITS[hundreds]} hundred" + (f" and {in_words(rest, hyphen=hyphen)}" if rest else "")


def capital(text: str) -> str:
    """Returns `text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
