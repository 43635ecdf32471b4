"""The programs that benchmarks.throughput compares, and the baseline: BLIP as the usual ONNX export recipes decode it.

The baseline has one decoder step with a past. There is one row per beam, cross-attention keys are repeated for every
beam, caches grow by concatenation and are reordered by Gather after every step, the full logits are copied to the host,
and a batch runs until its slowest image is finished. The search is the engine's, so that the tokens agree.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from benchmarks.workload import BUILD, Workload, read_pictures, read_pixels
from engine.backends.providers import import_onnxruntime
from engine.bundle.manifest import Bundle, cache_names
from engine.decoding.beam import Beams, Hypothesis, Search
from engine.host import available_cores
from engine.machine.bench import peak_memory_gib
from engine.options import DecodeOptions
from export.families.blip import PARTS
from export.families.modules import ExportedModule
from export.reference.huggingface import Reference, normalisation

OPSET = 18


class StepWithPast(ExportedModule):
    """One token per row with its past, with the weights and operations of transformers' BlipTextLMHeadModel."""

    parts = PARTS

    def forward(self, input_ids: Tensor, positions: Tensor, cross: list[Tensor], past: list[Tensor]) -> Any:
        """input_ids i64[R], positions i64[R], cross f32[R,H,S,d] and past f32[R,H,t,d] (keys and values alternate).

        Returns logits f32[R,V] and the past extended to f32[R,H,t+1,d].
        """
        bert = self.text_decoder.bert
        x = bert.embeddings.word_embeddings(input_ids) + bert.embeddings.position_embeddings(positions)
        x = bert.embeddings.LayerNorm(x)
        present: list[Tensor] = []
        for i, layer in enumerate(bert.encoder.layer):
            own = layer.attention.self
            keys = torch.cat([past[2 * i], self._split(own.key(x))], 2)
            values = torch.cat([past[2 * i + 1], self._split(own.value(x))], 2)
            present += [keys, values]
            x = layer.attention.output(self._attend(own.query(x), keys, values), x)
            query = layer.crossattention.self.query(x)
            x = layer.crossattention.output(self._attend(query, cross[2 * i], cross[2 * i + 1]), x)
            x = layer.output(layer.intermediate(x), x)
        return (self.text_decoder.cls(x), *present)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, self.heads, self.width).transpose(1, 2)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        weights = torch.softmax(self._split(query) @ keys.transpose(-1, -2) / math.sqrt(self.width), -1)
        return (weights @ values).transpose(1, 2).reshape(-1, self.heads * self.width)


