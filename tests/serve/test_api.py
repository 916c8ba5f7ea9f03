"""The API, its limits, and its answers under load."""

import asyncio
import shutil
import signal
import socket
import struct
import zlib
from io import BytesIO
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from drawn import png
from refilled.errors import RefilledError
from refilled.models import load_model
from refilled.runs.inference import classify_by, open_classifier, task_of, teacher_accuracies
from refilled.serve.app import make_app
from refilled.serve.engine import Engine
from refilled.serve.server import serve

LIMIT = 60_000


@pytest.fixture(scope="module")
def engine(student):
    return Engine(student, teacher=True, max_pixels=1_000_000)


@pytest.fixture(scope="module")
def app(engine):
    return make_app(engine, LIMIT)


def ask(app, *requests, host="127.0.0.1", at_once=1):
    """Send requests, each a method, a path and arguments of httpx; return the responses in their order."""

    async def all_of_them():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        turns = asyncio.Semaphore(at_once)

        async def one(client, method, path, arguments):
            async with turns:
                return await client.request(method, path, **arguments)

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client,
        ):
            return await asyncio.gather(*(one(client, *request) for request in requests))

    return asyncio.run(all_of_them())


def post(app, content=None, path="/predict", **arguments):
    (response,) = ask(app, ("POST", path, {"content": content, **arguments}))
    return response


