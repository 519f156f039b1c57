"""Envelopes: what was changed, forged, misdirected, old or odd is refused, for a typed reason."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus_machinery import KEYRING, MESSAGES, OTHER_KEYRING, Clock, record
from esper.bus.envelope import (
    MAX_MESSAGE_BYTES,
    MAX_RUN_CHARACTERS,
    Envelope,
    MessageRefusedError,
    Refusal,
    Sealer,
    check_fresh,
    check_run,
    messages_in,
    open_envelope,
)
from esper.bus.messages import EventMessage, Message, body_of, bundle_of, message_in
from esper.signing import Keyring

SOURCES = Path(__file__).parents[2] / "src" / "esper"


def refusal_of(message: bytes, keyring: Keyring = KEYRING) -> Refusal:
    """Return why a message is refused, by its envelope or by what it says."""
    with pytest.raises(MessageRefusedError) as caught:
        message_in(open_envelope(message, keyring))
    assert str(caught.value)
    return caught.value.refusal


def sealed(body: bytes, run: str = "run") -> bytes:
    return Sealer(KEYRING, run, clock=Clock(1_000_000.0)).seal(body)[1]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_what_was_sealed_is_read_back(message: Message) -> None:
    sealer = Sealer(KEYRING, "run", clock=Clock(1234.9))
    sealer.seal(b"another one")
    id_, data = sealer.seal(body_of(message))
    envelope = open_envelope(data, KEYRING)
    assert (envelope.id, envelope.run, envelope.time_seconds) == (id_, "run", 1234)
    assert (envelope.producer, envelope.numbers) == (id_[:16], range(2, 3))
    assert body_of(message_in(envelope)) == body_of(message)
    check_run(envelope, "run")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_a_message_with_any_one_byte_changed_is_refused(message: Message) -> None:
    data = sealed(body_of(message), "a run.2")
    head = data.index(b"\n") + 1
    reasons = set()
    for place, byte in enumerate(data):
        others = range(256) if place < head else (byte ^ 1 << bit for bit in range(8))
        for other in others:
            if other != byte:
                changed = data[:place] + bytes([other]) + data[place + 1 :]
                with pytest.raises(MessageRefusedError) as caught:
                    open_envelope(changed, KEYRING)
                reasons.add(caught.value.refusal)
    assert reasons == {Refusal.MALFORMED, Refusal.UNKNOWN_VERSION, Refusal.BAD_SIGNATURE}


def test_a_message_that_is_cut_or_goes_on_is_refused() -> None:
    data = sealed(body_of(MESSAGES[0]))
    for length in range(len(data)):
        with pytest.raises(MessageRefusedError):
            open_envelope(data[:length], KEYRING)
    assert refusal_of(data + b" ") is Refusal.BAD_SIGNATURE


def test_one_message_has_one_form() -> None:
    """Nothing that is not signed can be written in two ways, such as a time with a 0 before it."""
    data = sealed(b"{}")
    head, _, body = data.partition(b"\n")
    version, id_, run, time, signature = head.split(b" ")
    producer, _, sequence = id_.partition(b"-")
    for parts in (
        (version, id_, run, b"0" + time, signature),
        (version, producer + b"-0" + sequence, run, time, signature),
        (version, id_.upper(), run, time, signature),
        (version, id_, run, time, signature.upper()),
        (version, id_, run, b"+" + time, signature),
        (version, id_, run, time, signature, b""),
        (version, id_, run, "\N{ARABIC-INDIC DIGIT ONE}".encode() + time, signature),
    ):
        altered = b" ".join(parts) + b"\n" + body
        if altered != data:
            assert refusal_of(altered) is Refusal.MALFORMED, parts


def test_a_larger_message_than_receivers_take_is_neither_sealed_nor_opened() -> None:
    sealer = Sealer(KEYRING, "run")
    overhead = len(sealer.seal(b"")[1])
    id_, largest = sealer.seal(bytes(MAX_MESSAGE_BYTES - overhead))
    assert open_envelope(largest, KEYRING).id == id_
    with pytest.raises(ValueError, match="larger than the 1048576 that receivers take"):
        sealer.seal(bytes(MAX_MESSAGE_BYTES - overhead + 1))
    assert refusal_of(largest + b"x") is Refusal.TOO_LARGE
    assert refusal_of(bytes(64 * MAX_MESSAGE_BYTES)) is Refusal.TOO_LARGE


def test_keys_rotate_without_a_message_lost() -> None:
    old, new, newer = (f"key {number}, of 24 bytes or more".encode() for number in range(3))
    before, both, after = Keyring([old]), Keyring([new, old]), Keyring([newer, new])
    messages = [Sealer(ring, "run").seal(b"{}")[1] for ring in (before, both, after)]
    accepted = {
        name: [verified(message, ring) for message in messages]
        for name, ring in {"before": before, "both": both, "after": after}.items()
    }
    assert accepted == {
        "before": [True, False, False],
        "both": [True, True, False],
        "after": [False, True, True],
    }


def verified(message: bytes, keyring: Keyring) -> bool:
    try:
        open_envelope(message, keyring)
    except MessageRefusedError as error:
        return error.refusal is not Refusal.BAD_SIGNATURE
    return True


def test_short_keys_are_refused_before_anything_is_signed() -> None:
    with pytest.raises(ValueError, match="has 23 bytes, and must have 24"):
        Sealer(Keyring([23 * b"k"]), "run")


odd_runs = st.text(st.sampled_from("ab. \n\t/%-é\N{SNOWMAN}2E"), min_size=1, max_size=12)


@given(odd_runs, odd_runs)
def test_no_run_passes_for_another(run: str, other: str) -> None:
    envelope = open_envelope(sealed(b"{}", run), KEYRING)
    assert envelope.run == run
    check_run(envelope, run)
    if run != other:
        with pytest.raises(MessageRefusedError) as caught:
            check_run(envelope, other)
        assert caught.value.refusal is Refusal.WRONG_RUN


def test_parts_of_a_message_cannot_be_shifted_into_one_another() -> None:
    """Signed is `id.run.time.body`: a dot in a run must not be one between two parts."""
    data = sealed(b"b.c", "a")
    head, _, body = data.partition(b"\n")
    version, id_, run, time, signature = head.split(b" ")
    for parts, rest in (
        ((version, id_, run + b"." + time, b"1", signature), body),
        ((version, id_, run, time, signature), b"." + body),
        ((version, id_, b"a.%s.b" % time, b"0", signature), b"c"),
        ((version, id_, b"a%2Eb", time, signature), b"c"),
    ):
        assert refusal_of(b" ".join(parts) + b"\n" + rest) in (
            Refusal.BAD_SIGNATURE,
            Refusal.MALFORMED,
        )


def test_a_dot_in_a_run_is_not_one_between_two_parts() -> None:
    """Of run "a.5" at 1000000 with body "x" the signature must not hold for "a" at 5."""
    head, _, body = sealed(b"x", "a.5").partition(b"\n")
    version, id_, _, time, signature = head.split(b" ")
    for run, dotted in ((b"a", b"5"), (b"a.5", time)):
        rest = time + b"." + body if dotted != time else body
        altered = b" ".join((version, id_, run, dotted, signature)) + b"\n" + rest
        assert refusal_of(altered) is Refusal.BAD_SIGNATURE


@pytest.mark.parametrize("run", ["x", MAX_RUN_CHARACTERS * "\N{GRINNING FACE}"])
def test_every_run_that_is_sealed_can_be_opened(run: str) -> None:
    assert open_envelope(sealed(b"{}", run), KEYRING).run == run


@pytest.mark.parametrize("run", ["", (MAX_RUN_CHARACTERS + 1) * "x", "\ud800"])
def test_runs_without_a_name_are_refused_at_once(run: str) -> None:
    with pytest.raises(ValueError, match="run's id"):
        Sealer(KEYRING, run)


@pytest.mark.parametrize(
    ("received", "fresh"), [(699, False), (700, True), (1000, True), (1300, True), (1301, False)]
)
def test_a_message_is_fresh_up_to_the_window_whichever_clock_is_ahead(
    received: float, fresh: bool
) -> None:
    envelope = Envelope(id=f"{16 * '0'}-1", run="run", time_seconds=1000, body=b"")
    if fresh:
        check_fresh(envelope, received_seconds=received, window_seconds=300.0)
        return
    with pytest.raises(MessageRefusedError, match="is a clock wrong") as caught:
        check_fresh(envelope, received_seconds=received, window_seconds=300.0)
    assert caught.value.refusal is Refusal.STALE
    assert ("before" if received > 1000 else "after") in str(caught.value)


def test_what_was_left_out_shows_in_the_sequence() -> None:
    sealer = Sealer(KEYRING, "run")
    sealer.seal(b"")
    sealer.skip(3)
    assert open_envelope(sealer.seal(b"")[1], KEYRING).numbers == range(5, 6)


def test_an_event_without_a_schema_version_is_refused() -> None:
    document = json.loads(body_of(next(m for m in MESSAGES if isinstance(m, EventMessage))))
    del document["record"]["schema_version"]
    assert refusal_of(sealed(json.dumps(document).encode())) is Refusal.UNKNOWN_BODY


heads = st.tuples(
    st.sampled_from([b"esper1", b"esper2", b"", b"\xff"]) | st.binary(max_size=20),
    st.from_regex(rb"[0-9a-f]{16}-[1-9][0-9]{0,30}", fullmatch=True) | st.binary(max_size=40),
    st.sampled_from([b"run", b"%00", b"..%2F", b"%ff", b"%", b"%F0%9F"]) | st.binary(max_size=40),
    st.from_regex(rb"-?[0-9]{0,400}", fullmatch=True) | st.binary(max_size=20),
    st.from_regex(rb"[0-9a-f]{64}", fullmatch=True) | st.binary(max_size=80),
)
unsigned = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda parts, body: b" ".join(parts) + b"\n" + body, heads, st.binary(max_size=200)),
    st.builds(
        lambda byte, length: bytes([byte]) * length, st.integers(0, 255), st.integers(0, 1 << 21)
    ),
    st.sampled_from(MESSAGES).map(lambda m: Sealer(OTHER_KEYRING, "run").seal(body_of(m))[1]),
)


@pytest.mark.slow
@settings(max_examples=5000)
@given(unsigned)
def test_whatever_nobody_has_signed_is_refused(message: bytes) -> None:
    assert refusal_of(message) in set(Refusal) - {
        Refusal.UNKNOWN_BODY,
        Refusal.STALE,
        Refusal.WRONG_RUN,
    }


def places(document: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where fields are, but for those of objects that may hold anything."""
    for key, value in document.items():
        yield (*place, key)
        if isinstance(value, dict) and key in ("command", "action", "record", "event", "outcome"):
            yield from places(value, (*place, key))


