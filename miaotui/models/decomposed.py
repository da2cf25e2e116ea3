"""Models whose first layers read a question and its passage apart.

After DeFormer (Cao et al., ACL 2020): in the first layers tokens of the question attend to the
question alone, and tokens of the passage to the passage alone. What these layers make of a passage
is then the same for every question, is computed once, and kept. The layers after them read both
together.

`config.json` says so by `miaotui_decomposed_layers`, the number of such layers; `miaotui compress`
makes such models (`decompose=N`). The question is what a sequence begins with of token type 0, the
passage is the rest; positions count from 0 in both.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from miaotui.models.errors import PartitionError, UnsupportedModelError
from miaotui.models.layers import LayerRange

KEY = "miaotui_decomposed_layers"


def decomposed_layers(config: Any, *, layers: int, token_types: int) -> int:
    """Return how many of a model's `layers` read question and passage apart; mostly 0.

    Raises:
        UnsupportedModelError: all layers or more would, or the model cannot tell the parts.
    """
    count = getattr(config, KEY, 0)
    if not count:
        return 0
    if token_types < 2:
        raise UnsupportedModelError(
            f"{KEY}: question and passage are told apart by token types, and this "
            f"{config.model_type} model has none"
        )
    if not isinstance(count, int) or not 0 < count < layers:
        raise UnsupportedModelError(
            f"{KEY} is {count!r}; of {layers} layers 1 to {layers - 1} can read question and "
            "passage apart"
        )
    return count


def check_held(layers: LayerRange, decomposed: int) -> None:
    """Refuse a stage that would hold some of the decomposed layers only.

    Raises:
        PartitionError: says which it may hold.
    """
    if (layers.first < decomposed and layers.first) or layers.end < decomposed:
        raise PartitionError(
            f"layers {layers}: this model reads questions and passages apart in its first "
            f"{decomposed} layers, which stay together; the first stage must hold layers "
            f"0-{decomposed} at least"
        )


@dataclass(frozen=True, slots=True)
class Part:
    """The question or the passage of a sequence: tokens `begin` to `end` of its batch."""

    begin: int
    end: int
    sequence: int
    passage: bool

    @property
    def tokens(self) -> int:
        """How many."""
        return self.end - self.begin


def divide(lengths: Sequence[int], token_type_ids: torch.Tensor | None) -> list[Part]:
    """Return the parts of a batch's sequences, in order; none is empty.

    `token_type_ids`: integer [tokens]; None: all 0, that is, questions without a passage.
    """
    offsets = list(accumulate(lengths, initial=0))
    nonzero = [] if token_type_ids is None else (token_type_ids != 0).nonzero().flatten().tolist()
    seen = iter(nonzero)
    first = next(seen, offsets[-1])
    parts = []
    for sequence, (begin, end) in enumerate(pairwise(offsets)):
        while first < begin:
            first = next(seen, offsets[-1])
        middle = min(first, end)
        if begin < middle:
            parts.append(Part(begin, middle, sequence, passage=False))
        if middle < end:
            parts.append(Part(middle, end, sequence, passage=True))
    return parts


class PassageCache:
    """What the decomposed layers made of passages; the least recently used leave first.

    Thread-safe. Values are [tokens, hidden_size], and are neither changed nor copied.
    """

    def __init__(self, budget: int) -> None:
        """`budget`: bytes of activations that are kept."""
        self.budget = budget
        self.hits = 0
        self.shared = 0
        self.misses = 0
        self.on_computed: Callable[[bytes, torch.Tensor], None] | None = None
        """Told of each passage that was computed, on the thread that did; must be brief."""
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Of all activations that are kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._kept)

    def count(self, *, hits: int, shared: int, misses: int) -> None:
        """Add passages that were here or in the same batch, that came with the batch from where
        replicas share them, and that were computed."""
        self.hits += hits
        self.shared += shared
        self.misses += misses

    def get(self, key: bytes) -> torch.Tensor | None:
        """Return a passage's activations, if they are here."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._kept

    def put(self, key: bytes, hidden: torch.Tensor) -> None:
        """Keep a passage's activations, unless they are larger than all that may be kept."""
        with self._lock:
            old = self._kept.pop(key, None)
            self._bytes -= 0 if old is None else old.nbytes
            if hidden.nbytes > self.budget:
                return
            self._kept[key] = hidden
            self._bytes += hidden.nbytes
            while self._bytes > self.budget:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


