from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from parnet_engines.clock import Clock, FakeClock, MonotonicClock
from parnet_engines.engine import Engine, NullEngine
from parnet_engines.runtimes.delay_engine import DelayEngine
from parnet_export.stream_graph import Cost, Segment, TensorSpec

SEGMENT = Segment(
    "s",
    (TensorSpec("x", "float32", ("batch", 2)),),
    (TensorSpec("y", "float16", ("batch", 3)),),
    Cost(0, 0, 0, 0, 0, 0),
)


def test_a_delay_takes_its_time_by_the_clock_and_computes_nothing():
    clock = FakeClock(7)
    engine: Engine = DelayEngine(SEGMENT, 2.5, clock=clock, sizes={"batch": 4})
    outputs = engine.run({})
    assert clock.now_ns() == 2_500_007
    assert {name: (v.shape, v.dtype.name) for name, v in outputs.items()} == {
        "y": ((4, 3), "float16")
    }
    output = np.full((4, 3), 9, np.float16)
    run = engine.bind([np.zeros((4, 2), np.float32)], [output])
    assert clock.now_ns() == 2_500_007
    run()
    run()
    assert clock.now_ns() == 7_500_007
    assert (output == 9).all()
    engine.close()
    engine.close()


def test_the_null_engine_takes_no_time_and_leaves_the_outputs_alone():
    engine: Engine = NullEngine(SEGMENT)
    output = np.full((1, 3), 9, np.float16)
    engine.bind([np.zeros((1, 2), np.float32)], [output])()
    assert (output == 9).all()


@pytest.mark.parametrize("latency_ms", [0, 0.1, 3])
def test_a_real_delay_is_never_short_and_at_best_exact(latency_ms):
    run = DelayEngine(SEGMENT, latency_ms).bind([], [])
    taken_ms = []
    for _ in range(30):
        begin_ns = time.monotonic_ns()
        run()
        taken_ms.append((time.monotonic_ns() - begin_ns) / 1e6)
    assert min(taken_ms) >= latency_ms
    assert min(taken_ms) < latency_ms + 0.25


def test_other_threads_run_while_an_engine_waits():
    engine = DelayEngine(SEGMENT, 40)
    taken_ms = []
    for _ in range(5):
        begin_ns = time.monotonic_ns()
        threads = [threading.Thread(target=engine.run, args=({},)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken_ms.append((time.monotonic_ns() - begin_ns) / 1e6)
    assert 40 <= min(taken_ms) < 80  # one after another they take 160


@pytest.mark.parametrize("clock", [FakeClock(), MonotonicClock()])
def test_clocks_never_go_back(clock: Clock):
    before_ns = clock.now_ns()
    clock.sleep_until(before_ns - 1_000_000_000)
    assert clock.now_ns() >= before_ns
    clock.sleep_until(before_ns + 1_000_000)
    assert clock.now_ns() >= before_ns + 1_000_000


def test_a_fake_clock_is_told_the_time():
    clock = FakeClock()
    clock.advance_ms(1.5)
    assert clock.now_ns() == 1_500_000
