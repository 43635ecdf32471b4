"""Workloads: a checkpoint with its bundle, images, and options for which captions have many different lengths.

    python -m benchmarks.workload --shape base

No trained model is available from a package registry, and speed does not depend on the meaning of the tokens. It does
depend on the lengths of captions. The bias of the end token is set so that they vary like those of real captions.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

from engine.bundle.manifest import Bundle, demo_bundle
from engine.checkpoints.convert import convert
from engine.checkpoints.graphs import find_graphs
from engine.checkpoints.read import read_checkpoint
from engine.errors import UsageError
from engine.host import processor
from engine.inputs.images import find_images
from engine.inputs.pixels import decode_image, read_image
from engine.inputs.tables import read_table
from engine.options import DecodeOptions
from export.bundle import export_bundle
from export.families import PUBLISHED, family_for
from export.families.blip import BlipImageProcessor
from export.restore import restore_checkpoint

BUILD = Path("build/workload")
EXAMPLES = Path("examples/images")


STD, EMBEDDING_STD, OUTPUT_STD, CROSS_OUTPUT_STD = 0.05, 0.2, 0.02, 0.04
"""Standard deviations of the random weights. With the usual 0.02 all tokens are almost equally likely after any other,
and the search is full of ties that rounding decides. Large embeddings and small outputs of the text layers make a token
depend on the one before. Larger outputs of cross-attention make it depend on the image."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint, and the bias of its end token, which makes caption lengths vary.

    `cross_std` is the deviation of the output weights of cross-attention.
    """

    vision_layers: int
    vision_width: int
    vision_heads: int
    end_bias: float
    image_size: int = 224
    cross_std: float = CROSS_OUTPUT_STD


SHAPES = {
    "base": Shape(12, 768, 12, 26.9),
    "base-384": Shape(12, 768, 12, 11.0, 384, 1.7 * CROSS_OUTPUT_STD),
    "large": Shape(24, 1024, 16, 20.7),
}
"""Salesforce/blip-image-captioning-base and -large; the text decoder is BERT-base in both. With this bias captions have
about 20 new tokens on average at 4 beams, and some more than 50. The public checkpoints take images of 384 px. There
cross-attention averages over 577 positions instead of 197, which makes images more alike: its outputs are larger by the
root of that ratio."""
PATCH_SIZE, TEXT_WIDTH = 16, 768


@dataclass(frozen=True)
class Published:
    """An architecture whose graphs are in the wheel (export.families.PUBLISHED), with random weights.

    `programs` are those that `benchmarks.throughput` measures next to the engine by default. For `end_bias` see Shape.
    If the output layer has no bias, the bias of the module `last_norm` raises the end token's logit instead.
    """

    architecture: str
    programs: tuple[str, ...]
    end_bias: float
    last_norm: str = ""


FLORENCE = "model.language_model.decoder."
PUBLISHED_SHAPES = {
    "vit-gpt2": Published("ViT-GPT2", ("generate", "optimum", "openvino"), 13.7, "decoder.transformer.ln_f"),
    "git-base": Published("GIT-base", ("generate", "openvino"), 17.5),
    "florence2-base": Published(
        "Florence-2-base", ("generate", "openvino"), 0.0, f"{FLORENCE}layers.5.final_layer_norm"
    ),
}
"""Workloads of other families than BLIP. With their bias captions of vit-gpt2 and git-base have 10 to 13 new tokens on
average, and some have 40. Measure florence2-base with --forced-tokens."""
MAX_NEW_TOKENS = dict.fromkeys(SHAPES, 64) | dict.fromkeys(PUBLISHED_SHAPES, 40) | {"demo": 40}


@dataclass(frozen=True)
class Workload:
    """Folders of one workload, and the maximum number of new tokens of its searches.

    With None for `max_new_tokens` it is a checkpoint of the user, whose generation settings hold. `most` is the number
    of images of the folder that are used; None: all.
    """

    name: str
    checkpoint: Path
    bundle: Path
    pictures: Path
    max_new_tokens: int | None
    most: int | None = None

    def bundle_in(self, precision: str) -> Path:
        """Return the folder of the bundle in a precision; `prepare` writes those that it is asked for."""
        return self.bundle if precision == "fp32" else BUILD / self.name / f"bundle-{precision}"

    def options(self, num_beams: int | None, *, forced_tokens: int | None = None) -> DecodeOptions:
        """Return options for `num_beams` beams with a 3-gram ban; `forced_tokens` sets the length of all captions.

        With the user's checkpoint all options that are not given are the checkpoint's own, and there is no further ban.
        """
        if self.max_new_tokens is None:
            given = DecodeOptions(num_beams=num_beams, max_new_tokens=forced_tokens, min_new_tokens=forced_tokens)
            return given.replace(num_return_sequences=1).over(Bundle.load(self.bundle).generation)
        longest = forced_tokens or self.max_new_tokens
        return DecodeOptions(
            num_beams=num_beams, no_repeat_ngram_size=3, max_new_tokens=longest, min_new_tokens=forced_tokens
        ).over({})


def prepare(name: str, images: int, precisions: Iterable[str] = ()) -> Workload:
    """Create the files of the workload `name` (a key of MAX_NEW_TOKENS) under BUILD, unless they exist.

    `precisions` are further precisions (fp16, int8) in which its bundle is written. Bundles of PUBLISHED_SHAPES are
    converted without torch, because an export records answers of `generate`, which takes minutes per image for GIT.
    """
    pictures = write_corpus(BUILD / f"pictures_{images}", images, EXAMPLES)
    checkpoint = BUILD / name / "checkpoint"
    bundle = demo_bundle() if name == "demo" else BUILD / name / "bundle"
    if not checkpoint.exists():
        if name == "demo":
            _make_complete(checkpoint, lambda out: restore_checkpoint(bundle, out))
        elif name in SHAPES:
            _make_complete(checkpoint, lambda out: make_checkpoint(out, SHAPES[name]))
        else:
            _make_complete(checkpoint, lambda out: make_published(out, PUBLISHED_SHAPES[name]))
    write = _convert if name in PUBLISHED_SHAPES else export_bundle
    if not bundle.exists():
        write(checkpoint, bundle, click.echo, precision="fp32")
    workload = Workload(name, checkpoint, bundle, pictures, MAX_NEW_TOKENS[name])
    for precision in precisions:
        if not workload.bundle_in(precision).exists():
            write(checkpoint, workload.bundle_in(precision), click.echo, precision=precision)
    return workload


def prepare_own(checkpoint: str, pictures: Path, images: int | None) -> Workload:
    """Return the workload of a user: a checkpoint (folder, hub id or .pth file) and the first `images` of a folder.

    The checkpoint is exported under BUILD, once. Raises CheckpointError, and UsageError if the folder has no images.
    """
    from export.bundle import checkpoint_sha256
    from export.checkpoints.find import find_checkpoint

    folder = find_checkpoint(checkpoint)
    bare = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(checkpoint).name).strip(".") or "checkpoint"
    name = f"{bare}-{checkpoint_sha256(folder)[:12]}"
    found = find_images(pictures).images
    bundle = BUILD / name / "bundle"
    if not bundle.exists():
        bundle.parent.mkdir(parents=True, exist_ok=True)
        export_bundle(folder, bundle, lambda line: click.echo(line, err=True))
    return Workload(name, folder, bundle, pictures, None, min(len(found), images or OWN_IMAGES))


OWN_IMAGES = 64
"""Number of the user's images that are measured by default."""


