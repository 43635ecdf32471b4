"""The tables of figures.py about captions: how good they are, not how fast."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.setting.markdown import table

Record = dict[str, Any]
AVERAGES = (("valid", "rouge1"), ("test", "rouge1"), ("test", "bertscore"))
"""Splits and metrics in the table of averages."""


def difference(found: Record, digits: int = 4) -> str:
    """Return a difference with its interval."""
    return f"{found['difference']:+.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def consensus(record: Record) -> str:
    """Best beam against what was chosen otherwise."""
    metrics = {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)", "bleu1": "BLEU-1", "cider": "CIDEr-D"}
    rows = [
        [name, *(f"{found[m]['value']:.4f}" if name == "best beam" else difference(found[m]) for m in metrics)]
        for name, found in record["runs"].items()
    ]
    lines = table(["chosen among", *metrics.values()], rows)
    remarks = []
    if further := record.get("further_bundles"):
        remarks.append(f"Several bundles: that of the other rows and {', '.join(further)}, each with the same share.")
    if together := record.get("together"):
        remarks.append(f"One search: log-probabilities of {together} averaged; the first has the weights of the demo.")
    if support := record["setting"].get("support"):
        remarks.append(
            f"Support: {support['captions']:,} distinct captions of the training head; the {support['nearest']} "
            f"nearest have {support['share']:.0%} of the vote."
        )
    return "\n\n".join([lines, *([textwrap.fill(" ".join(remarks), 120)] if remarks else [])])


def averages(record: Record) -> str:
    """Averaged weights against those of one epoch."""
    first = next(iter(record["runs"]))
    rows = []
    for name, found in record["runs"].items():
        row = [name]
        for split, metric in AVERAGES:
            one = found[split][metric]
            row.append(f"{one['value']:.4f}" if name == first else difference(one))
        rows.append(row)
    splits, metrics = (
        {"valid": "validation", "test": "held-out"},
        {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)"},
    )
    return table(["weights", *(f"{splits[split]} {metrics[metric]}" for split, metric in AVERAGES)], rows)


def tuned(record: Record) -> str:
    """Settings chosen on one half, compared on the other."""
    rows = [
        [setting, own, record["chosen"][setting], ", ".join(f"{value:g}" for value in record["grids"][setting])]
        for setting, own in record["own"].items()
    ]
    settings = table(["setting", "the demo's own", "chosen", "tried"], rows)
    half, names = record["images"], {"rouge1": "ROUGE-1", "bleu1": "BLEU-1"}
    values = record["tuning"]
    rows = [
        [
            f"the {half['tuning']} slices it was chosen on",
            "ROUGE-1",
            f"{values['own']:.4f}",
            f"{values['chosen']:.4f}",
            "",
        ]
    ]
    rows += [
        [
            f"the {half['held_back']} slices held back",
            names[metric],
            f"{one['own']:.4f}",
            f"{one['chosen']:.4f}",
            difference(one),
        ]
        for metric, one in record["held_back"].items()
    ]
    scores = table(["slices", "metric", "own settings", "chosen settings", "difference"], rows)
    return f"{settings}\n\n{scores}"


def rewards(*records: Record) -> str:
    """What reward training changed."""
    rows = []
    for record in records:
        learnt = record.get("slices learnt from") or record["training slices"]
        slices = "slices that no gradient had seen" if learnt.get("head") == "valid" else "training slices"
        recipe = record["recipe"]
        how = [f"baseline {recipe.get('baseline', 'greedy')}"]
        how += [f"augmentation {recipe['augmentation']}"] if recipe["augmentation"] != "none" else []
        how.append(f"frozen: {', '.join(recipe['freeze'])}")
        rows.append(
            [
                f"{learnt['images']} {slices}; {'; '.join(how)}",
                difference(learnt["reward of greedy captions"]),
                difference(learnt["reward of drawn captions"]),
                difference(record["held-out volume"]["rouge1"]),
                difference(record["held-out volume"]["bertscore"]),
            ]
        )
    header = ["learnt from", "reward, greedy", "reward, drawn", "held-out ROUGE-1", "held-out BERTScore (proxy)"]
    return table(header, rows)
