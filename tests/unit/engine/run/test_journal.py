"""The journal, the lock, and the state that an interrupted run leaves."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.calibration import Calibration
from engine.captions import Alternative, Caption
from engine.errors import BundleError, EngineError, OutputError, UsageError
from engine.files.lock import OutputLock, folder_lock, waiting_lock
from engine.inputs.images import ImageFile
from engine.run.job import Outputs
from engine.run.journal import SYNC_EVERY_S, Journal, decode_record, encode_record, journal_path, read_journal
from engine.run.record import RunRecord, digest_of, rows_of, run_key

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read_caption(image: ImageFile) -> Caption:
    """Return the caption of an image's current content."""
    return replace(caption(image.id), file_sha256=hashlib.sha256(image.path.read_bytes()).hexdigest())


def caption(image_id: str, text: str = "a brain") -> Caption:
    return Caption(
        image_id,
        (Alternative(text, f"{text} .", (1, 2, 3), -1.25, -0.1 - 0.2), Alternative("", "", (), -2, -3)),
        latency_s=0.25,
    )


@pytest.fixture
def images(tmp_path: Path) -> list[ImageFile]:
    files = [ImageFile(f"image {i}, \"'ü", tmp_path / f"image {i}.png") for i in range(6)]
    for number, file in enumerate(files):
        file.path.write_bytes(b"%d" % number)
    return files


@given(st.dictionaries(st.text(), JSON))
def test_a_record_comes_back_as_it_was(record):
    line = encode_record(record)
    assert line.count(b"\n") == 1
    assert decode_record(line) == record


@given(st.dictionaries(st.text(), JSON), st.data())
def test_damaged_line_is_never_a_record(record, data):
    line = bytearray(encode_record(record))
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 255))
    assert decode_record(bytes(line)) is None
    assert decode_record(bytes(line[:place])) is None


@given(st.binary(max_size=200) | st.builds(bytes, st.integers(0, 200)))
def test_arbitrary_bytes_are_a_journal_or_kept(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("journal") / "run.csv.journal"
    path.write_bytes(content)
    try:
        journal = Journal(path, "key")
    except UsageError:
        assert content.strip(b"\0")
        assert path.read_bytes() == content
        return
    journal.append({"id": "a"})
    journal.close()
    assert Journal(path, "key").records == [{"id": "a"}]


@pytest.mark.parametrize("content", [b"secret key", b"deadbeef", b"line\n" * 1000, b"0123abcd other\n"])
def test_a_file_that_is_not_a_journal_is_refused(tmp_path, content):
    path = tmp_path / "run.csv.journal"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.csv\.journal is not a journal of this program: move it"):
        Journal(path, "key")
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.csv.journal"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
@pytest.mark.parametrize("target", ["precious", "nowhere", "."])
def test_a_journal_does_not_follow_a_link(tmp_path, target):
    (tmp_path / "precious").write_text("short")
    (tmp_path / "run.csv.journal").symlink_to(target)
    with pytest.raises(UsageError, match=r"run\.csv\.journal is a link"):
        Journal(tmp_path / "run.csv.journal", "key")
    assert (tmp_path / "precious").read_text() == "short"
    assert not (tmp_path / "nowhere").exists()


def test_unreadable_journal_is_renamed_unchanged(tmp_path):
    path = tmp_path / "run.csv.journal"
    journal = Journal(path, "key")
    for i in range(3):
        journal.append({"id": i})
    journal.close()
    converted = path.read_bytes().replace(b"\n", b"\r\n")
    path.write_bytes(converted)
    journal = Journal(path, "key")
    journal.close()
    assert journal.set_aside == tmp_path / "run.csv.journal.old"
    assert journal.set_aside.read_bytes() == converted


def test_journal_cut_at_any_byte_keeps_complete_records(tmp_path):
    path = tmp_path / "run.csv.journal"
    journal = Journal(path, "key")
    for i in range(5):
        journal.append({"id": i})
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, "key")
        survivors = max(0, sum(end <= cut for end in ends) - 1)
        assert journal.records == [{"id": i} for i in range(survivors)], cut
        journal.append({"id": "next"})
        journal.close()
        _, records, damaged, good = read_journal(path)
        assert damaged == 0
        assert records == [{"id": i} for i in range(survivors)] + [{"id": "next"}]
        assert good == path.stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.csv.journal"]


