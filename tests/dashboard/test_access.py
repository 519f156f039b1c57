"""Who may look and who may ask for anything: hosts, tokens, origins."""

import json
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from esper.dashboard.access import Access, TokenError, find_token, is_loopback, new_token
from esper.dashboard.server import Dashboard
from served_runs import write_run

TOKEN = "a token that is long enough"  # noqa: S105 – only this test's
HIDDEN = ("/api/runs", "/api/stream", "/api/runs/own/charts", "/api/compare?run=own")


def client(root: Path, token: str | None = None, base: str = "http://localhost:8265") -> TestClient:
    return TestClient(Dashboard(root, Access(token, port=8265)).app(), base_url=base)


def is_guarded(headers: Headers) -> bool:
    policy = headers["content-security-policy"].startswith("default-src 'none'")
    return policy and headers["x-content-type-options"] == "nosniff"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8265", 200),
        ("127.0.0.1:8265", 200),
        ("127.8.8.8", 200),
        ("[::1]:8265", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8265", 421),
        ("192.168.0.7", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_without_a_token_only_names_of_this_machine_are_answered(
    root: Path, host: str, status: int
) -> None:
    """Else a page of evil.example, whose name leads here by now, could read everything."""
    for path in ("/api/runs", "/"):
        answer = client(root).get(path, headers={"host": host})
        assert answer.status_code == status
        assert is_guarded(answer.headers)


@pytest.mark.parametrize("path", HIDDEN)
def test_nothing_of_a_run_is_said_without_the_token(root: Path, path: str) -> None:
    guarded = client(root, TOKEN)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "esper-dashboard-8265=x"}):
        answer = guarded.get(path, headers=headers)
        assert answer.status_code == 401
        assert "own" not in answer.text
        assert is_guarded(answer.headers)
    if path != "/api/stream":  # which has no end
        assert guarded.get(path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_page_itself_is_open_so_that_it_can_ask_for_the_token(root: Path) -> None:
    guarded = client(root, TOKEN)
    assert guarded.get("/").status_code == 200
    assert guarded.get("/static/dashboard.js").status_code == 200
    said = guarded.get("/api/session").json()
    assert (said["needs_token"], said["admitted"], said["command_token"]) == (True, False, None)


def test_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_cannot_use(
    root: Path,
) -> None:
    guarded = client(root, TOKEN)
    assert guarded.post("/api/session", json={"token": "wrong"}).status_code == 403
    assert guarded.get("/api/runs").status_code == 401
    answer = guarded.post("/api/session", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert TOKEN not in cookie
    assert guarded.get("/api/runs").status_code == 200
    assert guarded.get("/api/session").json()["admitted"]


@pytest.mark.parametrize("others", ["a=1; b c=2; ", 'x="{"y":1}"; ', "ö=ü; ", "; =; "])
def test_cookies_of_other_programs_on_this_host_are_no_hindrance(root: Path, others: str) -> None:
    access = Access(TOKEN, port=8265)
    cookie = f"{others}{access.cookie_name}={access.cookie_value}; z[0]=1"
    answer = client(root, TOKEN).get("/api/runs", headers={"cookie": cookie.encode()})
    assert answer.status_code == 200


def test_cookie_outlives_the_server_but_not_the_token(root: Path) -> None:
    cookie = Access(TOKEN, port=1).cookie_value
    assert Access(TOKEN, port=1).cookie_value == cookie
    assert Access(new_token(), port=1).cookie_value != cookie


def test_with_a_token_any_name_is_answered(root: Path) -> None:
    elsewhere = client(root, TOKEN, base="http://training.example:8265")
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert elsewhere.get("/api/runs", headers=headers).status_code == 200


@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN + "x", "ü", "\ud800", 7])
def test_what_is_not_the_token_is_not_taken(root: Path, token: object) -> None:
    content, headers = json.dumps({"token": token}), {"content-type": "application/json"}
    answer = client(root, TOKEN).post("/api/session", content=content, headers=headers)
    assert answer.status_code == 403


def test_token_comes_from_a_file_of_ones_own_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o644)
    with pytest.raises(TokenError, match="others may read"):
        find_token(file, {})
    file.chmod(0o600)
    assert find_token(file, {"ESPER_DASHBOARD_TOKEN": "x" * 20}) == TOKEN
    assert find_token(None, {"ESPER_DASHBOARD_TOKEN": "x" * 20}) == "x" * 20
    assert find_token(None, {}) is None
    file.write_bytes(b"\xff" * 32)
    with pytest.raises(TokenError, match="holds no text"):
        find_token(file, {})
    with pytest.raises(TokenError, match="has 5 characters"):
        find_token(None, {"ESPER_DASHBOARD_TOKEN": "short"})
    with pytest.raises(TokenError, match="holds others than printable ASCII"):
        find_token(None, {"ESPER_DASHBOARD_TOKEN": "schlüssel für alle"})


def test_command_needs_the_pages_origin_and_its_secret() -> None:
    access = Access(None, port=1)
    secret = access.command_token
    own = {"host": "localhost:1", "origin": "http://localhost:1", "x-esper-command": secret}
    assert access.may_command(Headers(own))
    assert not access.may_command(Headers({**own, "origin": "http://evil.example"}))
    for origin in ("null", "http://[", ""):
        assert not access.may_command(Headers({**own, "origin": origin}))
    assert not access.may_command(Headers({**own, "x-esper-command": "guessed"}))
    assert not access.may_command(Headers({"host": "localhost:1", "origin": "http://localhost:1"}))
    assert Access(None, port=1).command_token != secret


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)],  # noqa: S104
)
def test_loopback_is_known_by_its_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
