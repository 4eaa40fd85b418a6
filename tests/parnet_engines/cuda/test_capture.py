"""What goes on around a capture."""

from __future__ import annotations

import gc
import threading

import pytest

from parnet_engines.cuda.capture import capture
from parnet_engines.cuda.driver import on_device
from parnet_engines.cuda.recording_driver import RecordingDriver


@pytest.fixture
def _collector_on():
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


def captured(enqueue) -> None:
    """Capture on a GPU of its own."""
    driver = RecordingDriver()
    driver.retain_context(0)
    stream = driver.create_stream(0, 0)
    with on_device(driver, 0):
        capture(driver, 0, stream, enqueue)


@pytest.mark.usefixtures("_collector_on")
def test_the_collector_is_off_until_the_last_thread_is_through():
    is_capturing, first_is_through = threading.Event(), threading.Event()
    found = []

    def outlast_the_first() -> None:
        is_capturing.set()
        first_is_through.wait(10)
        found.append(gc.isenabled())

    second = threading.Thread(target=captured, args=(outlast_the_first,))

    def begin_another() -> None:
        second.start()
        is_capturing.wait(10)
        found.append(gc.isenabled())

    captured(begin_another)
    first_is_through.set()
    second.join(10)
    assert found == [False, False]
    assert gc.isenabled()


@pytest.mark.usefixtures("_collector_on")
def test_a_collector_that_was_off_stays_off():
    gc.disable()
    captured(lambda: None)
    assert not gc.isenabled()


@pytest.mark.usefixtures("_collector_on")
def test_the_collector_is_on_again_after_a_refusal():
    with pytest.raises(ZeroDivisionError):
        captured(lambda: 1 // 0)
    assert gc.isenabled()
