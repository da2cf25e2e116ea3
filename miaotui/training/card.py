"""The model card, written from the configuration and the measured results."""

from __future__ import annotations

from miaotui.training.config import TrainConfig
from miaotui.training.data import DOMAINS, Corpus
from miaotui.training.report import Results

_HEAD = """---
language: [en, zh]
license: apache-2.0
library_name: transformers
pipeline_tag: question-answering
---

# Miaotui's bundled question-answering model

Finds the answer to a question in a passage, in English and in Chinese, as a span of the passage.
Six layers, 384 wide, fp16 safetensors, made by `python -m miaotui.training` from
all-MiniLM-L6-v2 (Apache-2.0, see
`LICENSE` and `NOTICE`).

```python
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model = AutoModelForQuestionAnswering.from_pretrained("miaotui/bundled/qa", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("miaotui/bundled/qa")
```
"""


def _mixture(config: TrainConfig) -> str:
    early, late = config.early.shares(), config.late.shares()
    rows = [f"| {name} | {early[name]:.0%} | {late[name]:.0%} |" for name in early]
    return "\n".join(["| domain | share at first | share at the end |", "|---|---|---|", *rows])


def _data(corpus: Corpus) -> str:
    counts: dict[tuple[str, str], int] = {}
    for question in corpus.questions:
        passage = corpus.passages[question.passage]
        key = (passage.domain, passage.split)
        counts[key] = counts.get(key, 0) + 1
    lines = [
        "| domain | source | licence | split by | train | dev | held out |",
        "|---|---|---|---|---|---|---|",
    ]
    for domain in DOMAINS:
        numbers = [counts.get((domain.name, split), 0) for split in ("train", "dev", "heldout")]
        lines.append(
            f"| {domain.name} | {domain.source} | {domain.licence} | {domain.unit} | "
            + " | ".join(map(str, numbers))
            + " |"
        )
    return "\n".join(lines)


def _scores(found: Results) -> str:
    lines = [
        "| domain | questions | EM | F1 | AUROC no answer | wrong passage refused | right kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in found.domains.items():
        lines.append(
            f"| {name} | {s.questions} | {s.em:.1f} | {s.f1:.1f} | "
            f"{'' if s.auroc is None else f'{s.auroc:.3f}'} | {s.refused_wrong} % | "
            f"{s.kept_right} % |"
        )
    return "\n".join(lines)


def _weaknesses(found: Results) -> str:
    chinese = [s.f1 for n, s in found.domains.items() if n in ("cmrc", "drcd")]
    english = [s.f1 for n, s in found.domains.items() if n in ("wiki", "amazon", "reddit")]
    lines = []
    if chinese:
        mean = sum(chinese) / len(chinese)
        lines.append(
            f"- Chinese is the weaker language: mean character F1 {mean:.1f} on held-out "
            "questions. The base never read Chinese; all it knows of it comes from a dictionary "
            "and about 1,700 passages. Expect wrong spans on anything but plain questions."
        )
    if english:
        lines.append(
            f"- English: mean F1 {sum(english) / len(english):.1f} over the three passage domains."
            " Answers are spans: it cannot count, compare, compute or say yes or no."
        )
    pooled = found.auroc.get("all")
    if pooled is not None:
        lines.append(
            f"- Telling that a passage holds no answer: AUROC {pooled:.3f} on wrong passages of "
            "the same article (reviews and, mostly, posts: of the same domain). It was never "
            "shown questions written to be unanswerable, like those of SQuAD 2.0, and will be "
            "worse on them."
        )
    lines += [
        "- Chinese characters outside its vocabulary are unknown to it.",
        "- Trained on windows shorter than those it is used with (see below); long passages are "
        "read through overlapping windows.",
        "- The sources' biases (Wikipedia, reviews, forum posts) are its own.",
    ]
    return "\n".join(lines)


def model_card(config: TrainConfig, corpus: Corpus, found: Results, characters: int) -> str:
    """The whole README.md. ``characters`` is how many Chinese ones the vocabulary has."""
    pooled = ", ".join(f"{name} {value:.3f}" for name, value in found.auroc.items())
    thresholds = ", ".join(
        f"{name} threshold {value:.2f}, scale {found.scale[name]:.2f}"
        for name, value in found.threshold.items()
    )
    return f"""{_HEAD}
## Scores

On articles (reddit: passages) kept out of training, measured on these very files, windows of
{config.max_length} tokens that overlap by {config.stride}. F1 is SQuAD token F1 for English,
CMRC 2018 character F1 for Chinese.

{_scores(found)}

No-answer AUROC, right against wrong passages, QAMR left out: {pooled}.

## No answer

The no-answer score is `start[CLS] + end[CLS]` (the least over the windows) minus the best span's
`start + end` (the most over the windows). `P(no answer) = 1 / (1 + exp(-(score - threshold) /
scale))`, fitted on the development split with as many wrong passages as right ones, for each
language: {thresholds}.
They are in `config.json` under `miaotui`, English's as `no_answer_threshold`, all under
`no_answer_by_language`. The shares in the table above are at
these thresholds: where questions mostly have an answer, a higher one keeps more of them.

## Known weaknesses

{_weaknesses(found)}

## Data

{_data(corpus)}

Chinese characters' first embeddings: CC-CEDICT, CC BY-SA 4.0. Some of these licences ask that what
is adapted from them is shared alike; none of their text is in this folder. The split is by a hash
of the article's title (passage's text for reddit), so no article is in two splits.

## Training

Seed {config.seed}, {found.steps} steps of {config.batch} questions, AdamW. Rates: {config.rate:g}
for the top layer and {config.layer_decay:g} times that for each layer below,
{config.rate_words:g} for the base's embeddings, {config.rate_new:g} for the new rows; warm-up
{config.warmup} steps, constant to step {config.decay_from}, then falling linearly, to be zero at
step {config.steps}. Weights shipped: running average (decay {config.average:g}). Loss: cross
entropy of start and end against the votes of all annotators; in {config.finish} last steps, at
{config.finish_factor:.0%} of the rates and falling to zero, against the first annotator's answer.
Windows: crops of {config.crop_low} to {config.crop_first} passage tokens at first, rising, up to
{config.crop_late} from step {config.late_from} on. {config.unanswerable:.0%}, later
{config.unanswerable_late:.0%} and at last {config.unanswerable_finish:.0%} of the questions are
paired with a passage, or a part of their own, that does not answer them.

Chinese: {characters} characters in the vocabulary; those that differ by script only shared a row
while they were trained. Rows start from the English glosses of the
characters, then learn to give words the sentence vector of their gloss ({config.align_epochs}
epochs, encoder frozen), then learn with the questions and, {config.mask:.0%} of the Chinese passage
tokens being masked, by predicting those (weight {config.mask_weight:g}).

{_mixture(config)}
"""
