"""The services serve a compressed checkpoint as any other."""

from __future__ import annotations

from pathlib import Path

import miaotui
from miaotui.compression import compress_model
from miaotui.v1 import tensor_pb2
from tests.e2e.asking import Question, ask_http, http_client
from tests.processes import Cluster

BUNDLED = Path(miaotui.__file__).parent / "bundled" / "qa"


async def test_int8_bundled_model_answers_over_two_stages(tmp_path: Path) -> None:
    compress_model(BUNDLED, tmp_path / "int8", method="int8")
    asked = Question(
        "Who designed the Eiffel Tower?",
        "The Eiffel Tower stands in Paris. It is named after the engineer Gustave Eiffel, whose "
        "company designed and built the tower from 1887 to 1889.",
    )
    async with Cluster(tmp_path / "int8", stages=2) as cluster:
        async with http_client(cluster.url) as client:
            found = await ask_http(client, asked)
        told = [(await cluster.describe(index)).stage for index in range(2)]
    assert "Gustave Eiffel" in found["answers"][0]["text"]
    assert told[0].first_layer == 0 < told[1].first_layer
    # Embeddings (35,204 rows) and layers in 8 bits: a quarter of float32's 97 MB.
    assert sum(one.parameter_bytes for one in told) < 27e6


async def test_int8_between_stages() -> None:
    """Bundled model, unchanged, with activations on the wire in a byte each."""
    asked = Question(
        "Who designed the Eiffel Tower?",
        "The Eiffel Tower stands in Paris. It is named after the engineer Gustave Eiffel, whose "
        "company designed and built the tower from 1887 to 1889.",
    )
    wire = {"MIAOTUI_SHARD_WIRE_DTYPE": "int8"}
    async with Cluster(BUNDLED, stages=2, shard_env=wire) as cluster:
        async with http_client(cluster.url) as client:
            found = await ask_http(client, asked)
        told = await cluster.describe(0)
    assert told.stage.wire_dtype == tensor_pb2.DTYPE_INT8
    assert told.stage.compute_dtype == tensor_pb2.DTYPE_FLOAT32
    assert "Gustave Eiffel" in found["answers"][0]["text"]
