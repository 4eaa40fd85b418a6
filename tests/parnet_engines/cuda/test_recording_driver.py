"""The recording driver refuses what CUDA refuses, so that tests on it mean something."""

from __future__ import annotations

import pytest

from parnet_engines.cuda.driver import CudaError
from parnet_engines.cuda.recording_driver import RecordingDriver


@pytest.fixture
def driver():
    found = RecordingDriver()
    found.retain_context(0)
    found.push_context(0)
    return found


def captured_event(driver, *, timing=False) -> tuple[int, int]:
    """Return an event that was last recorded in a capture, which has ended, and the stream."""
    event, stream = driver.create_event(0, timing=timing), driver.create_stream(0, 0)
    driver.begin_capture(stream)
    driver.record_event(event, stream)
    driver.end_capture(stream)
    return event, stream


def test_no_stream_waits_outside_a_capture_for_an_event_recorded_inside(driver):
    event, stream = captured_event(driver)
    with pytest.raises(CudaError, match="CUDA_ERROR_CAPTURED_EVENT"):
        driver.wait_event(stream, event)
    driver.record_event(event, stream)
    driver.wait_event(stream, event)


def test_no_capture_waits_for_an_event_recorded_outside(driver):
    event, stream = driver.create_event(0), driver.create_stream(0, 0)
    driver.record_event(event, stream)
    driver.begin_capture(stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_ISOLATION"):
        driver.wait_event(stream, event)
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        driver.end_capture(stream)


def test_events_that_were_captured_tell_no_time_unless_the_graph_records_them(driver):
    event, stream = captured_event(driver, timing=True)
    zero = driver.create_event(0, timing=True)
    driver.record_event(zero, stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_CAPTURED_EVENT"):
        driver.elapsed_ms(0, zero, event)
    marked = driver.create_event(0, timing=True)
    driver.begin_capture(stream)
    driver.record_event(marked, stream, external=True)
    executable = driver.instantiate(0, driver.end_capture(stream))
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
        driver.elapsed_ms(0, zero, marked)
    driver.launch(executable, stream)
    assert driver.elapsed_ms(0, zero, marked) > 0


def test_events_that_are_not_for_timing_tell_no_time(driver):
    stream = driver.create_stream(0, 0)
    events = [driver.create_event(0, timing=timing) for timing in (True, False)]
    for event in events:
        driver.record_event(event, stream)
    for pair in (events, events[::-1]):
        with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
            driver.elapsed_ms(0, *pair)


@pytest.mark.parametrize("verb", ["allocate", "allocate_pinned", "free", "free_pinned"])
def test_memory_is_neither_taken_nor_given_back_during_a_capture(driver, verb):
    kind = "allocate_pinned" if verb.endswith("pinned") else "allocate"
    address, stream = getattr(driver, kind)(0, 8), driver.create_stream(0, 0)
    driver.begin_capture(stream)
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        getattr(driver, verb)(0, 8 if verb == kind else address)
    with pytest.raises(CudaError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        driver.end_capture(stream)