def altered(message: Message, choice: int, how: str) -> bytes:
    """Return a message's body with one of its fields of a wrong type or gone, or one too many."""
    document = json.loads(body_of(message))
    found = list(places(document))
    *way, key = found[choice % len(found)]
    target = document
    for step in way:
        target = target[step]
    if how == "wrong type":
        target[key] = [None]
    elif how == "unknown field":
        target[f"{key} "] = target[key]
    else:
        required = [field for field in document if field != "details"]
        del document[required[choice % len(required)]]
    return json.dumps(document).encode()


garbage = st.one_of(
    st.builds(
        altered,
        st.sampled_from(MESSAGES),
        st.integers(0, 100),
        st.sampled_from(["wrong type", "unknown field", "missing field"]),
    ),
    st.binary(max_size=500),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda depth, text: depth * text, st.integers(0, 60_000), st.sampled_from([b"[", b'{"a":'])
    ),
    st.builds(
        lambda depth, kind: (
            b'{"kind":"%s","config":' % kind + depth * b'{"a":' + b"1" + depth * b"}" + b"}"
        ),
        st.integers(0, 60_000),
        st.sampled_from([b"run", b"health", b"metrics", b"nothing"]),
    ),
    st.sampled_from(
        [
            b'{"kind":"status","status":"\\ud800"}',
            b'{"kind":"\\udfff"}',
            b'{"kind":"status","status":"\xed\xa0\x80"}',
            b'{"kind":"metrics","epoch":1,"step":%s,"metrics":{}}' % (5000 * b"9"),
            b'{"kind":"metrics","epoch":1e999,"step":1,"metrics":{}}',
            b'{"kind":"event","record":{"schema_version":2,"time_seconds":0,"epoch":0,"step":0,'
            b'"event":{"type":"run_finished","metrics":{},"param_count":1}}}',
            b'{"kind":{"kind":"event"}}',
            b'{"kind":"status","kind":"event"}',
            b"\xef\xbb\xbf{}",
            b"\x00",
        ]
    ),
)


