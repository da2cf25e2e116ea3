"""Postings (which passages hold a term, and how often) as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from miaotui.retrieval.postgres.server import Connection
from miaotui.retrieval.terms import HashArray, Terms

# A row of PostgreSQL's binary COPY: the number of fields, then each field's size and value.
_ROW = np.dtype(
    [
        ("fields", ">i2"),
        *(("collection_size", ">i4"), ("collection", ">i4")),
        *(("term_size", ">i4"), ("term", ">i4")),
        *(("passage_size", ">i4"), ("passage", ">i8")),
        *(("count_size", ">i4"), ("count", ">i2")),
        *(("length_size", ">i4"), ("length", ">i4")),
    ]
)
_COLUMNS = ("collection", "term", "passage", "count", "length")
_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"


def insert_postings(
    connection: Connection, collection: int, ids: Sequence[int], terms: Sequence[Terms]
) -> None:
    """Adds the postings of passages; `ids` and their `terms` have the same order."""
    if not ids:
        return
    sizes = [len(one.hashes) for one in terms]
    rows = np.empty(sum(sizes), _ROW)
    rows["fields"] = len(_COLUMNS)
    for name in _COLUMNS:
        rows[f"{name}_size"] = _ROW[name].itemsize
    rows["collection"] = collection
    rows["term"] = signed(np.concatenate([one.hashes for one in terms]))
    rows["passage"] = np.repeat(np.array(ids, np.int64), sizes)
    rows["count"] = np.concatenate([one.counts for one in terms])
    rows["length"] = np.repeat(np.array([one.total for one in terms], np.int64), sizes)
    # In the index's order, a term's postings come to lie together.
    rows = rows[np.argsort(rows["term"], kind="stable")]
    with connection.cursor().copy(
        f"COPY postings ({', '.join(_COLUMNS)}) FROM STDIN (FORMAT BINARY)"
    ) as copy:
        copy.write(_BEGIN)
        copy.write(rows.tobytes())
        copy.write(_END)


def signed(hashes: HashArray) -> npt.NDArray[np.int32]:
    """Terms' hashes as the 32-bit integers that PostgreSQL has."""
    return hashes.astype(np.uint32, copy=False).view(np.int32)
