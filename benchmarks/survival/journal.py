"""What the journal costs: seconds a caption while a run goes on, and seconds until a run that was cut off goes on.

python -m benchmarks.journal
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click

from benchmarks.setting.corpus import CHALLENGE_SIZE
from engine.captioner import Captioner
from engine.inputs.images import find_images
from engine.inputs.pixels import read_image
from engine.options import DecodeOptions
from engine.run.job import Outputs
from engine.run.record import RunRecord
from engine.run.rows import rows_of


@click.command()
@click.option("--images", type=click.IntRange(1), default=CHALLENGE_SIZE, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
def main(images: int, beams: int) -> None:
    """Journal so many captions of the demo bundle, then open the journal again; prints one JSON line."""
    captioner = Captioner.load(backend="cpu")
    example = find_images(Path("examples/images")).images[0]
    spec = captioner.bundle.image
    pixels = read_image(example.path, spec.height, spec.width, spec.resample)
    options = DecodeOptions(num_beams=beams, no_repeat_ngram_size=3, max_new_tokens=40)
    (caption,) = captioner.caption([pixels], options)
    with tempfile.TemporaryDirectory() as work:
        folder, out = Path(work, "images"), Path(work, "run.csv")
        folder.mkdir()
        for number in range(images):
            (folder / f"{number:06d}.png").symlink_to(example.path.resolve())
        found = find_images(folder).images
        start = time.perf_counter()
        with RunRecord(found, out, "benchmark") as record:
            for image in found:
                record.add(type(caption)(image.id, caption.alternatives))
        written = time.perf_counter() - start
        start = time.perf_counter()
        with RunRecord(find_images(folder).images, out, "benchmark") as record:
            assert record.resumed == images
        reopened = time.perf_counter() - start
        start = time.perf_counter()
        record.write(Outputs(out), rows_of(record, Outputs(out)))
        closed = time.perf_counter() - start
    report = {
        "benchmark": "journal",
        "captions": images,
        "ms_a_caption": round(1000 * written / images, 4),
        "list_and_resume_s": round(reopened, 3),
        "write_run_s": round(closed, 3),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
