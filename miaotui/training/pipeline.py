"""The steps of a run put together: vocabulary, first lessons, training, evaluation."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from miaotui.training.align import align, choose_words
from miaotui.training.config import TrainConfig
from miaotui.training.data import Corpus, Split, read_corpus, subset
from miaotui.training.features import Encoded, Maker, Special, encode
from miaotui.training.glosses import read_dictionary
from miaotui.training.model import TrainingModel, base_folder, base_state, from_base
from miaotui.training.predict import Pair, model_logits, predict
from miaotui.training.sampler import Sampler
from miaotui.training.scorer import best_scores
from miaotui.training.train import Trainer, pick_device
from miaotui.training.vocab import (
    Vocabulary,
    choose_characters,
    extend,
    initial_rows,
    load_vocabulary,
    save_vocabulary,
)

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """What training and evaluation share."""

    config: TrainConfig
    vocabulary: Vocabulary
    model: TrainingModel
    encoded: Encoded
    special: Special


def prepare_rows(config: TrainConfig, corpus: Corpus) -> tuple[Vocabulary, torch.Tensor]:
    """The extended vocabulary and its new rows, made once and kept in the work folder."""
    folder = config.work / "vocabulary"
    rows_file = folder / "rows.pt"
    if rows_file.exists():
        return load_vocabulary(folder), torch.load(rows_file, weights_only=True)
    base = base_folder()
    base_tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    base_tokenizer.no_padding()
    base_tokenizer.no_truncation()
    texts = [p.text for p in corpus.passages if p.language == "zh" and p.split == "train"]
    for question in corpus.select("train"):
        if corpus.passages[question.passage].language == "zh":
            texts.append(question.text)
    entries = read_dictionary()
    known = set(base_tokenizer.get_vocab())
    groups = choose_characters(texts, entries, known, config.vocabulary)
    vocabulary = extend(base / "tokenizer.json", groups)
    table = base_state(base)["embeddings.word_embeddings.weight"]
    rows = initial_rows(vocabulary, entries, table, base_tokenizer)
    model = from_base(base, rows, vocabulary.rows, config.seed).to(pick_device())
    words = choose_words(texts, entries, {c for group in groups for c in group})
    log.info("%d characters in %d rows, %d words", sum(map(len, groups)), len(groups), len(words))
    align(model, vocabulary, base_tokenizer, words, epochs=config.align_epochs, seed=config.seed)
    rows = model.words.new.detach().cpu().clone()
    save_vocabulary(vocabulary, folder)
    torch.save(rows, rows_file)
    return vocabulary, rows


def set_up(config: TrainConfig, base: Path | None = None) -> Setup:
    """Read the data, make or load the vocabulary, put the model together."""
    torch.set_num_threads(config.threads)
    corpus = read_corpus(config.data)
    vocabulary, rows = prepare_rows(config, corpus)
    model = from_base(base or base_folder(), rows, vocabulary.rows, config.seed)
    encoded = encode(corpus, vocabulary.tokenizer, config.max_question)
    return Setup(config, vocabulary, model, encoded, Special.of(vocabulary.tokenizer))


def question_numbers(encoded: Encoded, split: Split) -> dict[str, list[int]]:
    """Domain to the numbers of its questions in a split."""
    numbers: dict[str, list[int]] = {}
    for number, question in enumerate(encoded.corpus.questions):
        passage = encoded.corpus.passages[question.passage]
        if passage.split == split:
            numbers.setdefault(passage.domain, []).append(number)
    return numbers


def scores(setup: Setup, model: TrainingModel, split: Split, limit: int) -> dict[str, float]:
    """EM and F1 in per cent of at most ``limit`` random questions of each domain."""
    result = {}
    for domain, numbers in question_numbers(setup.encoded, split).items():
        chosen = random.Random(0).sample(numbers, min(limit, len(numbers)))
        corpus = setup.encoded.corpus
        pairs = [Pair(n, corpus.questions[n].passage) for n in chosen]
        found = predict(model_logits(model), setup.encoded, setup.special, pairs)
        marks = []
        for pair, prediction in zip(pairs, found, strict=True):
            passage = corpus.passages[pair.passage]
            truths = [
                passage.text[a.start : a.end] for a in corpus.questions[pair.question].answers
            ]
            marks.append(best_scores(prediction.text, truths, passage.language))
        result[f"{domain}_em"] = round(100 * sum(m[0] for m in marks) / len(marks), 1)
        result[f"{domain}_f1"] = round(100 * sum(m[1] for m in marks) / len(marks), 1)
    return result


def make_trainer(setup: Setup) -> Trainer:
    """A trainer on the training split, scored on the development split as it goes."""
    config = setup.config
    numbers = {
        domain: subset(found, config.fraction, config.seed)
        for domain, found in question_numbers(setup.encoded, "train").items()
    }
    maker = Maker(
        setup.encoded, setup.special, setup.vocabulary.rows.numpy(), setup.vocabulary.base_size
    )
    sampler = Sampler(maker, numbers, config)
    return Trainer(
        setup.model,
        sampler,
        config,
        lambda model: scores(setup, model, "dev", config.evaluate_questions),
    )
