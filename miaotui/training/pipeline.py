"""The steps of a run put together: vocabulary, first lessons, training, evaluation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForQuestionAnswering

from miaotui.training.align import align, choose_words
from miaotui.training.card import model_card
from miaotui.training.config import TrainConfig
from miaotui.training.data import Corpus, read_corpus, subset
from miaotui.training.export import (
    check_size,
    load_calibrations,
    save_calibrations,
    save_config,
    save_licence,
    save_tokenizer,
    save_weights,
)
from miaotui.training.features import Encoded, Special, encode
from miaotui.training.glosses import is_han, read_dictionary
from miaotui.training.maker import Maker
from miaotui.training.model import TrainingModel, base_folder, base_state, from_base, to_plain
from miaotui.training.predict import model_logits
from miaotui.training.report import (
    Results,
    calibrations_of,
    em_f1,
    measure,
    plain_logits,
    question_numbers,
    results,
)
from miaotui.training.sampler import Sampler
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
    texts += [
        question.text
        for question in corpus.select("train")
        if corpus.passages[question.passage].language == "zh"
    ]
    entries = read_dictionary()
    known = set(base_tokenizer.get_vocab())
    groups = choose_characters(texts, entries, known, config.vocabulary)
    vocabulary = extend(base / "tokenizer.json", groups)
    table = base_state(base)["embeddings.word_embeddings.weight"]
    rows = initial_rows(vocabulary, entries, table, base_tokenizer)
    model = from_base(base, rows, vocabulary.rows, config.seed).to(pick_device())
    words = choose_words(texts, entries, {c for group in groups for c in group})
    log.info("%d characters in %d rows, %d words", sum(map(len, groups)), len(groups), len(words))
    align(model, vocabulary, base_tokenizer, words, epochs=config.align_epochs, seed=1)
    rows = model.words.new.detach().cpu().clone()
    save_vocabulary(vocabulary, folder)
    torch.save(rows, rows_file)
    return vocabulary, rows


def set_up(config: TrainConfig, base: Path | None = None) -> Setup:
    """Read the data, make or load the vocabulary, put the model together."""
    torch.set_num_threads(config.threads)
    corpus = read_corpus(config.data)
    vocabulary, rows = prepare_rows(config, corpus)
    model = from_base(base or base_folder(), rows, vocabulary.rows, config.seed, config.dropout)
    encoded = encode(corpus, vocabulary.tokenizer, config.max_question)
    return Setup(config, vocabulary, model, encoded, Special.of(vocabulary.tokenizer))


def dev_scores(setup: Setup, model: TrainingModel) -> dict[str, float]:
    """EM and F1 in per cent on part of the development split."""
    measured = measure(
        model_logits(model),
        setup.encoded,
        setup.special,
        "dev",
        setup.config.evaluate_questions,
        setup.config,
        wrong=False,
    )
    found: dict[str, float] = {}
    for domain, answered in measured.own.items():
        found[f"{domain}_em"], found[f"{domain}_f1"] = em_f1(setup.encoded, answered)
    return found


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
    return Trainer(setup.model, sampler, config, lambda model: dev_scores(setup, model))


def export(setup: Setup, out: Path, limit: int) -> Results:
    """Write the averaged model of the checkpoint to ``out``, calibrated and measured.

    The threshold comes from the development split, the scores from the held-out one, both by the
    files as written. ``limit`` is how many questions of each domain are asked.
    """
    config = setup.config
    trainer = make_trainer(setup)
    trainer.resume()
    plain = to_plain(trainer.averaged().cpu())
    out.mkdir(parents=True, exist_ok=True)
    save_weights(plain, out)
    save_tokenizer(setup.vocabulary.tokenizer, out)
    save_licence(out)
    save_config(plain, out, config, trainer.step)
    log.info("%d bytes in %s", check_size(out), out)
    return evaluate(config, out, limit, calibrate=True, card=True)


def evaluate(
    config: TrainConfig, folder: Path, limit: int, *, calibrate: bool = False, card: bool = False
) -> Results:
    """Scores of an exported model on the held-out split, with its own tokenizer and thresholds.

    With ``calibrate`` the thresholds are first found anew on the development split and written to
    its ``config.json``; with ``card`` the scores are, to ``results.json`` and ``README.md``.
    """
    torch.set_num_threads(config.threads)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = Special.of(tokenizer)
    encoded = encode(read_corpus(config.data), tokenizer, config.max_question)
    model = AutoModelForQuestionAnswering.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    logits = plain_logits(model)
    if calibrate:
        dev = measure(logits, encoded, special, "dev", limit, config)
        save_calibrations(folder, calibrations_of(encoded, dev))
    steps = model.config.miaotui["trained_steps"]
    heldout = measure(logits, encoded, special, "heldout", limit, config)
    found = results(encoded, heldout, load_calibrations(folder), "heldout", steps)
    if card:
        characters = sum(len(t) == 1 and is_han(t) for t in tokenizer.get_vocab())
        (folder / "results.json").write_text(found.model_dump_json(indent=2) + "\n")
        text = model_card(config, encoded.corpus, found, characters)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return found
