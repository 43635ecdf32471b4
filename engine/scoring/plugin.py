"""Run metrics as external commands that exchange JSON lines with `engine score`.

Some metrics need licensed models or packages that conflict with ours (ClinicalBLEURT, MedBERTScore, MedImageInsight
similarity, UMLS concept F1, AlignScore). `--plugin alignscore="/path/to/python my_alignscore.py"` runs a command in its
own environment, without a shell:

  in   one line {"contract": 1, "metric": NAME, "count": N, "weights": DIR or null}, then N lines
       {"id": ID, "candidate": TEXT, "references": [TEXT, ...], "image": PATH or null}; texts as they were written,
       UTF-8
  out  N lines {"id": ID, "score": NUMBER} in any order, and optionally one {"signature": "model:...|..."}; exit code 0

The command's stderr is passed through to the user. A missing, unknown or repeated id and a score that is not a finite
number are errors; nothing is filled in. examples/plugins/term_f1.py is an example that needs only the standard library.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from typing import Any

from engine.errors import EngineError, counted
from engine.scoring.base import Items, Measured, MetricInputs, UnavailableError, mean

CONTRACT = 1
NEEDS = {
    "clinicalbleurt": "BLEURT-20 fine-tuned on clinical notes, which is licensed",
    "medbertscore": "MedCAT and a licensed UMLS model pack",
    "similarity": "MedImageInsight in a separate environment",
    "umls_f1": "MedCAT and a licensed UMLS model pack",
    "alignscore": "AlignScore in a separate environment",
}
"""Organisers' metrics that are not built in, and what each needs."""


class Plugin:
    """A metric that a command of the user computes; mean over images."""

    def __init__(self, name: str, setting: MetricInputs) -> None:
        self.name = name
        self._setting = setting
        self._signature = ""

    def signature(self) -> str:
        """Return the signature that the command sent; before it has run, the last word of the command."""
        return f"{self.name}|plugin:{self._signature or self._command()[-1]}"

    def measure(self, items: Items) -> Measured:
        """Run the command. Raises UnavailableError if none was given, EngineError if it breaks the contract."""
        head = {"contract": CONTRACT, "metric": self.name, "count": len(items)}
        weights = self._setting.weights.get(self.name)
        lines = [head | {"weights": str(weights) if weights else None}]
        for i, name in enumerate(items.ids):
            image = str(items.images[i]) if items.images else None
            lines.append(
                {"id": name, "candidate": items.candidates[i], "references": items.references[i], "image": image}
            )
        answer = self._run("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        scores = self._parse(answer)
        missing = [name for name in items.ids if name not in scores]
        if missing:
            raise self._broken(f"returned no score for {counted(len(missing), 'image')}, for example {missing[0]}")
        unknown = set(scores) - set(items.ids)
        if unknown:
            raise self._broken(f"returned a score for {min(unknown)}, which is not in the run")
        return mean([scores[name] for name in items.ids])

    def _command(self) -> list[str]:
        command = self._setting.plugins.get(self.name)
        if not command:
            why = NEEDS.get(self.name, "a command that computes it")
            raise UnavailableError(f"needs {why}: --plugin {self.name}=COMMAND (contract: engine/scoring/plugin.py)")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise self._broken(f"has a command that cannot be parsed ({error}): {command}") from error
        if not words:
            raise self._broken("has an empty command")
        return words

    def _run(self, text: str) -> str:
        try:
            done = subprocess.run(
                self._command(), input=text.encode("utf-8", "surrogateescape"), stdout=subprocess.PIPE
            )
        except OSError as error:
            raise self._broken(f"cannot be started: {error.strerror}: {error.filename}") from error
        if done.returncode:
            raise self._broken(f"exited with code {done.returncode}")
        return done.stdout.decode("utf-8", "surrogateescape")

    def _parse(self, answer: str) -> dict[str, float]:
        scores: dict[str, float] = {}
        for number, line in enumerate(answer.split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry: Any = json.loads(line)
                if "signature" in entry:
                    self._signature = " ".join(str(entry["signature"]).split())
                    continue
                name, score = entry["id"], float(entry["score"])
                if not isinstance(name, str):
                    raise TypeError(f"the id {name!r} is not a string")
            except (ValueError, TypeError, KeyError) as error:
                raise self._broken(f"returned an invalid line {number} ({error!r})") from error
            if name in scores or not math.isfinite(score):
                raise self._broken(f"returned {name} twice or without a finite score (line {number})")
            scores[name] = score
        return scores

    def _broken(self, problem: str) -> EngineError:
        return EngineError(f"the plug-in {self.name} {problem}")
