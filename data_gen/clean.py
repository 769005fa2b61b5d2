"""Item text is data: clean it, and make sure that no tokenizer ever reads a control token in it.

A title may contain `<|im_end|>`, a semantic-ID token such as `<|a_1|>`, `[INST]` or `</answer>`, by accident
or on purpose. `neutralise` breaks all of them by one rule on characters instead of a list of known tokens, so
tokens of models that do not exist yet are covered too.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import polars as pl

from reasonrec.data_gen.listed import list_words
from reasonrec.data_gen.schema import ITEM_TEXT
from reasonrec.data_gen.values import is_nothing

MAX_TITLE_CHARS = 300
MAX_FIELD_CHARS = 200

# Only real HTML elements are markup; other angle brackets are text and are left to `neutralise`.
_ELEMENTS = (
    "a|abbr|b|big|blockquote|body|br|center|code|dd|div|dl|dt|em|font|form|h[1-6]|head|hr|html|i|iframe|img|input|label|li|"
    "link|meta|nobr|ol|option|p|pre|script|small|span|strike|strong|style|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|"
    "tt|u|ul|video|wbr"
)
_SCRIPTS = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_COMMENTS = re.compile(r"<!--.*?-->", re.DOTALL)
_TAGS = re.compile(rf"</?(?:{_ELEMENTS})(?:\s[^<>]*|/)?/?>", re.IGNORECASE)
_TAG_TAIL = re.compile(r"""["']?\s*/>""")  # what scraping a page's <meta content="…" /> leaves behind
_SPACES = re.compile(r"\s+")
# Compatibility forms which NFKC (a normaliser of many tokenizers) would turn back into the plain brackets.
_PLAIN = str.maketrans("＜﹤＞﹥［］[]", "<<>>()()")
# A sign that stands in a comparison ("3 < 5", "<= 5 mm", "a > b") opens or closes no token; one at an end of
# the text could do so together with what a template puts beside it.
_OPENING = re.compile(r"<(?!\s+\S|=[\s\d])")
_CLOSING = re.compile(r"(?<!\s)>")
# Neither has a compatibility decomposition, so no Unicode normalisation leads back.
_OPEN, _CLOSE = "\u2039", "\u203a"  # ‹ ›
_KEPT_FORMAT = "\u200c\u200d"  # joiners carry meaning in Persian, Indic scripts and emoji


def drop_controls(text: str) -> str:
    """Remove invisible characters (ANSI escapes begin with one) and lone surrogates, keep white space."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c for c in text if c.isspace() or c in _KEPT_FORMAT or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    )


def _break_brackets(text: str) -> str:
    return _CLOSING.sub(_CLOSE, _OPENING.sub(_OPEN, text))


def neutralise(text: str, extra: Sequence[str] = ()) -> str:
    """Break everything in a text that a tokenizer or a parser could take for a control token.

    Angle brackets become ‹ › unless they stand as a comparison sign with white space after (before) them,
    square brackets become round ones. So no `<…>`, `<|…|>`, `</…>`, `<<SYS>>`, `[INST]` or `[MASK]` survives,
    whatever its name.

    Args:
        text: Any text.
        extra: Further literal strings that must not occur in the result (say, a tokenizer's added tokens).

    Returns:
        The text, still readable by a person.

    Example:
        >>> neutralise("M3 < M5 [Pack of 2] <|im_end|>")
        'M3 < M5 (Pack of 2) ‹|im_end|›'
    """
    text = _break_brackets(drop_controls(text).translate(_PLAIN))
    words = [word for word in extra if word.strip()]
    # A space inside splits a token and keeps it readable. Two words may need each other's letters, hence the
    # rounds.
    for _ in range(4):
        for word in words:
            if word in text:
                text = text.replace(word, word[0] + " " + word[1:] if len(word) > 1 else " ")
    while any(word in text for word in words):  # every round makes the text shorter, so this ends
        for word in words:
            text = text.replace(word, "")
    return _break_brackets(text)  # what stood behind a comparison sign may be gone


def strip_markup(text: str) -> str:
    """Undo HTML escapes (double ones too) and remove HTML tags."""
    for _ in range(3):
        plain = html.unescape(text)
        if plain == text:
            break
        text = plain
    if "<" not in text and ">" not in text:
        return text
    text = _COMMENTS.sub(" ", _SCRIPTS.sub(" ", text))
    return _TAG_TAIL.sub(" ", _TAGS.sub(" ", text))


def clean_text(text: str | None, limit: int) -> str:
    """Clean one text field: markup, control characters, white space, length, control tokens.

    Args:
        text: The raw text; None counts as empty.
        limit: Most characters to keep; a cut falls between words where it can.

    Returns:
        One line of text without anything `neutralise` forbids.
    """
    if not text:
        return ""
    # Far more than can survive, so one huge field does not cost minutes of regular expressions.
    text = strip_markup(text[: 8 * limit + 1000])
    text = _SPACES.sub(" ", drop_controls(text)).strip()
    if len(text) > limit:
        cut = text.rfind(" ", limit * 4 // 5, limit)
        text = text[: cut if cut > 0 else limit].rstrip()
    return _SPACES.sub(" ", neutralise(text)).strip()


def join_listed(value: Any, between: str, *, bare: bool = False) -> str:
    """Turn a list, or the spelling of one, into its words; other text comes back as it is.

    Args:
        value: Text, a list, or None.
        between: What stands between two words.
        bare: See `list_words`.

    Example:
        >>> join_listed("['a lamp', 'a shade']", ", "), join_listed(["a lamp", "a shade"], " ")
        ('a lamp, a shade', 'a lamp a shade')
    """
    if is_nothing(value):
        return ""
    words = list_words(value, bare=bare)
    return str(value).strip() if words is None else between.join(words)


def clean_items(items: pl.DataFrame, max_description_chars: int) -> pl.DataFrame:
    """Clean the four text columns of an item table.

    Lists become words: those of a description are sentences, with a space between them, all others stand with commas.

    Args:
        items: Columns `item_id`, `title` and any of `description`, `category`, `brand`: text or lists.
        max_description_chars: Length cap of the description.

    Returns:
        The table with all four text columns, empty strings where there is no text.
    """
    limits = {
        "title": MAX_TITLE_CHARS,
        "description": max_description_chars,
        "category": MAX_FIELD_CHARS,
        "brand": MAX_FIELD_CHARS,
    }
    columns = []
    for name in ITEM_TEXT:
        column = items[name] if name in items.columns else pl.Series(name, [""] * items.height)
        raw = (column if column.dtype.is_nested() else column.cast(pl.String)).to_list()
        between, bare = " " if name == "description" else ", ", name == "category"
        texts = [join_listed(value, between, bare=bare) for value in raw]
        columns.append(pl.Series(name, [clean_text(text, limits[name]) for text in texts], dtype=pl.String))
    return items.select("item_id").with_columns(columns)
