"""How far two answers are the same, with SQuAD's and CMRC's normalisation of text."""

from __future__ import annotations

from miaotui.robustness.perturbations import Language
from miaotui.training.scorer import best_scores


def same_answer(found: str, wanted: tuple[str, ...], language: Language) -> tuple[float, float]:
    """(1 if equal else 0, F1) of an answer, against the best of those wanted.

    Compared without characters that only look different: what was disturbed in the passage may
    be in the answer, and is not its fault.
    """
    return best_scores(plain(found), [plain(one) for one in wanted], language)


def plain(text: str) -> str:
    """A text without invisible characters."""
    return text.translate(_INVISIBLE)


_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
