"""The commands that need no services: help, plan, and errors."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from miaotui.cli.app import app
from miaotui.cli.layout import LayoutError, Wanted, lay_out
from miaotui.cli.render import highlight
from miaotui.cli.serve import SERVICES, variable
from tests.checkpoints import make_checkpoint
from tests.decoder_checkpoints import make_decoder
from tests.processes import clean_environment, free_port


def run(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """`miaotui` with these arguments, in this process."""
    environment = {"COLUMNS": str(columns), "MIAOTUI_URL": None, "MIAOTUI_MODEL": None}
    done = CliRunner().invoke(app, arguments, env=environment, prog_name="miaotui")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def serve(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """`miaotui serve`, which becomes another program and so needs a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "miaotui.cli", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean_environment(), "COLUMNS": str(columns)},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", "bert", layers=5)


@pytest.mark.parametrize("command", ["", "up", "ask", "write", "plan", "models", "status", "serve"])
def test_help_has_examples_and_fits(command: str) -> None:
    done = run(*command.split(), "--help", columns=80)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "miaotui" in done.stdout
    if command in ("up", "ask", "write", "plan", "serve"):
        assert "Example" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['miaotui', 'ask', '--help']\n"
        "from miaotui.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'grpc', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plan_as_json_adds_up(model: Path) -> None:
    done = run("plan", str(model), "--stages", "3", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    stages = plan["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1, 2]
    edges = [(stage["first_layer"], stage["end_layer"]) for stage in stages]
    assert edges[0][0] == 0
    assert edges[-1][1] == 5
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
    assert sum(stage["cost_share"] for stage in stages) == pytest.approx(1)
    weights = (model / "model.safetensors").stat().st_size
    assert sum(stage["bytes"] for stage in stages) == pytest.approx(weights, rel=0.05)
    assert all(stage["bytes"] == 4 * stage["parameters"] for stage in stages)


def test_plan_as_a_table(model: Path) -> None:
    done = run("plan", str(model), "--layers", "0-4,4-5")
    assert done.returncode == 0, done.stderr
    assert "--layers 0-4,4-5" in done.stdout
    assert "embeddings" in done.stdout
    assert "answer head" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "6"], "6 stages asked for; a model of 5 layers splits into 1 to 5"),
        (["--layers", "0-2,3-5"], "leaves a gap"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_plan_says_what_cannot_be(arguments: list[str], message: str, model: Path) -> None:
    done = run("plan", str(model), *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not done.stdout


@pytest.mark.parametrize("command", ["up", "plan"])
def test_a_directory_that_is_no_model(command: str, tmp_path: Path) -> None:
    option = ["--model"] if command == "up" else []
    done = run(command, *option, str(tmp_path))
    assert done.returncode == 2
    assert "has no config.json" in " ".join(done.stderr.split())


def test_ask_without_a_gateway_says_what_to_do() -> None:
    port = free_port()
    for flag, where in (("--url", f"http://127.0.0.1:{port}"), ("--grpc", f"127.0.0.1:{port}")):
        done = run("ask", "Who?", "--context", "Nobody.", flag, where)
        assert done.returncode == 1
        assert f"cannot reach a gateway at {where}" in " ".join(done.stderr.split())
        assert "miaotui up" in done.stderr


def test_up_says_which_models_do_not_fit(model: Path, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder", "llama", layers=1, tokenizer=False)
    for arguments, message in (
        (["--generator", str(model)], "finds answers and writes no text; give it with --model"),
        (["--model", str(decoder)], "this model writes text; give it with --generator"),
        (["--no-qa"], "there is no model to serve"),
        (["--model", "none"], "there is no model to serve"),
        (["--no-qa", "--generator", str(decoder), "--demo"], "leave --no-qa out"),
        (["--generator", str(tmp_path)], "has no config.json. --generator takes"),
    ):
        done = run("up", *arguments)
        assert done.returncode == 2, arguments
        assert message in " ".join(done.stderr.split()), arguments


def test_models_that_hear_and_see_get_services_of_their_own(tmp_path: Path) -> None:
    made = {}
    for kind in ("whisper", "vision-encoder-decoder"):
        made[kind] = tmp_path / kind
        made[kind].mkdir()
        (made[kind] / "config.json").write_text(json.dumps({"model_type": kind}))
    hears, sees = made.values()
    ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "encoder_stages": 0}
    layout = lay_out(
        Wanted(None, 1, transcriber=hears, captioner=sees, captioner_stages=1, **ports)
    )
    assert [service.name for service in layout.services] == [
        *("transcriber-tokenizer", "transcriber-shard-0", "transcriber-shard-1"),
        *("captioner-tokenizer", "captioner-shard-0", "gateway"),
    ]
    env = {service.name: service.env for service in layout.services}
    for name in ("transcriber", "captioner"):
        assert (
            env["gateway"][f"MIAOTUI_GATEWAY_{name.upper()}_SHARD"]
            == env[f"{name}-shard-0"]["MIAOTUI_SHARD_LISTEN"]
        )
    assert env["gateway"]["MIAOTUI_GATEWAY_GENERATOR_SHARD"] == ""
    with pytest.raises(LayoutError, match="writes down what is said; give it with --transcriber"):
        lay_out(Wanted(None, 1, generator=hears, **ports))
    with pytest.raises(LayoutError, match="describes pictures; give it with --captioner"):
        lay_out(Wanted(None, 1, transcriber=sees, **ports))


def test_up_decides_once_what_fast_means(model: Path) -> None:
    layout = lay_out(Wanted(model, 3, dtype="fast", http_port=0, grpc_port=0))
    dtypes = {s.env["MIAOTUI_SHARD_DTYPE"] for s in layout.services if s.name.startswith("shard-")}
    assert len(dtypes) == 1
    assert dtypes <= {"float32", "bfloat16"}
    with pytest.raises(LayoutError, match="'tpu'"):
        lay_out(Wanted(model, 1, dtype="fast", device="tpu", http_port=0, grpc_port=0))


def test_two_models_get_services_of_their_own(model: Path, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder", "llama", layers=2, tokenizer=False)
    wanted = Wanted(model, 3, generator=decoder, http_port=0, grpc_port=0)
    layout = lay_out(wanted)
    names = [service.name for service in layout.services]
    rings = [["tokenizer", "shard-0", "shard-1", "shard-2"]]
    rings += [["generator-tokenizer", "generator-shard-0", "generator-shard-1"]]
    assert names == [*rings[0], *rings[1], "encoder-0", "gateway"]
    assert [s.name for s in layout.services if not s.needed] == ["encoder-0"]
    env = {service.name: service.env for service in layout.services}
    gateway = env["gateway"]
    for prefix, setting, directory in (("", "", model), ("generator-", "GENERATOR_", decoder)):
        shard, tokenizer = env[f"{prefix}shard-0"], env[f"{prefix}tokenizer"]
        assert shard["MIAOTUI_SHARD_MODEL"] == tokenizer["MIAOTUI_TOKENIZER_MODEL"]
        assert shard["MIAOTUI_SHARD_MODEL"] == str(directory)
        assert gateway[f"MIAOTUI_GATEWAY_{setting}SHARD"] == shard["MIAOTUI_SHARD_LISTEN"]
        assert (
            gateway[f"MIAOTUI_GATEWAY_{setting}TOKENIZER"]
            == (tokenizer["MIAOTUI_TOKENIZER_LISTEN"])
        )
    assert gateway["MIAOTUI_GATEWAY_ENCODER_STAGES"] == env["encoder-0"]["MIAOTUI_SHARD_LISTEN"]
    assert env["encoder-0"]["MIAOTUI_SHARD_TASK"] == "embed"
    only = lay_out(Wanted(None, 1, generator=decoder, encoder_stages=0, http_port=0, grpc_port=0))
    assert "MIAOTUI_GATEWAY_ENCODER_STAGES" not in only.services[-1].env
    assert {s.name for s in only.services} == {*rings[1], "gateway"}
    assert only.services[-1].env["MIAOTUI_GATEWAY_SHARD"] == ""
    assert (only.answers, only.writes) == (False, True)


def test_write_says_which_options_do_not_fit() -> None:
    for arguments, message in (
        (["--to", "zh"], "--to goes with --scenario translate"),
        (["--scenario", "write", "--to", "zh"], "--to goes with --scenario translate"),
        (["--scenario", "write", "--raw"], "are for chats"),
    ):
        done = run("write", "Once", *arguments)
        assert done.returncode == 2, arguments
        assert message in " ".join(done.stderr.split()), arguments


def test_write_without_a_gateway_says_what_to_do() -> None:
    done = run("write", "Once", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "miaotui up --generator" in " ".join(done.stderr.split())


def test_ask_wants_one_passage_in_utf8(tmp_path: Path) -> None:
    file = tmp_path / "gb.txt"
    file.write_bytes("北京".encode("gb18030"))
    both = run("ask", "Who?", "--context", "Nobody.", "--file", str(file))
    assert (both.returncode, "give the passage once" in both.stderr) == (2, True)
    encoded = run("ask", "Who?", "--file", str(file))
    assert (encoded.returncode, "is not UTF-8 text" in " ".join(encoded.stderr.split())) == (
        2,
        True,
    )
    missing = run("ask", "Who?", "--file", str(tmp_path / "none"))
    assert (missing.returncode, "No such file" in " ".join(missing.stderr.split())) == (2, True)


@pytest.mark.parametrize("service", SERVICES)
def test_serve_has_a_flag_for_every_setting(service: str) -> None:
    import importlib

    _, module, name, _ = SERVICES[service]
    settings = getattr(importlib.import_module(module), name)
    done = serve(service, "--help", columns=200)
    assert done.returncode == 0, done.stderr
    for field in settings.model_fields:
        assert f"--{field.replace('_', '-')}" in done.stdout
        assert variable(settings, field) in done.stdout


def test_serve_passes_flags_on_and_keeps_the_exit_code() -> None:
    done = serve("shard", "--model", "/nowhere", "--stage", "-1")
    assert done.returncode == 2
    assert "MIAOTUI_SHARD_STAGE" in done.stderr
    unknown = serve("shard", "--modle", "/nowhere")
    assert unknown.returncode == 2
    assert "--modle" in unknown.stderr


@pytest.mark.parametrize(
    ("context", "answer", "shown"),
    [
        ("It rains. It was 1925, they say. So?", "1925", "It was 1925, they say."),
        ("今天下雨。成立于1925年，很大！好。", "1925年", "成立于1925年，很大！"),
        ("no stop at all 1925", "1925", "no stop at all 1925"),
        ("a b " * 100 + "1925" + " c d" * 100, "1925", None),
    ],
)
def test_the_answer_is_shown_in_its_sentence(context: str, answer: str, shown: str | None) -> None:
    start = context.index(answer)
    text = highlight(context, start, start + len(answer))
    marked = [text.plain[span.start : span.end] for span in text.spans]
    assert marked == [answer]
    if shown is None:
        assert len(text.plain) < 340
    else:
        assert text.plain == shown