def _convert(checkpoint: Path, out: Path, log: Callable[[str], None], *, precision: str) -> None:
    opened = read_checkpoint(checkpoint)
    graphs = find_graphs(opened.family, opened.shape, precision)
    _make_complete(out, lambda draft: convert(opened, graphs, draft, source={}, log=log))


def _make_complete(out: Path, make: Callable[[Path], object]) -> None:
    """Create a folder under a temporary name and rename it, so that an incomplete one is never used."""
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    unfinished.rename(out)


def read_pictures(workload: Workload) -> Iterator[Image.Image]:
    """Yield the workload's images, RGB; those of a user may be too large to hold all of them at once."""
    return (decode_image(image.path) for image in find_images(workload.pictures).images[: workload.most])


def read_references(workload: Workload) -> list[str] | None:
    """Return the caption of the example that each image was made from, or None: random weights have no captions."""
    if workload.name != "demo":
        return None
    captions = read_table(EXAMPLES.with_name("captions.csv")).single()
    names = [image.id for image in find_images(EXAMPLES).images]
    return [captions[names[number % len(names)]] for number in range(len(find_images(workload.pictures).images))]


def read_pixels(workload: Workload, bundle: Bundle) -> NDArray[np.uint8]:
    """Return the images as input of the bundle's encoder, u8[N,height,width,3]."""
    spec = bundle.image
    return np.stack(
        [
            read_image(picture, spec.height, spec.width, spec.resample, resize=spec.resize)
            for picture in read_pictures(workload)
        ]
    )


