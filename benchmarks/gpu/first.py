"""The first minutes on a borrowed GPU: each part is a process of its own and prints JSON lines. Never run on a GPU yet.

    python -m benchmarks.gpu.first PART [ARGUMENTS]

`make` writes a random checkpoint with spread caption lengths and its bundles in fp32 and fp16 into $W, `make_attention`
an fp16 bundle with ONNX's Attention operator (fp16a). `ids`, `engine`, `generate` and `live` caption the same images
with the engine, with Hugging Face and with the live torch modules. `kernels` lists where the GPU's time goes.
benchmarks/gpu/calls.sh runs them in an order that fits into fifteen minutes.

Environment: W (work folder), DEV (cuda or cpu), SHAPE (base, large or tiny), SECONDS_EACH (length of a measurement).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

W = Path(os.environ.get("W", "build/gpu"))
DEVICE = os.environ.get("DEV", "cuda")
SHAPE = os.environ.get("SHAPE", "base")
SECONDS = float(os.environ.get("SECONDS_EACH", "12"))
SEARCH: dict[str, Any] = {"num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 40}
IMAGES = 256
"""Different images in memory; measurements repeat them with changed pixels, since equal images are captioned once."""


def report(**values: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(values), flush=True)


def make() -> None:
    """Write the checkpoint of benchmarks/workload.py and its fp32 and fp16 bundles, without golden answers."""
    import benchmarks.workload as workload
    from engine.bundle.manifest import demo_bundle
    from export.bundle import describe_checkpoint, write_manifest
    from export.graphs.exporters import write_graphs
    from export.reference.huggingface import Reference, normalisation

    if SHAPE == "tiny":
        workload.SHAPES["tiny"], workload.TEXT_WIDTH = workload.Shape(2, 96, 12, 26.9), 96
    start = time.time()
    checkpoint = workload.make_checkpoint(W / "checkpoint", workload.SHAPES[SHAPE])
    reference = Reference.load(checkpoint)
    manifest = describe_checkpoint(reference, checkpoint)
    report(part="make", checkpoint_s=time.time() - start)
    for precision in ("fp32", "fp16"):
        out = _new_folder(W / precision)
        for name in ("tokenizer.json", "golden.npz"):  # of the demo: the loader wants them, no answer is replayed
            shutil.copy(demo_bundle() / name, out / name)
        model = reference.model.half() if precision == "fp16" else reference.model
        write_graphs(model, out, normalisation(reference.image_processor))
        write_manifest(out, manifest | {"precision": precision})
        report(part="make", precision=precision, seconds=time.time() - start)


def make_attention() -> None:
    """Write the fp16 bundle again as fp16a: Attention (opset 23) for image encoder and cross-attention, no Conv."""
    import onnx
    import torch

    from export.bundle import write_manifest
    from export.families.blip import BlipEncoder, BlipStep
    from export.graphs import exporters
    from export.reference.huggingface import Reference, normalisation

    attend = torch.nn.functional.scaled_dot_product_attention

    class Attention(torch.autograd.Function):
        """Exported as one operator; `heads` is 0 for inputs that are split into heads already."""

        @staticmethod
        def forward(_ctx: Any, q: Any, k: Any, v: Any, heads: int) -> Any:
            if not heads:
                return attend(q, k, v)
            split = [x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v)]
            return attend(*split).transpose(1, 2).flatten(2)

        @staticmethod
        def symbolic(g: Any, q: Any, k: Any, v: Any, heads: int) -> Any:
            sizes = {"q_num_heads_i": heads, "kv_num_heads_i": heads} if heads else {}
            out = g.op("engine::Attention", q, k, v, **sizes)
            out.setType(q.type())
            return out

    def vision(self: Any, pixels: Any) -> Any:
        tower, batch = self.vision_model, pixels.shape[0]
        patch, side = tower.embeddings.patch_embedding, tower.config.patch_size
        grid = tower.config.image_size // side
        # stride and kernel of the patch embedding are equal, so that it is a product of reshaped pixels
        squares = pixels.reshape(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        x = torch.nn.functional.linear(squares.reshape(batch, grid * grid, -1), patch.weight.flatten(1), patch.bias)
        x = torch.cat([tower.embeddings.class_embedding.expand(batch, -1, -1), x], 1)
        x = x + tower.embeddings.position_embedding
        for layer in tower.encoder.layers:
            q, k, v = layer.self_attn.qkv(layer.layer_norm1(x)).split(layer.self_attn.embed_dim, -1)
            x = x + layer.self_attn.projection(Attention.apply(q, k, v, layer.self_attn.num_heads))
            x = x + layer.mlp(layer.layer_norm2(x))
        return tower.post_layernorm(x)

    def cross(self: Any, q: Any, cache: Any) -> Any:
        return self.merge_heads(Attention.apply(q, *cache.cross, 0))

    def use_opset_23(model: Any, _name: str) -> None:
        for node in model.graph.node:
            node.domain = "" if node.domain == "engine" else node.domain
        del model.opset_import[:]
        model.opset_import.extend([onnx.helper.make_opsetid("", 23)])
        model.ir_version = 10

    BlipEncoder.encode = vision  # type: ignore[method-assign]
    BlipStep.cross_attention = cross  # type: ignore[method-assign]
    exporters._check_operators = use_opset_23
    reference = Reference.load(W / "checkpoint")
    out = _new_folder(W / "fp16a")
    for name in ("tokenizer.json", "golden.npz"):
        shutil.copy(W / "fp16" / name, out / name)
    exporters.write_graphs(reference.model.half(), out, normalisation(reference.image_processor))
    write_manifest(out, json.loads((W / "fp16" / "manifest.json").read_text()))
    report(part="make_attention", done=True)


def _new_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def pixels_of(count: int) -> NDArray[np.uint8]:
    """Return u8[count,height,width,3], kept in $W for the next part."""
    from benchmarks.gpu.check import make_pixels
    from engine.bundle.manifest import Bundle

    kept = W / f"pixels_{count}.npy"
    if not kept.exists():
        np.save(kept, make_pixels(Bundle.load(W / "fp32"), count))
    pixels: NDArray[np.uint8] = np.load(kept)
    return pixels


def endless(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield images for ever, no two of them equal for 251 rounds."""
    for i in itertools.count():
        yield pixels[i % len(pixels)] ^ np.uint8(i // len(pixels) % 251)


def ids(backend: str, precision: str, count: str = "64", rows: str = "") -> None:
    """Caption `count` images with the engine, keep the ids, and compare them with those of other backends in $W."""
    from engine.captioner import Captioner

    images = list(pixels_of(int(count)))
    start = time.perf_counter()
    captioner = Captioner.load(W / precision, backend=backend)
    load_s, start = time.perf_counter() - start, time.perf_counter()
    captions = captioner.caption(images, rows=int(rows) if rows else None, **SEARCH)
    found = [(list(caption.ids), caption.score) for caption in captions]
    seconds = time.perf_counter() - start
    (W / f"ids_{backend}_{precision}.json").write_text(json.dumps(found))
    same = {}
    for path in sorted(W.glob("ids_*.json")):
        theirs = json.loads(path.read_text())[: len(found)]
        equal = sum(mine[0] == other[0] for mine, other in zip(found, theirs, strict=False))
        same[path.stem.removeprefix("ids_")] = f"{equal}/{len(theirs)}"
    report(
        part="ids",
        backend=backend,
        precision=precision,
        load_s=load_s,
        images_per_s=len(found) / seconds,
        same_as=same,
    )


def engine(backend: str, precision: str, *rows: str) -> None:
    """Measure the engine's images/s in steady state, from pixels in memory, for each number of beams in flight."""
    from engine.captioner import Captioner

    captioner = Captioner.load(W / precision, backend=backend)
    for number in map(int, rows):
        captions = captioner.caption(endless(pixels_of(IMAGES)), rows=number, **SEARCH)
        measured = _steady(captions, warm_up=2 * number // 4, size=lambda caption: len(caption.ids) - 1)
        report(part="engine", backend=backend, precision=precision, rows=number, **measured)


def _steady(captions: Iterator[Any], warm_up: int, size: Callable[[Any], int] = lambda _: 0) -> dict[str, float]:
    """Return images/s, images and mean tokens over SECONDS, after `warm_up` captions."""
    for _ in itertools.islice(captions, warm_up):
        pass
    start, done, tokens = time.perf_counter(), 0, 0
    for caption in captions:
        done, tokens = done + 1, tokens + size(caption)
        if time.perf_counter() - start > SECONDS:
            break
    seconds = time.perf_counter() - start
    return {"images": done, "images_per_s": done / seconds, "tokens": tokens / max(1, done)}


def generate(*batches: str) -> None:
    """Measure Hugging Face generate in half precision for each batch size, with and without the 3-gram ban.

    Pixels are on the device before the clock starts.
    """
    import torch
    import transformers

    from export.reference.huggingface import Reference

    reference = Reference.load(W / "checkpoint")
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    model = reference.model.to(DEVICE, dtype).eval()
    from PIL import Image

    pixels = reference.pixels([Image.fromarray(image) for image in pixels_of(IMAGES)]).to(DEVICE, dtype)
    for batch, ban in itertools.product(map(int, batches), (3, 0)):
        images = pixels.repeat(-(-batch // len(pixels)), 1, 1, 1)[:batch]

        def run(images: Any = images, ban: int = ban) -> int:
            with torch.inference_mode():
                options = SEARCH | {"no_repeat_ngram_size": ban}
                return int(model.generate(pixel_values=images, **options).shape[1])

        longest, runs, start = run(), 0, time.perf_counter()
        while not runs or time.perf_counter() - start < SECONDS / 2:
            longest, runs = run(), runs + 1
        speed = runs * batch / (time.perf_counter() - start)
        report(
            part="generate",
            transformers=transformers.__version__,
            batch=batch,
            ban=ban,
            images_per_s=speed,
            longest=longest,
        )


def live(*rows: str) -> None:
    """Measure the torch modules of export/, eager, in half precision, through the engine's own scheduler."""
    import export.reference.torch_backend as torch_backend
    from engine.decoding.backend import BatchSizes
    from engine.options import DecodeOptions
    from export.reference.huggingface import Reference

    reference = Reference.load(W / "checkpoint")
    model = (reference.model.half() if DEVICE == "cuda" else reference.model).to(DEVICE)
    for number in map(int, rows):
        sizes = BatchSizes(rows=number, encode_batch=32)
        torch_backend.GPU_APPETITE = torch_backend.CPU_APPETITE = sizes
        options = DecodeOptions(**SEARCH).over({})
        images = enumerate(endless(pixels_of(IMAGES)))
        captions = torch_backend.caption_live(model, reference.image_processor, images, options)
        report(part="live", rows=number, **_steady(captions, warm_up=2 * number // 4))


def kernels(backend: str, precision: str, rows: str = "1024", images: str = "768") -> None:
    """List where the GPU's time goes, kernel by kernel; see benchmarks.gpu.runs.kernel_times."""
    from benchmarks.gpu.runs import kernel_times
    from engine.captioner import Captioner

    captioner = Captioner.load(W / precision, backend=backend)
    made = list(itertools.islice(endless(pixels_of(IMAGES)), int(images)))
    list(captioner.caption(made[:IMAGES], rows=int(rows), **SEARCH))  # kernels are chosen and memory is allocated
    times = kernel_times(lambda: list(captioner.caption(made, rows=int(rows), **SEARCH)))
    report(part="kernels", backend=backend, **times)


PARTS: dict[str, Callable[..., None]] = {
    part.__name__: part for part in (make, make_attention, ids, engine, generate, live, kernels)
}


def main() -> None:
    """Run the part that is named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        wants_help = sys.argv[1:2] in ([], ["-h"], ["--help"])
        print(f"{__doc__}\nparts: {', '.join(PARTS)}", file=sys.stdout if wants_help else sys.stderr)
        sys.exit(0 if wants_help else 2)
    PARTS[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
