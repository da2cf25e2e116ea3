"""`python -m tests.soak` (`make soak`): all services under load while everything breaks."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from tests.namespaces import missing
from tests.soak.judge import Rules
from tests.soak.latency import measure_links, show_links
from tests.soak.report import show
from tests.soak.run import Options, run


def _arguments() -> argparse.Namespace:
    defaults, rules = Options(), Rules()
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of load and faults")
    parser.add_argument("--clients", type=int, default=defaults.clients, help="that ask at once")
    parser.add_argument("--timeout", type=float, default=defaults.timeout, help="of a question")
    parser.add_argument("--text-timeout", type=float, default=defaults.text_timeout)
    parser.add_argument("--grace", type=float, default=rules.grace, help="beyond a deadline")
    parser.add_argument("--recovery", type=float, default=rules.recovery, help="after a fault")
    parser.add_argument("--memory", type=int, default=rules.memory >> 20, help="MiB of growth")
    parser.add_argument("--replicas", type=int, default=1, help="of each stage")
    parser.add_argument("--tiny", action="store_true", help="random weights, not the bundled model")
    parser.add_argument("--no-tls", action="store_true", help="plain text between services")
    parser.add_argument(
        "--latency-only", action="store_true", help="only delays and a capture of the links"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report for programs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the services' logs here")
    return parser.parse_args()


async def _main(arguments: argparse.Namespace, directory: Path, console: Console) -> int:
    options = Options(
        minutes=arguments.minutes,
        seed=arguments.seed,
        clients=arguments.clients,
        timeout=arguments.timeout,
        text_timeout=arguments.text_timeout,
        replicas=arguments.replicas,
        tls=not arguments.no_tls,
        tiny=arguments.tiny,
        rules=Rules(
            grace=arguments.grace, recovery=arguments.recovery, memory=arguments.memory << 20
        ),
    )
    # SIGTERM cleans up as Ctrl-C does.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    if arguments.latency_only:
        links = await measure_links(directory, say, tiny=arguments.tiny)
        show_links(links, console)
        _write(arguments.json, links.json())
        return 1 if links.violations else 0
    report = await run(options, directory, say)
    show(report, console)
    _write(arguments.json, report.json())
    return 1 if report.violations else 0


def _write(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    """Runs it; 0: nothing was violated, 1: something was, 2: it cannot run here."""
    arguments = _arguments()
    if reason := missing():
        print(f"make soak cannot run here: {reason}", file=sys.stderr)
        return 2
    if shutil.which("redis-server") is None:
        print("redis-server is missing: apt-get install redis-server", file=sys.stderr)
        return 2
    transformers_logging.disable_progress_bar()
    # Wide enough for the tables where nobody looks.
    console = Console(width=None if sys.stdout.isatty() else 170)
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="miaotui-soak-"))
    try:
        return asyncio.run(_main(arguments, directory, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; everything is stopped", file=sys.stderr)
        return 130
    finally:
        if arguments.keep is None:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
