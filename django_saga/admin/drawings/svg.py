"""The elements that drawings are made of; text from outside is always escaped."""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

# What XML does not allow, and what would turn the direction of the text after it.
_ILLEGIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def legible(text: str) -> str:
    """The text on one line; what cannot be written, or would turn its direction, shows as �."""
    return _ILLEGIBLE.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split())) or _("(no name)")


def shorten(text: str, width: float, size: float) -> str:
    """The text, without its middle where it would not surely fit that width; ends often differ."""
    if measure(text, size) <= width:
        return text
    room = width - measure("…", size)
    start = _fitting(text, room * 0.6, size)
    end = _fitting(text[::-1], room * 0.4, size)
    return f"{text[:start]}…{text[len(text) - end :]}"


def _fitting(text: str, width: float, size: float) -> int:
    """How many letters fit."""
    widths = accumulate(measure(char, size) for char in text)
    return sum(so_far <= width for so_far in widths)


def bold(size: float) -> float:
    """The size of plain letters that are as wide as bold ones of that size."""
    return size * 1.12


def measure(text: str, size: float) -> float:
    """Rather more than the width of the text in the admin's fonts."""
    return size * sum(map(_advance, text))


def _advance(char: str) -> float:
    if unicodedata.east_asian_width(char) in "WF":
        return 1.0
    return _ADVANCES.get(char, 0.76 if char.isupper() else 0.65)


_ADVANCES = {
    **dict.fromkeys("ijl|!'.,:; ", 0.36),
    **dict.fromkeys("tfrIJ()-", 0.46),
    **dict.fromkeys("acekosvxyz", 0.61),
    **dict.fromkeys("BCEFKLPRSTXYZ", 0.7),
    **dict.fromkeys("mMwW@%…—", 1.0),
}


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def element(tag: str, *content: str, **attributes: str | float) -> SafeString:
    """One element; ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``."""
    written = format_html_join(
        "",
        ' {}="{}"',
        (
            (name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else number(value))
            for name, value in attributes.items()
        ),
    )
    inside = format_html_join("", "{}", ((part,) for part in content))
    return format_html("<{}{}>{}</{}>", tag, written, inside, tag)


def group(css: str, title: str, *content: str) -> SafeString:
    """Elements with a title that shows when one points at them."""
    return element("g", element("title", legible(title)), *content, class_=css)


def path(d: str, css: str) -> SafeString:
    """A line or a shape."""
    return element("path", d=d, class_=css)


def label(x: float, y: float, text: str, css: str, anchor: str = "start") -> SafeString:
    """One line of text on its base line."""
    return element("text", text, x=x, y=y, class_=css, text_anchor=anchor)


def drawing(
    css: str, width: float, height: float, title: str, words: str, *content: str
) -> SafeString:
    """A whole drawing, which a screen reader meets as one picture: the words say what it shows."""
    return element(
        "svg",
        element("title", legible(title)),
        *content,
        class_=f"saga-drawing {css}",
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=legible(words),
    )
