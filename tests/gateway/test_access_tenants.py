"""What one tenant has is apart from what others have."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.access.caller import CALLER, Caller, current_tenant
from gateway.access.keys import make_key
from gateway.access.limiter import LocalLimiter
from gateway.access.tenancy import TenantLibraries
from gateway.cache.backend import EmbeddedBackend
from gateway.cache.stores import AnswerCache, PromptCache, SealedStore
from gateway.generation.memory import TextCache
from gateway.schema import QaRequest
from miaotui.retrieval.library import FolderStore
from miaotui.v1 import shard_pb2 as shard_pb
from services.cache.codec import Sealer


class as_tenant:
    """Within it, requests come from a key of this tenant; None: there are no keys."""

    def __init__(self, tenant: str | None) -> None:
        key = None if tenant is None else make_key("k", tenant=tenant)[0]
        self._caller = None if key is None else Caller(key, LocalLimiter())

    def __enter__(self) -> None:
        self._token = CALLER.set(self._caller)

    def __exit__(self, *_: object) -> None:
        CALLER.reset(self._token)


def test_caches_are_apart_for_each_tenant() -> None:
    class Silent:
        def lookup(self, cache: str, result: str) -> None:
            pass

    def store(name: str) -> SealedStore:
        backend = EmbeddedBackend(1000, 60)
        return SealedStore(name, backend, Sealer("s"), Silent(), 1000)  # type: ignore[arg-type]

    request = QaRequest.model_validate({"question": "When?", "context": "In 1925."})
    answers, prompts, texts = (
        AnswerCache(store("a")),
        PromptCache(store("p")),
        TextCache(store("t")),
    )
    keys: dict[str | None, tuple[bytes, ...]] = {}
    for tenant in (None, "default", "one", "two"):
        with as_tenant(tenant):
            generate = shard_pb.GenerateRequest(cache_salt=texts.salt())
            keys[tenant] = (
                answers.key("model", request),
                prompts.key("tokenizer", request),
                texts.key("model", generate, (), False),
                texts.salt(),
            )
    assert keys[None] == keys["default"]
    assert keys[None][3] == b""
    for place in range(4):
        assert len({keys[tenant][place] for tenant in (None, "one", "two")}) == 3


async def test_a_tenant_follows_its_request_into_tasks_and_threads_of_it(tmp_path: Path) -> None:
    libraries = TenantLibraries(FolderStore(tmp_path))

    async def serve(tenant: str) -> tuple[str, str]:
        with as_tenant(tenant):
            task = asyncio.create_task(asyncio.sleep(0.01, None))
            await task
            seen = await asyncio.gather(asyncio.to_thread(current_tenant))
            made = libraries.current().get("default", create=True)
            assert made is not None
            return seen[0], tenant

    seen = await asyncio.gather(*(serve(f"tenant-{n % 3}") for n in range(9)))
    assert all(found == tenant for found, tenant in seen)
    assert current_tenant() == ""
    assert libraries.current().names() == []
    assert len(libraries.every()) == 4
    assert sorted(p.name for p in (tmp_path / "tenants").iterdir()) == [
        *("tenant-0", "tenant-1", "tenant-2")
    ]
    libraries.close()
