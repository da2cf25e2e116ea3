"""A tiny world for the training tests: hand-made passages, a tiny tokenizer, a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig

from miaotui.training.config import TrainConfig
from miaotui.training.data import DOMAINS, Corpus, read_domain
from miaotui.training.features import Encoded, Special, encode
from miaotui.training.glosses import Entry
from miaotui.training.maker import Maker
from miaotui.training.model import TrainingModel
from miaotui.training.sampler import Sampler
from miaotui.training.train import Trainer
from miaotui.training.vocab import Vocabulary, choose_characters, extend

NAMES = ["anna", "bert", "carl", "dora", "emil", "fred", "gina", "hans"]
PLACES = ["rome", "oslo", "bonn", "cairo", "lima", "kiev", "riga", "delhi"]
JOBS = ["baker", "pilot", "nurse", "smith", "judge", "miner"]
CHINESE_NAMES = ["王芳", "李明", "張偉", "陳靜"]
CHINESE_PLACES = ["北京", "上海", "臺灣", "廣州"]

ENTRIES = [
    Entry("國", "国", ("country",)),
    Entry("國王", "国王", ("king",)),
    Entry("國家", "国家", ("country",)),
    Entry("國語", "国语", ("speech",)),
    Entry("廣", "广", ("wide",)),
    Entry("臺灣", "台湾", ("Taiwan",)),
    Entry("廣州", "广州", ("Guangzhou",)),
    Entry("張", "张", ("sheet",)),
    Entry("陳", "陈", ("old",)),
    Entry("靜", "静", ("quiet",)),
    Entry("偉", "伟", ("great",)),
]


def english_article(number: int) -> dict[str, object]:
    """One article of three passages with two questions each."""
    rng = random.Random(number)
    paragraphs = []
    for part in range(3):
        name, place, job = rng.choice(NAMES), rng.choice(PLACES), rng.choice(JOBS)
        text = f"In {1900 + number} {name} the {job} moved to {place}. It rained for {part} days."
        paragraphs.append(
            {
                "context": text,
                "qas": [
                    {
                        "id": f"{number}-{part}-{word}",
                        "question": f"{word} moved in {1900 + number}?",
                        "answers": [{"text": answer, "answer_start": text.index(answer)}] * 2,
                    }
                    for word, answer in (("Who", name), ("Where", place))
                ],
            }
        )
    return {"title": f"article {number}", "paragraphs": paragraphs}


def chinese_article(number: int) -> dict[str, object]:
    """One article of one passage with one question."""
    rng = random.Random(number)
    name, place = rng.choice(CHINESE_NAMES), rng.choice(CHINESE_PLACES)
    text = f"{number}年，{name}住在{place}。"
    answer = {"text": place, "answer_start": text.index(place)}
    question = {"id": f"zh-{number}", "question": f"{name}住在哪裡？", "answers": [answer]}
    return {
        "title": "",
        "id": f"zh-{number}",
        "paragraphs": [{"context": text, "qas": [question]}],
    }


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made questions as files of the names the pipeline expects."""
    folder = tmp_path_factory.mktemp("questions")
    files = {
        "wiki.json": [english_article(n) for n in range(40)],
        "cmrc_trial.json": [chinese_article(n) for n in range(20)],
        "cmrc_dev.json": [chinese_article(n) for n in range(100, 120)],
    }
    for name, articles in files.items():
        (folder / name).write_text(json.dumps({"data": articles}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(data_folder: Path) -> Corpus:
    """The made questions of two domains."""
    found = Corpus([], [])
    for domain in DOMAINS:
        if domain.name in ("wiki", "cmrc"):
            read_domain(data_folder, domain, found)
    return found


@pytest.fixture(scope="session")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer with BERT's rules that knows the English words and no Chinese."""
    words = "in the moved to it rained for days who where ? . ,".split()  # noqa: SIM905
    words += ["country", "king", "speech", "wide"]
    unused = [f"[unused{i}]" for i in range(4)]
    digits = [*"0123456789", *(f"##{d}" for d in "0123456789")]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *unused, *digits, *words, *NAMES, *PLACES, *JOBS]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def vocabulary(corpus: Corpus, base_tokenizer: Path) -> Vocabulary:
    """The tiny tokenizer with the Chinese characters of the made passages."""
    texts = [p.text for p in corpus.passages] + [q.text for q in corpus.questions]
    known = set(Tokenizer.from_file(str(base_tokenizer)).get_vocab())
    return extend(base_tokenizer, choose_characters(texts, ENTRIES, known, 40))


@pytest.fixture(scope="session")
def encoded(corpus: Corpus, vocabulary: Vocabulary) -> Encoded:
    """The made questions in tokens."""
    return encode(corpus, vocabulary.tokenizer, 32)


@pytest.fixture(scope="session")
def special(vocabulary: Vocabulary) -> Special:
    """The special tokens' ids."""
    return Special.of(vocabulary.tokenizer)


@pytest.fixture(scope="session")
def maker(encoded: Encoded, special: Special, vocabulary: Vocabulary) -> Maker:
    """Draws windows of the made questions."""
    return Maker(encoded, special, vocabulary.rows.numpy(), vocabulary.base_size)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of a few small steps."""
    return TrainConfig(
        work=tmp_path / "run",
        seed=7,
        steps=8,
        finish=4,
        warmup=2,
        decay_from=6,
        late_from=6,
        batch=6,
        chunk=4,
        crop_steps=8,
        rate=2e-3,
        rate_words=2e-3,
        rate_new=2e-3,
        rate_heads=2e-3,
        checkpoint_every=5,
        evaluate_every=1000,
        threads=2,
    )


def tiny_model(vocabulary: Vocabulary, seed: int = 0) -> TrainingModel:
    """A random two-layer model for the tiny tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary.base_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "sdpa"
    base = 0.1 * torch.randn(vocabulary.base_size, 32)
    new = 0.1 * torch.randn(len(vocabulary.row_chars), 32)
    return TrainingModel(config, base, new, vocabulary.rows)


def tiny_trainer(
    maker: Maker, vocabulary: Vocabulary, numbers: dict[str, list[int]], config: TrainConfig
) -> Trainer:
    """A trainer over the made questions, from the same random model each time."""
    return Trainer(tiny_model(vocabulary), Sampler(maker, numbers, config), config)
