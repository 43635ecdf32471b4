"""How long a challenge-sized run takes to score: ROUGE-1, BLEU-1 and CIDEr with their intervals, as the command does
it.

python -m benchmarks.scoring
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

import click

from benchmarks.quality.detokenise import make_caption
from benchmarks.setting.corpus import CHALLENGE_SIZE
from engine.files.run_files import write_run
from engine.scoring.files import write_report
from engine.scoring.score import ScoreRequest, score_run


@click.command()
@click.option("--captions", type=click.IntRange(1), default=CHALLENGE_SIZE, show_default=True)
def main(captions: int) -> None:
    """Score made-up captions against others of the same kind; prints one JSON line."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        run, references = Path(work, "run.csv"), Path(work, "references.csv")
        for path in (run, references):
            write_run(path, ((f"ID{i}", make_caption(chance)) for i in range(captions)))
        start = time.perf_counter()
        report = score_run(ScoreRequest(run, references), lambda line: click.echo(line, err=True))
        write_report(report, Path(work, "scores.json"), Path(work, "per_image.csv"))
        seconds = time.perf_counter() - start
    parts = {score.name: round(score.seconds, 2) for score in report.scores}
    click.echo(json.dumps({"benchmark": "scoring", "captions": captions, "seconds": round(seconds, 1), **parts}))


if __name__ == "__main__":
    main()
