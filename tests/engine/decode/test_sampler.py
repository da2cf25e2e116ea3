"""The sampler: filters as transformers', draws by position, penalties, drafts, grammars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from miaotui.engine.decode.filters import Choice, draw_tokens, thresholds, uniform
from miaotui.engine.decode.grammar import Grammars
from miaotui.engine.decode.sampler import Sampler, SampleRows
from miaotui.engine.decode.suppression import Suppression
from miaotui.engine.decode.types import SampledTokens, SamplingParams, SequenceStart
from miaotui.models.errors import BatchError
from tests.decoder_checkpoints import make_decoder_tokenizer

VOCAB = 1000
CPU = torch.device("cpu")
NONE = np.zeros(0, np.int32)


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


def start(params: SamplingParams, prompt: Any = (), written: Any = ()) -> SequenceStart:
    return SequenceStart(params, np.array(prompt, np.int32), np.array(written, np.int32))


def sampler_with(*begins: SequenceStart, vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(vocab, CPU)
    for index, begin in enumerate(begins):
        sampler.begin(index, begin)
    return sampler


def choice(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    position: int = 0,
) -> Choice:
    return Choice(temperature, top_k, top_p, min_p, seed, position)


FILTERS = [
    (1.0, 5, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.3, 0, 1.0, 0.1),
    (0.5, 40, 0.8, 0.05),
    (2.0, 0, 0.999, 0.0),  # far more than the first candidates
    (1.0, 3, 0.2, 0.9),
    (1.0, 5000, 0.95, 0.001),
    (1.0, 1, 0.0, 1.0),
]


def test_filters_keep_what_transformers_keep() -> None:
    """All rows with their own filters at once, over a flat and a peaked distribution."""
    for spread in (0.5, 3.0):
        logits = logits_of(len(FILTERS), spread=spread)
        choices = [choice(t, k, p, m) for t, k, p, m in FILTERS]
        scaled = logits / torch.tensor([[t] for t, *_ in FILTERS])
        kept = scaled >= thresholds(scaled, choices)[:, None]
        for row, (temperature, top_k, top_p, min_p) in enumerate(FILTERS):
            steps: list[Any] = [TemperatureLogitsWarper(temperature)]
            steps += [TopKLogitsWarper(top_k)] if top_k else []
            steps += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
            steps += [MinPLogitsWarper(min_p)] if min_p else []
            expected = LogitsProcessorList(steps)(
                torch.zeros(1, 1, dtype=torch.int64), logits[row : row + 1].clone()
            )[0]
            assert torch.equal(kept[row], expected > -torch.inf), (spread, row)
        assert kept.sum(-1)[0] == 5
        assert spread > 1 or kept.sum(-1)[4] > 256


def test_ties_do_not_depend_on_a_sort() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 300:310] = 4.0
    kept = logits >= thresholds(logits, [choice(top_k=3)])[:, None]
    assert kept[0].nonzero()[:, 0].tolist() == list(range(300, 310))


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 positions, for a filtered and an unfiltered row."""
    draws = 20_000
    logits = logits_of(1, seed=4, vocab=12, spread=1.2)
    for top_k in (0, 5):
        tokens = []
        for begin in range(0, draws, 2000):
            choices = [choice(0.8, top_k, seed=11, position=begin + i) for i in range(2000)]
            tokens += draw_tokens(logits.expand(2000, -1).clone(), choices)
        scaled = logits[0] / 0.8
        if top_k:
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
        expected = scaled.softmax(-1) * draws
        counts = torch.bincount(torch.tensor(tokens), minlength=12)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        # 99.9th percentile of chi-square with 11 and 4 degrees of freedom.
        assert square < (31.3 if top_k == 0 else 18.5)


def test_uniform_draws_are_uniform_over_seeds_and_positions() -> None:
    for values in (
        [uniform(7, position) for position in range(10_000)],
        [uniform(seed, 3) for seed in range(10_000)],
        [uniform(seed, seed) for seed in range(10_000)],
    ):
        counts = np.histogram(values, 20, (0.0, 1.0))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 99.9th percentile, 19 degrees
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.04
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(1, spread=0.3)
    mine = choice(seed=5, position=9)
    alone = draw_tokens(logits.clone(), [mine])[0]
    others = [choice(0.0), choice(0.3, 7, seed=1), mine, choice(2.0, position=9)]
    assert draw_tokens(logits.expand(4, -1).clone(), others)[2] == alone
    elsewhere = [draw_tokens(logits.clone(), [choice(seed=5, position=p)])[0] for p in range(20)]
    assert len(set(elsewhere)) > 15


