r"""Lists of words in the spellings in which tables hold them, as the words they are.

Python, JSON and numpy write `['Toys & Games', 'Puzzles']`, `["Toys & Games", "Puzzles"]` and
`['Toys & Games' 'Puzzles']`; there are tuples, sets, lists in lists, dictionaries with a name, and list columns of
Parquet. All become the same words. Text is cut into tokens, never run.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from reasonrec.data_gen.values import is_nothing

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<open>[\[({])|(?P<close>[\])}])|(?P<comma>,)"""
    r"""|(?P<text>[bBuUrR]{0,2}(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))"""
    # A number, nothing, numpy's "…" in a long array, and what wraps or follows a list in numpy's spelling.
    r"""|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"""
    r"""|(?P<rest>\.\.\.|(?:np\.|numpy\.)?(?:array|str_|bytes_|list|tuple|set|frozenset)(?=\()"""
    r"""|dtype=[^\s,)\]]+|(?:None|null|nan|NaN|NaT|<NA>)(?![^\s,\])}]))""",
    re.DOTALL,
)
_PAIRS = {"[": "]", "(": ")", "{": "}"}
_WRAPPED = re.compile(r"(?:np\.|numpy\.)?(?:array|list|tuple|set|frozenset)\(")
# A list whose quotes do not match, because an apostrophe stands bare inside: what stands between quotes cuts it.
_QUOTED = re.compile(r"(?:\[\s*)+['\"](?P<inner>(?:(?!['\"]\s*\]).)*)['\"](?:\s*\])+$", re.DOTALL)
_BETWEEN = re.compile(r"['\"](?:\s*,\s*|\s+)['\"]")
# Unquoted, as Spark, Java and PostgreSQL write: [Toys & Games, Puzzles], {Toys,"Home & Kitchen"}.
_BARE = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\[\](){}'",:]+)\s*(?:,|$)""", re.DOTALL)


def list_words(value: Any, *, bare: bool = False) -> list[str] | None:
    r"""The words of a list.

    Args:
        value: A list (of lists, of dictionaries), or a text that may be the spelling of one.
        bare: Take `[a, b]` without quotes for a list, too (a category may be one, a sentence in brackets is none).

    Returns:
        The words in their order without empty ones, or None for a text that is no list.

    Example:
        >>> list_words("['Toys & Games' 'Puzzles']"), list_words('[["it\'s warm"], null]'), list_words("[Rec] 2")
        (['Toys & Games', 'Puzzles'], ["it's warm"], None)
    """
    if not isinstance(value, str):
        return _flat(value)
    text = value.strip()
    if not text or (text[0] not in _PAIRS and not _WRAPPED.match(text)) or text[-1] not in "])}":
        return None
    words = _tokens(text)
    if words is None and ":" in text:
        words = _literal(text)
    if words is None and (quoted := _QUOTED.match(text)):
        words = [part.replace("\\n", " ").replace("\\'", "'") for part in _BETWEEN.split(quoted["inner"])]
    if words is None and bare and text[0] in "[{":
        words = _bare(text[1:-1])
    return None if words is None else [word.strip() for word in words if not is_nothing(word)]


def _flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        # [{"id": 16, "name": "Animation"}]: the name is the word, else all that is text.
        named = value.get("name")
        return _flat(named if named is not None else [part for part in value.values() if isinstance(part, str)])
    if isinstance(value, list | tuple):
        return [word for part in value for word in _flat(part)]
    word = "" if value is None else str(value).strip()
    return [] if is_nothing(word) else [word]


def _tokens(text: str) -> list[str] | None:
    """The words of one bracketed list; None if the text is anything else."""
    words: list[str] = []
    closes: list[str] = []
    at, apart, texts = 0, True, 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found or (not closes and at and found.lastgroup != "space" and not _WRAPPED.match(text)):
            return None
        kind, token = found.lastgroup, found.group()
        if kind == "open":
            closes.append(_PAIRS[token])
        elif kind == "close":
            if not closes or closes.pop() != token:
                return None
        elif kind in ("text", "number"):
            if not apart:  # 'it's': a quote inside of a word
                return None
            words.append(_unquote(token) if kind == "text" else token)
            texts += kind == "text"
        apart = kind not in ("text", "number", "close")
        at = found.end()
    # "(2003)" and "{1}" are text; "[1, 2]" and "()" are lists.
    return words if not closes and (texts or not words or text[0] == "[") else None


def _unquote(token: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd backslashes in a description are no news
        for read in (json.loads, ast.literal_eval) if token[0] == '"' else (ast.literal_eval,):
            try:
                word = read(token)
            except (ValueError, SyntaxError):
                continue
            return word.decode(errors="replace") if isinstance(word, bytes) else str(word)
    return re.sub(r"^[a-zA-Z]*", "", token)[1:-1]


def _literal(text: str) -> list[str] | None:
    """The words of a list with dictionaries, in JSON or Python."""
    for read in (json.loads, ast.literal_eval):
        try:
            return _flat(read(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None


def _bare(inner: str) -> list[str] | None:
    words, at = [], 0
    while at < len(inner):
        found = _BARE.match(inner, at)
        if not found:
            return None
        word = found.group(1)
        words.append(_unquote(word) if word[0] in "'\"" else word)
        at = found.end()
    return words
