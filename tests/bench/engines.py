"""Bare in-process engines on the same weights, as a careful user would set them up.

Transformers eager and compiled, ONNX Runtime and OpenVINO in float32, bfloat16 and int8. Where
an engine can be set up in more than one sensible way (graphs fused by ONNX Runtime's transformer
optimiser or by itself; one batch on all cores or a batch a core), all ways are loaded, and the
one that is fastest on the machine is measured.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForQuestionAnswering

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Batch = tuple[Ints, Ints, Ints]
"""Ids, mask and types, int64 [windows, tokens]."""
Logits = tuple[Floats, Floats]
"""Start and end logits, float32 [windows, tokens]."""
Engine = Callable[[Sequence[Batch]], list[Logits]]

ENGINES = (
    "transformers",
    "transformers-compiled",
    "transformers-int8",
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-bf16",
    "openvino-int8",
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


def why_not(engine: str) -> str | None:
    """Why an engine cannot run here; `None` where it can."""
    needed = _NEEDS.get(engine.partition("-")[0], ())
    if engine == "openvino-int8":
        needed = (*needed, "nncf")
    if missing := [name for name in needed if not find_spec(name)]:
        return f"not installed: {', '.join(missing)} (make bench-peers installs them)"
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if engine.endswith("compiled") and not any(map(shutil.which, compilers)):
        return "no C++ compiler, which torch.compile needs: install g++ or set CXX"
    return None


def load(engine: str, directory: Path, kept: Path, threads: int = 0) -> dict[str, Engine]:
    """The ways to run an engine, by what is special about them.

    `kept`: folder in which exported graphs are kept and found again. `threads`: of one batch;
    0: all cores, and ways that run a batch a core, too.
    """
    if threads:
        torch.set_num_threads(threads)
    if engine.startswith("transformers"):
        return _torch(engine, _model(directory, "sdpa"))
    if engine.startswith("onnxruntime"):
        return dict(_onnx(engine, directory, kept, threads))
    return dict(_openvino(engine, directory, threads))


def _model(directory: Path, attention: str) -> Any:
    return AutoModelForQuestionAnswering.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    ).eval()


class _Logits(torch.nn.Module):
    """The model with plain tensors at both ends, as exporters want it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        return output.start_logits, output.end_logits


def _one_by_one(forward: Callable[[Batch], Logits]) -> Engine:
    return lambda batches: [forward(batch) for batch in batches]


def _torch(engine: str, model: Any) -> dict[str, Engine]:
    if engine.endswith("int8"):
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    if engine.endswith("compiled"):
        model = torch.compile(model, dynamic=True)

    @torch.inference_mode()
    def forward(batch: Batch) -> Logits:
        output = model(**dict(zip(INPUTS, map(torch.from_numpy, batch), strict=True)))
        return output.start_logits.numpy(), output.end_logits.numpy()

    return {"all cores": _one_by_one(forward)}


def _example() -> tuple[torch.Tensor, ...]:
    # Three tensors: one that is passed twice becomes one input.
    shape = (2, 16)
    return torch.ones(shape).long(), torch.ones(shape).long(), torch.zeros(shape).long()


def _made(file: Path, make: Callable[[Path], object]) -> Path:
    """Makes a file that is not there yet; whole, whoever else makes it at the same time."""
    if not file.exists():
        new = file.with_name(f"{os.getpid()}-{file.name}")
        make(new)
        new.replace(file)
    return file


def _export(directory: Path, to: Path) -> None:
    axes = {0: torch.export.Dim("windows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        _Logits(_model(directory, "sdpa")).eval(),
        _example(),
        str(to),
        input_names=list(INPUTS),
        output_names=["start", "end"],
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _fuse(directory: Path, to: Path) -> None:
    """Attention, GELU and layer norms as single operators.

    The optimiser knows the graphs of the older exporter, with attention written out.
    """
    from onnxruntime.transformers import optimizer

    plain = to.with_name(f"plain-{to.name}")
    model = _model(directory, "eager")
    axes = {0: "windows", 1: "tokens"}
    torch.onnx.export(
        _Logits(model).eval(),
        _example(),
        str(plain),
        input_names=list(INPUTS),
        output_names=["start", "end"],
        dynamic_axes=dict.fromkeys((*INPUTS, "start", "end"), axes),
        opset_version=17,
        dynamo=False,
    )
    config = model.config
    fused = optimizer.optimize_model(
        str(plain),
        "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=1,
    )
    plain.unlink()
    if not any(fused.get_fused_operator_statistics().values()):
        raise RuntimeError("the optimiser fused nothing")
    fused.save_model_to_file(str(to))


def _quantise(source: Path, to: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        to,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Attention"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _graphs(directory: Path, kept: Path, int8: bool) -> Iterator[tuple[str, Path]]:
    """The exported graph, and the one that the optimiser makes of it where it can."""
    for name, make in (("own graph", _export), ("fused", _fuse)):
        file = kept / f"{make.__name__[1:]}.onnx"
        try:
            _made(file, lambda to, make=make: make(directory, to))  # type: ignore[misc]
            if int8:
                source, file = file, file.with_name(f"int8-{file.name}")
                _made(file, lambda to, source=source: _quantise(source, to))  # type: ignore[misc]
        except Exception as error:
            if make is _export:
                raise
            # Then the engine's own optimiser is all there is.
            print(f"onnxruntime, {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        yield name, file


def _onnx(engine: str, directory: Path, kept: Path, threads: int) -> Iterator[tuple[str, Engine]]:
    import onnxruntime

    for graph, file in _graphs(directory, kept, engine.endswith("int8")):
        for way, cores in _ways(threads):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.intra_op_num_threads = cores
            # Threads that spin take the cores from whoever is measured next.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )

            def forward(batch: Batch, session: Any = session) -> Logits:
                start, end = session.run(None, dict(zip(INPUTS, batch, strict=True)))
                return start, end

            apart = cores == 1 and not threads
            yield f"{graph}, {way}", (_a_batch_a_core if apart else _one_by_one)(forward)


def _ways(threads: int) -> list[tuple[str, int]]:
    if threads:
        return [(f"{threads} threads", threads)]
    return [("all cores", 0), ("a batch a core", 1)]


def _a_batch_a_core(forward: Callable[[Batch], Logits]) -> Engine:
    pool = ThreadPoolExecutor(os.cpu_count())
    return lambda batches: list(pool.map(forward, batches))


def _openvino(engine: str, directory: Path, threads: int) -> Iterator[tuple[str, Engine]]:
    import openvino

    converted = openvino.convert_model(
        _Logits(_model(directory, "sdpa")).eval(), example_input=_example()
    )
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    if engine.endswith("int8"):
        # Weights per channel, activations quantised at run time.
        import nncf

        converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if engine.endswith("bf16") else "f32"
    for hint in ("LATENCY",) if threads else ("LATENCY", "THROUGHPUT"):
        compiled = openvino.compile_model(converted, "CPU", {**settings, "PERFORMANCE_HINT": hint})
        queue = openvino.AsyncInferQueue(compiled)  # of as many requests as the hint asks for

        def run(batches: Sequence[Batch], queue: Any = queue) -> list[Logits]:
            found: dict[int, Logits] = {}

            def keep(request: Any, number: int) -> None:
                start, end = (request.get_output_tensor(at).data.copy() for at in (0, 1))
                found[number] = start, end

            queue.set_callback(keep)
            for number, batch in enumerate(batches):
                queue.start_async(list(batch), number)
            queue.wait_all()
            return [found[number] for number in range(len(batches))]

        yield hint.lower(), run