class EncoderOnly(nn.Module):
    """From pixels f32[B,3,height,width] to the cross-attention keys and values of every decoder layer."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.family, self.model = reference.family, reference.model
        self.encoder = reference.family.encoder(reference.model, normalisation(reference.image_processor))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        hidden = self.family.encode(self.model, pixel_values)
        return tuple(self.encoder.split_heads(x, hidden.shape[0]) for x in self.encoder.keys_values(hidden))


def export_conventional(reference: Reference, out: Path) -> Path:
    """Write encoder.onnx, step.onnx and reorder.onnx into `out` unless they exist; return `out`."""
    if (out / "reorder.onnx").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    sizes = reference.sizes
    heads, width = sizes.num_heads, sizes.head_width
    names = {part: cache_names(sizes.num_layers, part) for part in ("cross", "past", "present")}
    axes = {
        "cross": {0: "rows"},
        "past": {0: "rows", 2: "past"},
        "present": {0: "rows", 2: "past + 1"},
    }
    _export(
        EncoderOnly(reference).eval(),
        (torch.zeros(2, 3, sizes.image_size, sizes.image_size),),
        out / "encoder.onnx",
        ["pixel_values"],
        names["cross"],
        {"pixel_values": {0: "images"}} | {name: {0: "images"} for name in names["cross"]},
    )
    rows, past = 3, 5
    step_inputs = (
        torch.ones(rows, dtype=torch.long),
        torch.full((rows,), past),
        [torch.randn(rows, heads, sizes.encoder_positions, width) for _ in names["cross"]],
        [torch.randn(rows, heads, past, width) for _ in names["past"]],
    )
    _export(
        StepWithPast(reference.model, sizes).eval(),
        step_inputs,
        out / "step.onnx",
        ["input_ids", "positions", *names["cross"], *names["past"]],
        ["logits", *names["present"]],
        {name: {0: "rows"} for name in ("input_ids", "positions", "logits")}
        | {name: axes[part] for part in names for name in names[part]},
    )
    onnx.save(_reorder_graph(names["past"], heads, width), out / "reorder.onnx")
    return out


def _export(module: nn.Module, inputs: tuple, path: Path, names: list[str], outputs: list[str], axes: dict) -> None:
    torch.onnx.export(
        module,
        inputs,
        str(path),
        input_names=names,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=OPSET,
        dynamo=False,
    )


def _reorder_graph(names: list[str], heads: int, width: int) -> onnx.ModelProto:
    """Return a graph that gathers the rows `rows` i64[R] of every cache."""
    shape = ["rows", heads, "past", width]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", [name, "rows"], [f"new.{name}"], axis=0) for name in names],
            "reorder",
            [helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"])]
            + [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
            [helper.make_tensor_value_info(f"new.{name}", TensorProto.FLOAT, shape) for name in names],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )


class Conventional:
    """Caption batches with the three graphs of export_conventional on ONNX Runtime's CPU provider."""

    def __init__(self, directory: Path, search: Search, threads: int | None = None) -> None:
        self._ort = import_onnxruntime("cpu")
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.log_severity_level = 3
        self._encoder, self._step, self._reorder = (
            self._ort.InferenceSession(directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("encoder", "step", "reorder")
        )
        self.search = search
        step_inputs = [entry.name for entry in self._step.get_inputs()]
        self._cross = [name for name in step_inputs if name.startswith("cross.")]
        self._past = [name for name in step_inputs if name.startswith("past.")]
        shape = self._step.get_inputs()[2].shape
        self._heads, self._width = shape[1], shape[3]

    def caption(self, pixel_values: NDArray[np.float32]) -> list[Hypothesis]:
        """Return the best hypothesis of each image f32[B,3,height,width]."""
        search, images = self.search, len(pixel_values)
        assert len(search.prompt) == 1, "a longer prompt needs a prefill, which this baseline does not have"
        beams = Beams(search, images)
        beams.start(np.arange(images))
        encoded = self._run(self._encoder, {"pixel_values": pixel_values}, self._names(self._encoder))
        cross = {
            name: self._value(np.repeat(value.numpy(), search.num_beams, 0))
            for name, value in zip(self._cross, encoded, strict=True)
        }
        empty = np.zeros((images * search.num_beams, self._heads, 0, self._width), np.float32)
        past = {name: self._value(empty) for name in self._past}
        while not beams.closed.all():
            feed = {
                "input_ids": beams.last_tokens().reshape(-1),
                "positions": np.repeat(beams.lengths - 1, search.num_beams),
            }
            logits, *present = self._run(self._step, feed | cross | past, self._names(self._step))
            scores, ids = self._select(torch.from_numpy(logits.numpy()), beams)
            rows, tokens = np.divmod(ids, search.vocab_size)
            active = ~beams.closed
            chosen = beams.advance(scores, rows, tokens, active)
            parents = np.where(active[:, None], np.take_along_axis(rows, chosen, 1), np.arange(search.num_beams))
            flat = (parents + np.arange(images)[:, None] * search.num_beams).reshape(-1)
            if search.num_beams > 1:
                present = self._run(
                    self._reorder,
                    {"rows": flat} | dict(zip(self._past, present, strict=True)),
                    self._names(self._reorder),
                )
            past = dict(zip(self._past, present, strict=True))
        return [beams.results(image)[0] for image in range(images)]

    def _select(self, logits: Tensor, beams: Beams) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the best continuations, selected on the host with Hugging Face's operations in their order."""
        search, images = self.search, len(beams.closed)
        log_probs = torch.log_softmax(logits, -1).view(images, search.num_beams, -1)
        for image, beam, bans in _bans(beams.marked_ids()):
            log_probs[image, beam, bans] = float("-inf")
        totals = (log_probs + torch.from_numpy(beams.scores)[:, :, None]).flatten(1)
        scores, ids = torch.topk(totals, search.num_candidates)
        return scores.numpy(), ids.numpy()

    def _run(self, session: Any, feed: dict[str, Any], outputs: list[str]) -> list[Any]:
        values = {name: self._value(value) if isinstance(value, np.ndarray) else value for name, value in feed.items()}
        return list(session.run_with_ort_values(outputs, values))

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    @staticmethod
    def _names(session: Any) -> list[str]:
        return [entry.name for entry in session.get_outputs()]


def _bans(marked_ids: NDArray[np.int64]) -> list[tuple[int, int, list[int]]]:
    """Return (image, beam, banned ids) of the rows with bans. This baseline has no repetition penalty."""
    rows = np.argwhere(marked_ids[:, :, 0] >= 0)
    return [(image, beam, marked_ids[image, beam].tolist()) for image, beam in rows]


Ids = list[tuple[int, ...]]
Captioned = tuple[Ids, float | None]
"""The ids of the captions, and the seconds in which slots were empty because no image was left (None: no slots)."""
Caption = Callable[[int, int], Captioned]
"""Function (count, batch size) that captions the first `count` images; the engine ignores the batch size."""


@dataclass(frozen=True)
class Comparison:
    """The settings of a measurement, common to all programs."""

    workload: Workload
    options: DecodeOptions
    rows: int | None
    threads: int | None


@dataclass(frozen=True)
class Timing:
    """One call of a program: seconds, the ids it returned, and the peak memory of its process during the call.

    `unfilled_s` is the part of the seconds in which slots were empty, None for programs without slots.
    """

    seconds: float
    ids: Ids
    peak_gib: float | None
    unfilled_s: float | None = None


def engine(setting: Comparison) -> Caption:
    """Load the engine on ONNX Runtime."""
    return _engine_on("cpu", setting)


def openvino(setting: Comparison) -> Caption:
    """Load the engine on OpenVINO."""
    return _engine_on("openvino", setting)


def engine_fp16(setting: Comparison) -> Caption:
    """Load the engine on ONNX Runtime with the bundle in float16."""
    return _engine_on("cpu", setting, "fp16")


def engine_int8(setting: Comparison) -> Caption:
    """Load the engine on ONNX Runtime with the bundle in int8."""
    return _engine_on("cpu", setting, "int8")


def _engine_on(backend: str, setting: Comparison, precision: str = "fp32") -> Caption:
    from engine.captioner import Captioner
    from engine.runtime import Runtime

    # as `engine caption` opens it
    bundle, runtime = Bundle.load(setting.workload.bundle_in(precision)), Runtime(backend, threads=setting.threads)
    captioner = Captioner.of(bundle, runtime, many_images=True)
    pixels = read_pixels(setting.workload, captioner.bundle)
    scheduler = captioner.scheduler(captioner.search(setting.options), setting.rows)

    def caption(count: int, _: int) -> Captioned:
        exhausted: list[float] = []

        def images() -> Iterator[tuple[int, NDArray[np.uint8]]]:
            yield from enumerate(pixels[:count])
            exhausted.append(time.perf_counter())  # a slot is empty and no image is left for it

        results = dict(scheduler.run(images()))
        return [results[i][0].ids for i in range(count)], time.perf_counter() - exhausted[0]

    return caption


def generate(setting: Comparison) -> Caption:
    """Load the model for Hugging Face's generate, which returns only ids here."""
    return _generate_with(lambda model: model, setting)


def generate_bf16(setting: Comparison) -> Caption:
    """Load Hugging Face generate with the model in bfloat16."""
    return _generate_with(lambda model: model.bfloat16(), setting)


def generate_int8(setting: Comparison) -> Caption:
    """Load Hugging Face generate with torch's dynamic int8: Linear layers, one activation scale per tensor."""
    return _generate_with(lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), setting)


