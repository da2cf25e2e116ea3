"""Random values: texts, numbers, JSON documents after a schema, and how they are spoilt."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from tests.fuzz.cases import MARK

Json = Any
_TEXTS = (
    "",
    " ",
    "\n\r\t\u2028\u2029",
    "Who wrote the first program?",
    "谁写了第一个程序？艾达·洛夫莱斯在1843年写的。",
    "Ada Lovelace wrote the first program in 1843. " * 12,
    "\x00",
    "a\x00b",
    "\u202e\u200f\u200b\ufeff",
    "e\u0301" * 40,
    "👩‍👩‍👧‍👦🏳️‍🌈" * 5,
    "<script>alert(1)</script><b>x</b>&amp;&#0;&#xD800;",
    "'; DROP TABLE documents; --",
    "../../../../etc/passwd",
    "%s%n%x {0} ${jndi:ldap://x} {{7*7}}",
    "\u0000\uffff\U0010ffff",
    "[CLS][SEP][MASK]<s></s><|start|>system\n",
    "-1e309",
    "null",
    "龘" * 300,
    "𠀀𠀁" * 20,
)
_NUMBERS: tuple[int | float, ...] = (
    *(0, 1, -1, 2, 7, 255, 256, 65_535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63),
    *(2**64, -(2**63) - 1, 10**40, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, 1.0000000001),
)
_ODD: tuple[float, ...] = (math.nan, math.inf, -math.inf)
_MOST_DEPTH = 4


def text(chance: random.Random, *, surrogates: bool = False) -> str:
    """A text that something may stumble over."""
    kind = chance.random()
    if kind < 0.25:
        made = chance.choice(_TEXTS)
    elif kind < 0.5:
        made = f"{chance.choice(_TEXTS)}{MARK} {chance.choice(_TEXTS)}"
    elif kind < 0.9:
        length = chance.choice((1, 3, 10, 60, 400))
        ranges = ((32, 126), (0, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xE000, 0xFFFF))
        low, high = chance.choice(ranges)
        made = "".join(chr(chance.randint(low, high)) for _ in range(length))
    else:
        made = chance.choice(("a", "字", "a ", "。", "\u0301")) * chance.choice(
            (600, 5_000, 30_000)
        )
    if surrogates and chance.random() < 0.1:
        place = chance.randint(0, len(made))
        made = made[:place] + chr(chance.randint(0xD800, 0xDFFF)) + made[place:]
    return made


def number(chance: random.Random) -> int | float:
    """A number, mostly at some border."""
    if chance.random() < 0.7:
        return chance.choice(_NUMBERS)
    return chance.choice((chance.randint(-(10**6), 10**6), chance.uniform(-10, 10)))


def junk(chance: random.Random, depth: int = 0) -> Json:
    """Any JSON value."""
    kind = chance.randrange(8 if depth < _MOST_DEPTH else 6)
    if kind == 6:
        return [junk(chance, depth + 1) for _ in range(chance.randrange(5))]
    if kind == 7:
        return {text(chance)[:30]: junk(chance, depth + 1) for _ in range(chance.randrange(5))}
    simple = (None, True, False, chance.choice(_ODD), number(chance), text(chance, surrogates=True))
    return simple[kind]


def of_schema(chance: random.Random, schema: Json, root: Json, depth: int = 0) -> Json:
    """A value that a JSON schema allows, as far as it is one of the usual ones."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return of_schema(chance, root[name], root, depth + 1)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return of_schema(chance, chance.choice(schema[word]), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return chance.choice(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = chance.choice(kind)
    if kind == "object" or "properties" in schema:
        return _object(chance, schema, root, depth)
    if kind == "array":
        low = schema.get("minItems", 0)
        count = min(schema.get("maxItems", 9), low + chance.choice((0, 0, 1, 2, 4)))
        items = schema.get("items") or {}
        return [of_schema(chance, items, root, depth + 1) for _ in range(count)]
    if kind in ("integer", "number"):
        return _number(chance, schema, kind)
    if kind == "string":
        return _text(chance, schema)
    if kind == "boolean":
        return chance.random() < 0.5
    return None if kind == "null" else junk(chance, depth + 2)


