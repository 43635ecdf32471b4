"""Define the tables that figures.py writes: the records of each table and the function that formats them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import counted


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table. Every row needs one cell per entry of the header."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Record = dict[str, Any]

PROGRAMS = {"generate": "`generate`", "conventional": "the usual ONNX loop", "openvino": "the engine on OpenVINO"}


def beams(count: int) -> str:
    """Return `greedy` for one beam, `N beams` otherwise."""
    return "greedy" if count == 1 else f"{count} beams"


def name_of(record: Record) -> str:
    """Return workload and search of a record, such as `base, 4 beams`."""
    return f"{record['workload']}, {beams(record['setting']['beams'])}"


def seconds_and_ratio(record: Record, program: str, digits: int = 1) -> str:
    """Return seconds per image of a program and how many times the engine's time that is, such as `0.407 (2.6 x)`."""
    row = record["programs"][program]
    return f"{row['seconds_per_image']:.3f} ({row['times_engine']:.{digits}f} x)"


def program_cell(record: Record, program: str, digits: int = 1) -> str:
    """Return time, ratio and batch size of a program, or "" if it was not measured."""
    if program not in record["programs"]:
        return ""
    batch = f", batch {record['batch'][program]}" if program in record["batch"] else ""
    return seconds_and_ratio(record, program, digits) + batch


def ratios(records: Sequence[Record], program: str) -> str:
    """Return the smallest and the largest ratio to a program, such as `2.2 to 6.9 times`."""
    values = [record["programs"][program]["times_engine"] for record in records]
    return f"{min(values):.1f} to {max(values):.1f} times"


def headline(*everything: Record) -> str:
    """Return the README's first sentence about speed; the last three records have captions of equal lengths."""
    spread, equal = everything[:-3], everything[-3:]
    text = (
        f"On the same CPU, with the same ids, it is {ratios(spread, 'generate')} as fast as `generate` where captions "
        f"differ in length, and {ratios(equal, 'generate')} where all have the same length ([records](#speed))."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def readme_speeds(*everything: Record) -> str:
    """Format the README's speed table; the last two records, of another processor, only appear in the lead sentence."""
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
        f"On a CPU, the engine is {ratios(everything, 'generate')} as fast as `generate` and "
        f"{ratios(everything, 'conventional')} as fast as the usual ONNX loop. Below: seconds per image from pixels "
        "to token ids, float32, 3-gram ban, each program at its best batch size. On a slower processor, where torch's "
        "matrix product is almost as fast as ONNX Runtime's, base and large with 4 beams are "
        f"{ratios(others, 'generate')} as fast."
    )
    header = ["model", "engine", "`generate`", "usual ONNX loop", "peak memory: engine, loop"]
    return f"{textwrap.fill(lead, 120, break_long_words=False, break_on_hyphens=False)}\n\n{table(header, rows)}"


def agreement(record: Record) -> str:
    """Return how many captions of each other program equal the engine's, with the reasons of the differences."""
    parts, is_whole = [], True
    for counts in record["agreement"].values():
        images = sum(counts[kind] for kind in ("identical", "tie", "batch", "real"))
        explained = [
            counted(counts[kind], word) for kind, word in (("tie", "tie"), ("batch", "batch effect")) if counts[kind]
        ]
        note = f" ({', '.join(explained)})" if explained else ""
        parts.append(f"{counts['identical']} of {images}{note}")
        is_whole &= counts["identical"] == images
    return "all" if is_whole else "; ".join(parts)


