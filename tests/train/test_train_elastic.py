"""A run on as many hosts as there are: which hosts, which micro-batch, and what happens when one is lost."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_scale.config.run_config import RunConfig, TrainConfig, grad_accum_steps
from sret_scale.launch import elastic as module
from sret_scale.launch.elastic import Elastic, fit_hosts, start_elastic
from sret_scale.launch.hostfile import Host
from sret_scale.launch.nodes import Place


def hosts_with(*slots: int) -> tuple[Host, ...]:
    return tuple(Host(name=f"node-{index}", devices=tuple(map(str, range(count)))) for index, count in enumerate(slots))


@settings(max_examples=50, deadline=None)
@given(
    slots=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    global_batch_size=st.integers(1, 200),
    micro_batch_size=st.integers(1, 64),
)
def test_chosen_hosts_share_the_global_batch_and_no_longer_beginning_could(
    slots: list[int], global_batch_size: int, micro_batch_size: int
) -> None:
    train = TrainConfig(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    hosts = hosts_with(*slots)
    divides = [sum(slots[:count]) <= global_batch_size and global_batch_size % sum(slots[:count]) == 0
               for count in range(1, len(slots) + 1)]  # fmt: skip
    if not any(divides):
        with pytest.raises(ValueError, match="cannot be shared equally"):
            fit_hosts(hosts, train, Elastic(minimum=1, maximum=99))
        return
    used, fitted = fit_hosts(hosts, train, Elastic(minimum=1, maximum=99))
    assert used == hosts[: len(used)]
    assert len(used) == max(index + 1 for index, fits in enumerate(divides) if fits)
    ranks = sum(len(host.devices) for host in used)
    assert fitted.micro_batch_size <= micro_batch_size
    assert fitted.micro_batch_size * ranks * grad_accum_steps(fitted, ranks) == global_batch_size


def test_refusal_says_how_many_ranks_would_divide() -> None:
    train = TrainConfig(global_batch_size=64, micro_batch_size=8)
    with pytest.raises(ValueError, match=r"=64 .*\[24\] ranks.*divide it: \[1, 2, 4, 8, 16\]"):
        fit_hosts(hosts_with(8, 8, 8), train, Elastic(minimum=3, maximum=8))
    with pytest.raises(ValueError, match="at least 4 hosts, 3 can be reached: node-0, node-1, node-2"):
        fit_hosts(hosts_with(8, 8, 8), train, Elastic(minimum=4, maximum=8))


@pytest.mark.parametrize("text", ["2", "2:", "0:3", "4:2", "a:b", "-1:2", "2:3:4"])
def test_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--elastic: expected"):
        Elastic.parse(text)


def test_elastic_without_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a --hostfile"):
        start_elastic(RunConfig(), tmp_path, (), Elastic(minimum=1, maximum=2))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, tuple[int, set[str]]]], list[tuple[str, ...]]]:
    """Starts that return what the test says, and the hosts that are out of reach after each."""

    def make(script: dict[int, tuple[int, set[str]]]) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []
        lost: set[str] = set()

        def start(config: RunConfig, _path: Path, *, hosts: Sequence[Host], **options: Any) -> int:
            ranks = sum(len(host.devices) for host in hosts)
            assert config.train.micro_batch_size * ranks * grad_accum_steps(config.train, ranks) == 48
            assert options["is_fresh"] == (not calls)
            calls.append(tuple(host.name for host in hosts))
            status, newly_lost = script[len(calls)]
            lost.update(newly_lost)
            return status

        def problems(self: Place, _folder: Path) -> dict[str, str]:
            return {host.name: f"host {host.name} is away" for host in self.hosts if host.name in lost}

        monkeypatch.setattr(module, "start_run", start)
        monkeypatch.setattr(Place, "problems", problems)
        # No name of these hosts has an address.
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        return calls

    return make


CONFIG = RunConfig(train=TrainConfig(global_batch_size=48, micro_batch_size=16))


def test_run_goes_on_without_the_lost_host(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = cluster({1: (1, {"node-1"}), 2: (0, set())})
    status = start_elastic(CONFIG, tmp_path, hosts_with(1, 1, 1), Elastic(minimum=2, maximum=3), is_fresh=True)
    assert status == 0
    assert calls == [("node-0", "node-1", "node-2"), ("node-0", "node-2")]
    printed = capsys.readouterr()
    assert "elastic: 2 of 3 hosts (node-0, node-2), micro-batch 12 of a global batch of 48" in printed.out
    assert "host node-1 is away" in printed.err


def test_failure_with_all_hosts_in_reach_ends_the_run(cluster: Any, tmp_path: Path) -> None:
    calls = cluster({1: (1, set())})
    assert start_elastic(CONFIG, tmp_path, hosts_with(1, 1), Elastic(minimum=1, maximum=2), is_fresh=True) == 1
    assert len(calls) == 1


def test_stopped_run_is_not_started_again(cluster: Any, tmp_path: Path) -> None:
    calls = cluster({1: (85, {"node-1"})})
    assert start_elastic(CONFIG, tmp_path, hosts_with(1, 1), Elastic(minimum=1, maximum=2), is_fresh=True) == 85
    assert len(calls) == 1


def test_too_few_hosts_left_end_the_run(cluster: Any, tmp_path: Path) -> None:
    cluster({1: (1, {"node-1", "node-2"})})
    with pytest.raises(ValueError, match="at least 2 hosts, 1 can be reached: node-0"):
        start_elastic(CONFIG, tmp_path, hosts_with(1, 1, 1), Elastic(minimum=2, maximum=3), is_fresh=True)