def test_records_are_forced_to_disk_after_some_seconds(tmp_path, monkeypatch):
    """A power cut loses at most the captions of SYNC_EVERY_S."""
    now, forced = [0.0], []
    monkeypatch.setattr("engine.run.journal.time.monotonic", lambda: now[0])
    journal = Journal(tmp_path / "run.csv.journal", "key")
    monkeypatch.setattr(os, "fsync", lambda _: forced.append(now[0]))
    for second in range(1, 17):
        now[0] = float(second)
        journal.append({"id": second})
    journal.close()
    assert forced == [SYNC_EVERY_S + 1, 2 * (SYNC_EVERY_S + 1)]


def test_records_after_a_damaged_line_are_valid(tmp_path):
    path = tmp_path / "run.csv.journal"
    journal = Journal(path, "key")
    for i in range(3):
        journal.append({"id": i})
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"damaged\n", *lines[3:]]))
    journal = Journal(path, "key")
    assert journal.records == [{"id": 0}, {"id": 2}]
    assert journal.damaged == 1


def test_captions_of_changed_images_stay_in_the_journal(tmp_path, images):
    """A run that dies before its first caption must not delete what an earlier one has journaled."""
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        record.add(caption(images[0].id))
    images[0].path.write_bytes(b"another")
    with RunRecord(images, out, "signature") as record:
        assert (record.resumed, record.not_reused) == (0, 1)
    assert (tmp_path / "run.csv.journal").exists()


