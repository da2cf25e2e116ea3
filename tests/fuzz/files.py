"""Documents that are broken, hostile, or none."""

from __future__ import annotations

import io
import random
import zipfile

from tests.fuzz import values
from tests.fuzz.cases import MARK

_PDF = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R
/Resources<</Font<</F 5 0 R>>>>>>endobj
4 0 obj<</Length 44>>stream
BT /F 12 Tf 10 100 Td (Ada wrote it in 1843.) Tj ET
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R>>
"""
_WORD = (
    '<?xml version="1.0"?><w:document xmlns:w="http://schemas.openxmlformats.org/'
    'wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>%s</w:t></w:r></w:p></w:body></w:document>'
)
_BOMB_BYTES = 80 * 1024 * 1024
_ENTITIES = (
    '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY a "aaaaaaaaaa">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + ']><w:document xmlns:w="x"><w:t>&i;</w:t></w:document>'
)


def _docx(document: str | bytes, **more: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", document)
        for name, data in more.items():
            archive.writestr(name, data)
    return made.getvalue()


def document(chance: random.Random) -> tuple[str, bytes]:
    """A file's name and bytes."""
    act = chance.randrange(12)
    words = values.text(chance)
    if act == 0:
        return "a.pdf", _PDF
    if act <= 2:
        return "b.pdf", values.mutated(chance, _PDF)
    if act == 3:
        return "c.pdf", b"%PDF-1.7\n" + chance.randbytes(400)
    if act == 4:
        return "d.docx", _docx(_WORD % f"{MARK} Ada")
    if act == 5:
        return "e.docx", values.mutated(chance, _docx(_WORD % "Ada wrote it."))
    if act == 6:
        hostile = (_ENTITIES, "<a>" * 20_000, "<w:document", "", "\x00", _WORD % words[:500])
        return "f.docx", _docx(chance.choice(hostile).encode("utf-8", "replace"))
    if act == 7 and chance.random() < 0.15:
        return "bomb.docx", _docx(b"<w:t>" + b"a" * _BOMB_BYTES)
    if act <= 9:
        html = f"<html><body><p>{words}<div>" + "<div>" * chance.choice((1, 50, 3_000))
        return "g.html", html.encode(chance.choice(("utf-8", "utf-16", "gb18030")), "replace")
    if act == 10:
        return "h.txt", chance.choice((b"", b"\xff\xfe\x00", chance.randbytes(300), b"\x00" * 500))
    return f"{words[:40]}.md", words.encode("utf-8", "replace")


def form(chance: random.Random) -> tuple[str, bytes]:
    """A multipart form's content type and bytes, mostly well formed."""
    boundary = chance.choice(("b0undary", "x" * 70, "----a'b"))
    parts = b""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        name, data = document(chance)
        name = name.replace("\r", "").replace("\n", "").replace('"', "")
        parts += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            f"Content-Type: application/octet-stream\r\n\r\n"
        ).encode("utf-8", "replace")
        parts += data + b"\r\n"
    body = parts + f"--{boundary}--\r\n".encode()
    if chance.random() < 0.25 and len(body) < 100_000:
        body = values.mutated(chance, body)
    given = boundary if chance.random() < 0.95 else chance.choice(("other", "", '"'))
    return f"multipart/form-data; boundary={given}", body
