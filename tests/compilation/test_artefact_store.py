"""Compiled graphs are code: nothing of them is opened that these keys have not signed."""

import importlib
import io
import os
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from esper.compilation import ArtefactError, ArtefactStore
from esper.compilation.alone import seed_alone
from esper.compilation.compile_request import CompileRequest
from esper.compilation.compiled_host import seed_options
from esper.compilation.feature_guards import FeatureGuards
from esper.compilation.fingerprint import Fingerprint
from esper.compilation.inductor_cache import (
    CACHE_VARIABLE,
    CacheFolderError,
    inductor_folder,
    pack,
    unpack,
)
from esper.seeds import blueprints
from esper.signing import Keyring
from esper.slots.call_arguments import NO_ARGUMENTS

KEYRING = Keyring([b"k" * 32])
FILES = b"the compiler's files"
TIMES = {"checked": True, "cold_ms": 2.0, "warm_ms": 1.0}


def request_for(
    blueprint: str = "norm",
    dim: int = 4,
    seed_options_: Mapping[str, Any] = MappingProxyType({}),
    **options: object,
) -> CompileRequest:
    features = FeatureGuards.of(torch.randn(2, dim, 3, 3, requires_grad=True))
    slot = seed_alone(blueprint, features, **seed_options_)
    return CompileRequest.of(slot, features, NO_ARGUMENTS, seed_options(**options))


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(str(tmp_path / "store"), KEYRING)


class CachedListings(LocalFileSystem):
    """Keeps listings, as file systems of object stores do, and looks into nothing else."""

    protocol = "cachedlistings"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.removeprefix(f"{cls.protocol}://"))

    def ls(self, path: str, detail: bool = False, *, refresh: bool = False, **_: Any) -> Any:
        listed = None if refresh else self.dircache.get(path)
        if listed is None:
            listed = self.dircache[path] = super().ls(path, detail=True)
        return listed if detail else [entry["name"] for entry in listed]

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        listed = self.dircache.get(self._parent(path))
        if mode == "rb" and listed is not None and path not in {e["name"] for e in listed}:
            raise FileNotFoundError(path)
        return super()._open(path, mode, **settings)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


def test_what_another_process_has_saved_is_seen(tmp_path: Path) -> None:
    fsspec.register_implementation("cachedlistings", CachedListings, clobber=True)
    (tmp_path / "store").mkdir()
    here = ArtefactStore(f"cachedlistings://{tmp_path / 'store'}", KEYRING)
    request = request_for()
    assert here.load(request) is None
    ArtefactStore(str(tmp_path / "store"), KEYRING).save(request, FILES, **TIMES)
    assert here.load(request) is not None


def test_nothing_is_left_of_what_could_not_be_saved(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store._files, "mv", fails)
    with pytest.raises(OSError, match="no space left"):
        store.save(request_for(), FILES, **TIMES)
    assert list(Path(store.url).iterdir()) == []


ROOTS = """
from torch import nn
from esper import Seed
from esper.seeds import zero_initialise_

def scaled(features):
    return 2.0 * features

class Scaling:
    def scaled(self, features):
        return 3.0 * features

class Root(Scaling, Seed):
    def __init__(self, dim):
        super().__init__()
        self.layer = zero_initialise_(nn.Conv2d(dim, dim, 1))

    @property
    def output_layers(self):
        return (self.layer,)

    def increment(self, features):
        return self.layer(scaled(self.scaled(features)) * 4.0)
"""
LEAVES = """
from written_roots import Root

class Leaf(Root):
    pass
"""


