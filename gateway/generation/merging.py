"""Several requests' news as one stream: a completion may have many prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gateway.errors import GatewayError
from gateway.generation.request import News, Usage


async def merged(streams: Sequence[AsyncGenerator[News]], n: int) -> AsyncGenerator[News]:
    """The news of all streams as they come; text j of stream i becomes text i * n + j.

    The usage of all comes with the last. Raises the first error of any, which ends the others,
    as closing the generator does.
    """
    queue: asyncio.Queue[News | GatewayError] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[News]) -> None:
        try:
            async with aclosing(stream):
                async for news in stream:
                    for text in news.texts:
                        text.index += number * n
                    queue.put_nowait(news)
        except GatewayError as error:
            queue.put_nowait(error)
        except Exception:
            queue.put_nowait(GatewayError("internal", "Something went wrong that should not."))
            raise

    usage, left = Usage(), len(streams)
    tasks = [asyncio.create_task(read(*item)) for item in enumerate(streams)]
    try:
        while left:
            news = await queue.get()
            if isinstance(news, GatewayError):
                raise news
            if news.usage is not None:
                usage.add(news.usage)
                left -= 1
                news.usage = None if left else usage
            if news.texts or news.usage:
                yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
