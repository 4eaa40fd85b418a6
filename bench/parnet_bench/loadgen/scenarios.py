"""MLPerf's load generator: scenarios, the settings that its rules fix, and what it reports.

Settings are those that the load generator brings itself (``mlperf.conf``) for image
classification: 600 s, 1,024 samples in memory, the 90th percentile for single streams and
the 99th otherwise, and the seeds of its round. A latency or throughput that comes out is
no MLPerf result: those are reviewed, and of the benchmark's own networks.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from parnet_export.errors import InputError, MissingBackendError

if TYPE_CHECKING:
    from pathlib import Path

Scenario = Literal["single-stream", "multi-stream", "offline", "server"]

DETAIL_LOG = "mlperf_log_detail.txt"
RULES_MODEL = "resnet50"
"""The benchmark of the rules whose settings are taken: image classification."""

SAMPLES = 1024
"""Distinct inputs in memory, as the rules ask for image classification."""

SHORT_SAMPLES = 16
"""Distinct inputs of runs that are shorter than the rules allow."""

_MODULE = "mlperf_loadgen"
_INSTALL = "pip install 'parnet-export[loadgen]'"
_NAMES: dict[Scenario, str] = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "offline": "Offline",
    "server": "Server",
}
_RULES_FILE = 0  # FromConfig then reads the settings that are built in, and no file
_LINE = ":::MLLOG "
_NS_PER_MS = 1_000_000
_MS_PER_S = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the load generator.

    Parameters
    ----------
    scenario
        How queries arrive.
    expected_ms
        Latency of one inference, from which it plans how many queries it needs.
    batch
        Samples in one inference.
    target_qps
        Queries per second of the server scenario.
    target_latency_ms
        The server scenario's bound; None takes the rules'.
    seconds
        Length of a run that breaks the rules for being shorter; None keeps them.
    """

    scenario: Scenario
    expected_ms: float
    batch: int = 1
    target_qps: float | None = None
    target_latency_ms: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.scenario == "server" and self.target_qps is None:
            raise ValueError("the server scenario takes a number of queries per second")

    @property
    def samples(self) -> int:
        """How many distinct inputs there are."""
        return SAMPLES if self.seconds is None else SHORT_SAMPLES

    @property
    def broken_rules(self) -> tuple[str, ...]:
        """What the rules forbid, as clauses; empty for a run that keeps them."""
        broken = []
        if self.seconds is not None:
            broken.append(f"it takes {self.seconds:g} s instead of 600 s")
            broken.append(f"it has {SHORT_SAMPLES} inputs instead of {SAMPLES}")
        if self.target_latency_ms is not None and self.scenario == "server":
            broken.append(f"its latency bound is {self.target_latency_ms:g} ms")
        return tuple(broken)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the load generator reports.

    Parameters
    ----------
    valid
        Whether it calls the run valid.
    samples_per_s
        Samples per second over the whole run; None where it does not report them.
    latency_ms, percentile
        The latency that counts in the scenario, an early-stopping estimate where the run is
        long enough for one, and which percentile that is; None for the offline scenario.
    is_estimate
        Whether `latency_ms` is that estimate, instead of the plain percentile.
    percentiles_ms
        Plain percentiles of latencies.
    queries
        How many queries were answered.
    version
        Of the load generator.
    """

    valid: bool
    samples_per_s: float | None
    latency_ms: float | None
    percentile: float | None
    is_estimate: bool
    percentiles_ms: dict[str, float]
    queries: int
    version: str


def import_loadgen() -> Any:
    """Return the module ``mlperf_loadgen``.

    Raises
    ------
    MissingBackendError
        When it is not installed. One that is installed and broken raises what it raises.
    """
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        raise MissingBackendError(_MODULE, "A scenario", _INSTALL) from error


def make_settings(loadgen: Any, load: Load, rules_file: Path) -> Any:
    """Return the load generator's settings for a load.

    Parameters
    ----------
    loadgen
        The module.
    load
        What is asked for.
    rules_file
        A path for the load generator to open; what is in it does not matter.
    """
    settings = loadgen.TestSettings()
    name = _NAMES[load.scenario]
    settings.FromConfig(str(rules_file), RULES_MODEL, name, _RULES_FILE)
    settings.scenario = getattr(loadgen.TestScenario, name)
    settings.mode = loadgen.TestMode.PerformanceOnly
    expected_ns = int(load.expected_ms * _NS_PER_MS)
    per_sample_ns = max(1, expected_ns // load.batch)
    settings.single_stream_expected_latency_ns = max(1, expected_ns)
    settings.multi_stream_expected_latency_ns = (
        per_sample_ns * settings.multi_stream_samples_per_query
    )
    settings.offline_expected_qps = _MS_PER_S * _NS_PER_MS / per_sample_ns
    if load.target_qps is not None:
        settings.server_target_qps = load.target_qps
    if load.target_latency_ms is not None:
        settings.server_target_latency_ns = int(load.target_latency_ms * _NS_PER_MS)
    if load.seconds is not None:
        settings.min_duration_ms = int(load.seconds * _MS_PER_S)
        settings.max_duration_ms = 0
        settings.min_query_count = 1
        settings.performance_sample_count_override = load.samples
    return settings


def make_log_settings(loadgen: Any, folder: Path) -> Any:
    """Return settings that write the log into a folder and nothing to the terminal."""
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    output.copy_detail_to_stdout = False
    settings = loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def read_outcome(folder: Path, scenario: Scenario) -> Outcome:
    """Read what the load generator has logged.

    Raises
    ------
    InputError
        When the log is missing or no run has been completed in it.
    """
    path = folder / DETAIL_LOG
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(path, f"cannot be read ({reason})", "Run the scenario again") from error
    entries: dict[str, Any] = {}
    for line in text.splitlines():
        _, found, content = line.partition(_LINE)
        if found:
            try:
                entry = msgspec.json.decode(content)
            except msgspec.DecodeError:
                continue  # the last line of a run that was cut off
            entries[entry["key"]] = entry["value"]
    if "result_validity" not in entries:
        raise InputError(path, "holds no completed run", "Run the scenario again")
    return _outcome(entries, scenario)


def _outcome(entries: dict[str, Any], scenario: Scenario) -> Outcome:
    # A query of several streams ends with its last sample, and it is queries that count.
    ending = "_percentile_latency_ns"
    if scenario == "multi-stream":
        ending = "_percentile_per_query_latency_ns"
    percentiles_ms = {
        key.removeprefix("result_").removesuffix(ending): value / _NS_PER_MS
        for key, value in entries.items()
        if key.startswith("result_") and key.endswith(ending)
    }
    percentile = {"single-stream": 90.0, "multi-stream": 99.0, "server": 99.0}.get(scenario)
    estimate_key = {
        "single-stream": "early_stopping_latency_ss",
        "multi-stream": "early_stopping_latency_ms",
    }.get(scenario, "")
    estimate_ns = entries.get(estimate_key) or 0
    plain_ms = percentiles_ms.get(f"{percentile:.2f}") if percentile else None
    rates = (
        "result_samples_per_second",
        "result_completed_samples_per_sec",
        "result_qps_without_loadgen_overhead",
    )
    return Outcome(
        valid=entries["result_validity"] == "VALID",
        samples_per_s=next((float(entries[key]) for key in rates if key in entries), None),
        latency_ms=estimate_ns / _NS_PER_MS if estimate_ns else plain_ms,
        percentile=percentile,
        is_estimate=bool(estimate_ns),
        percentiles_ms=percentiles_ms,
        queries=int(entries.get("result_query_count", 0)),
        version=str(entries.get("loadgen_version", "")),
    )
