"""What the ranks of `sret-scale doctor` measured, and what it says about the nodes together."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sret_scale.launch.doctor.checks import Finding
from sret_scale.runs.rank_errors import counted


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One rank's measurements."""

    rank: int
    host: str
    torch: str
    device: str
    clock_s: float
    """This rank's time when all ranks left a barrier together."""
    matmul_per_s: float
    """Floating-point operations a second of a square matrix product, the best of several."""
    all_reduce_bytes_per_s: float
    """Bytes of the reduced tensor a second; 0 with one rank."""
    findings: tuple[Finding, ...] = ()
    """The checks of its node, from the first rank of each."""


def judge(probes: Sequence[Probe], here: str) -> Iterator[Finding]:
    """What the ranks say together; of the checks of nodes other than `here` what is wrong, with the node's name."""
    for probe in probes:
        for finding in probe.findings:
            # A teacher is loaded by the ranks alone, also here.
            if finding.name == "teacher" or (finding.state != "ok" and probe.host != here):
                yield replace(finding, text=f"{probe.host}: {finding.text}")
    hosts = sorted({probe.host for probe in probes})
    yield Finding(name="start", state="ok", text=f"{counted(len(probes), 'rank')} on {counted(len(hosts), 'host')} met")
    versions = sorted({probe.torch for probe in probes})
    if len(versions) > 1:
        where = ", ".join(f"{probe.host} {probe.torch}" for probe in probes)
        advice = "one shared .venv, or the same image everywhere"
        yield Finding(name="same torch", state="fail", text=where, advice=advice)
    spread_s = max(probe.clock_s for probe in probes) - min(probe.clock_s for probe in probes)
    late = spread_s > 1.0
    advice = "start chrony or ntpd: the order of errors and the times in logs are wrong" if late else ""
    yield Finding(name="clocks", state="warn" if late else "ok", text=f"{spread_s:.2f} s apart", advice=advice)
    median = statistics.median(probe.matmul_per_s for probe in probes)
    for probe in probes:
        if probe.matmul_per_s < 0.9 * median:
            text = f"rank {probe.rank} on {probe.host}: {probe.matmul_per_s / median:.0%} of the median rate"
            advice = "something else runs there, or it is throttled: leave it out of the hostfile"
            yield Finding(name="slow device", state="warn", text=text, advice=advice)
    yield Finding(name="matrix product", state="ok", text=f"median {median / 1e12:.3g} TFLOP/s ({probes[0].device})")
    if len(probes) > 1:
        slowest = min(probe.all_reduce_bytes_per_s for probe in probes)
        yield Finding(name="all-reduce", state="ok", text=f"{slowest / 1e9:.2f} GB/s over {len(probes)} ranks")
