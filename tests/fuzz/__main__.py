"""`python -m tests.fuzz --cases 50000 --seed 1`: fuzzes all entry points of real services."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from pathlib import Path

from tests.fuzz.contract import NAME
from tests.fuzz.run import Run
from tests.fuzz.services import running_services


async def fuzz(cases: int, seed: int, only: str, seconds: float) -> tuple[int, str]:
    """Runs the cases; returns an exit code, 1 where anything came that must not, and a report."""
    with tempfile.TemporaryDirectory(prefix="miaotui-fuzz-") as directory:
        async with running_services(Path(directory), writes=True) as (services, entries):
            if only.startswith(NAME):
                run = Run(services, [], seed)
                operation = only.removeprefix(NAME).removeprefix(", ")
                await run.check_contract(_examples(cases), only=operation)
                return int(run.failed), run.report()
            name, _, number = only.rpartition(":")
            chosen = [e for e in entries if not only or e.name == (name or only)]
            if not chosen:
                names = "\n".join(f"  {name}" for name in (*(e.name for e in entries), NAME))
                return 2, f"there is no entry point {name or only!r}; there are\n{names}"
            run = Run(services, chosen, seed)
            plan = run.plan(cases)
            if name:
                plan = [(chosen[0], int(number))]
            await run.run(plan, seconds)
            if not only:
                await run.check_contract(_examples(cases))
            return int(run.failed), run.report()


def _examples(cases: int) -> int:
    """Of each operation in each phase of Schemathesis that draws them: a tenth of all or so."""
    return max(5, cases // 1000)


def main() -> int:
    """Reads the arguments and fuzzes."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000, help="how many, over all")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same cases")
    parser.add_argument("--only", default="", help="ENTRY, or ENTRY:NUMBER as a report prints it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more than this long")
    parser.add_argument("--report", type=Path, help="a file for the report, too")
    given = parser.parse_args()
    code, report = asyncio.run(fuzz(given.cases, given.seed, given.only, given.seconds))
    print(report)
    if given.report is not None:
        given.report.write_text(report + "\n", "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
