"""Metadata filters as text: `lang = py and (year >= 2020 or starred exists)`.

    filter      any { "or" any }
    any         part { "and" part }
    part        "not" part | "(" filter ")" | comparison
    comparison  key ( "=" | "!=" | "<" | "<=" | ">" | ">=" ) value
              | key [ "not" ] "in" "(" value { "," value } ")"
              | key [ "not" ] "exists"
    value       number | true | false | word | "quoted" | 'quoted'

A bare word is a string; quote strings that hold spaces, look like numbers or are words of the language.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from memory_service.errors import InvalidArgument
from memory_service.types.conditions import AllOf, AnyOf, Compare, Condition, Filter, Not, Scalar

Where = Filter | str | Sequence[Filter | str] | None  # What callers may give; a sequence means that all must match.

MAX_DEPTH = 32
MAX_TEXT = 16_384
_TOKEN = re.compile(
    r"""\s*(?: (?P<quoted> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' )
             | (?P<symbol> <= | >= | != | == | [=<>(),] )
             | (?P<word>   [^\s"'<>=!(),]+ ) )""",
    re.VERBOSE | re.DOTALL,
)
_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_KEYWORDS = frozenset({"and", "or", "not", "in", "exists", "true", "false"})
_COMPARISONS = {"=": Compare.EQ, "==": Compare.EQ, "!=": Compare.NE} | {
    c.value: c for c in Compare if c.value in "<=>="
}


def filter_of(where: Where) -> Filter | None:
    """The filter that `where` stands for; None and an empty sequence match everything.

    Raises InvalidArgument, pointing at the place, for text that is no filter.
    """
    if where is None:
        return None
    if isinstance(where, str):
        return parse(where)
    if isinstance(where, Sequence):
        parts = tuple(parse(part) if isinstance(part, str) else part for part in where)
        return parts[0] if len(parts) == 1 else AllOf(parts) if parts else None
    return where


def parse(text: str) -> Filter:
    """Read a filter written as text. Raises InvalidArgument that points at the place."""
    if len(text) > MAX_TEXT:
        raise InvalidArgument(f"a filter may have {MAX_TEXT} characters, this one has {len(text)}")
    return _Parser(text).filter()


def write(where: Filter) -> str:
    """Write a filter as the text that `parse` reads back."""
    match where:
        case Condition(key, Compare.EXISTS, _):
            return f"{_write_string(key)} exists"
        case Condition(key, Compare.IN, values):
            return f"{_write_string(key)} in ({', '.join(map(_write_scalar, values))})"
        case Condition(key, compare, values):
            return f"{_write_string(key)} {compare.value} {_write_scalar(values[0])}"
        case AllOf(parts):
            return " and ".join(map(_write_part, parts)) if parts else "true"
        case AnyOf(parts):
            return " or ".join(map(_write_part, parts)) if parts else "false"
        case Not(part):
            return f"not {_write_part(part)}"


class _Token(NamedTuple):
    kind: str  # "quoted", "symbol", "word" or "end"
    text: str
    at: int


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str):
        self._text = text
        self._tokens = self._split(text)
        self._next = 0
        self._depth = 0

    def filter(self) -> Filter:
        found = self._any()
        if self._peek.kind != "end":
            raise self._wrong("expected 'and', 'or' or the end")
        return found

    def _split(self, text: str) -> list[_Token]:
        tokens, at = [], 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong("this is no word, number, quoted string or comparison", at)
            kind = match.lastgroup or ""
            tokens.append(_Token(kind, match[kind], match.start(kind)))
            at = match.end()
        return [*tokens, _Token("end", "", len(text))]

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek
        self._next += token.kind != "end"
        return token

    def _took(self, kind: str, text: str) -> bool:
        """Step over the next token if it is this one."""
        found = self._peek.kind == kind and self._peek.text.lower() == text
        self._next += found
        return found

    def _any(self) -> Filter:
        parts = [self._all()]
        while self._took("word", "or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _all(self) -> Filter:
        parts = [self._part()]
        while self._took("word", "and"):
            parts.append(self._part())
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _part(self) -> Filter:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(f"a filter may nest {MAX_DEPTH} deep")
        try:
            if self._took("word", "not"):
                return Not(self._part())
            if self._took("symbol", "("):
                inner = self._any()
                self._expect(")")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Filter:
        name = self._take()
        constant = name.kind == "word" and name.text.lower() in ("true", "false")
        if constant and (self._peek.kind == "end" or self._peek.text.lower() in ("and", "or", ")")):
            return AllOf(()) if name.text.lower() == "true" else AnyOf(())
        if name.kind not in ("word", "quoted"):
            raise self._wrong("expected the name of a metadata field", name.at)
        key = _unquote(name)
        operator = self._take()
        word = operator.text.lower() if operator.kind == "word" else ""
        if operator.kind == "symbol" and operator.text in _COMPARISONS:
            return Condition(key, _COMPARISONS[operator.text], (self._value(),))
        if word == "not":
            return Not(self._listed(key))
        if word in ("in", "exists"):
            self._next -= 1
            return self._listed(key)
        raise self._wrong(f"expected =, !=, <, <=, >, >=, in or exists after {key!r}", operator.at)

    def _listed(self, key: str) -> Condition:
        if self._took("word", "exists"):
            return Condition(key, Compare.EXISTS)
        if not self._took("word", "in"):
            raise self._wrong("expected 'in' or 'exists'")
        self._expect("(")
        values = [self._value()]
        while self._took("symbol", ","):
            values.append(self._value())
        self._expect(")")
        return Condition(key, Compare.IN, tuple(values))

    def _value(self) -> Scalar:
        token = self._take()
        if token.kind == "quoted":
            return _unquote(token)
        if token.kind != "word":
            raise self._wrong("expected a value", token.at)
        value = _scalar(token.text)
        if not isinstance(value, str) and not -(2**63) <= value < 2**63 and not isinstance(value, float):
            raise self._wrong("this number does not fit 64 bits; quote it if it is text", token.at)
        return value

    def _expect(self, symbol: str) -> None:
        if not self._took("symbol", symbol):
            raise self._wrong(f"expected {symbol!r}")

    def _wrong(self, what: str, at: int | None = None) -> InvalidArgument:
        at = self._peek.at if at is None else at
        before, rest = self._text[max(0, at - 30) : at].lstrip(), self._text[at : at + 30].rstrip()
        return InvalidArgument(f"the filter cannot be read: {what} at {before}⟨here⟩{rest}")


def _unquote(token: _Token) -> str:
    return re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL) if token.kind == "quoted" else token.text


def _scalar(word: str) -> Scalar:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if _INTEGER.fullmatch(word):
        return int(word[:40])  # Longer than 64 bits is refused anyway; Python refuses very long ones by itself.
    number = float(word) if _NUMBER.fullmatch(word) else math.nan
    return number if math.isfinite(number) else word


def _write_part(part: Filter) -> str:
    simple = isinstance(part, Condition | Not) or not part.parts
    return write(part) if simple else f"({write(part)})"


def _write_scalar(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _write_string(value) if isinstance(value, str) else repr(value)


def _write_string(text: str) -> str:
    plain = re.fullmatch(r"[^\s\"'<>=!(),]+", text) and text.lower() not in _KEYWORDS and isinstance(_scalar(text), str)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
