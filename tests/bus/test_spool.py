"""What could not be sent is kept in order, within its bound, through kills and full disks."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus_machinery import files_of_at_most
from esper.bus.spool import Spool
from processes import TESTS

WRITER = """
import itertools, sys
from pathlib import Path
from esper.bus.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=1 << 26)
for number in itertools.count():
    indices = range(10 * number, 10 * number + 10)
    spool.append([b"%d:" % index + bytes(index % 300) for index in indices])
    if number == 50:
        print("written", flush=True)
"""


def drained(spool: Spool, *, limit: int = 7) -> list[bytes]:
    found = []
    while messages := spool.first(limit=limit)[0]:
        found += messages
        spool.sent(len(messages))
    return found


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.binary(max_size=90), max_size=6)),
        st.tuples(st.just("send"), st.integers(1, 5)),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=300)
@given(operations)
def test_a_spool_is_a_queue_whoever_opens_it(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, object]]
) -> None:
    """Only what was sent of a file that is not yet empty may come again."""
    folder = tmp_path_factory.mktemp("spool")
    spool, expected, sent = Spool(folder, max_bytes=64 * 200), deque[bytes](), list[bytes]()
    for step, value in steps:
        if step == "append":
            assert spool.append(value) == (0, [])
            expected.extend(value)
        elif step == "send":
            messages, lost = spool.first(limit=value)
            assert (lost, messages) == (0, [*expected][: len(messages)])
            assert bool(messages) == bool(expected)
            if messages:
                spool.sent(len(messages))
                sent += [expected.popleft() for _ in messages]
        else:
            spool.close()
            spool = Spool(folder, max_bytes=64 * 200)
            again = len(spool) - len(expected)
            assert 0 <= again <= len(sent)
            expected.extendleft(reversed(sent[len(sent) - again :]))
        assert len(spool) == len(expected)
        assert spool.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert drained(spool) == [*expected]
    assert not [*folder.iterdir()]
    spool.close()


def test_a_full_spool_keeps_the_newest_and_counts_the_others(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=64_000)
    messages = [
        b"%06d" % number + bytes(random.Random(number).randrange(200)) for number in range(5000)
    ]
    dropped = sent = 0
    for start in range(0, 5000, 50):
        dropped += spool.append(messages[start : start + 50])[0]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 64_000
        if start == 2500:  # what is sent is not dropped
            sent = len(spool.first(limit=3)[0])
            spool.sent(sent)
    num_kept = len(spool)
    left = drained(spool)
    assert sent == 3
    assert num_kept == len(left)
    assert left == messages[-len(left) :]
    assert dropped == 5000 - len(left) - sent
    assert 60_000 < sum(map(len, left)) + 8 * len(left) <= 64_000


def test_a_message_larger_than_the_spool_is_dropped_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1000)
    assert spool.append([b"first", bytes(1000), b"last"]) == (1, [])
    assert drained(spool) == [b"first", b"last"]


def test_what_a_killed_process_left_is_found(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=TESTS
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = drained(Spool(tmp_path), limit=500)
    assert len(found) >= 510
    assert found == [b"%d:" % index + bytes(index % 300) for index in range(len(found))]


@pytest.mark.parametrize("cut", range(1, 14))
def test_half_a_message_at_the_end_is_cut_off(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path)
    spool.append([b"first", b"second"])
    spool.close()
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - cut)
    spool = Spool(tmp_path)
    assert file.stat().st_size == spool.num_bytes == 13
    spool.append([b"third"])
    assert drained(spool) == [b"first", b"third"]


def test_a_message_that_changed_on_the_disk_is_not_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([b"first", b"second", b"third"])
    spool.close()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[13 + 8 + 2] ^= 1
    file.write_bytes(content)
    assert drained(Spool(tmp_path)) == [b"first"]


def test_what_is_lost_while_it_is_kept_is_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=64 * 20)
    spool.append([b"first", b"second", b"third"])
    oldest = sorted(tmp_path.iterdir())[0]
    oldest.unlink()
    assert spool.first(limit=5) == ([b"second"], 1)
    assert drained(spool) == [b"second", b"third"]


def test_what_the_disk_does_not_take_is_given_back_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=64 * 60)
    assert spool.append([b"before"]) == (0, [])
    with files_of_at_most(40):  # which ends within the second message
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            (tmp_path / "other").write_bytes(bytes(41))
        given = [bytes(4000), b"one", 44 * b"2", b"small"]
        dropped, left = spool.append(given)
        assert (dropped, left) == (1, given[2:])
        assert spool.append(left) == (0, left)
    assert spool.append(left) == (0, [])
    assert len(Spool(tmp_path / "spool")) == 4
    assert drained(spool) == [b"before", *given[1:]]


def test_a_folder_that_cannot_be_made_takes_nothing_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spool = Spool(tmp_path / "file" / "spool")
    assert spool.append([b"one", b"two"]) == (0, [b"one", b"two"])
    assert spool.first(limit=5) == ([], 0)
    (tmp_path / "file").unlink()
    assert spool.append([b"three"]) == (0, [])


def test_appending_costs_the_same_however_much_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=8 << 20)
    batch = [bytes(400) for _ in range(100)]
    seconds = []
    for _ in range(600):
        began = time.process_time()
        spool.append(batch)
        seconds.append(time.process_time() - began)
    assert sum(seconds[-100:]) < 4.0 * sum(seconds[:100]) + 0.05