@pytest.mark.parametrize("number", ["2.0", "3.0", "4.0"], ids=["function", "mixin", "base class"])
def test_a_seed_whose_inherited_code_is_another_is_another_request(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def request(roots: str) -> CompileRequest:
        for name, text in {"written_roots": roots, "written_leaves": LEAVES}.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        with blueprints.temporarily():
            leaf = importlib.import_module("written_leaves").Leaf
            blueprints.register("leaf", family="cnn")(leaf)
            return request_for("leaf")

    first = request(ROOTS)
    assert request(ROOTS).digest == first.digest
    assert request(ROOTS.replace(number, "12.5")).digest != first.digest


def only_file(store: ArtefactStore) -> Path:
    (file,) = Path(store.url).iterdir()
    return file


def test_what_is_kept_comes_back(store: ArtefactStore) -> None:
    request = request_for()
    assert store.load(request) is None
    assert list(store.names()) == []
    artefact = store.save(request, FILES, **TIMES)
    again = ArtefactStore(store.url, KEYRING).load(request)
    assert again is not None
    assert again == (artefact, FILES)
    assert list(store.names()) == [store.name_of(request)]
    assert store.describe(store.name_of(request)) == artefact
    assert store.load(request_for(dim=8)) is None
    newer = store.save(request, b"newer", **TIMES)
    assert store.load(request) == (newer, b"newer")
    only_file(store)


def test_an_object_store_by_its_url() -> None:
    store = ArtefactStore("memory://esper/compiled", KEYRING)
    store.save(request_for(), FILES, **TIMES)
    found = ArtefactStore("memory://esper/compiled", KEYRING).load(request_for())
    assert found is not None
    assert found.files == FILES
    fsspec.filesystem("memory").store.clear()
    with pytest.raises(ValueError, match="nowhere"):
        ArtefactStore("nowhere://esper", KEYRING)


def test_every_truncation_and_every_flipped_bit_is_refused(store: ArtefactStore) -> None:
    request = request_for()
    store.save(request, FILES, **TIMES)
    file = only_file(store)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ArtefactError, match="not what was signed"):
            store.load(request)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        with pytest.raises(ArtefactError, match="not what was signed"):
            store.load(request)
    file.write_bytes(content + b"x")
    with pytest.raises(ArtefactError, match="not what was signed"):
        store.load(request)
    file.write_bytes(content)
    assert store.load(request) is not None


def test_other_keys_and_another_name_are_refused(store: ArtefactStore) -> None:
    request, other = request_for(), request_for(dim=8)
    ArtefactStore(store.url, Keyring([b"x" * 32])).save(request, FILES, **TIMES)
    with pytest.raises(ArtefactError, match="comes from someone else"):
        store.load(request)
    rotated = ArtefactStore(store.url, Keyring([b"k" * 32, b"x" * 32]))
    assert rotated.load(request) is not None
    store.save(request, FILES, **TIMES)
    file = only_file(store)
    file.rename(file.with_name(f"{store.name_of(other)}.artefact"))
    with pytest.raises(ArtefactError, match="not what was signed"):
        store.load(other)


def test_a_signed_description_of_something_else_is_refused(store: ArtefactStore) -> None:
    request, other = request_for(), request_for(dim=8)
    described = store.save(other, FILES, **TIMES).model_dump_json().encode()
    place = only_file(store).with_name(f"{store.name_of(request)}.artefact")
    for files, told in ((FILES, "another request"), (b"others", "not those that it describes")):
        signed = described + b"\n" + files
        signature = KEYRING.signature(store.name_of(request).encode() + b"\n" + signed)
        place.write_bytes(b"esper artefact " + signature.encode() + b"\n" + signed)
        with pytest.raises(ArtefactError, match=told):
            store.load(request)


def test_an_artefact_of_another_version_is_refused(store: ArtefactStore) -> None:
    request = request_for()
    described = store.save(request, FILES, **TIMES).model_copy(update={"version": 2})
    signed = described.model_dump_json(warnings=False).encode() + b"\n" + FILES
    signature = KEYRING.signature(store.name_of(request).encode() + b"\n" + signed)
    only_file(store).write_bytes(b"esper artefact " + signature.encode() + b"\n" + signed)
    with pytest.raises(ArtefactError, match="written by another version"):
        store.load(request)


@pytest.mark.parametrize("folder", ["store", "runs [1]"])
def test_what_was_made_elsewhere_is_told_apart(folder: str, tmp_path: Path) -> None:
    store = ArtefactStore(str(tmp_path / folder), KEYRING)
    there = Fingerprint.here().model_copy(update={"torch": "9.9", "cpu": "another"})
    ArtefactStore(store.url, KEYRING, fingerprint=there).save(request_for(), FILES, **TIMES)
    with pytest.raises(ArtefactError, match=r"made elsewhere: torch is .*, was 9\.9, cpu is"):
        store.load(request_for())
    store.save(request_for(), b"mine", **TIMES)
    found = store.load(request_for())
    assert found is not None
    assert found.files == b"mine", "both are kept, side by side"
    assert len(list(store.names())) == 2


