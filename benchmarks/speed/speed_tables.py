"""The tables of figures.py about how fast programs say the same captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.setting.markdown import table

Record = dict[str, Any]

PROGRAMS = {"generate": "`generate`", "conventional": "the usual ONNX loop", "openvino": "the engine on OpenVINO"}


def beams(count: int) -> str:
    return "greedy" if count == 1 else f"{count} beams"


def name_of(record: Record) -> str:
    return f"{record['workload']}, {beams(record['setting']['beams'])}"


def seconds_and_ratio(record: Record, program: str) -> str:
    row = record["programs"][program]
    return f"{row['seconds_per_image']:.3f} ({row['times_engine']:.1f} x)"


def ratios(records: Sequence[Record], program: str) -> str:
    found = [record["programs"][program]["times_engine"] for record in records]
    return f"{min(found):.1f} to {max(found):.1f} times"


def readme_speeds(*everything: Record) -> str:
    """The table of one processor, and a sentence on the last two records, of another one."""
    records, others = everything[:-2], everything[-2:]
    rows = [
        [
            name_of(record),
            f"**{record['programs']['engine']['seconds_per_image']:.3f}**",
            seconds_and_ratio(record, "generate"),
            seconds_and_ratio(record, "conventional"),
            f"{record['programs']['engine']['peak_gib']:.1f}, {record['programs']['conventional']['peak_gib']:.1f} GiB",
        ]
        for record in records
    ]
    lead = (
        f"{ratios(everything, 'generate')} as fast as `generate` on a CPU, {ratios(everything, 'conventional')} as the "
        "usual ONNX loop. Seconds an image, from pixels to token ids, float32, 3-gram ban, each program at its best "
        "batch size. On a slower processor, where torch multiplies almost as fast as ONNX Runtime, base and large "
        f"with 4 beams are {ratios(others, 'generate')} as fast as `generate`."
    )
    header = ["model", "engine", "`generate`", "usual ONNX loop", "memory: engine, loop"]
    return f"{textwrap.fill(lead, 120, break_long_words=False, break_on_hyphens=False)}\n\n{table(header, rows)}"


def agreement(record: Record) -> str:
    images = record["setting"]["images"]
    parts = []
    for found in record["agreement"].values():
        explained = [
            f"{found[kind]} {word}" for kind, word in (("tie", "a tie"), ("batch", "its batch")) if found[kind]
        ]
        note = f" ({', '.join(explained)})" if explained else ""
        parts.append(f"{found['identical']} of {images}{note}")
    return "all the same" if set(parts) == {f"{images} of {images}"} else "; ".join(parts)


def speeds(*records: Record) -> str:
    rows = []
    for record in records:
        batch, roofline = record["batch"], record["roofline"]
        rows.append(
            [
                f"{name_of(record)}, {record['setting']['images']} images",
                f"{record['programs']['engine']['seconds_per_image']:.3f}",
                f"{seconds_and_ratio(record, 'generate')}, batch {batch['generate']}",
                f"{seconds_and_ratio(record, 'conventional')}, batch {batch['conventional']}",
                seconds_and_ratio(record, "openvino"),
                agreement(record),
                f"{roofline['share']:.0%}",
            ]
        )
    header = [
        "workload",
        "engine, s an image",
        *PROGRAMS.values(),
        "captions like the engine's",
        "of the roofline",
    ]
    return table(header, rows)


def memory(*records: Record) -> str:
    rows = [[name_of(r), *(f"{r['programs'][p]['peak_gib']:.2f}" for p in ("engine", *PROGRAMS))] for r in records]
    return table(["peak memory, GiB", "engine", *PROGRAMS.values()], rows)


def products(*records: Record) -> str:
    rows = [
        [
            name_of(record),
            f"{record['roofline']['matmul_gflops']['torch']:.0f}",
            f"{record['roofline']['matmul_gflops']['onnxruntime']:.0f}",
            f"{record['roofline']['achieved_gflops']:.0f}",
        ]
        for record in records
    ]
    return table(["GFLOP/s", "torch's matrix product", "ONNX Runtime's", "useful work of the engine"], rows)


def by_length(*records: Record) -> str:
    rows = [
        [
            record["setting"]["forced_tokens"],
            f"{record['programs']['engine']['seconds_per_image']:.3f}",
            seconds_and_ratio(record, "generate"),
            seconds_and_ratio(record, "conventional"),
            agreement(record),
        ]
        for record in records
    ]
    header = ["new tokens of every caption", "engine, s an image", "`generate`", "usual ONNX loop", "captions"]
    return table(header, rows)


def by_rows(record: Record) -> str:
    found = record["images_per_s"]
    return table(["rows side by side", *found], [["images/s", *(f"{speed:.1f}" for speed in found.values())]])
