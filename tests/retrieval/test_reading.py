"""Reading files: kinds, encodings, headings and pages, and clear refusals."""

from __future__ import annotations

from io import BytesIO
from zipfile import ZipFile

import pytest
from pypdf import PdfReader, PdfWriter

from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.reading import Limits, read_document
from miaotui.retrieval.reading.pdf import join_lines
from tests.retrieval.files import docx, pdf

SIMPLIFIED = "北京是中华人民共和国的首都，人口超过两千万。故宫位于城市的中心。\n"
TRADITIONAL = "臺北是臺灣的首都，人口超過兩百萬。國立故宮博物院位於士林區。\n"
LATIN = "The café near the château was naïve, as résumés go; nothing else is to be said.\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (SIMPLIFIED, "utf-8"),
        (SIMPLIFIED, "utf-8-sig"),
        (SIMPLIFIED, "utf-16"),
        (SIMPLIFIED, "utf-16-le"),
        (SIMPLIFIED, "utf-16-be"),
        (SIMPLIFIED, "gb18030"),
        (SIMPLIFIED, "gbk"),
        (f"Beijing {SIMPLIFIED} and more", "gb18030"),
        (TRADITIONAL, "big5"),
        (TRADITIONAL, "utf-8"),
        (TRADITIONAL, "gb18030"),
        (f"Taipei {TRADITIONAL}", "big5"),
        (LATIN, "cp1252"),
        (LATIN, "utf-16"),
        ("plain ASCII\r\nwith line ends\r\n", "ascii"),
    ],
)
def test_text_is_read_in_its_encoding(text: str, encoding: str) -> None:
    assert read_document("a.txt", text.encode(encoding)).text == text


def test_markdown_is_read_as_it_is_shown() -> None:
    source = (
        "---\nauthor: nobody\n---\n# Guide\n\nRead *this* [first](http://x.example).\n\n"
        "## Install\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nx  =  1\n```\n"
        "### 细节\n\n内容。\n"
    )
    read = read_document("guide.MD", source.encode())
    assert read.title == "Guide"
    assert "nobody" not in read.text
    assert "Read this first." in read.text
    assert "1\t2" in read.text
    assert "x  =  1" in read.text
    assert [(h.level, h.text) for h in read.headings] == [(1, "Guide"), (2, "Install"), (3, "细节")]
    for heading in read.headings:
        assert read.text.startswith(heading.text, heading.start)
    assert read.heading_at(read.text.index("内容")) == "Guide › Install › 细节"
    assert read.heading_at(read.text.index("one")) == "Guide › Install"


def test_html_gives_what_a_page_shows() -> None:
    source = (
        "<!doctype html><html><head><title>T &amp; U</title><style>p{}</style></head><body>"
        "<nav>menu</nav><h1>One</h1><p>First\n  <b>bold</b>&nbsp;text.<script>x()</script></p>"
        "<h2>Two</h2><div>Second<br>line</div><pre>a\n  b</pre><nav>never closed"
    )
    read = read_document("page.html", source.encode())
    assert read.title == "T & U"
    assert read.text == "One\n\nFirst bold\xa0text.\n\nTwo\n\nSecond\nline\n\na\n  b"
    assert read.heading_at(len(read.text) - 1) == "One › Two"


def test_html_in_the_encoding_that_it_names() -> None:
    source = '<meta http-equiv="Content-Type" content="text/html; charset=gb2312"><p>中文</p>'
    assert read_document("a.htm", source.encode("gb2312")).text == "中文"


def test_docx_has_headings_paragraphs_and_tables() -> None:
    table = (
        "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc>"
        "<w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
    )
    data = docx([("Heading1", "报告"), ("", "第一段。"), ("Heading2", "Two"), ("", "x")], table)
    read = read_document("报告.docx", data)
    assert read.text == "报告\n\n第一段。\n\nTwo\n\nx\n\na\tb"
    assert read.title == "报告"
    assert read.heading_at(len(read.text) - 1) == "报告 › Two"


def test_pdf_has_pages() -> None:
    data = pdf([["The first page of it."], ["The second page", "goes on here."]])
    read = read_document("a.pdf", data)
    assert read.text == "The first page of it.\n\nThe second page goes on here."
    assert [read.page_at(read.text.index(word)) for word in ("first", "second", "here")] == [
        1,
        2,
        2,
    ]


def test_lines_of_a_page_become_paragraphs() -> None:
    page = (
        "Introduction\nAn under-\nstanding of the many lines that are\nbroken as they were set.\n"
        "The next one follows here, and has\n也有中文的段落，它分成了两行，\n因为一行放不下。"
    ).replace("An under-", "This is the beginning of an under-")
    assert join_lines(page) == [
        "Introduction",
        "This is the beginning of an understanding of the many lines that are broken as they "
        "were set.",
        "The next one follows here, and has 也有中文的段落，它分成了两行，因为一行放不下。",
    ]


def _encrypted() -> bytes:
    writer = PdfWriter(clone_from=PdfReader(BytesIO(pdf([["secret"]]))))
    writer.encrypt("password", algorithm="RC4-128")
    output = BytesIO()
    writer.write(output)
    return output.getvalue()


def _zip(name: str, content: str) -> bytes:
    output = BytesIO()
    with ZipFile(output, "w") as archive:
        archive.writestr(name, content)
    return output.getvalue()


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>'


@pytest.mark.parametrize(
    ("source", "data", "why"),
    [
        ("a.png", b"x", "of this kind"),
        ("a.doc", b"x", "save it as .docx"),
        ("noending", b"x", "of this kind"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\t ", "no text"),
        ("a.txt", b"\x00\x01\x02\x03binary", "not text"),
        ("a.txt", bytes(range(128, 256)) * 8, "not text"),
        ("a.md", b"\n\n---\n", "no text"),
        ("a.pdf", b"not a pdf", "damaged"),
        ("a.pdf", pdf([["text"]])[:200], "damaged"),
        ("a.pdf", pdf([[]]), "no text"),
        ("a.pdf", _encrypted(), "password"),
        ("a.docx", b"not a zip", "damaged"),
        # The directory's place, far before the file's beginning.
        ("a.docx", _zip("word/document.xml", "<a/>")[:-6] + b"\xff\xff\xff\x7f\0\0", "damaged"),
        ("a.docx", _zip("other.xml", "x"), "not a Word document"),
        ("a.docx", _zip("word/document.xml", "<broken"), "damaged"),
        ("a.docx", _zip("word/document.xml", BOMB), "document type"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(source: str, data: bytes, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        read_document(source, data)


def test_limits() -> None:
    limits = Limits(max_bytes=1000, max_characters=100, max_pages=1)
    with pytest.raises(UnreadableError, match="1,000 bytes"):
        read_document("a.txt", b"x" * 1001, limits)
    with pytest.raises(UnreadableError, match="100 characters"):
        read_document("a.txt", b"x" * 101, limits)
    with pytest.raises(UnreadableError, match="100 characters"):
        read_document("a.html", b"<p>" + b"x" * 101, limits)
    with pytest.raises(UnreadableError, match="1,000 bytes"):
        read_document("a.docx", docx([("", "x" * 5000)]), limits)
    with pytest.raises(UnreadableError, match="1 pages"):
        read_document("a.pdf", pdf([["a"], ["b"]]), Limits(max_pages=1))
