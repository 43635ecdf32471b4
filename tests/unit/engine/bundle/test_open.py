"""References to the bundles of a run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from engine.bundle.open import BundleRef
from engine.errors import UsageError
from engine.inputs.remote import RemoteFolder

REMOTE = RemoteFolder("s3://KEY:SECRET@bucket/model")


def test_reference_names_its_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = BundleRef((Path("a"), REMOTE), (1.0, 3.0))
    assert str(mixed) == "a + s3://bucket/model"
    assert mixed.folders() == [Path("a")]
    assert mixed.absolute() == BundleRef((tmp_path / "a", REMOTE), (1.0, 3.0))
    assert pickle.loads(pickle.dumps(mixed)) == mixed
    assert str(BundleRef()) == "the embedded demo"


def test_local_folder_of_each_kind_of_bundle(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for reference in (BundleRef(), BundleRef((tiny_bundle,)), BundleRef((RemoteFolder(tiny_bundle.as_uri()),))):
        bundle = reference.open()
        (folder,) = reference.local(bundle).folders()
        assert folder.is_absolute()
        assert BundleRef((folder,)).open().digest == bundle.digest
    demo = BundleRef().open()
    assert BundleRef((Path("engine/assets/demo"),)).open().digest == demo.digest


@pytest.mark.parametrize(
    ("count", "weights", "sentence"),
    [
        (1, (1.0,), "needs at least two --bundle"),
        (0, (1.0,), "needs at least two --bundle"),
        (3, (1.0, 2.0), "3 bundles and 2 weights"),
        (2, (1.0, 0.0), "must be a number above 0"),
        (2, (1.0, float("nan")), "must be a number above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(count, weights, sentence):
    with pytest.raises(UsageError, match=sentence):
        BundleRef(tuple(Path(str(number)) for number in range(count)), weights)
    with pytest.raises(UsageError, match="given twice"):
        BundleRef((Path("a"), Path("a")))
