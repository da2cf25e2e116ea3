"""Warnings about questions and passages, as answers carry them."""

from __future__ import annotations

from gateway.explanation import WarningView
from gateway.served import Served
from miaotui.robustness.warnings import look_at_input


def warnings_about(
    question: str, context: str, unknown_share: float, served: Served
) -> list[WarningView]:
    """What is unusual about them for this model; mostly nothing."""
    found = look_at_input(
        question,
        context,
        unknown_share=unknown_share,
        script_pieces=dict(served.script_pieces) if served.script_pieces else None,
    )
    return [WarningView(one.kind, one.message, round(one.score, 4)) for one in found]
