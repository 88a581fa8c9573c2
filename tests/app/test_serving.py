from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.testclient import TestClient

from app.serving import MODULES, PIECE, Shown, publish, replace, routes, withdraw

SHAPE = (6, 7, 5)


@pytest.fixture
def shown(rng: np.random.Generator) -> Iterator[Shown]:
    yield Shown(
        rng.integers(-1024, 3000, SHAPE).astype(np.int16),
        {"prediction": rng.integers(0, 4, SHAPE).astype(np.uint8)},
    )
    for session in ("one", "two"):
        withdraw(session)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def client() -> TestClient:
    """The routes as they run in the app: behind a middleware that compresses."""
    return TestClient(Starlette(routes=routes(), middleware=[Middleware(GZipMiddleware, minimum_size=1)]))


def test_slices_are_raw_voxels_in_their_order(client: TestClient, shown: Shown) -> None:
    token = publish("one", shown)
    image = client.get(f"/surm/data/{token}/image?from=2&to=5")
    assert image.headers["content-encoding"] == "identity" and image.headers["cache-control"] == "no-store"
    np.testing.assert_array_equal(np.frombuffer(image.content, "<i2").reshape(3, 7, 5), shown.image[2:5])
    labels = client.get(f"/surm/data/{token}/layers/prediction?from=0&to=6&version=3")
    assert labels.headers["content-encoding"] == "gzip"
    np.testing.assert_array_equal(np.frombuffer(labels.content, np.uint8).reshape(SHAPE), shown.layers["prediction"])


def test_a_client_that_cannot_unpack_gets_labels_as_they_are(client: TestClient, shown: Shown) -> None:
    token = publish("one", shown)
    labels = client.get(f"/surm/data/{token}/layers/prediction?from=1&to=2", headers={"Accept-Encoding": "identity"})
    assert labels.content == shown.layers["prediction"][1].tobytes()


def test_a_flipped_view_arrives_as_it_reads(client: TestClient, shown: Shown) -> None:
    other = Shown(shown.image[::-1, ::-1], {})
    answer = client.get(f"/surm/data/{publish('one', other)}/image?from=0&to=6")
    np.testing.assert_array_equal(np.frombuffer(answer.content, "<i2").reshape(SHAPE), other.image)


def test_the_same_arrays_keep_their_token_within_a_session_only(shown: Shown) -> None:
    token = publish("one", shown)
    again = Shown(shown.image, dict(shown.layers))
    assert publish("one", again) == token
    assert publish("two", again) != token
    assert publish("one", Shown(shown.image.copy(), shown.layers)) != token
    assert len(token) >= 43  # 32 random bytes


def test_a_session_that_ended_is_served_no_more_and_others_are(client: TestClient, shown: Shown) -> None:
    mine, yours = publish("one", shown), publish("two", shown)
    withdraw("one")
    assert client.get(f"/surm/data/{mine}/image?from=0&to=1").status_code == 404
    assert client.get(f"/surm/data/{yours}/image?from=0&to=1").status_code == 200


def test_a_renewed_layer_is_served_under_the_old_token(client: TestClient, shown: Shown) -> None:
    token = publish("one", shown)
    replace(token, "prediction", np.full(SHAPE, 9, np.uint8))
    assert set(client.get(f"/surm/data/{token}/layers/prediction?from=0&to=1").content) == {9}
    assert publish("one", shown) != token


@pytest.mark.parametrize("asked", ["", "?from=0", "?from=-1&to=2", "?from=2&to=2", "?from=0&to=7", "?from=a&to=b"])
def test_slices_that_are_not_there_are_refused(client: TestClient, shown: Shown, asked: str) -> None:
    assert client.get(f"/surm/data/{publish('one', shown)}/image{asked}").status_code == 400


def test_what_is_unknown_is_one_answer_without_a_list(client: TestClient, shown: Shown) -> None:
    token = publish("one", shown)
    paths = ["/surm/data/guess/image", "/surm/data/guess/layers/prediction", f"/surm/data/{token}/layers/none"]
    modules = ["__init__.py", "events.py", "none.js", "__pycache__"]
    answers = [client.get(path + "?from=0&to=1") for path in paths] + [client.get(f"/surm/viewer/{m}") for m in modules]
    assert {(answer.status_code, answer.text) for answer in answers} == {(404, "There is nothing here.")}
    for path in ("/surm/data/", f"/surm/data/{token}/", "/surm/viewer/", "/surm/viewer/..%2Frle.py"):
        assert client.get(path).status_code == 404


def test_every_module_is_served_as_what_it_is(client: TestClient) -> None:
    served = [path for path in MODULES.iterdir() if path.suffix in (".js", ".css")]
    assert len(served) > 10
    for path in served:
        answer = client.get(f"/surm/viewer/{path.name}")
        kind = "text/javascript" if path.suffix == ".js" else "text/css"
        assert answer.content == path.read_bytes() and answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_memory_map_is_sent_without_a_copy_of_it(client: TestClient, tmp_path: Path) -> None:
    """The test client itself collects an answer, so the server's part is what is allocated beyond that."""
    image = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.int16, (40, 512, 512))
    token = publish("one", Shown(image, {}))
    peaks = []
    for end in (4, 40):
        tracemalloc.start()
        received = len(client.get(f"/surm/data/{token}/image?from=0&to={end}").content)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * received)  # collected, then joined
        tracemalloc.stop()
        assert received == end * image[0].nbytes
    withdraw("one")
    assert peaks[1] - peaks[0] < 4 * PIECE
