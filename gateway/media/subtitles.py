"""A transcript as subtitles."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.media.transcriber import Segment


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered cues, one a segment that holds text."""
    cues = [
        f"{number}\n{_time(one.start, ',')} --> {_time(one.end, ',')}\n{_line(one.text)}\n"
        for number, one in enumerate(_spoken(segments), 1)
    ]
    return "\n".join(cues)


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT: the same cues."""
    cues = [
        f"{_time(one.start, '.')} --> {_time(one.end, '.')}\n{_escaped(_line(one.text))}\n"
        for one in _spoken(segments)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _spoken(segments: Sequence[Segment]) -> list[Segment]:
    return [one for one in segments if one.text]


def _line(text: str) -> str:
    """An empty line would end the cue."""
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _time(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
