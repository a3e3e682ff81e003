"""Files are written whole or not at all, wherever they go; what cannot be written is known before the work."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import unicodedata
from pathlib import Path

import pytest

from capt_peft.utils.files import entries, make_writable, open_regular, write_json, written_whole
from capt_peft.utils.outputs import OutputLock, save_somewhere

FORK = multiprocessing.get_context("fork")
NAMES = [
    *("n" * length for length in (200, 245, 246, 247, 250, 254, 255)), "ü" * 127, "模" * 85, "🦆" * 63, "🦆" * 62 + "abc",
    unicodedata.normalize("NFD", "é" * 80), os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff" * 255), "a.", "a..", "a b ", " a",
    "-rf", ".hidden", "a\nb", "a'b\"c", "[a]*?", "..a", "%s{}", "~", "a\\b", ".capt-", ".capt-00000000-1-", "CON", "a:b",
]  # fmt: skip


def fill(folder, **files):
    with written_whole(folder) as temporary:
        for name, text in files.items():
            (temporary / f"{name}.txt").write_text(text)


def texts(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def elsewhere(tmp_path):
    """A folder on another disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        if os.stat(folder).st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is one disk only")
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ------------------------------------------------------------------------------------------------------------ whole


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]) + str(len(os.fsencode(name))))
def test_a_folder_of_any_name_is_written_and_nothing_is_written_beside_it(tmp_path, name):
    folder = tmp_path / name
    make_writable(folder)
    assert not folder.exists()
    for text in ("first", "second"):
        with written_whole(folder) as temporary:
            assert list(tmp_path.iterdir()) == [folder]
            (temporary / "sub").mkdir()
            (temporary / "sub" / "a.txt").write_text(text)
        assert texts(folder) == {"sub/a.txt": text}
    write_json(folder / name, {name: 1})
    assert json.loads((folder / name).read_bytes()) == {name: 1}
    assert sorted(os.listdir(folder)) == sorted([name, "sub"])


def test_if_the_block_raises_everything_stays_as_it_was(tmp_path):
    fill(tmp_path / "old", a="a")
    for folder in (tmp_path / "old", tmp_path / "new" / "and" / "deep"):
        with pytest.raises(RuntimeError), written_whole(folder) as temporary:
            (temporary / "a.txt").write_text("b")
            raise RuntimeError
    assert texts(tmp_path) == {"old/a.txt": "a"}
    assert os.listdir(tmp_path) == ["old"]


def test_links_stay_links_and_what_they_lead_to_is_written(tmp_path, elsewhere):
    (tmp_path / "folder").symlink_to(elsewhere / "not" / "there" / "yet")
    make_writable(tmp_path / "folder")
    fill(tmp_path / "folder", a="a")
    for target in (elsewhere / "file", tmp_path / "file"):  # one of them on another disk
        target.write_text("old")
        link = tmp_path / "folder" / "b.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        make_writable(tmp_path / "folder", "b.txt")
        fill(tmp_path / "folder", b="b")
        assert link.is_symlink() and target.read_text() == "b"
    assert (tmp_path / "folder").is_symlink()
    assert texts(elsewhere) == {"not/there/yet/a.txt": "a", "file": "b", "not/there/yet/b.txt": "b"}


