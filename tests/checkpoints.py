"""Tiny checkpoints with random weights of the real architectures, for tests only.

`make_checkpoint` writes a complete Hugging Face directory: `config.json`, `model.safetensors`
(or an index with several files), and a small fast tokenizer trained on the texts below, so
that `AutoTokenizer` and `AutoModelForQuestionAnswering` load it like any published model.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    DistilBertTokenizer,
    ElectraConfig,
    ElectraTokenizer,
    PreTrainedConfig,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from miaotui.models.decomposed import KEY

FAMILIES: tuple[str, ...] = ("bert", "distilbert", "roberta", "xlm-roberta", "electra")

# (question, passage) pairs that every tokenizer here covers; also its training text.
EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "Where is the Eiffel Tower?",
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
        "It is named after the engineer Gustave Eiffel, whose company designed and built it "
        "from 1887 to 1889.",
    ),
    (
        "Who wrote Pride and Prejudice?",
        "Pride and Prejudice is an 1813 novel of manners by Jane Austen. It follows Elizabeth "
        "Bennet, who learns about the repercussions of hasty judgments.",
    ),
    (
        "How long is the Yangtze?",
        "The Yangtze River is 6,300 km (3,915 mi) long; it is the longest river in Eurasia and "
        "the third-longest in the world, after the Nile and the Amazon.",
    ),
    (
        "中国的首都是哪里?",
        "北京是中华人民共和国的首都,也是全国的政治、文化中心。二〇二〇年,北京市常住人口约为2189万人。",
    ),
    (
        "长江有多长?",
        "长江发源于青藏高原的唐古拉山脉,全长约6300公里,是亚洲第一长河,世界第三长河,"
        "仅次于尼罗河与亚马孙河。",
    ),
    (
        "《红楼梦》的作者是谁?",
        "《红楼梦》是清代作家曹雪芹创作的长篇小说,中国古典四大名著之一;全书共120回,"
        "前80回由曹雪芹所著。",
    ),
    (
        "What does PyTorch 是用什么语言写的 mean?",
        "PyTorch is written in Python, C++ and CUDA. 它由Meta AI开发,于2016年9月首次发布。"
        "Its e-mail list is open: you can ask “anything” — e.g. “how fast?” (50% faster!).",
    ),
)

_PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[]_{|}~,。、;:?!“”‘’()《》【】…—·")
_ALPHABET = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", *_PUNCTUATION]
_SUFFIXES = ["ce", "ed", "en", "er", "es", "ing", "ion", "ly", "ment", "th"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training_texts() -> list[str]:
    """Return the texts that the tokenizers are trained on."""
    return [text for pair in EXAMPLES for text in pair]


def make_tokenizer(family: str) -> Any:
    """Return a small fast tokenizer of the kind that `family` is published with.

    WordPiece (BERT, DistilBERT, ELECTRA), byte-level BPE (RoBERTa), Unigram with Metaspace
    and NFKC (XLM-RoBERTa). Raises `KeyError` for another family.
    """
    if family in ("bert", "distilbert", "electra"):
        kind = {"bert": BertTokenizer, "distilbert": DistilBertTokenizer}
        return kind.get(family, ElectraTokenizer)(
            vocab=dict(_wordpiece_vocabulary()), do_lower_case=True, model_max_length=512
        )
    if family == "roberta":
        vocabulary, merges = _bpe_vocabulary()
        return RobertaTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=512)
    if family == "xlm-roberta":
        tokenizer = XLMRobertaTokenizer(vocab=_unigram_vocabulary(), model_max_length=512)
        tokenizer._tokenizer.normalizer = normalizers.NFKC()
        return tokenizer
    raise KeyError(f"no test tokenizer for family {family!r}; there are {FAMILIES}")


def make_config(
    family: str,
    *,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    vocab_size: int = 1024,
    max_length: int = 512,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """Return the configuration of a small model.

    `max_length` is the longest sequence in tokens; RoBERTa's tables get the extra rows that
    its position offset needs. ELECTRA gets embeddings half as wide as `hidden`, as in
    electra-small, so that `embeddings_project` exists.
    """
    common: dict[str, Any] = {"vocab_size": vocab_size}
    if family == "distilbert":
        return DistilBertConfig(
            **common,
            dim=hidden,
            n_layers=layers,
            n_heads=heads,
            hidden_dim=4 * hidden,
            max_position_embeddings=max_length,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
        )
    common |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    if family == "bert":
        return BertConfig(**common, max_position_embeddings=max_length, pad_token_id=0)
    if family == "electra":
        return ElectraConfig(
            **common, max_position_embeddings=max_length, embedding_size=hidden // 2, pad_token_id=0
        )
    pad = 1 if pad_token_id is None else pad_token_id
    config = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}[family]
    return config(
        **common,
        max_position_embeddings=max_length + pad + 1,
        type_vocab_size=1,
        pad_token_id=pad,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-5,
    )


def make_checkpoint(
    directory: Path | str,
    family: str = "bert",
    *,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    seed: int = 0,
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "50GB",
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    Weights are drawn so that activations keep their scale from layer to layer and logits
    spread over several units: unlike transformers' default initialisation (standard
    deviation 0.02, after which every token looks alike), errors then show in the logits.

    Args:
        directory: where to write; made if it is missing.
        family: one of `FAMILIES` (transformers' `model_type`).
        layers: transformer layers.
        hidden: width of the activations, a multiple of `heads`.
        heads: attention heads.
        seed: same seed, same bytes.
        max_length: longest sequence in tokens.
        dtype: element type of the stored tensors.
        max_shard_size: as in `save_pretrained`; small values give several files and an index.
        tokenizer: whether to write tokenizer files too.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer(family)
    config = make_config(
        family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocab_size=len(tok),
        max_length=max_length,
    )
    model = AutoModelForQuestionAnswering.from_config(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        tok.model_max_length = max_length
        tok.save_pretrained(directory)
    return directory


def decomposed(directory: Path, layers: int) -> Path:
    """The same checkpoint, the first layers of which read question and passage apart."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, KEY: layers}))
    return directory


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill a model's parameters in place with reproducible random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if "LayerNorm" in name or "layer_norm" in name:
                values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                values *= 0.1
            elif "embeddings." not in name:
                values *= parameter.shape[-1] ** -0.5
            parameter.copy_(values)


