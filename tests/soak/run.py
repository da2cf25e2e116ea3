"""A run: services, load and faults for some minutes, and the verdict."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpc.aio import AioRpcError

from miaotui.v1 import shard_pb2 as pb
from tests.namespaces import Hosts
from tests.soak.cases import Cases, make_cases, make_models
from tests.soak.client import Client
from tests.soak.deployment import ENCODER, READY_SECONDS, Deployment, host_names
from tests.soak.faults import Draw, Injector
from tests.soak.judge import OK, WRONG, Fault, Life, Outcome, Rules
from tests.soak.load import Load
from tests.soak.report import Report, make_report
from tests.soak.resources import Sampler

PROGRESS_SECONDS = 5.0
_PAUSE_SECONDS = 2.5  # before each fault of a script, and after the last
# All that is under way has ended long before, and what it held is given back.
_FREE_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """What a run is like."""

    minutes: float = 10.0
    seed: int = 1
    clients: int = 8
    questions: int = 40
    timeout: float = 15.0
    text_timeout: float = 30.0
    replicas: int = 1
    tls: bool = True
    tiny: bool = False
    rules: Rules = field(default_factory=Rules)
    script: Sequence[Draw] = ()
    """Faults to inject instead of what the seed draws for `minutes`."""


async def run(options: Options, directory: Path, say: Callable[[str], None]) -> Report:
    """Runs and judges. `directory`: for logs and models; `say` gets lines of progress.

    What ends a run early is a violation in its report, too.
    """
    models = make_models(directory, tiny=options.tiny)
    say("computing the right answers with transformers, unsplit")
    cases = await asyncio.to_thread(make_cases, models, count=options.questions, seed=options.seed)
    count = len(host_names(models, options.replicas))
    say(f"starting all services on {count} hosts")
    try:
        with Hosts(count) as hosts:
            async with Deployment(
                hosts, models, directory, tls=options.tls, replicas=options.replicas
            ) as deployment:
                client = Client(deployment)
                try:
                    say("asking everything once, undisturbed")
                    found = await _learn(deployment, client, cases, options, say)
                    return await _soak(options, deployment, directory, client, cases, found, say)
                finally:
                    await client.close()
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs in the report
        say(f"{type(error).__name__}: {error}")
        why = str(error).partition("\n")[0]
        return _report(options, 0.0, found=[f"it came to no run: {type(error).__name__}: {why}"])


async def _learn(
    deployment: Deployment,
    client: Client,
    cases: Cases,
    options: Options,
    say: Callable[[str], None],
) -> list[str]:
    """Asks everything once, documents without the encoder and with it; starts the encoder.

    Returns what was not right even so.
    """
    await client.add_documents()
    outcomes: list[Outcome] = []
    found: list[str] = []
    for meaning in (False, True):
        if meaning:
            deployment.services[ENCODER].start()
            if not await client.encoded(READY_SECONDS):
                found.append("the encoder gave no vectors, undisturbed")
        outcomes += [
            await client.documents(document, options.timeout, learn=True, meaning=meaning)
            for document in cases.documents
        ]
    changed = sum(len({*map(tuple, one.expected.values())}) > 1 for one in cases.documents)
    say(f"the encoder changes the answers to {changed} of {len(cases.documents)} such questions")
    room = asyncio.Semaphore(4)

    async def one(work: Coroutine[Any, Any, Outcome]) -> Outcome:
        async with room:
            return await work

    asking = [client.text(text, options.text_timeout, cached=False) for text in cases.texts]
    for case in cases.questions:
        asking.append(client.question(case, options.timeout, cached=False))
        asking.append(client.grpc_question(case, options.timeout))
    outcomes += await asyncio.gather(*map(one, asking))
    return found + [
        f"undisturbed {one.operation}: {one.status} {one.detail}"
        for one in outcomes
        if one.status != OK
    ]


async def _soak(
    options: Options,
    deployment: Deployment,
    directory: Path,
    client: Client,
    cases: Cases,
    found: list[str],
    say: Callable[[str], None],
) -> Report:
    load = Load(
        client,
        cases,
        clients=options.clients,
        seed=options.seed,
        timeout=options.timeout,
        text_timeout=options.text_timeout,
    )
    injector = Injector(deployment, load, options.rules, options.seed)
    sampler = Sampler(deployment.services)
    sampler.look()  # before anything is killed
    began = time.monotonic()
    faults = asyncio.create_task(_disturb(options, injector, began))
    tasks = [
        asyncio.create_task(sampler.run()),
        asyncio.create_task(_watch(deployment, injector, load, began, found, say)),
    ]
    try:
        await asyncio.wait([faults, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, faults):
            if task.done():
                task.result()  # only the faults come to an end by themselves
        await load.finish()
    except Exception as error:  # noqa: BLE001 - what was seen until then is told all the same
        found.append(f"the run ended early: {error!r}")
    finally:
        for task in (*tasks, faults):
            task.cancel()
        await asyncio.gather(*tasks, faults, load.stop(), return_exceptions=True)
    sampler.look()
    try:
        found += await _held(deployment)
    except AioRpcError as error:
        found.append(f"a stage does not say what it holds: {error.code().name}")
    _write_all(directory / "outcomes.jsonl", began, load, injector)
    return _report(
        options,
        time.monotonic() - began,
        outcomes=load.outcomes,
        faults=injector.faults,
        lives=sampler.lives,
        found=found,
    )


def _report(
    options: Options,
    seconds: float,
    *,
    outcomes: Sequence[Outcome] = (),
    faults: Sequence[Fault] = (),
    lives: Sequence[Life] = (),
    found: Sequence[str],
) -> Report:
    return make_report(
        seed=options.seed,
        seconds=seconds,
        tls=options.tls,
        outcomes=outcomes,
        faults=faults,
        lives=lives,
        rules=options.rules,
        found=found,
    )


def _write_all(file: Path, began: float, load: Load, injector: Injector) -> None:
    """Every fault and every request that was not answered, with seconds since the beginning."""
    rows = [asdict(fault) for fault in injector.faults]
    rows += [asdict(one) for one in load.outcomes if one.status != OK]
    for row in rows:
        for name in ("began", "ended", "recovered"):
            if row.get(name) is not None:
                row[name] = round(row[name] - began, 3)
    rows.sort(key=lambda row: float(row["began"]))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), "utf-8")


async def _disturb(options: Options, injector: Injector, began: float) -> None:
    if not options.script:
        await injector.run(began + 60 * options.minutes)
        return
    for draw in options.script:
        await asyncio.sleep(_PAUSE_SECONDS)
        await injector.inject(draw)
    await asyncio.sleep(_PAUSE_SECONDS)


async def _watch(
    deployment: Deployment,
    injector: Injector,
    load: Load,
    began: float,
    found: list[str],
    say: Callable[[str], None],
) -> None:
    """Tells how it goes, and sees who dies without having been killed."""
    told = began
    while True:
        for name, process in deployment.services.items():
            if not process.alive and name not in injector.killed:
                found.append(f"{name} ended by itself with {process.process.returncode}")
                say(process.tail())
                process.start()
        load.check()
        if (now := time.monotonic()) - told >= PROGRESS_SECONDS:
            told = now
            minutes, seconds = divmod(int(now - began), 60)
            counts = Counter(one.status for one in load.outcomes)
            failed = sum(counts.values()) - counts[OK] - counts[WRONG]
            say(
                f"{minutes:2d}:{seconds:02d}  {counts[OK]:,} right, {counts[WRONG]} wrong, "
                f"{failed} failed, {load.in_flight} in flight, {len(injector.faults)} faults"
                f"{'  ' + injector.now if injector.now else ''}"
            )
        await asyncio.sleep(0.1)


async def _held(deployment: Deployment) -> list[str]:
    """What stages still hold though nobody asks for anything."""
    deadline = time.monotonic() + _FREE_SECONDS
    held: list[str] = []
    while time.monotonic() < deadline:
        held = []
        for name in deployment.stages:
            held += _work(name, await deployment.describe(name))
        if not held:
            break
        await asyncio.sleep(0.5)
    return held


def _work(name: str, told: pb.ShardServiceDescribeResponse) -> list[str]:
    counts = {
        "queued sequences": told.queued_sequences,
        "running sequences": told.running_sequences,
        "KV blocks in use": told.kv_blocks_used,
    }
    return [f"{name} still holds {count} {what}" for what, count in counts.items() if count]