def test_equal_seeds_have_equal_requests_and_others_have_others() -> None:
    base = request_for()
    assert base.digest == request_for().digest
    others = [
        request_for("conv_light"),
        request_for(dim=8),
        request_for(mode="max-autotune"),
        request_for("attention", seed_options_={"reduction": 1}),
        request_for("attention", seed_options_={"reduction": 2}),
        base.model_copy(update={"features": base.features.model_copy(update={"dtype": "float64"})}),
        base.model_copy(update={"settings": base.settings.model_copy(update={"num_threads": 77})}),
    ]
    assert len({request.digest for request in [base, *others]}) == 1 + len(others)


class Canary:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def planted_archive(canary: bytes) -> bytes:
    """Return the compiler's files, with a canary under every kind of name that it looks for."""
    stream = io.BytesIO()
    names = ["fxgraph/ab/fab/entry", "aotautograd/abc/entry", "ab/cab.py", "ab/cab.main.so"]
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, canary)
    return stream.getvalue()


def test_a_planted_canary_is_never_opened(store: ArtefactStore, tmp_path: Path) -> None:
    trace, request = tmp_path / "trace", request_for()
    canary = pickle.dumps(Canary(trace))
    pickle.loads(canary)  # noqa: S301 – planted here
    trace.rmdir()  # so it works
    planted = planted_archive(canary)
    store.save(request, FILES, **TIMES)
    file = only_file(store)
    signed = file.read_bytes()
    header, description, _ = signed.split(b"\n", 2)
    stranger = ArtefactStore(str(tmp_path / "stranger"), Keyring([b"x" * 32]))
    stranger.save(request, planted, **TIMES)
    for content in (
        canary,
        planted,
        header + b"\n" + canary,
        header + b"\n" + description + b"\n" + planted,
        header + b"\n" + canary + b"\n" + planted,
        b"esper artefact \n" + description + b"\n" + planted,
        only_file(stranger).read_bytes(),
    ):
        for name in (f"{store.name_of(request)}.artefact", "other.artefact"):
            file.with_name(name).write_bytes(content)
        with pytest.raises(ArtefactError):
            store.load(request)
        for name in store.names():
            with pytest.raises(ArtefactError):
                store.describe(name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/../../b", "a/.hidden", "a\nb"])
def test_an_archive_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("ok", b"1")
        archive.writestr(name, b"2")
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match="no place in its folder"):
        unpack(stream.getvalue(), folder)
    assert list(tmp_path.rglob("*")) == []
    with pytest.raises(ValueError, match="no zip archive"):
        unpack(b"nonsense", folder)


def test_files_that_are_there_stay_and_locks_do_not_travel(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name, content in {"ab/x.so": b"1", "fxgraph/a/b": b"2", "locks/l.lock": b""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (target / "ab").mkdir(parents=True)
    (target / "ab/x.so").write_bytes(b"mine")
    assert unpack(pack(source), target) == 1
    assert (target / "ab/x.so").read_bytes() == b"mine"
    assert (target / "fxgraph/a/b").read_bytes() == b"2"
    assert not (target / "locks").exists()
    assert pack(target) == pack(target)


def test_the_compilers_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "as before, afterwards")
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = inductor_folder()
    assert folder == tmp_path / "esper" / "inductor"
    assert os.environ[CACHE_VARIABLE] == str(folder)
    folder.chmod(0o777)
    with pytest.raises(CacheFolderError, match=r"can be written by others.* remove it"):
        inductor_folder()


@pytest.mark.parametrize("place", ["torchinductor_*", "torchinductor_*/precompiled_headers"])
def test_so_is_torchs_own_where_headers_are_precompiled_all_the_same(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "inductor"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inductor_folder()
    (folder,) = tmp_path.glob(place)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(CacheFolderError, match=r"can be written by others.* set TMPDIR"):
        inductor_folder()


def test_a_clock_before_1980_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_bytes(b"1")
    os.utime(tmp_path / "kernel.py", (0, 0))
    assert unpack(pack(tmp_path), tmp_path / "other") == 1