def random_sequences(
    config: PreTrainedConfig, lengths: Sequence[int], seed: int = 0
) -> list[torch.Tensor]:
    """Return int64 id sequences of the given lengths, drawn over the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, config.vocab_size, (length,), generator=generator) for length in lengths
    ]


# WordPiece and Unigram vocabularies are counted here, not by the library's trainers, whose
# result differs from run to run: equal seeds must give equal bytes in every process.


@cache
def _wordpiece_vocabulary() -> tuple[tuple[str, int], ...]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    pieces = {character.lower() for character in _ALPHABET}
    pieces |= {f"##{character}" for character in pieces if character.isalnum()}
    pieces |= {f"##{suffix}" for suffix in _SUFFIXES}
    for text in training_texts():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            pieces |= {word[0], *(f"##{character}" for character in word[1:])}
            if len(word) <= 7:
                pieces.add(word)
    return tuple((piece, index) for index, piece in enumerate([*special, *sorted(pieces)]))


@cache
def _bpe_vocabulary() -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training_texts(),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = tuple((left, right) for left, right in model["merges"])
    return tuple(sorted(model["vocab"].items(), key=lambda item: item[1])), merges


@cache
def _unigram_vocabulary() -> list[tuple[str, float]]:
    counts = Counter(("▁", *_ALPHABET, *_SUFFIXES))
    for text in training_texts():
        for word in unicodedata.normalize("NFKC", text).split():
            counts.update(word)
            counts["▁"] += 1
            if word.isascii():
                counts[f"▁{word}"] += 1
            else:
                counts.update(word[i : i + 2] for i in range(len(word) - 1) if word.isalpha())
    total = sum(counts.values())
    learned = sorted((piece, round(log(count / total), 6)) for piece, count in counts.items())
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return [*special, *learned, ("<mask>", 0.0)]