def passage_key(
    salt: bytes, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
) -> bytes:
    """Return the name of a passage among those of a salt.

    `input_ids`, `token_type_ids`: integer [tokens], on the CPU; None: types are all 1.
    """
    digest = hashlib.blake2b(salt, digest_size=24, person=b"passage")
    digest.update(len(salt).to_bytes(4, "little"))
    digest.update(input_ids.to(torch.int32).contiguous().numpy().tobytes())
    if token_type_ids is not None and not bool((token_type_ids == 1).all()):
        digest.update(token_type_ids.to(torch.int32).contiguous().numpy().tobytes())
        digest.update(b"types")
    return digest.digest()


def passage_names(
    parts: Sequence[Part],
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    salts: Sequence[bytes] | None,
) -> list[bytes | None]:
    """Return the names of a batch's parts by which passages are kept; None for questions."""
    return [
        passage_key(
            salts[part.sequence] if salts else b"",
            input_ids[part.begin : part.end],
            None if token_type_ids is None else token_type_ids[part.begin : part.end],
        )
        if part.passage
        else None
        for part in parts
    ]


Compute = Callable[[torch.Tensor, torch.Tensor | None, Sequence[int]], torch.Tensor]
"""Embeds sequences (ids and types [tokens], and lengths) and takes them through the layers."""


def read_apart(
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor | None,
    lengths: Sequence[int],
    compute: Compute,
    cache: PassageCache | None = None,
    salts: Sequence[bytes] | None = None,
    found: Mapping[bytes, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return what the decomposed layers make of a batch, [tokens, hidden_size].

    Args:
        input_ids: integer [tokens], on the CPU; likewise `token_type_ids` (None: all 0).
        lengths: the sequences' tokens, in order.
        compute: called once at most, with all parts that must be computed.
        cache: keeps passages; None: all are computed.
        salts: a sequence each; only sequences of equal salt share a passage. None: all do.
        found: what was kept elsewhere of some of the passages, by name, where `compute` leaves
            its output.
    """
    parts = divide(lengths, token_type_ids)
    if cache is None:
        return compute(input_ids, token_type_ids, [part.tokens for part in parts])
    names = passage_names(parts, input_ids, token_type_ids, salts)
    known = {name: cache.get(name) for name in set(names) if name is not None}
    shared = 0
    for key, rows in (found or {}).items():
        # It may have been computed since it was looked for.
        if key in known and known[key] is None:
            known[key] = rows
            cache.put(key, rows)
            shared += 1
    missing = list(_missing(parts, names, known))
    # Neighbours of equal length attend together.
    missing.sort(key=lambda item: item[0].tokens)
    made: dict[int, torch.Tensor] = {}
    if missing:
        slices = [slice(part.begin, part.end) for part, _ in missing]
        tokens = [part.tokens for part, _ in missing]
        types = None if token_type_ids is None else torch.cat([token_type_ids[s] for s in slices])
        hidden = compute(torch.cat([input_ids[s] for s in slices]), types, tokens)
        for (part, name), rows in zip(missing, hidden.split(tokens), strict=True):
            made[part.begin] = rows
            if name is not None:
                known[name] = kept = rows.clone()  # a view would hold all of the batch
                cache.put(name, kept)
                if cache.on_computed is not None:
                    cache.on_computed(name, kept)
    computed = sum(part.passage for part, _ in missing)
    hits = sum(part.passage for part in parts) - shared - computed
    cache.count(hits=hits, shared=shared, misses=computed)
    return torch.cat(
        [
            made[part.begin] if name is None else _held(known[name])
            for part, name in zip(parts, names, strict=True)
        ]
    )


def _missing(
    parts: Sequence[Part],
    names: Sequence[bytes | None],
    known: dict[bytes, torch.Tensor | None],
) -> Iterator[tuple[Part, bytes | None]]:
    """Yield what must be computed: all questions, and each unknown passage once."""
    taken: set[bytes] = set()
    for part, name in zip(parts, names, strict=True):
        if name is None:
            yield part, None
        elif known[name] is None and name not in taken:
            taken.add(name)
            yield part, name


def _held(hidden: torch.Tensor | None) -> torch.Tensor:
    assert hidden is not None, "every passage was found or computed"
    return hidden
