"""The tokenizer service: loads a model directory's tokenizer and serves."""

from __future__ import annotations

import asyncio
import logging

from miaotui.media.features import MediaLimits, modality_of
from miaotui.media.tokenizer import MediaTokenizer, load_media_tokenizer
from miaotui.models.errors import ModelError
from miaotui.models.fingerprint import model_fingerprint
from miaotui.telemetry import setup_logging, setup_telemetry
from miaotui.text.directory import is_decoder, read_model_config
from miaotui.text.errors import ModelDirectoryError
from miaotui.text.prompts import PromptTokenizer, load_prompt_tokenizer
from miaotui.text.tokenizer import Limits, TextTokenizer, load_tokenizer
from miaotui.v1 import tokenizer_pb2_grpc
from services.rpc.server import RpcServer, run, serve
from services.rpc.spans import spans_to
from services.tokenizer.media import MediaReader
from services.tokenizer.servicer import TokenizerServicer
from services.tokenizer.settings import TokenizerSettings
from services.tokenizer.workers import Workers

log = logging.getLogger(__name__)

SERVICE = "miaotui.v1.TokenizerService"


async def serve_tokenizer(settings: TokenizerSettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises `ModelDirectoryError`."""
    telemetry = setup_telemetry("miaotui-tokenizer", spans=spans_to(settings.traces_to))
    tokenizer, fingerprint = await asyncio.to_thread(_load, settings)
    workers = Workers(settings.worker_threads, settings.max_waiting)
    media = None
    if isinstance(tokenizer, MediaTokenizer):
        media = MediaReader(tokenizer.extractor, settings.media_threads, settings.max_files)
    server = RpcServer(SERVICE)
    servicer = TokenizerServicer(
        tokenizer, fingerprint, workers, max_spans=settings.max_spans, media=media
    )
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server.aio)
    try:
        await serve(
            server,
            settings.listen,
            grace=settings.drain_seconds,
            drain=lambda: servicer.drain(settings.drain_seconds),
            metrics_port=settings.metrics_port,
        )
    finally:
        workers.close()
        if media is not None:
            media.close()
        telemetry.shutdown()


def _load(
    settings: TokenizerSettings,
) -> tuple[TextTokenizer | PromptTokenizer | MediaTokenizer, str]:
    limits = Limits(settings.max_characters, settings.max_window_tokens)
    try:
        fingerprint = model_fingerprint(settings.model)
    except ModelError as error:
        raise ModelDirectoryError(str(error)) from error
    config = read_model_config(settings.model)
    if modality_of(config) is not None:
        most = MediaLimits(settings.max_file_bytes, settings.max_sound_seconds, settings.max_pixels)
        media = load_media_tokenizer(settings.model, limits=most)
        log.info(
            "tokenizer of %s: %d ids, texts of %d tokens about %s",
            settings.model.name,
            media.vocab_size,
            media.context_length,
            "sound" if media.extractor.modality == "audio" else "pictures",
        )
        return media, fingerprint
    if is_decoder(config):
        prompts = load_prompt_tokenizer(settings.model, limits=limits)
        log.info(
            "tokenizer of %s: %d ids, a context of %d tokens, %s chat template",
            settings.model.name,
            prompts.vocab_size,
            prompts.context_length,
            "a" if prompts.has_chat_template else "no",
        )
        return prompts, fingerprint
    tokenizer = load_tokenizer(settings.model, limits=limits)
    log.info(
        "tokenizer of %s: %d ids, windows of %d tokens",
        settings.model.name,
        tokenizer.vocab_size,
        tokenizer.max_length,
    )
    return tokenizer, fingerprint


def main(settings: TokenizerSettings) -> int:
    """Runs the service; returns the process's exit code: 2 for a configuration error."""
    setup_logging("tokenizer", settings.log_level)
    return run(lambda: serve_tokenizer(settings))
