from __future__ import annotations

import subprocess
import sys

import onnx
import pytest

from parnet_bench.machine.footprint import graph_sizes, peak_host_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it():
    code = "import sys; b = bytearray({}); del b; print(flush=True); sys.stdin.read()"
    peaks = []
    ballast = bytearray(200_000_000)  # a peak that children must not inherit
    for size in (0, 100_000_000):
        command = [sys.executable, "-S", "-c", code.format(size)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            peaks.append(peak_host_bytes(child.pid))
            child.stdin.close()
    del ballast
    assert peaks[0] < 60_000_000
    assert 95_000_000 < peaks[1] - peaks[0] < 105_000_000  # held once, and given back


def test_a_system_that_does_not_tell_yields_no_peak(tmp_path):
    assert peak_host_bytes(1, tmp_path) is None
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "status").write_text("Name:\tx\nVmRSS:\t 12 kB\n")
    assert peak_host_bytes(1, tmp_path) is None
    (tmp_path / "1" / "status").write_text("Name:\tx\nVmHWM:\t 12 kB\n")
    assert peak_host_bytes(1, tmp_path) == 12 * 1024


def test_sizes_are_those_of_the_files_and_of_the_weights_in_them(forked_bundle, forked_onnx):
    whole, streams = (graph_sizes(forked_bundle, plan) for plan in ("whole", "streams"))
    weights = onnx.load(forked_onnx).graph.initializer
    assert whole.weights_bytes == sum(len(tensor.raw_data) for tensor in weights)
    assert streams.weights_bytes == whole.weights_bytes
    assert whole.graph_bytes == forked_bundle.whole_path.stat().st_size
    segments = forked_bundle.stream_graph.segments
    files = [forked_bundle.segment_path(segment.name) for segment in segments]
    assert streams.graph_bytes == sum(file.stat().st_size for file in files)


def test_an_open_batch_counts_as_often_as_it_is_asked_for(forked_bundle, dynamic_bundle):
    fixed = graph_sizes(forked_bundle, "whole").activation_bytes
    assert graph_sizes(dynamic_bundle, "whole").activation_bytes == fixed
    assert graph_sizes(dynamic_bundle, "whole", batch=4).activation_bytes == 4 * fixed
    assert graph_sizes(forked_bundle, "whole", batch=4).activation_bytes == fixed