def _object(chance: random.Random, schema: Json, root: Json, depth: int) -> Json:
    required = set(schema.get("required", ()))
    optional = 0.4 if depth < 2 * _MOST_DEPTH else 0.0
    return {
        name: of_schema(chance, inner, root, depth + 1)
        for name, inner in schema.get("properties", {}).items()
        if name in required or chance.random() < optional
    }


def _number(chance: random.Random, schema: Json, kind: str) -> int | float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 8))
    if kind == "integer":
        return chance.choice(
            (low, chance.randint(int(low), max(int(low), int(min(high, low + 9)))))
        )
    return chance.choice((low, high, chance.uniform(low, min(high, low + 2))))


def _text(chance: random.Random, schema: Json) -> str:
    examples = schema.get("examples")
    if examples and chance.random() < 0.3:
        return str(chance.choice(examples))
    made = text(chance)
    made = made.ljust(schema.get("minLength", 0), "x")
    return made[: schema.get("maxLength", 40_000)]


def spoilt(chance: random.Random, value: Json) -> Json:
    """The value with one thing in it that is not right."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        copy = dict(value)
        name = chance.choice(list(copy))
        act = chance.randrange(4)
        if act == 0:
            del copy[name]
        elif act == 1:
            copy[text(chance)[:20] or "x"] = junk(chance)
        else:
            copy[name] = spoilt(chance, copy[name])
        return copy
    if isinstance(value, list) and value and chance.random() < 0.7:
        items = list(value)
        place = chance.randrange(len(items))
        items[place] = spoilt(chance, items[place])
        return items * chance.choice((1, 1, 1, 2, 40))
    if isinstance(value, str) and chance.random() < 0.6:
        return text(chance, surrogates=True)
    if isinstance(value, (int, float)) and chance.random() < 0.6:
        return number(chance)
    return chance.choice((junk(chance), [value], {"value": value}, str(value)))


def dumped(chance: random.Random, value: Json) -> bytes:
    """JSON text, in one of the ways in which it can be written."""
    ascii_only = chance.random() < 0.5
    made = json.dumps(value, ensure_ascii=ascii_only, indent=chance.choice((None, None, None, 2)))
    act = chance.random()
    if act < 0.03 and made.startswith("{") and len(made) > 2:
        made = made[0] + made[1:-1].strip() + "," + made[1:]  # every key twice
    elif act < 0.05:
        depth = chance.choice((50, 1_000, 100_000))
        made = "[" * depth + made + "]" * depth
    elif act < 0.06:
        made = made.replace("{", '{"deep":' + '{"a":' * 2_000 + "1" + "}" * 2_000 + ",", 1)
    elif act < 0.07:
        made += chance.choice(("x", "{}", "\x00", " " * 5_000, ","))
    coding = "utf-8" if act < 0.97 else chance.choice(("utf-16", "utf-32-be", "gb18030", "utf-7"))
    try:
        return made.encode(coding, "surrogatepass")
    except UnicodeEncodeError:
        return made.encode("utf-8", "surrogatepass")


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with some of them changed, left out, doubled, or put in."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randint(0, len(made))
        act = chance.randrange(6)
        if act == 0 and place < len(made):
            made[place] ^= 1 << chance.randrange(8)
        elif act == 1 and place < len(made):
            made[place] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif act == 2:
            del made[place:]
        elif act == 3:
            made[place:place] = chance.randbytes(chance.choice((1, 2, 8, 64)))
        elif act == 4:
            del made[place : place + chance.choice((1, 2, 8))]
        else:
            made[place:place] = made[max(0, place - 12) : place]
    return bytes(made)