def make_checkpoint(out: Path, shape: Shape, *, seed: int = 0, std: float = STD) -> Path:
    """Write a checkpoint of `shape` with random weights and the demo's tokenizer into `out`; return `out`."""
    tokenizer = BertTokenizerFast(tokenizer_file=str(demo_bundle() / "tokenizer.json"))
    text = {
        "vocab_size": 30524,
        "hidden_size": TEXT_WIDTH,
        "encoder_hidden_size": shape.vision_width,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image_size,
        "patch_size": PATCH_SIZE,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_std(name, std, shape.cross_std), generator=generator)
        model.tie_weights()
        model.text_decoder.cls.predictions.bias[text["sep_token_id"]] += shape.end_bias
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    BlipImageProcessor(size=dict.fromkeys(("height", "width"), shape.image_size)).save_pretrained(out)
    return out


def make_published(out: Path, shape: Published, *, seed: int = 0) -> Path:
    """Write a checkpoint of `shape` with random weights and the demo's tokenizer into `out`; return `out`."""
    tokenizer = BertTokenizerFast(tokenizer_file=str(demo_bundle() / "tokenizer.json"))
    config = PUBLISHED[shape.architecture]
    family = family_for(config)
    sizes = family.sizes(config)
    if sizes.vocab_size < len(tokenizer):  # GIT's vocabulary lacks two tokens that BLIP added to BERT's
        patches = math.isqrt(sizes.encoder_positions - 1)
        config = family.with_sizes(
            config, patches=patches, vocab_size=len(tokenizer), max_positions=sizes.max_positions
        )
    model, tokens = family.model_class(config).eval(), family.sizes(config).tokens
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_std(name, STD), generator=generator)
        model.tie_weights()
        if shape.last_norm:
            row, norm = head.weight[tokens.eos], model.get_submodule(shape.last_norm)
            # the embedding of a token is in the output of its own position: without signs it would be chosen again
            norm.weight *= torch.randint(0, 2, norm.weight.shape, generator=generator) * 2 - 1
            norm.bias += shape.end_bias * row / row.dot(row)
        else:
            head.bias[tokens.eos] += shape.end_bias
    family.apply_settings(model, {})
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor = family.rules.processor_for(None, config.to_dict())
    assert processor is not None, "each family has a default"
    settings = {**processor.settings, "image_processor_type": processor.kind}
    family.make_processor(settings).save_pretrained(out)
    return out


EMBEDDINGS = ("word_embeddings", "position_embeddings", "wte.", "wpe.", "language_model.shared.", "r.embed_positions.")
DAVIT_STD = 0.02
"""With STD the random DaViT of Florence-2 makes float32's rounding errors grow to 3e-4 of its output, in torch as in
the engine, so that captions of 16 tokens differ; with this deviation to 1e-6."""
OUTPUTS = ("output.dense.weight", "c_proj.weight", "out_proj.weight", "fc2.weight")
"""Parts of the names of a text decoder's embeddings, and endings of those of its output layers."""