def sequential(
    params: SamplingParams, rows: torch.Tensor, prompt: Any = (), first: int = 10
) -> list[int]:
    """Tokens sampled one batch each from successive rows."""
    sampler = sampler_with(start(params, prompt))
    return [
        int(sampler.sample(rows[i : i + 1], [SampleRows(0, first + i)])[0].token_ids[0])
        for i in range(len(rows))
    ]


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=4),
    SamplingParams(repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=0.7),
    SamplingParams(temperature=0.9, frequency_penalty=3.0, repetition_penalty=0.8, seed=5),
    SamplingParams(logit_bias={1: 4.0, 7: -100.0}, logprobs=2),
]


@pytest.mark.parametrize("right", [0, 2, 5])
@pytest.mark.parametrize("params", PARAMS)
def test_drafts_sample_what_single_steps_sample(params: SamplingParams, right: int) -> None:
    """Penalties at each place see the accepted tokens before it."""
    rows = logits_of(1, seed=8, spread=1.5).expand(6, -1) + logits_of(6, seed=9, spread=0.3)
    prompt = [3, 4, 5]
    expected = sequential(params, rows, prompt)
    draft = [*expected[:right], (expected[right] + 1) % VOCAB, *expected[right + 1 :]][:5]
    sampler = sampler_with(start(params, prompt), start(PARAMS[1]))
    both = torch.cat([logits_of(1, seed=1), rows])
    other, mine = sampler.sample(both, [SampleRows(1, 4), SampleRows(0, 10, draft)])
    assert mine.token_ids.tolist() == expected[: right + 1]
    assert len(other.token_ids) == 1
    assert len(mine.logprobs) == (right + 1 if params.logprobs is not None else 0)
    assert not mine.complete


@pytest.mark.parametrize("params", PARAMS)
def test_a_sequence_that_starts_again_goes_on_the_same(params: SamplingParams) -> None:
    rows = logits_of(1, seed=2, spread=1.5).expand(8, -1) + logits_of(8, seed=3, spread=0.3)
    prompt = [9, 8, 7]
    expected = sequential(params, rows, prompt)
    sampler = sampler_with(start(params, prompt, expected[:4]))
    again = [
        int(sampler.sample(rows[i : i + 1], [SampleRows(0, 10 + i)])[0].token_ids[0])
        for i in range(4, 8)
    ]
    assert again == expected[4:]


def test_repetition_penalty_is_transformers() -> None:
    logits = logits_of(1, spread=1.0)
    order = logits[0].argsort(descending=True).tolist()
    seen = order[:3] + order[-3:]
    for penalty in (1.5, 4.0, 0.5):
        processed = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits.clone())
        # Half in the prompt, half in the text; each counts once.
        params = SamplingParams(repetition_penalty=penalty)
        sampler = sampler_with(start(params, seen[:3] * 2, seen[3:]))
        row = logits[0].clone()
        sampler._sequences[0].penalise(row)
        torch.testing.assert_close(row, processed[0])
        result = sampler.sample(logits, [SampleRows(0, 6)])
        assert result[0].token_ids.tolist() == processed.argmax(-1).tolist()


def test_presence_and_frequency_count_the_text_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = sampler_with(start(params, [1, 2, 3], [5, 5, 6]))
    row = torch.zeros(VOCAB)
    sampler._sequences[0].penalise(row)
    expected = torch.zeros(VOCAB)
    expected[5], expected[6] = -1.0, -0.75
    torch.testing.assert_close(row, expected)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    params = SamplingParams(temperature=0.2, top_k=1, logit_bias={best: -100.0}, logprobs=4)
    (result,) = sampler_with(start(params)).sample(logits, [SampleRows(0, 1)])
    expected = logits[0].log_softmax(-1)
    token = int(result.token_ids[0])
    assert token == int(logits[0].topk(2).indices[1])
    (place,) = result.logprobs
    assert place.chosen[0] == token
    assert place.chosen[1] == pytest.approx(float(expected[token]), abs=1e-5)
    assert [pair[0] for pair in place.top] == logits[0].topk(4).indices.tolist()
    assert place.top[0][1] == pytest.approx(float(expected[best]), abs=1e-5)
    none = SamplingParams(logprobs=0)
    (bare,) = sampler_with(start(none)).sample(logits, [SampleRows(0, 1)])
    assert bare.logprobs[0].top == ()
    assert bare.logprobs[0].chosen[0] == best


def test_raw_logits_are_left_alone() -> None:
    logits = logits_of(3)
    before = logits.clone()
    sampler = sampler_with(*(start(params, [1, 2], [3]) for params in PARAMS[3:6]))
    sampler.sample(logits, [SampleRows(i, 5) for i in range(3)])
    assert torch.equal(logits, before)