@pytest.mark.slow
@settings(max_examples=5000)
@given(garbage, odd_runs)
def test_whatever_says_nothing_known_is_refused_although_it_is_signed(
    body: bytes, run: str
) -> None:
    assert refusal_of(sealed(body, run)) is Refusal.UNKNOWN_BODY


SECRETS = {"digest", "hexdigest", "hmac", "mac", "sha256", "signature", "signatures", "token"}

OF_PUBLIC_CONTENT = {
    "compilation/artefact_store.py": 2,
    "compilation/compile_service.py": 4,
    "experiments/series_folder.py": 1,
    "policies/learned/learned_policy.py": 1,
    "training/sealed_folder.py": 1,
}
"""Checksums that no key has a part in, and names made of them: nobody gains by learning them."""


def compared(tree: ast.AST) -> list[str]:
    """Return comparisons whose time tells something of what is compared."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops)
        and any(names_secret(operand) for operand in (node.left, *node.comparators))
    ]


def names_secret(operand: ast.expr) -> bool:
    if isinstance(operand, ast.Call) and ast.unparse(operand.func) == "len":
        return False
    names = []
    for node in ast.walk(operand):
        if isinstance(node, ast.Name):
            names += [] if node.id.isupper() else [node.id]
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
    return any(SECRETS & set(name.lower().split("_")) for name in names)


def test_no_source_compares_a_signature_in_a_time_that_tells_of_it() -> None:
    found = {
        path.relative_to(SOURCES).as_posix(): places
        for path in sorted(SOURCES.rglob("*.py"))
        if (places := compared(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert {path: len(places) for path, places in found.items()} == OF_PUBLIC_CONTENT, found


@pytest.mark.parametrize(
    "planted",
    [
        "given == expected_signature",
        "self._token != given",
        "mac in expected",
        "hmac.digest(key, message, 'sha256') == given",
        "hashlib.sha256(key).hexdigest() not in known",
        "found['signature'] == given",
    ],
)
def test_a_planted_comparison_is_found(planted: str) -> None:
    assert compared(ast.parse(planted))


def test_what_tells_nothing_may_be_compared() -> None:
    harmless = "len(token) == 32 or token is None or TOKEN_NAME in environment or tokens == 3"
    assert not compared(ast.parse(harmless))


@pytest.mark.parametrize("claimed", [1, 2, 4], ids=str)
def test_a_bundle_holds_as_many_messages_as_its_numbers_say(claimed: int) -> None:
    events = [EventMessage(record=record(step)) for step in range(3)]
    body = bundle_of([body_of(event) for event in events])
    sealer = Sealer(KEYRING, "run")
    sealer.skip(6)
    _, good = sealer.seal(body, messages=3)
    envelope = open_envelope(good, KEYRING)
    assert envelope.numbers == range(7, 10)
    assert messages_in(good) == 3
    assert message_in(envelope).messages == tuple(events)
    _, wrong = sealer.seal(body, messages=claimed)
    with pytest.raises(MessageRefusedError, match=f"holds {claimed} messages, and has 3"):
        message_in(open_envelope(wrong, KEYRING))
