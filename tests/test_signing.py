"""Keys: who may have signed a message, and who may read the keys."""

import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.signing import KeyFileError, Keyring

OLD = b"an old key of 24 bytes or more"
NEW = b"a new key, of 24 bytes or more"


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_one_changed_bit_is_another_message(message: bytes, place: int) -> None:
    ring = Keyring([NEW])
    signature = ring.signature(message)
    assert ring.verifies(message, signature)
    flipped = bytearray(message + b"x")
    flipped[place % len(flipped)] ^= 1 << (place % 8)
    assert not ring.verifies(bytes(flipped), signature)
    assert not ring.verifies(message + b"x", signature)


@given(st.text(max_size=80))
def test_what_is_no_signature_verifies_nothing(signature: str) -> None:
    assert not Keyring([NEW]).verifies(b"message", signature)


def test_keys_replace_one_another() -> None:
    both = Keyring([NEW, OLD])
    assert both.verifies(b"m", Keyring([OLD]).signature(b"m"))
    assert Keyring([NEW]).verifies(b"m", both.signature(b"m"))
    assert not Keyring([OLD]).verifies(b"m", both.signature(b"m"))
    assert "key" not in repr(both).replace("Keyring", "").replace("keys", "")


def test_short_keys_and_none_are_refused() -> None:
    with pytest.raises(ValueError, match="key 2 has 23 bytes, and must have 24 or more"):
        Keyring([NEW, b"x" * 23])
    with pytest.raises(ValueError, match="at least one key"):
        Keyring([])


def test_a_file_of_keys_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "keys"
    with pytest.raises(KeyFileError, match="cannot be read"):
        Keyring.from_file(file)
    made = Keyring.from_file(file, create=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Keyring.from_file(file, create=True).keys == made.keys
    assert [path.name for path in file.parent.iterdir()] == ["keys"]
    file.write_bytes(NEW + b"\n\n" + OLD + b"\n")
    assert Keyring.from_file(file).keys == (NEW, OLD)
    file.write_bytes(b"short\n")
    with pytest.raises(KeyFileError, match="key 1 has 5 bytes"):
        Keyring.from_file(file)
    file.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Keyring.from_file(file)


def test_a_user_without_a_home_folder_is_told_where_keys_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # as of one without a name, and so without a folder
    with pytest.raises(KeyFileError, match="no home folder; set HOME or XDG_CONFIG_HOME"):
        Keyring.of_user()


def test_who_makes_the_file_at_the_same_time_gets_the_same_key(tmp_path: Path) -> None:
    file, found = tmp_path / "keys", []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        found.append(Keyring.from_file(file, create=True).keys)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