def _std(name: str, std: float, cross_std: float = CROSS_OUTPUT_STD) -> float:
    """Return the standard deviation of a weight matrix."""
    if "vision_tower" in name:
        return DAVIT_STD
    if any(part in name for part in EMBEDDINGS) or name == "output.weight":
        return EMBEDDING_STD
    if name.startswith(("text_decoder", "decoder.", "git.encoder.", FLORENCE)) and name.endswith(OUTPUTS):
        return cross_std if "crossattention" in name or "encoder_attn" in name else OUTPUT_STD
    return std


@click.command()
@click.option("--shape", "name", type=click.Choice(sorted(MAX_NEW_TOKENS)), required=True, help="Model.")
@click.option("--images", type=click.IntRange(1), default=32, show_default=True, help="Number of images.")
def main(name: str, images: int) -> None:
    """Create a workload under build/workload and print its paths."""
    click.echo(prepare(name, images))


RESULTS = Path("benchmarks/results")
"""Records in the repository. The tables of the docs are made from them, and a test compares both."""
SCRATCH = Path("build/benchmarks")
"""Records of trials, outside version control."""


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --out and --record to a command; see record_path."""
    out = click.option(
        "--out", type=click.Path(path_type=Path), help=f"Record to write; the default is a file in {SCRATCH}/."
    )
    record = click.option("--record", is_flag=True, help=f"Write into {RESULTS}/ and replace the record there.")
    return out(record(command))


def record_path(name: str, out: Path | None = None, record: bool = False) -> Path:
    """Return the path of a record and create its folder: `out`, or `name` in RESULTS (with `record`) or SCRATCH.

    Raises UsageError for an `out` in RESULTS without `record`: the tables of the docs are made from these files.
    """
    if out is not None and not record and out.resolve().is_relative_to(RESULTS.resolve()):
        raise UsageError(f"--out {out} would be among the tracked records: choose another folder, or add --record")
    path = out or (RESULTS if record else SCRATCH) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Linux's flags of the instructions that the speed of a precision depends on."""


def describe_machine() -> dict[str, object]:
    """Return the date, the processor with the INSTRUCTIONS it has, cores, Python version and versions of packages."""
    versions = {}
    for name in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = [name for name in INSTRUCTIONS if name in processor().flags]
    machine = {
        "processor": processor().full_name,
        "instructions": instructions,
        "cores": cores,
        "python": platform.python_version(),
        "versions": versions,
    }
    return {"date": date.today().isoformat()} | machine


CHALLENGE_SIZE = 17_237
"""Number of test images of ImageCLEFmedical Caption 2024."""
LONGER_SIDE = 320
"""Pixels. Most images of ROCOv2 are larger, but a JPEG of this size already costs more to decode than to resize."""


def make_picture(number: int, bases: list[Image.Image]) -> Image.Image:
    """Return image `number`: a base slice rotated by up to 12 degrees, zoomed, shifted, gamma 0.7 to 1.4."""
    rng = np.random.default_rng(number)
    base = bases[number % len(bases)].convert("L")
    scale = LONGER_SIDE / max(base.size)
    base = base.resize((round(base.width * scale), round(base.height * scale)), Image.Resampling.BICUBIC)
    angle, zoom = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.88, 1.12)
    shift = rng.uniform(-0.05, 0.05, 2) * base.size
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    x, y = base.width / 2, base.height / 2
    affine = (cos, sin, x - cos * x - sin * y + shift[0], -sin, cos, y + sin * x - cos * y + shift[1])
    rotated = base.transform(base.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    contrast = (np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4) * 255).astype(np.uint8)
    return rotated.point(contrast.tolist())


def write_corpus(out: Path, count: int, pictures: Path) -> Path:
    """Write `count` JPEGs made from the images in the folder `pictures` into `out`; existing files are kept."""
    bases = [decode_image(image.path) for image in find_images(pictures).images]
    out.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        path = out / f"corpus_{number:06d}.jpg"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make_picture(number, bases).save(unfinished, "JPEG", quality=90)
            unfinished.rename(path)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return out


if __name__ == "__main__":
    main()