def optimum(setting: Comparison) -> Caption:
    """Load ORTModelForVision2Seq of optimum-onnx, which runs `generate`'s loop on two ONNX graphs of the decoder."""
    from optimum.onnxruntime import ORTModelForVision2Seq

    graphs = BUILD / setting.workload.name / "optimum"
    if not graphs.exists():
        unfinished = graphs.with_name("optimum.unfinished")
        ORTModelForVision2Seq.from_pretrained(setting.workload.checkpoint, export=True).save_pretrained(unfinished)
        unfinished.rename(graphs)
    options = import_onnxruntime("cpu").SessionOptions()
    options.intra_op_num_threads = setting.threads or available_cores()
    model = ORTModelForVision2Seq.from_pretrained(graphs, session_options=options, use_merged=False)
    return _generate_with(lambda _: model, setting)


def _generate_with(convert: Callable[[Any], Any], setting: Comparison) -> Caption:
    torch.set_num_threads(setting.threads or available_cores())
    reference = Reference.load(setting.workload.checkpoint)
    pixel_values = _pixels(reference, setting.workload)
    reference = replace(reference, model=convert(reference.model))
    pixel_values = pixel_values.to(reference.model.dtype)

    def caption(count: int, batch: int) -> Captioned:
        captions = []
        for i in range(0, count, batch):
            captions += reference.generate(pixel_values[i : min(i + batch, count)], setting.options, with_scores=False)
        return [best.ids for best, *_ in captions], None

    return caption


