"""A folder of mixed documents, `miaotui add`, and ten questions to the bundled model."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from miaotui.cli.layout import BUNDLED_MODEL
from tests.processes import Cluster
from tests.retrieval.files import docx, pdf

FOLDER = {
    "towers/eiffel.md": (
        b"# Eiffel Tower\n\n## History\n\nIt is named after the engineer Gustave Eiffel, whose "
        b"company designed and built the tower from 1887 to 1889.\n\n## Height\n\nThe Eiffel Tower "
        b"is 330 metres tall."
    ),
    "austen.html": (
        b"<html><head><title>Jane Austen</title></head><body><h1>Life</h1><p>Jane Austen was born "
        b"in Steventon, Hampshire, on 16 December 1775.</p><h1>Work</h1><p>Her novel Pride and "
        b"Prejudice was published in 1813.</p></body></html>"
    ),
    "treaty.txt": (
        b"The war ended slowly. The Peace of Westphalia was signed in October 1648 in the cities "
        b"of Osnabruck and Munster, after years of talks."
    ),
    "canal.pdf": pdf(
        [
            ["Canals are waterways that were made by people."],
            ["The Suez Canal was opened in 1869. It connects", "two seas."],
        ]
    ),
    "dam.docx": docx(
        [
            ("Heading1", "Hoover Dam"),
            ("", "The Hoover Dam was built during the Great Depression. It stands in the Black "
             "Canyon of the Colorado River."),
        ]
    ),
    "中文/鲁迅.md": (
        "# 鲁迅\n\n鲁迅，原名周树人，1881年9月25日出生于浙江绍兴。他的代表作是《狂人日记》。"
    ).encode(),
    "中文/故宫.txt": "故宫博物院位于北京，成立于1925年，藏品超过一百八十万件。".encode("gb18030"),
    "中文/臺北.txt": "臺北101大樓位於臺北市信義區，高度為508公尺，於2004年完工。".encode("big5"),
    "picture.png": b"\x89PNG\r\n",
}  # fmt: skip
# question, what the answer must hold, its source, page, heading
QUESTIONS: list[tuple[str, str, str, int | None, str]] = [
    ("Who was the Eiffel Tower named after?", "Gustave Eiffel", "eiffel.md", None,
     "Eiffel Tower › History"),
    ("How tall is the Eiffel Tower?", "330", "eiffel.md", None, "Eiffel Tower › Height"),
    ("Where was Jane Austen born?", "Steventon", "austen.html", None, "Life"),
    ("When was Pride and Prejudice published?", "1813", "austen.html", None, "Work"),
    ("When was the Peace of Westphalia signed?", "1648", "treaty.txt", None, ""),
    ("When was the Suez Canal opened?", "1869", "canal.pdf", 2, ""),
    ("Where does the Hoover Dam stand?", "Black Canyon", "dam.docx", None, "Hoover Dam"),
    ("鲁迅出生于哪里？", "绍兴", "鲁迅.md", None, "鲁迅"),
    ("故宫博物院成立于哪一年？", "1925", "故宫.txt", None, ""),
    ("台北101大楼的高度是多少？", "508", "臺北.txt", None, ""),
]  # fmt: skip


@pytest.fixture(scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(BUNDLED_MODEL, stages=2) as running:
        yield running


async def miaotui(cluster: Cluster, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "miaotui.cli", *arguments),
        env={**os.environ, "MIAOTUI_URL": cluster.url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_ten_questions_over_a_mixed_folder(cluster: Cluster, tmp_path: Path) -> None:
    for name, data in FOLDER.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    said = await miaotui(cluster, "add", str(tmp_path))
    assert "8 added, 0 replaced, 0 unchanged" in said
    assert "picture.png: files of this kind are not read" in said.replace("\n", "")
    assert "0 added, 0 replaced, 8 unchanged" in await miaotui(cluster, "add", str(tmp_path))

    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=60) as client:

        async def ask(question: str) -> dict[str, Any]:
            response = await client.post("/v1/qa", json={"question": question})
            assert response.status_code == 200, response.text
            body: dict[str, Any] = response.json()
            return body

        wrong: list[tuple[str, object]] = []
        for question, expected, source, page, heading in QUESTIONS:
            body = await ask(question)
            if not body["answerable"]:
                wrong.append((question, "no answer"))
                continue
            answer = body["answers"][0]
            place = (Path(answer["source"]).name, answer["page"], answer["heading"])
            if expected not in answer["text"] or place != (source, page, heading):
                wrong.append((question, (answer["text"], *place)))
            document = (await client.get(f"/v1/documents/{answer['document']}")).json()
            assert document["text"][answer["start"] : answer["end"]] == answer["text"]
        assert wrong == []
        for question in ("What is the boiling point of mercury?", "月球的直径是多少？"):
            assert not (await ask(question))["answerable"], question

    told = await miaotui(cluster, "ask", "鲁迅出生于哪里？")
    assert "绍兴" in told
    assert "鲁迅.md" in told
    listed = await miaotui(cluster, "documents", "list", "--json")
    assert listed.count('"id"') == 8
    assert "removed" in await miaotui(cluster, "documents", "delete", str(tmp_path / "treaty.txt"))
    assert "do not say" in await miaotui(cluster, "ask", "When was the Peace of Westphalia signed?")