def speeds(*records: Record) -> str:
    rows = [
        [
            f"{name_of(record)}, {record['setting']['images']} images",
            f"{record['programs']['engine']['seconds_per_image']:.3f}",
            *(program_cell(record, program) for program in PROGRAMS),
            agreement(record),
            f"{record['roofline']['share']:.0%}",
        ]
        for record in records
    ]
    header = [
        "workload",
        "engine, s/image",
        *PROGRAMS.values(),
        "captions equal to the engine's",
        "share of the roofline",
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
    return table(["GFLOP/s", "torch matrix product", "ONNX Runtime matrix product", "engine, useful work"], rows)


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
    header = [
        "new tokens per caption",
        "engine, s/image",
        "`generate`",
        "usual ONNX loop",
        "captions equal to the engine's",
    ]
    return table(header, rows)


def families(*records: Record) -> str:
    """Compare the engine with other programs on models of other families."""
    rows = []
    for record in records:
        tokens = record["new_tokens"]
        spread = f"{tokens['mean']:.0f} on average, at most {tokens['most']}"
        rows.append(
            [
                name_of(record),
                f"{record['setting']['forced_tokens']} each" if record["setting"]["forced_tokens"] else spread,
                f"{record['programs']['engine']['seconds_per_image']:.3f}",
                *(program_cell(record, program) for program in ("generate", "optimum")),
                agreement(record),
            ]
        )
    header = ["model", "new tokens", "engine, s/image", "`generate`", "optimum-onnx", "captions equal to the engine's"]
    return table(header, rows)


IN_LOWER_PRECISION = {
    "engine-int8": "the engine, int8",
    "engine-fp16": "the engine, float16",
    "generate-bf16": "`generate`, bf16",
    "generate-int8": "`generate`, torch's dynamic int8",
}


def precisions(*records: Record) -> str:
    """Compare programs in lower precision with the engine in float32."""
    rows = []
    for record in records:
        ours = f"{record['programs']['engine']['seconds_per_image']:.3f}"
        rows.append([name_of(record), "the engine, float32", ours, "", ""])
        for program, found in record["fidelity"].items():
            same = f"{found['identical']} of {found.get('images', record['setting']['images'])}"
            change = difference(found["rouge1"]) if found["rouge1"] is not None else ""
            rows.append(["", IN_LOWER_PRECISION[program], program_cell(record, program, 2), same, change])
    return table(["model", "program", "s/image", "captions as in float32", "ROUGE-1 minus float32's"], rows)


def by_rows(record: Record) -> str:
    speeds_by_rows = record["images_per_s"]
    return table(["rows", *speeds_by_rows], [["images/s", *(f"{speed:.1f}" for speed in speeds_by_rows.values())]])


AVERAGES = (("valid", "rouge1"), ("test", "rouge1"), ("test", "bertscore"))
"""Split and metric of each column in the table of averages."""


def difference(result: Record, digits: int = 4) -> str:
    """Return a difference with its 95 % interval, such as `+0.0009 [-0.0021, 0.0038]`."""
    return f"{result['difference']:+.{digits}f} [{result['low']:.{digits}f}, {result['high']:.{digits}f}]"


def consensus(record: Record) -> str:
    """Compare the best beam with captions chosen by consensus."""
    metrics = {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)", "bleu1": "BLEU-1", "cider": "CIDEr-D"}
    rows = [
        [name, *(f"{scores[m]['value']:.4f}" if name == "best beam" else difference(scores[m]) for m in metrics)]
        for name, scores in record["runs"].items()
    ]
    lines = table(["caption", *metrics.values()], rows)
    remarks = []
    if further := record.get("further_bundles"):
        remarks.append(f"Several bundles: the bundle of the other rows and {', '.join(further)}, with equal weights.")
    if together := record.get("together"):
        remarks.append(f"One search: mean log-probabilities of {together}; the first has the weights of the demo.")
    if support := record["setting"].get("support"):
        remarks.append(
            f"Support: {support['captions']:,} distinct captions of the training head; the {support['nearest']} "
            f"nearest captions have {support['share']:.0%} of the vote."
        )
    return "\n\n".join([lines, *([textwrap.fill(" ".join(remarks), 120)] if remarks else [])])


def averages(record: Record) -> str:
    """Compare averaged weights with those of one epoch."""
    first = next(iter(record["runs"]))
    rows = []
    for name, scores in record["runs"].items():
        row = [name]
        for split, metric in AVERAGES:
            score = scores[split][metric]
            row.append(f"{score['value']:.4f}" if name == first else difference(score))
        rows.append(row)
    splits, metrics = (
        {"valid": "validation", "test": "held-out"},
        {"rouge1": "ROUGE-1", "bertscore": "BERTScore (proxy)"},
    )
    return table(["weights", *(f"{splits[split]} {metrics[metric]}" for split, metric in AVERAGES)], rows)


def tuned(record: Record) -> str:
    """Compare settings that were chosen on the tuning half on the test half."""
    rows = [
        [setting, own, record["chosen"][setting], ", ".join(f"{value:g}" for value in record["grids"][setting])]
        for setting, own in record["own"].items()
    ]
    settings = table(["setting", "default of the demo", "chosen", "values tried"], rows)
    half, names = record["images"], {"rouge1": "ROUGE-1", "bleu1": "BLEU-1"}
    values = record["tuning"]
    rows = [
        [
            f"tuning half, {half['tuning']} slices",
            "ROUGE-1",
            f"{values['own']:.4f}",
            f"{values['chosen']:.4f}",
            "",
        ]
    ]
    rows += [
        [
            f"test half, {half['held_back']} slices",
            names[metric],
            f"{score['own']:.4f}",
            f"{score['chosen']:.4f}",
            difference(score),
        ]
        for metric, score in record["held_back"].items()
    ]
    scores = table(["slices", "metric", "default settings", "chosen settings", "difference"], rows)
    return f"{settings}\n\n{scores}"


def rewards(*records: Record) -> str:
    """Show how reward training changed the reward and the held-out scores."""
    rows = []
    for record in records:
        learnt = record.get("slices learnt from") or record["training slices"]
        slices = "slices not used in training before" if learnt.get("head") == "valid" else "training slices"
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
    header = [
        "trained on",
        "reward, greedy captions",
        "reward, sampled captions",
        "held-out ROUGE-1",
        "held-out BERTScore (proxy)",
    ]
    return table(header, rows)


@dataclass(frozen=True)
class Table:
    """A table of the documentation.

    records:      names of the records in benchmarks/results
    make:         formats the records as Markdown
    needs_bundle: name the bundle below the table; False if the benchmark used none
    see:          where the circumstances of the records are, such as "as above" (None: below the table)
    elsewhere:    further records for `make`, whose circumstances are listed below another table
    """

    records: tuple[str, ...]
    make: Callable[..., str]
    needs_bundle: bool = True
    see: str | None = None
    elsewhere: tuple[str, ...] = ()


def _soak(record: Record) -> str:
    calm, disturbed, setting = record["undisturbed"], record["disturbed"], record["setting"]
    growth = calm["peak_gib"] / calm["peak_gib_of_500"] - 1
    survived = "no caption lost or repeated, identical output" if not disturbed["problems"] else disturbed["problems"]
    return table(
        ["what", "result"],
        [
            ["undisturbed", f"{setting['images']:,} images, {calm['images_per_s']:.1f} images/s"],
            [
                "speed over time",
                f"the last tenth of the images runs {calm['last_over_second_tenth']:.2f} x as fast as the second",
            ],
            ["memory", f"peak {calm['peak_gib']:.2f} GiB, {growth:.0%} above a run of 500 images"],
            [
                f"with {setting['kills']} `kill -9`, {setting['terms']} SIGTERM, {setting['full_disks']} full "
                f"disks, {disturbed['unreadable']} unreadable files",
                survived,
            ],
        ],
    )


def _update(record: Record) -> str:
    runs, setting = record["runs"], record["setting"]
    names = {
        "first": f"first run, {setting['images']:,} images",
        "nothing_changed": "second run, nothing changed",
        "some_changed": f"third run, {setting['changed']} images changed",
        "scratch": "the changed folder from scratch",
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
    same = "identical to a run from scratch" if record["same_as_from_scratch"] else "DIFFERENT"
    rows.append(["only listing the folder and the status of its files", "", f"{record['listing_s']:.1f}", ""])
    return table(
        [f"{beams(setting['beams'])}; run.csv: {same}", "captioned", "total, s", "relative to a run from scratch"], rows
    )


def _faults(*records: Record) -> str:
    rows = []
    for record in records:
        setting, disturbed = record["setting"], record["disturbed"]
        kinds = {"kills": "`kill -9`", "terms": "SIGTERM", "full_disks": "full disks"}
        what = ", ".join(f"{setting[key]} {word}" for key, word in kinds.items() if setting[key])
        outcome = "no caption lost or repeated, identical output" if disturbed["passed"] else disturbed["problems"]
        rows.append([what, f"{disturbed['images']}, {disturbed['unreadable']} of them unreadable", outcome])
    return table(["faults", "images", "result"], rows)


def _page(record: Record) -> str:
    def spread(values: list[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f} s"

    runs = record["runs"]
    frames = {kind: max(run[kind]["slowest_frame_s"] for run in runs) for kind in ("reading", "flicking", "dragging")}
    gaps = sum(run[kind]["gaps"] for run in runs for kind in frames)
    return table(
        ["what", "result"],
        [
            [
                "building the page: thumbnails new; thumbnails exist",
                f"{record['making_first_s']:.1f} s; {record['making_again_s']:.1f} s",
            ],
            ["size: page; thumbnails", f"{record['page_MB']:.1f} MB; {record['thumbnails_MB']} MB"],
            ["first paint", spread([run["first_paint_s"] for run in runs])],
            ["first rows visible", spread([run["first_rows_s"] for run in runs])],
            ["slowest frame: reading, flicking, dragging", ", ".join(f"{frame:.2f} s" for frame in frames.values())],
            ["blank places while scrolling", gaps],
            [
                "first search; new sort order",
                f"{spread([r['search_s'] for r in runs])}; {spread([r['sort_s'] for r in runs])}",
            ],
        ],
    )


def _cluster(*records: Record) -> str:
    rows = []
    for record in records:
        alone = record["ways"]["one process"]
        for way, timing in record["ways"].items():
            rows.append(
                [
                    f"{record['setting']['workload']}: {way}",
                    f"{timing['image_s']:.3f} ({timing['image_s'] / alone['image_s']:.2f} x)",
                    f"{timing['fixed_s']:.1f}",
                    ", ".join(f"{wall:.0f}" for wall in timing["wall_s"][-1]),
                ]
            )
    images = records[0]["setting"]["images"]
    return table(["", "s/image", "startup, s", f"total for {images} images, s"], rows)


def _simulated(record: Record) -> str:
    chosen = [one for one in record["simulated"] if one["actors"] in (1, 8, 64, 256, 512, 1024)]
    rows = [
        [
            f"{one['images']:,}",
            one["actors"],
            f"{one['images_per_s']:.1f}",
            one["bottleneck"],
            f"{one['worker_busy']:.0%}",
        ]
        for one in chosen
    ]
    return table(["images", "workers", "images/s", "bottleneck", "workers busy"], rows)


def _host(record: Record) -> str:
    rows = [
        [
            beams(one["beams"]),
            *(f"{one[checkout]['images_per_s']:,.0f}" for checkout in ("here", "there")),
            f"{one['ratio']:.2f} x",
        ]
        for one in record["measured"]
    ]
    return table(["zero-latency device", "images/s", "images/s at commit 084ae4d", "ratio"], rows)


def _devices(*records: Record) -> str:
    rows = [
        [
            f"{record['device'].upper()}, {beams(one['beams'])}",
            f"{one['here']['seconds']:.1f}",
            f"{one['here']['device_s']:.1f}",
            f"{one['host_s']:.1f}",
            f"{one['over_slower']:.3f} x",
        ]
        for record in records
        for one in record["measured"]
    ]
    images = records[0]["measured"][0]["images"]
    header = [f"{images:,} images", "total, s", "device alone, s", "host alone, s", "total / slower of the two"]
    return table(header, rows)


BASE = ("base_1beams", "base_4beams", "base_10beams")
ZEN4 = ("zen4/base_4beams", "zen4/large_4beams")
LENGTHS = ("base_4beams_10tokens", "base_4beams_20tokens", "base_4beams_40tokens")
FAMILIES = (
    *(f"{model}_4beams{length}" for model in ("vit-gpt2", "git-base") for length in ("_16tokens", "")),
    "florence2-base_3beams_16tokens",
)
TABLES = {
    "headline": Table((*BASE, "large_4beams"), headline, elsewhere=(*ZEN4, *LENGTHS), see=""),
    "readme speed": Table((*BASE, "large_4beams"), readme_speeds, elsewhere=ZEN4),
    "speed": Table((*BASE, "base-384_4beams", "large_4beams", "demo_4beams"), speeds),
    "precisions": Table(("base_4beams_precisions", "demo_4beams_precisions"), precisions),
    "memory": Table((*BASE, "base-384_4beams", "large_4beams", "demo_4beams"), memory, see="as above"),
    "products": Table((*BASE, "base-384_4beams", "large_4beams", "demo_4beams"), products, see="as above"),
    "other processor": Table(ZEN4, speeds),
    "products of the other": Table(ZEN4, products, see="as above"),
    "lengths": Table(LENGTHS, by_length),
    "families": Table(FAMILIES, families),
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