def test_what_cannot_be_is_refused() -> None:
    sampler = sampler_with(start(SamplingParams()))
    with pytest.raises(BatchError, match="has not begun"):
        sampler.sample(logits_of(1), [SampleRows(4, 0)])
    with pytest.raises(BatchError, match="do not fit"):
        sampler.sample(logits_of(3), [SampleRows(0, 0, [5])])
    with pytest.raises(BatchError, match="logit_bias"):
        sampler.begin(1, start(SamplingParams(logit_bias={VOCAB: 1.0})))
    sampler.release([0, 99])
    assert len(sampler) == 0


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "year": {"type": "integer", "minimum": 1000, "maximum": 2999},
        },
        "required": ["city", "year"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    make_decoder_tokenizer().save_pretrained(made)
    (made / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    return made


def write_json(
    sampler: Sampler, index: int, rows: torch.Tensor, written: int = 0
) -> tuple[list[int], list[SampledTokens]]:
    tokens: list[int] = []
    results: list[SampledTokens] = []
    for step in range(written, len(rows)):
        (result,) = sampler.sample(rows[step : step + 1], [SampleRows(index, step)])
        results.append(result)
        tokens += result.token_ids.tolist()
        if result.complete:
            break
    return tokens, results


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_fit_the_schema(directory: Path, temperature: float) -> None:
    vocab = 700  # more than the tokenizer has, as in padded models
    tokenizer = make_decoder_tokenizer()
    grammars = Grammars(directory, vocab)
    texts = set()
    for seed in range(5):
        sampler = Sampler(vocab, CPU, grammars)
        params = SamplingParams(temperature=temperature, seed=seed, json_schema=SCHEMA)
        sampler.begin(0, start(params))
        rows = logits_of(80, seed=seed, vocab=vocab)
        tokens, results = write_json(sampler, 0, rows)
        assert [r.complete for r in results] == [False] * (len(results) - 1) + [True]
        text = tokenizer.decode(tokens)
        value = json.loads(text)
        assert set(value) == {"city", "year"}
        assert 1000 <= value["year"] <= 2999
        texts.add(text)
        # Nothing but a stop token may follow.
        (after,) = sampler.sample(logits_of(1, vocab=vocab), [SampleRows(0, 80)])
        assert after.token_ids[0] in (2, 4)
        # From the middle: the same.
        again = Sampler(vocab, CPU, grammars)
        again.begin(0, start(params, written=tokens[:6]))
        assert write_json(again, 0, rows, 6)[0] == tokens[6:]
        # As a draft, with a token that cannot be at the end.
        ahead = Sampler(vocab, CPU, grammars)
        ahead.begin(0, start(params))
        draft = [*tokens[:-1], tokens[-1]]
        (whole,) = ahead.sample(rows[: len(draft) + 1], [SampleRows(0, 0, draft)])
        assert whole.token_ids.tolist() == tokens
        assert whole.complete
    assert len(texts) == 5


def test_a_schema_that_fails_late_ends_its_text_only(directory: Path, tmp_path: Path) -> None:
    for grammars in (None, Grammars(tmp_path, VOCAB), Grammars(directory, VOCAB)):
        sampler = Sampler(VOCAB, CPU, grammars)
        bad = "{" if grammars and grammars.stop_ids else SCHEMA
        sampler.begin(0, start(SamplingParams(json_schema=bad)))
        sampler.begin(1, start(SamplingParams()))
        logits = logits_of(2)
        ended, other = sampler.sample(logits, [SampleRows(0, 0), SampleRows(1, 0)])
        assert ended.complete
        assert not other.complete
        assert other.token_ids[0] == logits[1].argmax()


def test_suppressed_tokens_are_never_written() -> None:
    """One never, one not as a text's first; whatever else is asked for, and beside a draft."""
    suppression = Suppression(torch.tensor([3]), torch.tensor([5]))
    row = torch.tensor([[0.0, 1.0, 2.0, 9.0, 6.0, 7.0, 0.5, 0.0]])
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=1, logprobs=0)):
        sampler = Sampler(8, CPU, suppression=suppression)
        sampler.begin(0, start(params))
        sampler.begin(1, start(params, written=[1]))  # begun before, and resumed
        first, resumed = sampler.sample(row.repeat(2, 1), [SampleRows(0, 1), SampleRows(1, 2)])
        assert (first.token_ids.tolist(), resumed.token_ids.tolist()) == ([4], [5])
        (drafted,) = sampler.sample(row.repeat(3, 1), [SampleRows(0, 2, [5, 3])])
        assert drafted.token_ids.tolist() == [5, 5]
