"""`miaotui up`: all services on this machine, supervised."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

from miaotui.cli.asking import AskError, Options, ask_http
from miaotui.cli.demo import Asked
from miaotui.cli.layout import Layout
from miaotui.cli.output import Output
from miaotui.cli.render import show_reply
from miaotui.cli.supervisor import StartError, Supervisor

_INTERRUPTED = 130


@dataclass(frozen=True)
class Plan:
    """What `up` does besides keeping the services running."""

    questions: Sequence[Asked] = ()
    once: bool = False
    quiet: bool = False
    ready_timeout: float = 180.0


def run_up(layout: Layout, plan: Plan, console: Console) -> int:
    """Runs until interrupted (or through the questions, with `once`); returns an exit code."""
    return asyncio.run(_run(layout, plan, console))


async def _run(layout: Layout, plan: Plan, console: Console) -> int:
    output = Output(console, quiet=plan.quiet)
    supervisor = Supervisor(layout.services, output)
    for note in layout.notes:
        output.say(note, "yellow")
    stopping = _watch_signals(supervisor, output)
    work = asyncio.create_task(_work(supervisor, layout, plan, output))
    interrupted = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([work, interrupted], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return 0 if supervisor.started else _INTERRUPTED
    except (StartError, AskError) as error:
        output.say(str(error), "bold red")
        return 1
    finally:
        for task in (work, interrupted):
            task.cancel()
        with suppress(asyncio.CancelledError, StartError, AskError):
            await work
        output.say("stopping")
        await supervisor.stop()
        output.say("all services have stopped")


async def _work(supervisor: Supervisor, layout: Layout, plan: Plan, output: Output) -> int:
    names = ", ".join(service.name for service in layout.services)
    output.say(f"starting {names}")
    await supervisor.start(plan.ready_timeout)
    options = Options(key=os.environ.get("MIAOTUI_KEY", ""))
    for asked in plan.questions:
        output.console.print()
        reply = await asyncio.to_thread(ask_http, layout.url, asked, options)
        show_reply(output.console, asked, reply)
    if plan.once:
        return 0
    output.say(f"web page       {layout.url}/", "bold green")
    output.say(f"API docs       {layout.url}/docs", "green")
    output.say(f"metrics        {layout.url}/metrics", "green")
    output.say(f"gRPC           {layout.grpc_target}", "green")
    if layout.answers:
        output.say(f'ask            miaotui ask "…" --file PASSAGE.txt --url {layout.url}', "green")
    if layout.writes:
        output.say(f'write          miaotui write "…" --url {layout.url}', "green")
    if layout.hears:
        output.say(f"transcribe     miaotui transcribe FILE --url {layout.url}", "green")
    if layout.sees:
        output.say(f"describe       miaotui describe FILE --url {layout.url}", "green")
    if layout.writes or layout.hears or layout.sees:
        output.say(f"OpenAI's API   {layout.url}/v1", "green")
    output.say("Ctrl-C stops everything", "green")
    await supervisor.failed
    return 1


def _watch_signals(supervisor: Supervisor, output: Output) -> asyncio.Event:
    """An event that the first signal sets; the second one kills all services."""
    stopping = asyncio.Event()

    def handle(number: signal.Signals) -> None:
        if stopping.is_set():
            output.say(f"{number.name} again: killing everything", "red")
            supervisor.kill()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, handle, number)
    return stopping