def test_a_folder_within_that_is_on_another_disk_is_written(tmp_path, elsewhere):
    (tmp_path / "sub").symlink_to(elsewhere)
    with written_whole(tmp_path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text("a")
    assert texts(elsewhere) == {"a.txt": "a"} and (tmp_path / "sub").is_symlink()


def test_a_mount_point_is_written(small_disk):
    make_and_fill = [lambda: fill(small_disk, a="a"), lambda: write_json(small_disk / "b.json", 1)]
    for act in make_and_fill:
        act()
    assert sorted(os.listdir(small_disk)) == ["a.txt", "b.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "out") as temporary:
            (temporary / "a").touch(mode=0o600)
        write_json(tmp_path / "out" / "b", 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


# ------------------------------------------------------------------------------------------------------------ probed


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device", "long"])
def test_what_is_not_a_file_is_refused_before_the_work_and_is_not_replaced(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "a.txt")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = None if kind == "long" else path.stat().st_mode
    with pytest.raises(ValueError, match=r"Nothing can be written into output=.* Give another output") as caught:
        make_writable(tmp_path, path.name)
    assert len(str(caught.value)) < 1000
    if before is not None:
        with pytest.raises(OSError):
            fill(tmp_path, a="a")
        assert path.stat().st_mode == before and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["file", "file/out", "link/out"])
def test_a_file_in_the_way_is_refused_before_the_work(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match=r"Nothing can be written into output_dir=.*Give another output_dir"):
        make_writable(tmp_path / place, given="output_dir")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write into")
@pytest.mark.parametrize("place", ["/proc/self", "/proc/self/out", "/proc/1"])
def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(place):
    with pytest.raises(ValueError, match="Nothing can be written into"):
        make_writable(place)


def test_a_full_disk_is_refused_before_the_work(small_disk):
    with pytest.raises(ValueError, match="No space left on device"):
        make_writable(small_disk)
    assert os.listdir(small_disk) == []


# ------------------------------------------------------------------------------------------------------------ killed


def killed_in_a_save(folder):
    def save():
        with written_whole(folder) as temporary:
            (temporary / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=save)
    process.start()
    process.join()


def test_what_a_killed_save_left_is_removed_by_the_next_and_was_no_content_of_the_folder(tmp_path):
    for _ in range(2):
        killed_in_a_save(tmp_path)
    assert len(os.listdir(tmp_path)) == 1 and entries(tmp_path) == []
    fill(tmp_path, b="b")
    assert os.listdir(tmp_path) == ["b.txt"]


def test_what_others_still_write_stays_and_is_removed_a_day_later(tmp_path):
    with written_whole(tmp_path) as temporary:
        other = tmp_path / f".capt-{'0' * 8}-1-other"  # of another machine, whose processes cannot be seen from here
        other.mkdir()
        fill(tmp_path, b="b")
        assert temporary.is_dir() and other.is_dir()
        os.utime(other, (0, other.stat().st_mtime - 25 * 60 * 60))
        fill(tmp_path, b="b")
        assert temporary.is_dir() and not other.exists()
    assert os.listdir(tmp_path) == ["b.txt"]


# ------------------------------------------------------------------------------------------------------------ locked


def in_another_process(function):
    """Returns what a function returns in another process, or the message of its error."""
    receiver, sender = FORK.Pipe(duplex=False)

    def call():
        try:
            sender.send(function())
        except Exception as error:
            sender.send(str(error))

    process = FORK.Process(target=call)
    process.start()
    said = receiver.recv()
    process.join()
    return said


def takes(folder, name=""):
    return in_another_process(lambda: bool(OutputLock(folder, name)))


@pytest.mark.parametrize("name", NAMES[::4], ids=ascii)
def test_of_two_runs_that_write_to_one_place_the_second_is_refused_until_the_first_ends(tmp_path, name):
    lock, again = OutputLock(tmp_path, name), OutputLock(tmp_path, name)
    assert takes(tmp_path, f"{name}2") is True
    lock.release()
    said = takes(tmp_path, name)
    assert f"process {os.getpid()} on " in said and "Wait until it has ended, or give another output" in said
    again.release()
    assert takes(tmp_path, name) is True
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_run_stops_nobody(tmp_path):
    def locked_and_killed():
        lock = OutputLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        return lock

    process = FORK.Process(target=locked_and_killed)
    process.start()
    process.join()
    assert len(os.listdir(tmp_path)) == 1
    assert takes(tmp_path) is True
    assert os.listdir(tmp_path) == []


def test_a_lock_goes_away_with_what_holds_it(tmp_path):
    OutputLock(tmp_path)
    assert takes(tmp_path) is True


# ---------------------------------------------------------------------------------------------------------- full disk


def test_what_a_full_disk_does_not_take_is_kept_elsewhere_and_the_error_says_where(small_disk):
    fill(small_disk, a="old")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_somewhere(small_disk, lambda folder: (folder / "a.txt").write_text("n" * 100_000))
    rescue = Path(str(caught.value).split("is in ")[1].split(": move")[0])
    assert texts(rescue) == {"a.txt": "n" * 100_000}
    assert texts(small_disk) == {"a.txt": "old"} and os.listdir(small_disk) == ["a.txt"]
    shutil.rmtree(rescue)


def test_what_no_disk_takes_is_said_and_a_bug_is_not_mistaken_for_a_full_disk(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="Neither into a temporary folder"):
        save_somewhere(tmp_path, full)
    with pytest.raises(ZeroDivisionError):
        save_somewhere(tmp_path, lambda folder: 1 / 0)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("path", "words"),
    [("/dev/zero", "is a device"), (".", "is a folder"), ("missing", "There is no file"), ("a\0b", "cannot be read")],
)
def test_only_files_are_read(path, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_regular(path)
