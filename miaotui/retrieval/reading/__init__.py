"""Files to text: plain text, Markdown, HTML, PDF and docx."""

from miaotui.retrieval.reading.document import Extracted, Heading, Limits
from miaotui.retrieval.reading.files import SUFFIXES, read_document

__all__ = ["SUFFIXES", "Extracted", "Heading", "Limits", "read_document"]
