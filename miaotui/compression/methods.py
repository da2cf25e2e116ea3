"""What can be done to a model, and how it is written: `prune-heads=0.25,int8-static`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from miaotui.compression.errors import CompressionError

PRUNING = ("prune-weights", "prune-2:4", "prune-heads", "prune-neurons", "prune-layers")
FACTORING = ("svd", "asvd")
DECOMPOSING = "decompose"
WORDS = "words"
EXAMPLES = (
    "int8, int8-static, int4 (2 to 7 bits), int4-static, prune-weights=0.5, prune-2:4, "
    "prune-heads=0.25, prune-neurons=0.25, prune-layers=1, svd=0.5, asvd=0.5, decompose=3, "
    "words=4; several, in order, with commas between"
)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do.

    `value`: the share to prune (0 to 1), layers to take out or to decompose, or the share of
    parameters that a factorised layer keeps; the bits of a quantisation or of word embeddings.
    `static`: whether a quantisation's activations are rounded by calibrated scales.
    """

    name: str
    value: float = 0.0
    static: bool = False

    @property
    def kind(self) -> str:
        """quantize, prune, decompose, words or factorize."""
        if self.name in PRUNING:
            return "prune"
        if self.name in (DECOMPOSING, WORDS):
            return self.name
        return "factorize" if self.name in FACTORING else "quantize"

    @property
    def takes_away(self) -> bool:
        """Whether a training afterwards can give back what it takes."""
        return self.kind not in ("quantize", WORDS)

    @property
    def rounds_coarsely(self) -> bool:
        """Whether a training through the rounding can give back what it takes."""
        return self.kind == "quantize" and (self.static or self.value < 8)

    @property
    def needs_questions(self) -> bool:
        """Whether it has to see questions with passages."""
        return self.kind == "prune" or self.static or self.name == "asvd"

    def __str__(self) -> str:
        if self.kind == "quantize" or self.name == "prune-2:4":
            return self.name
        return f"{self.name}={self.value:g}"


# Whether a value will do, what values do, and one of them.
_Value = tuple[Callable[[float], bool], str, str]
_SHARE: _Value = (lambda value: 0 < value < 1, "a share above 0 and below 1", "0.25")
_COUNT: _Value = (
    lambda value: value >= 1 and value == int(value),
    "a whole number of layers, at least 1",
    "1",
)
_BITS: _Value = (lambda value: value in (2, 4, 8), "2, 4 or 8 bits", "4")
_VALUES: dict[str, _Value] = {
    "prune-weights": _SHARE,
    "prune-heads": _SHARE,
    "prune-neurons": _SHARE,
    "prune-layers": _COUNT,
    DECOMPOSING: _COUNT,
    WORDS: _BITS,
    "svd": _SHARE,
    "asvd": _SHARE,
}
_QUANTIZE = re.compile(r"int(\d+)(-static)?")


def parse_method(text: str) -> tuple[Step, ...]:
    """Return the steps that a method says.

    Raises:
        CompressionError: unknown, out of range, or in an order that cannot be done.
    """
    steps = tuple(_parse(part.strip()) for part in text.split(","))
    quantized = None
    for step in steps:
        if quantized is not None:
            raise CompressionError(
                f"{step} after {quantized}: quantised weights cannot be changed any more; put "
                "the quantisation last, and only one"
            )
        if step.kind == "quantize":
            quantized = step
    for name in (*PRUNING, *FACTORING, DECOMPOSING, WORDS):
        if sum(step.name == name for step in steps) > 1:
            what = "once" if name == WORDS else "once, with the whole share"
            raise CompressionError(f"{name} twice; give it {what}")
    if len([step for step in steps if step.kind == "factorize"]) > 1:
        raise CompressionError("svd and asvd exclude each other; give one of them")
    names = [step.kind for step in steps]
    if "factorize" in names and "prune" in names[names.index("factorize") :]:
        raise CompressionError("pruning after a factorisation; prune first, then factorise")
    return steps


def _parse(text: str) -> Step:
    name, given, value = text.partition("=")
    if match := _QUANTIZE.fullmatch(name):
        bits = int(match[1])
        if not 2 <= bits <= 8:
            raise CompressionError(f"{name}: {bits} bits; weights are rounded to 2 to 8 bits")
        if given:
            raise CompressionError(f"{text}: {name} takes no value")
        return Step(name, bits, match[2] is not None)
    if name == "prune-2:4" and not given:
        return Step(name, 0.5)
    if name not in _VALUES:
        raise CompressionError(f"unknown method {text!r}; there are {EXAMPLES}")
    check, what, example = _VALUES[name]
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not check(number):
        raise CompressionError(f"{text}: {name} takes {what}, such as {name}={example}")
    return Step(name, number)
