"""`miaotui up --generator` and `miaotui write`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from miaotui.cli.app import app
from tests.decoder_checkpoints import make_decoder, make_decoder_tokenizer
from tests.e2e.conftest import Checkpoints
from tests.e2e.generating import Prompt, Reference
from tests.e2e.test_up import Up, running


def _run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "120"})


def test_two_models_beside_each_other(checkpoint: Checkpoints, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder", "gpt2", layers=2)
    arguments = [
        "--stages",
        "1",
        "--generator-stages",
        "1",
        "--generator",
        str(decoder),
        "--dtype",
        "float32",
    ]
    with running(Up(checkpoint("bert"), tmp_path / "log", *arguments)) as up:
        assert f'miaotui write "…" --url {up.url}' in up.log
        where = ("--url", up.url)
        prompt = "The Eiffel Tower is"
        raw = ("--raw", "--temperature", "0", "--max-tokens", "12")
        done = _run("write", prompt, *raw, "--json", *where)
        assert done.exit_code == 0, done.output
        written: dict[str, Any] = json.loads(done.stdout)
        tokenizer = make_decoder_tokenizer()
        ids = tuple(tokenizer(prompt)["input_ids"])
        expected = Reference(decoder).write(Prompt(ids, 12))
        assert written["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert written["usage"]["completion_tokens"] == len(expected)
        assert 0 < written["first_token_seconds"] <= written["seconds"]
        # From standard input, as plain text.
        plain = _run("write", *raw, *where, stdin=prompt)
        assert plain.stdout.rstrip("\n") == written["text"].rstrip("\n")
        chat = _run("write", "Hello", "--system", "Be brief.", "--max-tokens", "5", *where)
        assert chat.exit_code == 0, chat.output
        wrong = _run("write", "Hello", "--raw", "--max-tokens", "100000", "--stop", "", *where)
        assert wrong.exit_code == 1
        status = _run("status", *where)
        assert status.exit_code == 0
        assert status.stdout.count("ready") == 2
        assert "finds answers" in status.stdout
        assert "writes text" in status.stdout
        models = _run("models", *where).stdout
        assert "finds answers" in models
        assert "writes text" in models
        answered = _run("ask", "When?", "--context", "It was built in 1889.", *where)
        assert answered.exit_code == 0, answered.output
    up.assert_nothing_left()
