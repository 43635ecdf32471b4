"""The tables of figures.py: which records each is made of, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import quality_tables
from benchmarks.setting.markdown import table
from benchmarks.speed import speed_tables

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Names of records, and what makes Markdown of them. Without `needs_bundle` no bundle took part; with `as_above`
    the records are those of the table before. What `elsewhere` were measured with stands below another table.
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
        "scratch": "what is there then, from scratch",
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
        [f"{speed_tables.beams(setting['beams'])}; run.csv: {same}", "captioned", "s in all", "of from scratch"], rows
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
            ["slowest frame: reading, flicking, dragging", ", ".join(f"{one:.2f} s" for one in frames.values())],
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
        for way, found in record["ways"].items():
            rows.append(
                [
                    f"{record['setting']['workload']}: {way}",
                    f"{found['image_s']:.3f} ({found['image_s'] / alone['image_s']:.2f} x)",
                    f"{found['fixed_s']:.1f}",
                    ", ".join(f"{wall:.0f}" for wall in found["wall_s"][-1]),
                ]
            )
    images = records[0]["setting"]["images"]
    return table(["", "s an image", "starting, s", f"{images} images in all, s"], rows)


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
    return table(["images", "workers", "images/s", "what is in the way", "workers are busy"], rows)


def _host(record: Record) -> str:
    rows = [
        [
            speed_tables.beams(one["beams"]),
            *(f"{one[checkout]['images_per_s']:,.0f}" for checkout in ("here", "there")),
            f"{one['ratio']:.2f} x",
        ]
        for one in record["measured"]
    ]
    return table(["a device that answers at once", "images/s", "images/s of 084ae4d", "ratio"], rows)


def _devices(*records: Record) -> str:
    rows = [
        [
            f"{record['device'].upper()}, {speed_tables.beams(one['beams'])}",
            f"{one['here']['seconds']:.1f}",
            f"{one['here']['device_s']:.1f}",
            f"{one['host_s']:.1f}",
            f"{one['over_slower']:.3f} x",
        ]
        for record in records
        for one in record["measured"]
    ]
    images = records[0]["measured"][0]["images"]
    header = [f"{images:,} images", "s in all", "the device, s", "the host alone, s", "over the slower of the two"]
    return table(header, rows)


BASE = ("base_1beams", "base_4beams", "base_10beams")
ZEN4 = ("zen4/base_4beams", "zen4/large_4beams")
TABLES = {
    "readme speed": Table((*BASE, "large_4beams"), speed_tables.readme_speeds, elsewhere=ZEN4),
    "speed": Table((*BASE, "large_4beams", "demo_4beams"), speed_tables.speeds),
    "memory": Table((*BASE, "large_4beams", "demo_4beams"), speed_tables.memory, as_above=True),
    "products": Table((*BASE, "large_4beams", "demo_4beams"), speed_tables.products, as_above=True),
    "other processor": Table(ZEN4, speed_tables.speeds),
    "products of the other": Table(ZEN4, speed_tables.products, as_above=True),
    "lengths": Table(("base_4beams_10tokens", "base_4beams_20tokens", "base_4beams_40tokens"), speed_tables.by_length),
    "rows": Table(("rows_demo_4beams",), speed_tables.by_rows),
    "soak": Table(("soak_17237",), _soak),
    "faults": Table(("soak_300_kill", "soak_300_term", "soak_300_disk"), _faults),
    "page": Table(("report_page",), _page, needs_bundle=False),
    "cluster": Table(("scaleout_demo", "scaleout_base"), _cluster),
    "simulated cluster": Table(("scaleout_demo",), _simulated),
    "host": Table(("host_instant_against",), _host, needs_bundle=False),
    "devices": Table(("host_a100", "host_h100"), _devices, needs_bundle=False),
    "update": Table(("update_17237",), _update),
    "averages": Table(("averages",), quality_tables.averages, needs_bundle=False),
    "tuned": Table(("tuned",), quality_tables.tuned),
    "consensus": Table(("consensus",), quality_tables.consensus),
    "rewards": Table(("rewards_greedy", "rewards_augmented", "rewards_train", "rewards_valid"), quality_tables.rewards),
}
