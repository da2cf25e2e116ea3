"""Adds files to a collection of a running gateway, and lists and deletes documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miaotui.cli.asking import AskError, problem_text, unreachable
from miaotui.cli.shared import headers_with

SUFFIXES = (
    *(".txt", ".text", ".log", ".rst", ".md", ".markdown"),
    *(".html", ".htm", ".xhtml", ".pdf", ".docx"),
)
# Files travel in groups: one by one they would wait for each other's answers.
_GROUP_FILES = 16
_GROUP_BYTES = 8 * 1024 * 1024
# One large document may take this long to be read.
_TIMEOUT_SECONDS = 600.0


@dataclass
class Report:
    """What became of the files."""

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason)."""

    def as_json(self) -> dict[str, Any]:
        """The same for `--json`."""
        skipped = [{"source": source, "reason": reason} for source, reason in self.skipped]
        counts = {"added": self.added, "replaced": self.replaced, "unchanged": self.unchanged}
        return {**counts, "skipped": skipped}


def find_files(paths: Sequence[Path], report: Report) -> list[Path]:
    """The files named, and those of the folders named that can be read, by path.

    What is hidden or a link is left out of folders; what else is left out is noted in
    `report`.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(names):
                    file = Path(folder, name)
                    if name.startswith(".") or file.is_symlink():
                        continue
                    if file.suffix.lower() in SUFFIXES:
                        found[file.resolve()] = None
                    else:
                        report.skipped.append((str(file), "files of this kind are not read"))
        elif path.exists():
            found[path.resolve()] = None
        else:
            report.skipped.append((str(path), "there is no such file or folder"))
    return list(found)


def add_files(
    url: str,
    collection: str,
    files: Sequence[Path],
    report: Report,
    done: Callable[[int], None],
    key: str = "",
) -> None:
    """Sends the files; `done` is told of each group's size. Raises `AskError`."""
    import httpx

    with _client(url, key) as client:
        for group in _groups(files):
            with ExitStack() as opened:
                parts = []
                for file in group:
                    try:
                        stream = opened.enter_context(file.open("rb"))
                    except OSError as error:
                        report.skipped.append((str(file), os.strerror(error.errno or 0)))
                        continue
                    parts.append(("file", (file.as_posix(), stream, "application/octet-stream")))
                if parts:
                    try:
                        response = client.post(
                            "/v1/documents", data={"collection": collection}, files=parts
                        )
                    except httpx.HTTPError as error:
                        raise AskError(unreachable(url, str(error), "--url")) from None
                    if response.status_code == 413 and len(group) == 1:
                        report.skipped.append(
                            (str(group[0]), "it is larger than the gateway takes")
                        )
                    elif response.status_code != 200:
                        raise AskError(problem_text(url, response.status_code, response.content))
                    else:
                        _note(response.json(), report)
            done(len(group))


def _note(body: dict[str, Any], report: Report) -> None:
    for document in body["documents"]:
        name = document["outcome"]
        setattr(report, name, getattr(report, name) + 1)
    report.skipped += [(one["source"], one["reason"]) for one in body["skipped"]]


def _groups(files: Sequence[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    total = 0
    for file in files:
        try:
            size = file.stat().st_size
        except OSError:
            size = 0  # opening it will say what is wrong
        if group and (len(group) == _GROUP_FILES or total + size > _GROUP_BYTES):
            yield group
            group, total = [], 0
        group.append(file)
        total += size
    if group:
        yield group


def show_report(console: Console, report: Report, collection: str) -> None:
    """Prints the summary."""
    done = (
        f"{report.added} added, {report.replaced} replaced, {report.unchanged} unchanged "
        f"in the collection {collection}"
    )
    console.print(done, style="green", markup=False, highlight=False)
    if report.skipped:
        console.print(f"{len(report.skipped)} skipped:", style="yellow")
        for path, reason in report.skipped:
            console.print(f"  {path}: {reason}", markup=False, highlight=False)


def all_documents(url: str, collection: str, key: str = "") -> list[dict[str, Any]]:
    """The collection's documents, by source. Raises `AskError`."""
    documents: list[dict[str, Any]] = []
    after = ""
    while True:
        query = {"collection": collection, "limit": 1000, **({"after": after} if after else {})}
        page = _call(url, "GET", "/v1/documents", query, key).json()
        documents += page["documents"]
        after = page["next"]
        if not after:
            return documents


def delete_document(url: str, collection: str, wanted: str, key: str = "") -> str:
    """Removes the document with this id or source; returns its source. Raises `AskError`."""
    matching = [d for d in all_documents(url, collection, key) if wanted in (d["id"], d["source"])]
    if not matching:
        path = Path(wanted).resolve().as_posix()
        matching = [d for d in all_documents(url, collection, key) if d["source"] == path]
    if not matching:
        raise AskError(f"the collection {collection} holds no document {wanted}")
    identifier = matching[0]["id"]
    _call(url, "DELETE", f"/v1/documents/{identifier}", {"collection": collection}, key)
    return str(matching[0]["source"])


def show_documents(console: Console, documents: Sequence[dict[str, Any]]) -> None:
    """Prints them as a table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("id")
    table.add_column("passages", justify="right")
    table.add_column("characters", justify="right")
    table.add_column("source", overflow="fold")
    for document in documents:
        table.add_row(
            document["id"],
            str(document["passages"]),
            str(document["characters"]),
            Text(document["source"]),
        )
    console.print(table)


def _call(url: str, method: str, path: str, query: dict[str, Any], key: str) -> Any:
    import httpx

    with _client(url, key) as client:
        try:
            response = client.request(method, path, params=query)
        except httpx.HTTPError as error:
            raise AskError(unreachable(url, str(error), "--url")) from None
    if response.status_code not in (200, 204):
        raise AskError(problem_text(url, response.status_code, response.content))
    return response


def _client(url: str, key: str) -> Any:
    import httpx

    return httpx.Client(
        base_url=url.rstrip("/"),
        timeout=_TIMEOUT_SECONDS,
        trust_env=False,
        headers=headers_with(key),
    )