def _pixels(reference: Reference, workload: Workload) -> Tensor:
    """Return the images as the processor's input for the encoder, f32[N,3,height,width], decoded one after another."""
    return torch.cat([reference.pixels([picture]) for picture in read_pictures(workload)])


def conventional(setting: Comparison) -> Caption:
    """Load the usual ONNX loop, see Conventional."""
    from engine.captioner import Captioner
    from export.reference.huggingface import Reference

    workload = setting.workload
    reference = Reference.load(workload.checkpoint)
    directory = export_conventional(reference, BUILD / workload.name / "conventional")
    search = Captioner.load(workload.bundle, backend="cpu").search(setting.options)
    pixel_values = _pixels(reference, workload).numpy()
    del reference
    program = Conventional(directory, search, setting.threads)

    def caption(count: int, batch: int) -> Captioned:
        hypotheses = []
        for i in range(0, count, batch):
            hypotheses += program.caption(pixel_values[i : min(i + batch, count)])
        return [hypothesis.ids for hypothesis in hypotheses], None

    return caption


EXACT: dict[str, Callable[[Comparison], Caption]] = {
    "engine": engine,
    "generate": generate,
    "conventional": conventional,
    "openvino": openvino,
    "optimum": optimum,
}
"""Programs in float32. Their captions must be the same up to ties, or the measurement is void."""
ROUNDED: dict[str, Callable[[Comparison], Caption]] = {
    "engine-fp16": engine_fp16,
    "engine-int8": engine_int8,
    "generate-bf16": generate_bf16,
    "generate-int8": generate_int8,
}
"""Programs in lower precision. Their captions may differ; the record has how many do, and the difference in ROUGE-1."""
PROGRAMS = EXACT | ROUNDED
BATCHED = ("generate", "conventional", "optimum", "generate-bf16", "generate-int8")
"""Programs with a batch size."""


class Worker:
    """A program in a separate process, idle between calls."""

    def __init__(self, name: str, setting: Comparison) -> None:
        """Start the process and load the program. Raises RuntimeError with the traceback of the process if it fails."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else this end stays open and recv would not raise EOFError when the process ends
        self.load_s: float = self._receive()

    def caption(self, count: int, batch: int = 1) -> Timing:
        """Caption the first `count` images, in batches of `batch` if the program has batches."""
        self._connection.send((count, batch))
        timing: Timing = self._receive()
        return timing

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def forget_peak_memory() -> None:
    """Reset the peak that peak_memory_gib returns, if the system can do that (Linux, see proc_pid_clear_refs(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _serve(name: str, setting: Comparison, connection: Connection) -> None:
    try:
        start = time.perf_counter()
        caption = PROGRAMS[name](setting)
        connection.send(time.perf_counter() - start)
        while True:
            count, batch = connection.recv()
            forget_peak_memory()
            start = time.perf_counter()
            ids, unfilled_s = caption(count, batch)
            connection.send(Timing(time.perf_counter() - start, ids, peak_memory_gib(), unfilled_s))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the parent has ended
    except Exception:
        connection.send(traceback.format_exc())