def header_of_png(width, height):
    """Return a PNG whose header declares a size and that holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.slow
def test_every_answer_under_load_is_that_of_predict(app, student, pictures):
    paths = sorted(pictures.rglob("*.png"))
    expected = dict(classify_by(open_classifier(student), [pictures])[0])
    chosen = [paths[number * 7 % len(paths)] for number in range(200)]
    requests = [("POST", "/predict", {"content": path.read_bytes()}) for path in chosen]
    responses = ask(app, *requests, at_once=20)
    assert [response.status_code for response in responses] == [200] * 200
    for path, response in zip(chosen, responses, strict=True):
        (answer,) = response.json()["predictions"]
        assert answer["probabilities"] == pytest.approx(expected[path], abs=1e-5)
        assert answer["class"] == max(expected[path], key=expected[path].get)


def test_requests_that_wait_share_a_batch(engine, pictures, monkeypatch):
    sizes = []
    answer = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, batch: sizes.append(len(batch)) or answer(self, batch))
    picture = next(pictures.rglob("*.png")).read_bytes()
    ask(make_app(engine, LIMIT), *[("POST", "/predict", {"content": picture})] * 100, at_once=20)
    assert sum(sizes) == 100
    assert 1 < max(sizes) <= 32


def test_several_pictures_of_a_form_are_answered_in_order_with_the_broken_one_named(app, student, pictures):
    paths = [next((pictures / name).iterdir()) for name in sorted(path.name for path in pictures.iterdir())]
    files = [("picture", (path.name, path.read_bytes())) for path in paths]
    files.insert(1, ("picture", ("torn.jpg", b"text, no picture")))
    response = post(app, files=files, path="/predict?top=2")
    assert response.status_code == 200
    answers = response.json()["predictions"]
    assert [answer["name"] for answer in answers] == [paths[0].name, "torn.jpg", paths[1].name, paths[2].name]
    assert answers[1]["status"] == 415
    expected = dict(classify_by(open_classifier(student), paths)[0])
    for path, answer in zip(paths, answers[:1] + answers[2:], strict=True):
        two = dict(sorted(expected[path].items(), key=lambda item: -item[1])[:2])
        assert answer["probabilities"] == pytest.approx(two, abs=1e-5)


def test_a_training_image_is_its_own_nearest_and_its_thumbnail_is_served(app, engine):
    images = engine.neighbours.images
    for row in (0, len(images) - 1):
        pixels = images.pixels[row : row + 1][0]
        (answer,) = post(app, png(Image.fromarray(pixels.permute(1, 2, 0).numpy()))).json()["predictions"]
        first = answer["nearest"][0]
        assert first["similarity"] == pytest.approx(1, abs=1e-4)
        assert first["name"] == images.sources[row]
        assert first["class"] == engine.classes[images.labels[row]]
        (response,) = ask(app, ("GET", f"/{first['thumbnail']}", {}))
        shown = Image.open(BytesIO(response.content)).convert("RGB")
        assert shown.tobytes() == pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    missing = ask(app, *(("GET", f"/thumbnails/{row}", {}) for row in (len(images), -1, "..%2f..%2fetc%2fpasswd")))
    assert [response.status_code for response in missing] == [404] * 3


def test_the_teacher_predicts_the_nearest_class_mean(engine, student):

    test = task_of(student).test
    found = [engine.classes.index(ranked[0]["class"]) for ranked in engine.teacher.ranked(test.pixels)]
    right = (torch.tensor(found) == test.labels).double().mean().item()
    assert 100 * right == pytest.approx(teacher_accuracies(student)[0])


def test_limits_and_mistakes_get_json_with_a_reason(app, pictures):
    good = next(pictures.rglob("*.png")).read_bytes()
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    cases = [
        (post(app, b""), 400, "body is empty"),
        (post(app, files=[("picture", ("a.png", b""))]), 400, "empty"),
        (post(app, b"Dear sir", headers={"Content-Type": "image/jpeg"}), 415, "not a picture in a known format"),
        (post(app, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 415, "not a picture"),
        (post(app, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), 415, "not a picture"),
        (post(app, good[: len(good) // 2]), 400, ""),
        (post(app, header_of_png(50_000, 50_000)), 413, "too large: 50000x50000"),
        (post(app, bytes(LIMIT + 1)), 413, "more than 60,000 bytes"),
        (post(app, good, headers={"Content-Type": "multipart/mixed"}), 415, "send multipart/form-data"),
        (post(app, good, headers=form), 400, "the form"),
        (post(app, good, headers={"Content-Type": "multipart/form-data"}), 400, "the form cannot be read"),
        (post(app, data={"a": "b"}, files=[("c", (None, "d"))]), 400, "the form contains no file"),
        (post(app, files=[("p", (f"{n}.png", b"x")) for n in range(65)]), 400, "the form cannot be read"),
        (post(app, good, path="/predict?top=none"), 400, "top must be an integer"),
        (post(app, good, path="/nothing"), 404, "Not Found"),
        (ask(app, ("GET", "/predict", {}))[0], 405, "Method Not Allowed"),
    ]
    for response, status, reason in cases:
        assert response.status_code == status, response.text
        assert reason in response.json()["error"]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_body_of_undeclared_length_is_cut_off(app):
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield bytes(10_000)

    assert post(app, endless()).status_code == 413
    assert len(sent) < 20


def test_another_name_than_the_servers_is_refused(engine, app):
    (response,) = ask(app, ("GET", "/health", {}), host="evil.example")
    assert response.status_code == 400
    for host in ("localhost:8000", "127.0.0.1:80", "[::1]:9"):
        assert ask(app, ("GET", "/health", {}), host=host)[0].status_code == 200
    everywhere = make_app(engine, LIMIT, "0.0.0.0")
    assert ask(everywhere, ("GET", "/health", {}), host="my.machine")[0].status_code == 200


def test_a_failure_of_one_batch_is_an_error_and_the_next_is_answered(engine, pictures, monkeypatch):
    answer, failed = Engine.answer, []

    def fail_once(self, batch):
        if not failed:
            failed.append(1)
            raise RuntimeError("out of memory")
        return answer(self, batch)

    monkeypatch.setattr(Engine, "answer", fail_once)
    picture = next(pictures.rglob("*.png")).read_bytes()
    responses = ask(make_app(engine, LIMIT), *[("POST", "/predict", {"content": picture})] * 2)
    assert sorted(response.status_code for response in responses) == [200, 500]
    assert any("error" in response.json() for response in responses)


def test_the_description_names_the_paths_that_exist(app):
    (response,) = ask(app, ("GET", "/openapi.json", {}))
    paths = {route.path.replace(":int", "") for route in app.routes}
    assert set(response.json()["paths"]) == {path for path in paths if "." not in path and path != "/"}


@pytest.mark.slow
def test_mistakes_get_an_explanation(student, tmp_path, teacher):
    with pytest.raises(RefilledError, match=r"no_run|cannot be read"):
        serve(tmp_path / "no_run", port=0)
    with pytest.raises(RefilledError, match="has no teacher"):
        serve(Path(teacher), port=0, teacher=True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RefilledError, match=f"port {port} of 127.0.0.1 cannot be used: address already in use"):
            serve(student, port=port)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_cleanly(served, student, pictures, number):
    with served(student) as (address, process):
        picture = next(pictures.rglob("*.png")).read_bytes()
        answer = httpx.post(f"{address}predict", content=picture).json()["predictions"][0]
        assert answer["class"] in load_model(student).class_names
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read().strip() == "stopped"


def test_a_student_without_its_images_is_served_with_a_note(student, tmp_path):

    shutil.copytree(student, tmp_path / "moved")
    text = (student / "run.toml").read_text()
    task = next(line for line in text.splitlines() if line.startswith("task ="))
    (tmp_path / "moved" / "run.toml").write_text(text.replace(task, f'task = "{tmp_path}/gone"'))
    engine = Engine(tmp_path / "moved")
    assert engine.neighbours is None
    assert engine.notes[0].startswith("the nearest training images are not shown")
