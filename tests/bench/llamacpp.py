"""llama.cpp as a peer for generation: many streams in one batch, in a process of its own.

`python -m tests.bench.llamacpp FILE TYPE` is that process: it speaks to the library directly,
since its Python class writes one text at a time. All streams go through one `llama_decode`, on all
cores. How attention is computed and the cache laid out makes a difference that depends on the
machine and on how many streams there are, so that all ways are tried.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.child import Child, answer_lines
from tests.bench.gguf_file import write_gguf

Written = tuple[list[list[int]], float]
"""Ids of each stream, and all streams' tokens a second."""
_CELLS = 256
"""A stream's share of the cache is a multiple of this many tokens."""


def why_not() -> str | None:
    """Why llama.cpp cannot run here; `None` where it can."""
    if missing := [name for name in ("llama_cpp", "gguf") if not find_spec(name)]:
        return f"not installed: {', '.join(missing)} (make bench-llama installs them)"
    return None


class LlamaCpp:
    """A checkpoint in llama.cpp, as the bench asks it; `RuntimeError` where its process ends."""

    def __init__(self, stack: ExitStack, model: Path, file_type: str) -> None:
        file = model.with_name(f"{model.name}-{file_type}.gguf")
        write_gguf(model, file, file_type)
        self._kind = f"llama.cpp {file_type}"
        self.name = self._kind
        self._child = stack.enter_context(Child(__name__, str(file), file_type))

    def tune(self, batch: list[list[int]], tokens: int) -> None:
        """Find how as many streams of as many tokens go fastest, for the calls that follow."""
        self.name = f"{self._kind}, {self._child('tune', batch=batch, tokens=tokens)}"

    def generate(self, batch: list[list[int]], tokens: int) -> Written:
        """Greedy continuations of equally long prompts; needs `tune` with as many before."""
        ids, rate = self._child("generate", batch=batch, tokens=tokens)
        return ids, rate


class _Batch:
    """A `llama_batch` of `each` tokens of every stream, whose last ones get logits."""

    def __init__(self, library: Any, streams: int, each: int) -> None:
        count = streams * each
        self.struct = library.llama_batch_init(count, 0, 1)
        self.struct.n_tokens = count

        def view(field: Any) -> Any:
            return np.ctypeslib.as_array(field, (count,))

        self.tokens = view(self.struct.token).reshape(streams, each)
        self.positions = view(self.struct.pos).reshape(streams, each)
        self.positions[:] = np.arange(each)
        view(self.struct.n_seq_id)[:] = 1
        view(self.struct.logits)[:] = np.arange(count) % each == each - 1
        for place in range(count):
            self.struct.seq_id[place][0] = place // each


class _Context:
    """One way to write `streams` texts of `prompt` and `tokens` tokens."""

    def __init__(
        self,
        decoder: Decoder,
        streams: int,
        prompt: int,
        tokens: int,
        *,
        flash: bool,
        unified: bool,
    ) -> None:
        self._library = library = decoder.library
        self._shape = streams, decoder.vocabulary
        parameters = library.llama_context_default_params()
        parameters.n_ctx = streams * -(-(prompt + tokens) // _CELLS) * _CELLS
        parameters.n_batch = max(parameters.n_batch, streams * prompt)
        parameters.n_seq_max = streams
        parameters.n_threads = parameters.n_threads_batch = os.cpu_count()
        parameters.type_k = parameters.type_v = decoder.cache_type
        parameters.kv_unified = unified
        kinds = library.LLAMA_FLASH_ATTN_TYPE_DISABLED, library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.flash_attn_type = kinds[flash]
        self._context = library.llama_init_from_model(decoder.model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp made no context; its error is above")
        self._memory = library.llama_get_memory(self._context)
        self._prompt = _Batch(library, streams, prompt)
        self._step = _Batch(library, streams, 1)

    def generate(self, batch: list[list[int]], tokens: int) -> Written:
        started = time.perf_counter()
        self._library.llama_memory_clear(self._memory, False)
        self._prompt.tokens[:] = batch
        self._step.positions[:] = len(batch[0])
        written = np.empty((len(batch), tokens), np.int32)
        written[:, 0] = self._next(self._prompt)
        for place in range(1, tokens):
            self._step.tokens[:, 0] = written[:, place - 1]
            written[:, place] = self._next(self._step)
            self._step.positions += 1
        seconds = time.perf_counter() - started
        return written.tolist(), written.size / seconds

    def _next(self, batch: _Batch) -> Any:
        """Each stream's likeliest token after a batch."""
        if code := self._library.llama_decode(self._context, batch.struct):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, self._shape).argmax(1)

    def close(self) -> None:
        """Free what the library holds."""
        for batch in (self._prompt, self._step):
            self._library.llama_batch_free(batch.struct)
        self._library.llama_free(self._context)


def _log_error(level: int, text: bytes, _: object) -> None:
    """Leave out what llama.cpp says of every model (ggml.h: errors are 4, their next lines 5)."""
    if level >= 4:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


class Decoder:
    """A GGUF file in this process."""

    def __init__(self, file: Path, file_type: str) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        # Kept, since the library calls it as long as it runs.
        self._log = llama_cpp.llama_log_callback(_log_error)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError("llama.cpp took no such file; its error is above")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        # A cache in float16, llama.cpp's default, would round what float32 weights do not.
        self.cache_type = llama_cpp.GGML_TYPE_F32 if file_type == "f32" else llama_cpp.GGML_TYPE_F16
        self._context: _Context | None = None

    def tune(self, batch: list[list[int]], tokens: int) -> str:
        """Try all ways twice, keep the fastest; its name."""
        if self._context:
            self._context.close()
            self._context = None
        best, name = 0.0, ""
        for flash, unified in product((True, False), (True, False) if len(batch) > 1 else (True,)):
            context = _Context(
                self, len(batch), len(batch[0]), tokens, flash=flash, unified=unified
            )
            rate = max(context.generate(batch, tokens)[1] for _ in range(2))
            if rate <= best:
                context.close()
                continue
            if self._context:
                self._context.close()
            self._context, best = context, rate
            name = f"{'flash' if flash else 'plain'} attention"
            if len(batch) > 1:
                name += ", one cache" if unified else ", a cache a stream"
        return name

    def generate(self, batch: list[list[int]], tokens: int) -> Written:
        """Greedy continuations; needs `tune` with as many streams and tokens before."""
        assert self._context
        return self._context.generate(batch, tokens)


if __name__ == "__main__":
    served = Decoder(Path(sys.argv[1]), sys.argv[2])
    answer_lines(tune=served.tune, generate=served.generate)
