"""The frozen model's outputs on disk: never wrong whatever happens to the files, and not held in memory."""

import logging
import os
import random
import resource
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest
import torch

from capt_peft.training import frozen_store
from capt_peft.training.frozen_store import ENTRY, KEY, FrozenStore

WIDTH, ABOUT = 3, {"classes": ["red circle", "seven"]}


def images(numbers):
    """Images (B, 3, 2, 2) that hold their numbers."""
    return torch.tensor(list(numbers), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def right(pixels):
    """What the "model" of these tests says of images: (B, 3, 2, 2) -> (B, WIDTH)."""
    return torch.stack([pixels[:, 0, 0, 0] * factor + 0.1 for factor in (1, -2, 3)], dim=1)


def open_store(folder, count=100, width=WIDTH):
    return FrozenStore(folder, ABOUT, count, width)


def fetch(store, numbers, batch=4):
    """Asks for images by their numbers, checks every output, and returns the numbers of those that were computed."""
    computed = []

    def compute(pixels):
        computed.extend(int(value) for value in pixels[:, 0, 0, 0])
        return right(pixels)

    numbers = list(numbers)
    for start in range(0, len(numbers), batch):
        part = numbers[start : start + batch]
        assert torch.equal(store.get(part, images(part), compute), right(images(part)))
    return computed


def shard_files(folder):
    """The paths of the only shard: its rows and its keys."""
    (rows,) = folder.rglob("*.rows")
    return rows, rows.with_suffix(".keys")


def in_child(work):
    """Runs `work` in a fork of this process, which ends with it, and returns the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            logging.exception("in the child")
            os._exit(1)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_was_computed_is_read_again_by_this_store_and_by_the_next(tmp_path):
    store = open_store(tmp_path)
    assert fetch(store, range(10)) == list(range(10))
    assert fetch(store, [9, 3, 0, 5]) == []
    assert fetch(store, range(8, 13)) == [10, 11, 12]
    assert fetch(open_store(tmp_path), range(13)) == []


def test_images_are_found_by_their_content_wherever_they_stand(tmp_path):
    fetch(open_store(tmp_path), range(6))
    other = open_store(tmp_path, count=3)
    computed = []
    shown = [5, 2, 50]  # at the places 0, 1 and 2
    outputs = other.get(range(3), images(shown), lambda pixels: computed.append(pixels) or right(pixels))
    assert torch.equal(outputs, right(images(shown)))
    assert torch.equal(torch.cat(computed), images([50]))


def test_one_changed_pixel_makes_another_image(tmp_path):
    fetch(open_store(tmp_path), [1])
    changed = images([1])
    changed[0, 2, 1, 1] += 1e-6
    calls = []
    open_store(tmp_path).get([0], changed, lambda pixels: calls.append(len(pixels)) or right(pixels))
    assert calls == [1]


def test_stores_of_other_outputs_do_not_mix(tmp_path):
    fetch(open_store(tmp_path), range(4))
    other = FrozenStore(tmp_path, {"classes": ["red circle", "eight"]}, 4, WIDTH)
    assert fetch(other, range(4)) == list(range(4))
    assert len(list(tmp_path.glob("*/about.json"))) == 2


@pytest.mark.parametrize("suffix", [".rows", ".keys"])
def test_a_file_that_ends_anywhere_in_its_last_row_loses_that_row_alone(tmp_path, suffix):
    fetch(open_store(tmp_path / "whole"), range(5), batch=1)
    size = {".rows": 4 * WIDTH, ".keys": ENTRY}[suffix]
    for cut in range(1, size + 1):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        path = next(folder.rglob(f"*{suffix}"))
        os.truncate(path, 5 * size - cut)
        assert fetch(open_store(folder), range(5)) == [4]
        assert fetch(open_store(folder), range(5)) == []  # what was computed anew is found beside the cut one


def killed_after(monkeypatch, written):
    """Lets a process write so many bytes more to its shard, and kills it in the middle of the next."""
    whole = frozen_store._write_at
    left = written

    def torn(file, offset, content):
        nonlocal left
        whole(file, offset, content[:left])
        left -= len(content)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(frozen_store, "_write_at", torn)


@pytest.mark.parametrize("written", range(0, 2 * 2 * (4 * WIDTH + ENTRY), 5))
def test_a_process_killed_at_any_byte_that_it_writes_leaves_a_sound_store(tmp_path, monkeypatch, written):
    def work():
        killed_after(monkeypatch, written)
        fetch(open_store(tmp_path), range(100), batch=2)

    assert status_of(in_child(work)) == -signal.SIGKILL
    batches, rest = divmod(written, 2 * (4 * WIDTH + ENTRY))
    kept = 2 * batches + max(0, rest - 2 * 4 * WIDTH) // ENTRY  # rows come first, then their keys
    assert fetch(open_store(tmp_path), range(10)) == list(range(kept, 10))


def test_processes_killed_at_random_times_leave_a_sound_store(tmp_path):
    for number in range(8):
        child = in_child(lambda: fetch(open_store(tmp_path, 10**6, WIDTH), range(10**6)))
        time.sleep(random.Random(number).uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        known = len(open_store(tmp_path)._keys)
        assert fetch(open_store(tmp_path, 10**6), range(10 * number)) == list(range(known, 10 * number))
    assert known > 100  # they were killed at work


def test_two_processes_write_at_the_same_time(tmp_path):
    def writer(numbers):
        store = open_store(tmp_path, 1000)
        (tmp_path / f"ready-{numbers.start}").touch()
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.001)
        assert fetch(store, numbers) == list(numbers)

    children = [in_child(lambda numbers=numbers: writer(numbers)) for numbers in (range(600), range(400, 1000))]
    assert [status_of(child) for child in children] == [0, 0]
    assert len(list(tmp_path.rglob("*.rows"))) == 2
    assert fetch(open_store(tmp_path, 1000), range(1000)) == []


@pytest.mark.parametrize(
    ("suffix", "place", "lost"),
    [(".rows", 2 * 4 * WIDTH, 2), (".keys", 3 * ENTRY + KEY, 3), (".keys", 3 * ENTRY + ENTRY - 1, 3), (".keys", ENTRY, 1)],
    ids=["row", "checksum", "end of checksum", "key"],
)  # fmt: skip
def test_a_damaged_row_is_computed_anew_and_then_found(tmp_path, caplog, suffix, place, lost):
    fetch(open_store(tmp_path), range(6))
    with next(tmp_path.rglob(f"*{suffix}")).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x10]))
    assert fetch(open_store(tmp_path), range(6)) == [lost]
    known_by_another_key = suffix == ".keys" and place == ENTRY
    assert ("is damaged" in caplog.text) is not known_by_another_key
    assert fetch(open_store(tmp_path), range(6)) == []


def test_a_row_under_the_key_of_another_image_is_no_row(tmp_path):
    fetch(open_store(tmp_path), range(6))
    keys = shard_files(tmp_path)[1]
    content = bytearray(keys.read_bytes())
    content[:KEY], content[ENTRY : ENTRY + KEY] = content[ENTRY : ENTRY + KEY], content[:KEY]
    keys.write_bytes(content)
    assert fetch(open_store(tmp_path), range(6)) == [0, 1]


def test_what_the_system_writes_in_pieces_is_written_whole(tmp_path):
    class Slow:
        content = b"before"

        def seek(self, offset):
            self.offset = offset

        def write(self, part):
            self.content = self.content[: self.offset] + bytes(part[:2])
            self.offset += 2
            return len(part[:2])

    file = Slow()
    frozen_store._write_at(file, 6, b", and behind")
    assert file.content == b"before, and behind"


def test_a_shard_that_cannot_be_read_is_passed_over_with_a_warning(tmp_path, caplog):
    fetch(open_store(tmp_path), range(6))
    rows, keys = shard_files(tmp_path)
    rows.unlink()
    assert fetch(open_store(tmp_path), range(6)) == list(range(6))
    assert "cannot be read" in caplog.text and str(keys) in caplog.text


def test_a_shard_of_noise_gives_no_row(tmp_path):
    fetch(open_store(tmp_path), range(6))
    for path in shard_files(tmp_path):
        path.write_bytes(random.Random(0).randbytes(path.stat().st_size))
    assert fetch(open_store(tmp_path), range(6)) == list(range(6))


def test_a_shard_shorter_than_its_keys_is_told(tmp_path, caplog):
    fetch(open_store(tmp_path), range(6))
    os.truncate(shard_files(tmp_path)[0], 2 * 4 * WIDTH)
    assert fetch(open_store(tmp_path), range(6)) == [2, 3, 4, 5]
    assert "has 2 of its 6 rows" in caplog.text


def test_a_full_disk_is_told_once_and_the_rest_is_computed(tmp_path, caplog):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # Python ignores SIGXFSZ: writing raises EFBIG
        store = open_store(tmp_path)
        computed = fetch(store, range(100))
        assert computed == list(range(100))
        again = fetch(store, range(100))
        assert 0 < len(again) < 100 and again == list(range(100 - len(again), 100))
        assert caplog.text.count("cannot be written") == 1

    assert status_of(in_child(work)) == 0
    left = fetch(open_store(tmp_path), range(100))
    assert 0 < len(left) < 100 and left == list(range(100 - len(left), 100))


def test_a_folder_that_cannot_be_made_is_told_and_everything_is_computed(tmp_path, caplog):
    (tmp_path / "file").touch()
    store = open_store(tmp_path / "file" / "inside")
    assert fetch(store, range(4)) == fetch(store, range(4)) == list(range(4))
    assert caplog.text.count("cannot be written") == 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"is a file\. Name a folder"):
        open_store(tmp_path / "file")


def test_a_store_deleted_under_a_run_does_not_disturb_it(tmp_path):
    fetch(open_store(tmp_path), range(5))
    store = open_store(tmp_path)
    fetch(store, range(10))
    shutil.rmtree(tmp_path)
    assert fetch(store, range(20)) == list(range(10, 20))
    assert fetch(store, range(20)) == []


def test_an_interrupted_call_leaves_the_next_rows_in_their_places(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    fetch(store, range(4))
    whole = frozen_store._write_at

    def interrupted(file, offset, content):
        whole(file, offset, content[:7])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frozen_store, "_write_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(store, [4, 5, 6, 7])
    assert fetch(store, range(12)) == list(range(4, 12))
    assert fetch(store, range(12)) == fetch(open_store(tmp_path), range(12)) == []


def test_rows_stay_on_disk(tmp_path):
    count, width = 4000, 2500  # 40 MB
    store = open_store(tmp_path, count, width)
    for start in range(0, count, 100):
        numbers = range(start, start + 100)
        store.get(numbers, images(numbers), lambda pixels: pixels[:, 0, 0, :1].expand(-1, width))
    tracemalloc.start()
    store = open_store(tmp_path, count, width)
    for start in range(0, count, 100):
        numbers = range(start, start + 100)
        outputs = store.get(numbers, images(numbers), None)  # computing would raise
        assert torch.equal(outputs[:, width - 1], torch.arange(start, start + 100.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(store._shards[0].rows, np.memmap)
    assert peak < 4e6  # a batch of 100 is 1 MB


def test_a_run_that_goes_on_knows_what_it_knew_and_nothing_else(tmp_path):
    folder = tmp_path / "store"
    store = open_store(folder)
    fetch(store, range(4))
    store.save(tmp_path / "frozen_outputs_0.safetensors")
    fetch(store, range(4, 8))
    fetch(open_store(folder), range(8, 12))
    resumed = open_store(folder)
    resumed.load(tmp_path / "frozen_outputs_0.safetensors", torch.device("cpu"))
    assert fetch(resumed, range(12)) == list(range(4, 12))
    fetch(FrozenStore(folder, {"classes": []}, 100, WIDTH), [0, 1])
    other = FrozenStore(folder, {"classes": []}, 100, WIDTH)
    other.load(tmp_path / "frozen_outputs_0.safetensors", torch.device("cpu"))  # of another model: no word on this one
    assert fetch(other, range(4)) == [2, 3]


def test_rows_that_a_checkpoint_knew_and_that_are_gone_are_computed_with_a_warning(tmp_path, caplog):
    folder = tmp_path / "store"
    store = open_store(folder)
    fetch(store, range(4))
    store.save(tmp_path / "frozen_outputs_0.safetensors")
    shutil.rmtree(folder)
    resumed = open_store(folder)
    resumed.load(tmp_path / "frozen_outputs_0.safetensors", torch.device("cpu"))
    assert fetch(resumed, range(4)) == list(range(4))
    assert "cannot be read" in caplog.text
