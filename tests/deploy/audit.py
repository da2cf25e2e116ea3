"""Looks the locked versions up among known vulnerabilities, where pip-audit and its service are.

`python -m tests.deploy.audit` ends with 1 where it finds some or cannot look; with `--lenient` it
says so and ends with 0, because what others find out must not break a build that was well.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent.parent / "requirements.lock"
_SECONDS = 120


def versions(lock: str) -> list[str]:
    """The pinned versions in a lock file, without hashes."""
    return re.findall(r"^[A-Za-z0-9][\w.-]*==[\w.!+-]+", lock, re.MULTILINE)


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """What pip-audit's JSON tells: lines about vulnerabilities, and how many were looked up."""
    found = [one for one in report["dependencies"] if "skip_reason" not in one]
    lines = [
        f"{one['name']} {one['version']}: {hole['id']}, fixed in "
        f"{', '.join(hole['fix_versions']) or 'no version yet'}"
        for one in found
        for hole in one["vulns"]
    ]
    return lines, len(found)


def look_up(pinned: list[str]) -> dict[str, Any] | None:
    """pip-audit's report; `None` where it is not installed or cannot reach its service."""
    program = Path(sys.executable).with_name("pip-audit")
    command = str(program) if program.exists() else shutil.which("pip-audit")
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text("\n".join(pinned), "utf-8")
        arguments = ["--no-deps", "--disable-pip", "--progress-spinner=off", "-f", "json"]
        try:
            done = subprocess.run(
                [command, *arguments, "-r", str(wanted)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            report: dict[str, Any] = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            return None
    return report


def main(arguments: list[str]) -> int:
    """Audits the lock file; returns the exit code."""
    lenient = "--lenient" in arguments
    if lenient and not Path(sys.executable).with_name("pip-audit").exists():
        print("versions are not audited: `make audit` installs pip-audit and does it")
        return 0
    pinned = versions(LOCK.read_text("utf-8"))
    report = look_up(pinned)
    lines, seen = ([], 0) if report is None else verdict(report)
    for line in lines:
        print(f"vulnerable: {line}")
    print(
        f"{seen} of {len(pinned)} versions were looked up, {len(lines)} vulnerabilities are known"
    )
    return 0 if lenient or (seen and not lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
