"""The timelines of all rows of a result as one trace for Perfetto."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from parnet_engines.schedule import program_file
from parnet_engines.schedule import recording as recording_file
from parnet_engines.timeline.trace_file import encode_trace

if TYPE_CHECKING:
    from parnet_bench.results.result import Result


def encode_traces(result: Result) -> bytes:
    """Return one inference of each row as a trace file, in which each row has its processes.

    Returns
    -------
    bytes
        JSON, ending in a newline. Rows without a timeline are left out.
    """
    events: list[dict[str, Any]] = []
    processes = flows = 0
    for row in result.rows:
        if row.timeline is None:
            continue
        name = row.description.name
        program = program_file.decode(msgspec.json.encode(row.timeline.program), name)
        recording = recording_file.decode(msgspec.json.encode(row.timeline.recording), name)
        document = msgspec.json.decode(encode_trace(program, recording, name))
        for event in document["traceEvents"]:
            event["pid"] += processes
            if "id" in event:
                event["id"] += flows
            if event["name"] == "process_name":
                event["args"]["name"] = f"{name}: {event['args']['name']}"
            if event["name"] == "process_sort_index":
                event["args"]["sort_index"] += processes
            events.append(event)
        processes = max((event["pid"] for event in events), default=0)
        flows = max((event["id"] for event in events if "id" in event), default=0)
    document = {
        "displayTimeUnit": "ns",
        "otherData": {"title": "parnet-bench latency", "source": "recorded"},
        "traceEvents": events,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
