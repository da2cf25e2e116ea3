"""The vocabulary grows without moving what was there; both scripts share rows."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from miaotui.training.config import TrainConfig
from miaotui.training.export import (
    load_calibrations,
    save_calibrations,
    save_config,
    save_licence,
    save_tokenizer,
    save_weights,
)
from miaotui.training.glosses import parse, simplifications
from miaotui.training.model import to_plain
from miaotui.training.noanswer import Calibration
from miaotui.training.vocab import (
    Vocabulary,
    initial_rows,
    load_vocabulary,
    save_vocabulary,
)
from tests.training.conftest import ENTRIES, tiny_model


def test_known_tokens_keep_their_ids(vocabulary: Vocabulary, base_tokenizer: Path) -> None:
    before = Tokenizer.from_file(str(base_tokenizer)).get_vocab()
    after = vocabulary.tokenizer.get_vocab()
    for token, number in before.items():
        if not token.startswith("[unused"):
            assert after[token] == number
    assert sorted(after.values()) == list(range(vocabulary.size))


def test_scripts_share_a_row(vocabulary: Vocabulary) -> None:
    ids = [vocabulary.tokenizer.token_to_id(c) for c in "國国"]
    assert ids[0] != ids[1]
    assert int(vocabulary.rows[ids[0]]) == int(vocabulary.rows[ids[1]]) >= vocabulary.base_size


def test_chinese_is_no_longer_unknown(vocabulary: Vocabulary) -> None:
    assert "[UNK]" not in vocabulary.tokenizer.encode("王芳住在廣州").tokens


def test_dictionary_lines() -> None:
    lines = [
        "# a comment",
        "國 国 [guo2] /surname Guo/country (a state)/nation/CL:個|个[ge4]/",
        "後 后 [hou4] /back/behind/",
    ]
    entries = list(parse(lines))
    assert entries[0].senses == ("country", "nation")
    assert simplifications(entries) == {"國": "国", "後": "后"}


def test_rows_start_near_their_gloss(vocabulary: Vocabulary, base_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base_tokenizer))
    table = torch.randn(1000 + vocabulary.base_size, 64)
    rows = initial_rows(vocabulary, ENTRIES, table, tokenizer)
    assert rows.shape == (len(vocabulary.row_chars), 64)
    row = rows[next(i for i, chars in enumerate(vocabulary.row_chars) if "廣" in chars)]
    wide = table[tokenizer.token_to_id("wide")]
    assert torch.cosine_similarity(row, wide, dim=0) > 0.7


def test_vocabulary_survives_the_disk(vocabulary: Vocabulary, tmp_path: Path) -> None:
    save_vocabulary(vocabulary, tmp_path)
    loaded = load_vocabulary(tmp_path)
    assert torch.equal(loaded.rows, vocabulary.rows)
    assert loaded.tokenizer.get_vocab() == vocabulary.tokenizer.get_vocab()


def test_the_exported_model_is_the_trained_one(
    vocabulary: Vocabulary, config: TrainConfig, tmp_path: Path
) -> None:
    model = tiny_model(vocabulary).eval()
    plain = to_plain(model)
    save_weights(plain, tmp_path)
    save_tokenizer(vocabulary.tokenizer, tmp_path)
    save_config(plain, tmp_path, config, 3)
    save_calibrations(tmp_path, {"zh": Calibration(-1.0, 1.0), "en": Calibration(1.5, 2.0)})
    save_licence(tmp_path)

    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question, passage = "Who moved?", "In 1905 anna moved to 廣州。 李明住在北京"
    inputs = tokenizer(question, passage, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == vocabulary.tokenizer.encode(question, passage).ids
    with torch.no_grad():
        out = loaded(**inputs)
        mask = inputs["attention_mask"]
        hidden = model.hidden(inputs["input_ids"], mask, inputs["token_type_ids"])
        start, end = model.spans(hidden, mask)
    assert torch.allclose(out.start_logits, start, atol=2e-3)
    assert torch.allclose(out.end_logits, end, atol=2e-3)
    assert loaded.config.miaotui["no_answer_threshold"] == 1.5
    assert loaded.config.miaotui["max_length"] == 384
    assert load_calibrations(tmp_path)["zh"] == Calibration(-1.0, 1.0)
    assert "Apache License" in (tmp_path / "LICENSE").read_text()
