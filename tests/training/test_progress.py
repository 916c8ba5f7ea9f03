"""Messages about work without a bar, with a clock that the test moves."""

import pytest

from refilled.training import progress
from refilled.training.progress import Pace


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_images_per_second_and_the_time_left_are_shown_every_ten_seconds(clock):
    said = []
    pace = Pace("teacher cache", 3000, said.append)
    for _ in range(6):
        clock[0] += 4
        pace(200)
    assert said == [
        "teacher cache: 600 of 3,000 images, 50 images/s, 48 seconds left",
        "teacher cache: 1,200 of 3,000 images, 50 images/s, 36 seconds left",
    ]


def test_images_that_another_process_embeds_are_not_waited_for(clock):
    said = []
    pace = Pace("teacher cache", 3000, said.append)
    clock[0] += 20
    pace.leave_out(2600)
    pace(400)
    assert said == ["teacher cache: 400 of 400 images, 20 images/s"]