def test_full_disk_loses_nothing_and_reports_how_to_resume(tmp_path, monkeypatch):
    path = tmp_path / "run.csv.journal"
    journal = Journal(path, "key")
    journal.append({"id": 0})
    write = os.write

    def full(file, data):
        write(file, bytes(data)[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match=r"No space left on device: free disk space and run the same command again"):
        journal.append({"id": 1})
    monkeypatch.setattr(os, "write", write)
    journal.append({"id": 2})
    journal.close()
    assert Journal(path, "key").records == [{"id": 0}, {"id": 2}]


def test_journal_of_another_run_is_renamed(tmp_path):
    path = tmp_path / "run.csv.journal"
    for key in ("a", "b", "c"):
        journal = Journal(path, key)
        assert journal.records == []
        journal.append({"key of": key})
        journal.close()
    assert read_journal(tmp_path / "run.csv.journal.old")[1] == [{"key of": "a"}]
    assert read_journal(tmp_path / "run.csv.journal.old2")[1] == [{"key of": "b"}]


def test_captions_come_back_exactly(tmp_path, images):
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        for image in images[:4]:
            record.add(caption(image.id))
    with RunRecord(images, out, "signature") as record:
        assert record.resumed == 4
        assert list(record.captions.values()) == [caption(image.id) for image in images[:4]]
        assert list(record.remaining()) == images[4:]


def test_changed_or_missing_image_is_not_recalled(tmp_path, images):
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        for image in images:
            record.add(caption(image.id))
    images[1].path.write_bytes(b"another")
    images[2].path.unlink()
    with RunRecord(images, out, "signature") as record:
        assert list(record.remaining()) == [images[1], images[2]]


@pytest.mark.parametrize("change", ["signature", "depth", "no resume"])
def test_another_option_starts_afresh(tmp_path, images, change):
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        record.add(caption(images[0].id))
    signature = "another" if change == "signature" else "signature"
    again = [replace(image, depth="scale") for image in images] if change == "depth" else images
    with RunRecord(again, out, signature, resume=change != "no resume") as record:
        assert record.resumed == 0
        assert record.set_aside == tmp_path / "run.csv.journal.old"


@pytest.mark.parametrize("change", ["one is deleted", "order", "one is replaced", "one is new"])
def test_another_list_of_images_keeps_the_captions(tmp_path, images, change):
    out = tmp_path / "run.csv"
    with RunRecord(images[:5], out, "signature") as record:
        for image in images[:4]:
            record.add(read_caption(image))
    broken = images[4].path
    if change == "one is deleted":
        broken.unlink()
    elif change == "one is replaced":
        broken.write_bytes(b"fixed")
    again = {"one is deleted": images[:4], "order": images[4::-1], "one is replaced": images[:5]}.get(change, images)
    with RunRecord(again, out, "signature") as record:
        assert record.set_aside is None
        assert (record.resumed, record.not_reused) == (4, 0)
        assert list(record.captions.values()) == [caption(i.id) for i in again if i.id in record.captions]


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """Names of the images that are read for their digests."""
    read: list[str] = []

    def counted(path: Path) -> str | None:
        read.append(path.name)
        return digest_of(path)

    monkeypatch.setattr("engine.run.record.digest_of", counted)
    return read


def test_images_copied_elsewhere_keep_their_captions(tmp_path, images, files_read):
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        for image in images[:4]:
            record.add(read_caption(image))
    (tmp_path / "node").mkdir()
    copies = [replace(image, path=tmp_path / "node" / image.path.name) for image in images]
    for image, copied in zip(images, copies, strict=True):
        copied.path.write_bytes(image.path.read_bytes())
    copies[1].path.write_bytes(b"y")  # of a size that is known
    copies[5].path.write_bytes(b"of a size that no image has")
    with RunRecord(copies, out, "signature") as record:
        assert list(record.captions.values()) == [caption(images[i].id) for i in (0, 2, 3)]
    assert sorted(files_read) == [f"image {i}.png" for i in range(5)], "only files of a known size are read"


def test_a_file_with_its_size_and_time_is_trusted(tmp_path, images, files_read):
    """Inode number and ctime change on network file systems and after chmod without the content."""
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        for image in images:
            record.add(read_caption(image))
    images[0].path.chmod(0o600)
    before = images[1].path.stat()
    (tmp_path / "new").write_bytes(images[1].path.read_bytes())
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(images[1].path)
    assert images[1].path.stat().st_ino != before.st_ino
    os.utime(images[2].path)
    with RunRecord(images, out, "signature") as record:
        assert record.resumed == 6
    assert files_read == ["image 2.png"], "its time has changed, so its bytes are compared"


@pytest.mark.parametrize("update", [False, True])
def test_changed_inodes_and_times_do_not_fail_a_run(tmp_path, images, update):
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature", update=update) as record:
        for image in images:
            record.add(read_caption(image))
        images[0].path.chmod(0o600)
        (tmp_path / "new").write_bytes(images[1].path.read_bytes())
        (tmp_path / "new").replace(images[1].path)
        images[2].path.unlink()
        record.check_unchanged()
        record.write(Outputs(out, update=update), rows_of(record, Outputs(out)))
        record.finish()
    assert out.exists()
    with RunRecord(images, out, "signature", update=update) as record:
        assert record.resumed == (5 if update else 0)


@pytest.mark.parametrize("update", [False, True])
def test_changed_bytes_fail_a_run_whatever_the_times(tmp_path, images, update):
    out, path = tmp_path / "run.csv", images[1].path
    with RunRecord(images, out, "signature", update=update) as record:
        for image in images:
            record.add(read_caption(image))
        before = path.stat()
        path.write_bytes(b"y")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(EngineError, match=r"1 image changed during the run \(image 1\.png\)"):
            record.check_unchanged()
    with RunRecord(images, out, "signature", update=update) as record:
        assert [image.id for image in record.remaining()] == [images[1].id], "the time is that of the old content"
        record.check_unchanged()


def test_captions_are_recalled_by_prompt(tmp_path, images):
    out, prompts = tmp_path / "run.csv", {image.id: "a ct" for image in images}
    with RunRecord(images, out, "signature", prompts=prompts) as record:
        for image in images[:3]:
            record.add(read_caption(image))
    changed = prompts | {images[1].id: "an mri"}
    with RunRecord(images, out, "signature", prompts=changed) as record:
        assert sorted(record.captions) == [images[0].id, images[2].id]
    with RunRecord(images, out, "signature") as record:
        assert record.resumed == 0


def journal_of_an_earlier_version(out: Path, images: list[ImageFile], prompts: dict[str, str] | None) -> None:
    """Write what earlier versions wrote: the key stands for the list of images, and records have ids alone."""
    lines = [encode_record({"journal": 1, "key": run_key(images, "signature", prompts)})]
    for image in images[:4]:
        status = image.path.stat()
        record = {"id": image.id, "file": [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]}
        made = caption(image.id)
        lines.append(
            encode_record(record | {"latency_s": made.latency_s, "alternatives": list(map(vars, made.alternatives))})
        )
    journal_path(out).write_bytes(b"".join(lines))


@pytest.mark.parametrize("has_prompts", [False, True])
def test_a_journal_of_an_earlier_version_resumes(tmp_path, images, has_prompts):
    out = tmp_path / "run.csv"
    prompts = {image.id: "a ct" for image in images} if has_prompts else None
    journal_of_an_earlier_version(out, images, prompts)
    with RunRecord(images, out, "signature", prompts=prompts) as record:
        assert (record.resumed, record.set_aside) == (4, None)
        record.add(read_caption(images[4]))
    with RunRecord(images[:5], out, "signature", prompts=prompts) as record:  # it has this version's key now
        assert list(record.captions.values()) == [caption(image.id) for image in images[:5]]
    journal_of_an_earlier_version(out, images, prompts)
    with RunRecord(images[:5], out, "signature", prompts=prompts) as record:
        assert record.set_aside is not None


def test_no_caption_is_kept_after_the_bundle_changed(tmp_path, images):
    def overwritten() -> None:
        raise BundleError("overwritten")

    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        record.add(read_caption(images[0]))
    with RunRecord(images, out, "signature", check_bundle=overwritten) as record:
        with pytest.raises(BundleError):
            record.add(read_caption(images[1]))
        with pytest.raises(BundleError):
            record.check_unchanged()
    with RunRecord(images, out, "signature") as record:
        assert list(record.captions) == [images[0].id]


def test_captions_of_unknown_score_are_marked_for_review(tmp_path, images):
    """A caption without a runner-up has no margin, and so no expected score."""
    by_margin = Calibration("margin", 2, "rouge1", "rouge1:F", 4, (0.0, 1.0), (0.25, 0.5))
    alone = Caption(images[1].id, caption("").alternatives[:1])
    with RunRecord(images[:2], tmp_path / "run.csv", "signature", calibration=by_margin) as record:
        record.add(caption(images[0].id))
        record.add(alone)
        files = {"calibration": tmp_path / "map.json", "review_out": tmp_path / "review.csv"}
        verdicts = record.verdicts(Outputs(tmp_path / "run.csv", **files, abstain_below=0.1))
    assert verdicts[alone.id] == {"expected_score": None, "review": True}
    assert verdicts[images[0].id]["review"] is False


def test_journal_is_deleted_only_after_writing(tmp_path, images):
    out, journal = tmp_path / "run.csv", tmp_path / "run.csv.journal"
    with RunRecord(images[:1], out, "signature") as record:
        record.add(caption(images[0].id))
        record.write(Outputs(out), rows_of(record, Outputs(out)))
        assert journal.exists()
        record.finish()
    assert out.exists()
    assert not journal.exists()
    with RunRecord(images[:1], out, "signature") as record:
        record.add(caption(images[0].id))
        with pytest.raises(OutputError):
            record.write(Outputs(tmp_path / "missing" / "run.csv"), [])
    assert journal.exists()


def test_invalid_header_is_of_another_run(tmp_path):
    path = tmp_path / "run.csv.journal"
    path.write_bytes(encode_record({"journal": 1, "key": ["key"]}) + encode_record({"id": "a"}))
    assert Journal(path, "key").records == []
    assert (tmp_path / "run.csv.journal.old").exists()


def test_malformed_records_are_ignored(tmp_path, images):
    """A record may have a valid checksum and invalid content."""
    out = tmp_path / "run.csv"
    with RunRecord(images, out, "signature") as record:
        known = {"file": record._fingerprints[images[0].id], "place": str(images[0].path)}
        for absurd in ({}, {"id": []}, {"place": [], "file": 3}, known | {"prompt": {}, "alternatives": 3}):
            record._journal.append(absurd)
        for alternatives in (None, 3, [], [{"text": "a"}]):
            record._journal.append(known | {"id": images[0].id, "alternatives": alternatives})
        record._journal.append({"id": "a stranger", "place": str(images[1].path), "file": None, "sha256": "0"})
        record._journal.append(known | {"file": [[], "1"], "sha256": "0"})
    with RunRecord(images, out, "signature") as record:
        assert record.resumed == 0


def test_a_second_run_on_one_output_is_refused_by_name(tmp_path):
    out = tmp_path / "run.csv"
    with OutputLock(out), pytest.raises(UsageError, match=f"being written by process {os.getpid()}"), OutputLock(out):
        pass
    with OutputLock(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    out = tmp_path / "run.csv"
    code = (
        "import os; from pathlib import Path; from engine.files.lock import OutputLock\n"
        f"OutputLock(Path({str(out)!r})).__enter__()\n"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / "run.csv.lock").exists()
    with OutputLock(out):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_lock_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("1\n")
    (tmp_path / "run.csv.lock").symlink_to("precious")
    with pytest.raises(UsageError, match=r"run\.csv\.lock is a link"), OutputLock(tmp_path / "run.csv"):
        pass
    with pytest.raises(UsageError, match=r"run\.csv\.lock is a link"), waiting_lock(tmp_path / "run.csv.lock"):
        pass
    assert (tmp_path / "precious").read_text() == "1\n"


@pytest.mark.parametrize("content", ["[[package]]\n", "123 456\n", "1" * 100])
def test_a_file_that_is_not_a_lock_stays(tmp_path, content):
    (tmp_path / "poetry.lock").write_text(content)
    with pytest.raises(UsageError, match=r"poetry\.lock is not a lock"), OutputLock(tmp_path / "poetry"):
        pass
    assert (tmp_path / "poetry.lock").read_text() == content


@pytest.mark.parametrize("content", [b"", b"4711\n", b" 4711\n", b"\0\0\0\0\0"])
def test_a_dead_runs_lock_is_taken_over(tmp_path, content):
    (tmp_path / "run.csv.lock").write_bytes(content)
    with OutputLock(tmp_path / "run.csv") as lock:
        assert int(lock.path.read_text()) == os.getpid()
    assert not lock.path.exists()


def test_note_without_file_locks(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.lock_descriptor", refuse)
    with OutputLock(tmp_path / "run.csv") as lock:
        assert "has no file locks" in lock.note
    with waiting_lock(tmp_path / "a.lock"), folder_lock(tmp_path):
        pass


def test_run_with_failed_images_is_not_complete(tmp_path, images):
    from engine.errors import ImageError

    with RunRecord(images, tmp_path / "run.csv", "signature") as record:
        record.add(caption(images[0].id))
        record.fail(ImageError("image 1.png", "truncated"))
        with pytest.raises(EngineError, match="1 of 6 images cannot be read and no run was written"):
            record.check_complete(allow_missing=False)
        record.check_complete(allow_missing=True)
