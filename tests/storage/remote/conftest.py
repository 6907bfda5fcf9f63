"""Buckets of both kinds on loopback, whose clients never really wait."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bucket_servers import Clock, Proxy, amazon_server, fresh_clients, google_server
from difffract_jax.storage.remote import bucket as buckets
from difffract_jax.storage.remote import cache


@pytest.fixture(scope="session")
def google() -> Iterator[Proxy]:
    with google_server() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def amazon() -> Iterator[Proxy]:
    with amazon_server() as proxy:
        yield proxy


@pytest.fixture
def clock() -> Clock:
    return Clock()


def point_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> None:
    """Sets a cache of the test's own, a patience that does not wait, and credentials."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "PATIENCE", clock.patience())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    fresh_clients()


@pytest.fixture
def gs(google: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> Iterator[Proxy]:
    """The emulated bucket gs://bucket."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    point_at(monkeypatch, tmp_path, clock)
    yield google
    google.fault = lambda method, path: None
    fresh_clients()


@pytest.fixture
def s3(amazon: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> Iterator[Proxy]:
    """The emulated bucket s3://bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", amazon.url)
    point_at(monkeypatch, tmp_path, clock)
    yield amazon
    amazon.fault = lambda method, path: None
    fresh_clients()


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.s3)])
def either(request: pytest.FixtureRequest) -> tuple[str, Proxy]:
    """A scheme and the proxy before its emulator."""
    return request.param, request.getfixturevalue(request.param)
