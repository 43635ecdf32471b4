"""The tables of benchmarks.figures: the records of each, and the function that makes Markdown of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; each row has as many cells as the header."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    factors = [record["programs"][program]["times_engine"] for record in records]
    return f"{min(factors):.1f} to {max(factors):.1f} times"


def readme_speeds(*everything: Record) -> str:
    """Return the table of one processor, and a sentence about the last two records, which are of another processor."""
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
        "usual ONNX loop. Seconds per image, from pixels to token ids, float32, 3-gram ban, each program at its best "
        "batch size. On a slower processor, where torch multiplies almost as fast as ONNX Runtime, base and large "
        f"with 4 beams are {ratios(others, 'generate')} as fast as `generate`."
    )
    header = ["model", "engine", "`generate`", "usual ONNX loop", "memory: engine, loop"]
    return f"{textwrap.fill(lead, 120, break_long_words=False, break_on_hyphens=False)}\n\n{table(header, rows)}"


def agreement(record: Record) -> str:
    images = record["setting"]["images"]
    parts = []
    for counts in record["agreement"].values():
        explained = [
            f"{counts[kind]} {word}" for kind, word in (("tie", "a tie"), ("batch", "its batch")) if counts[kind]
        ]
        note = f" ({', '.join(explained)})" if explained else ""
        parts.append(f"{counts['identical']} of {images}{note}")
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
        "engine, s per image",
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
    header = ["new tokens of every caption", "engine, s per image", "`generate`", "usual ONNX loop", "captions"]
    return table(header, rows)


def by_rows(record: Record) -> str:
    speeds = record["images_per_s"]
    return table(["beams in flight", *speeds], [["images/s", *(f"{speed:.1f}" for speed in speeds.values())]])


AVERAGES = (("valid", "rouge1"), ("test", "rouge1"), ("test", "bertscore"))
"""Splits and metrics in the table of averages."""


def difference(result: Record, digits: int = 4) -> str:
    """Return a difference with its interval."""
    return f"{result['difference']:+.{digits}f} [{result['low']:.{digits}f}, {result['high']:.{digits}f}]"


def consensus(record: Record) -> str:
    """Compare the best beam with other ways to choose a caption."""
    metrics = {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)", "bleu1": "BLEU-1", "cider": "CIDEr-D"}
    rows = [
        [name, *(f"{run[m]['value']:.4f}" if name == "best beam" else difference(run[m]) for m in metrics)]
        for name, run in record["runs"].items()
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
    """Compare averaged weights with those of one epoch."""
    first = next(iter(record["runs"]))
    rows = []
    for name, run in record["runs"].items():
        row = [name]
        for split, metric in AVERAGES:
            result = run[split][metric]
            row.append(f"{result['value']:.4f}" if name == first else difference(result))
        rows.append(row)
    splits, metrics = (
        {"valid": "validation", "test": "held-out"},
        {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)"},
    )
    return table(["weights", *(f"{splits[split]} {metrics[metric]}" for split, metric in AVERAGES)], rows)


def tuned(record: Record) -> str:
    """Show settings that were chosen on one half of the slices and compared on the other half."""
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
            f"{result['own']:.4f}",
            f"{result['chosen']:.4f}",
            difference(result),
        ]
        for metric, result in record["held_back"].items()
    ]
    scores = table(["slices", "metric", "own settings", "chosen settings", "difference"], rows)
    return f"{settings}\n\n{scores}"


def rewards(*records: Record) -> str:
    """Show the differences that reward training made."""
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


@dataclass(frozen=True)
class Table:
    """Names of records, and the function that makes Markdown of them.

    Without `needs_bundle` no bundle is named below the table. With `as_above` the records are those of the table
    before. `elsewhere` are further records, whose machine and versions are given below another table.
    """

    records: tuple[str, ...]
    make: Callable[..., str]
    needs_bundle: bool = True
    as_above: bool = False
    elsewhere: tuple[str, ...] = ()


def _soak(record: Record) -> str:
    calm, disturbed, setting = record["undisturbed"], record["disturbed"], record["setting"]
    growth = calm["peak_gib"] / calm["peak_gib_of_500"] - 1
    survived = "nothing lost, nothing twice, the same bytes" if not disturbed["problems"] else disturbed["problems"]
    return table(
        ["what", "figure"],
        [
            ["undisturbed", f"{setting['images']:,} images, {calm['images_per_s']:.1f} images/s"],
            ["does it slow down?", f"the last tenth is {calm['last_over_second_tenth']:.2f} x as fast as the second"],
            ["does memory grow?", f"peak {calm['peak_gib']:.2f} GiB, {growth:.0%} above a run of 500"],
            [
                f"through {setting['kills']} `kill -9`, {setting['terms']} SIGTERM, {setting['full_disks']} full "
                f"disks, {disturbed['unreadable']} unreadable files",
                survived,
            ],
        ],
    )


def _update(record: Record) -> str:
    runs, setting = record["runs"], record["setting"]
    names = {
        "first": f"the first run, {setting['images']:,} images",
        "nothing_changed": "again, with nothing changed",
        "some_changed": f"again, with {setting['changed']} images changed",
        "scratch": "the same folder from scratch",
    }
    scratch = runs["scratch"]["seconds"]
    rows = [
        [
            what,
            f"{runs[name]['captioned']:,}",
            f"{runs[name]['seconds']:,.1f}",
            f"{runs[name]['seconds'] / scratch:.2%}",
        ]
        for name, what in names.items()
    ]
    same = "the same bytes" if record["same_as_from_scratch"] else "OTHER BYTES"
    rows.append(["only listing the folder, looking at each file", "", f"{record['listing_s']:.1f}", ""])
    return table(
        [f"{beams(setting['beams'])}; run.csv: {same}", "captioned", "s in total", "relative to from scratch"], rows
    )


def _faults(*records: Record) -> str:
    rows = []
    for record in records:
        setting, disturbed = record["setting"], record["disturbed"]
        kinds = {"kills": "`kill -9`", "terms": "SIGTERM", "full_disks": "full disks"}
        what = ", ".join(f"{setting[key]} {word}" for key, word in kinds.items() if setting[key])
        outcome = "nothing lost, nothing twice, the same bytes" if disturbed["passed"] else disturbed["problems"]
        rows.append([what, f"{disturbed['images']}, {disturbed['unreadable']} of them unreadable", outcome])
    return table(["faults", "images", "outcome"], rows)


def _page(record: Record) -> str:
    def spread(values: list[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f} s"

    runs = record["runs"]
    frames = {kind: max(run[kind]["slowest_frame_s"] for run in runs) for kind in ("reading", "flicking", "dragging")}
    gaps = sum(run[kind]["gaps"] for run in runs for kind in frames)
    return table(
        ["what", "figure"],
        [
            [
                "making it, all thumbnails new; none new",
                f"{record['making_first_s']:.1f} s; {record['making_again_s']:.1f} s",
            ],
            ["page; thumbnails", f"{record['page_MB']:.1f} MB; {record['thumbnails_MB']} MB"],
            ["until something is painted", spread([run["first_paint_s"] for run in runs])],
            ["until the first rows are there", spread([run["first_rows_s"] for run in runs])],
            [
                "slowest frame: reading, flicking, dragging",
                ", ".join(f"{slowest:.2f} s" for slowest in frames.values()),
            ],
            ["places without a row while scrolling", gaps],
            [
                "a first search; another order",
                f"{spread([r['search_s'] for r in runs])}; {spread([r['sort_s'] for r in runs])}",
            ],
        ],
    )


def _cluster(*records: Record) -> str:
    rows = []
    for record in records:
        alone = record["ways"]["one process"]
        for way, times in record["ways"].items():
            rows.append(
                [
                    f"{record['setting']['workload']}: {way}",
                    f"{times['image_s']:.3f} ({times['image_s'] / alone['image_s']:.2f} x)",
                    f"{times['fixed_s']:.1f}",
                    ", ".join(f"{wall:.0f}" for wall in times["wall_s"][-1]),
                ]
            )
    images = records[0]["setting"]["images"]
    return table(["", "s per image", "start, s", f"{images} images in total, s"], rows)


def _simulated(record: Record) -> str:
    chosen = [entry for entry in record["simulated"] if entry["actors"] in (1, 8, 64, 256, 512, 1024)]
    rows = [
        [
            f"{entry['images']:,}",
            entry["actors"],
            f"{entry['images_per_s']:.1f}",
            entry["bottleneck"],
            f"{entry['worker_busy']:.0%}",
        ]
        for entry in chosen
    ]
    return table(["images", "workers", "images/s", "bottleneck", "workers busy"], rows)


def _host(record: Record) -> str:
    rows = [
        [
            beams(entry["beams"]),
            *(f"{entry[checkout]['images_per_s']:,.0f}" for checkout in ("here", "there")),
            f"{entry['ratio']:.2f} x",
        ]
        for entry in record["measured"]
    ]
    return table(["a device that answers at once", "images/s", "images/s of 084ae4d", "ratio"], rows)


def _devices(*records: Record) -> str:
    rows = [
        [
            f"{record['device'].upper()}, {beams(entry['beams'])}",
            f"{entry['here']['seconds']:.1f}",
            f"{entry['here']['device_s']:.1f}",
            f"{entry['host_s']:.1f}",
            f"{entry['over_slower']:.3f} x",
        ]
        for record in records
        for entry in record["measured"]
    ]
    images = records[0]["measured"][0]["images"]
    header = [f"{images:,} images", "s in total", "device, s", "host alone, s", "relative to the slower of the two"]
    return table(header, rows)


BASE = ("base_1beams", "base_4beams", "base_10beams")
ZEN4 = ("zen4/base_4beams", "zen4/large_4beams")
TABLES = {
    "readme speed": Table((*BASE, "large_4beams"), readme_speeds, elsewhere=ZEN4),
    "speed": Table((*BASE, "large_4beams", "demo_4beams"), speeds),
    "memory": Table((*BASE, "large_4beams", "demo_4beams"), memory, as_above=True),
    "products": Table((*BASE, "large_4beams", "demo_4beams"), products, as_above=True),
    "other processor": Table(ZEN4, speeds),
    "products of the other": Table(ZEN4, products, as_above=True),
    "lengths": Table(("base_4beams_10tokens", "base_4beams_20tokens", "base_4beams_40tokens"), by_length),
    "rows": Table(("rows_demo_4beams",), by_rows),
    "soak": Table(("soak_17237",), _soak),
    "faults": Table(("soak_300_kill", "soak_300_term", "soak_300_disk"), _faults),
    "page": Table(("report_page",), _page, needs_bundle=False),
    "cluster": Table(("scaleout_demo", "scaleout_base"), _cluster),
    "simulated cluster": Table(("scaleout_demo",), _simulated),
    "host": Table(("host_instant_against",), _host, needs_bundle=False),
    "devices": Table(("host_a100", "host_h100"), _devices, needs_bundle=False),
    "update": Table(("update_17237",), _update),
    "averages": Table(("averages",), averages, needs_bundle=False),
    "tuned": Table(("tuned",), tuned),
    "consensus": Table(("consensus",), consensus),
    "rewards": Table(("rewards_greedy", "rewards_augmented", "rewards_train", "rewards_valid"), rewards),
}
