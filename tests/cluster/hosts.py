"""Hosts as network namespaces: each has an address, a host name and an sshd of its own; the file system is shared.

root namespace (10.77.0.254, bridge) --+-- 10.77.0.1 host-1
                                       +-- 10.77.0.2 host-2 ...
"""

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

BRIDGE = "sret-bridge"
_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
_SSH = """
Host *
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def why_not() -> str:
    """Why hosts cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd")
    if missing:
        return f"{', '.join(missing)} not installed: run tests/cluster/install.sh"
    probe = subprocess.run(["ip", "netns", "add", "sret-probe"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "sret-probe"], check=True)
    return ""


class Hosts:
    """`count` hosts inside the `with`; `ssh_config` reaches them without a password."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.addresses = [f"10.77.0.{index + 1}" for index in range(count)]
        self.ssh_config = folder / "ssh_config"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        self._remove_links()
        for key in ("host_key", "user_key"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        self.ssh_config.write_text(_SSH.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        self._run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._run("ip", "address", "add", "10.77.0.254/24", "dev", BRIDGE)
        self._run("ip", "link", "set", BRIDGE, "up")
        for index, address in enumerate(self.addresses):
            self._start(f"sret-{index + 1}", f"host-{index + 1}", address)
        for address in self.addresses:
            self._wait_for_ssh(address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        self._remove_links()

    def hostfile(self, indices: list[int]) -> Path:
        """A hostfile with one slot on each of the hosts with these indices."""
        path = self.folder / f"hosts-{'-'.join(map(str, indices))}"
        path.write_text("".join(f"{self.addresses[index]} slots=1\n" for index in indices))
        return path

    def cut(self, index: int) -> None:
        """Takes a host's link down: no packet says that it is gone."""
        self._run("ip", "link", "set", f"sret-{index + 1}", "down")

    def join(self, index: int) -> None:
        """Brings a cut host back, and waits until it answers."""
        self._run("ip", "link", "set", f"sret-{index + 1}", "up")
        self._wait_for_ssh(self.addresses[index])

    def processes_of(self, index: int) -> list[int]:
        """Processes in the host's network namespace, its sshd included."""
        output = subprocess.run(
            ["ip", "netns", "pids", f"sret-{index + 1}"], capture_output=True, text=True, check=True
        ).stdout
        return [int(pid) for pid in output.split()]

    def _start(self, namespace: str, name: str, address: str) -> None:
        self._run("ip", "netns", "add", namespace)
        self._run("ip", "link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._run("ip", "link", "set", namespace, "master", BRIDGE, "up")
        inside = ["ip", "-n", namespace]
        self._run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        self._run(*inside, "link", "set", "eth0", "up")
        self._run(*inside, "link", "set", "lo", "up")
        config = self.folder / f"sshd-{namespace}"
        config.write_text(_SSHD.format(address=address, folder=self.folder))
        start = f"hostname {name} && exec /usr/sbin/sshd -D -e -f {config}"
        command = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", start]
        with (self.folder / f"{namespace}.log").open("wb") as log:
            self._daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait_for_ssh(self, address: str) -> None:
        deadline_s = time.monotonic() + 20
        command = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", address, "true"]
        while (answer := subprocess.run(command, capture_output=True, text=True, check=False)).returncode != 0:
            assert time.monotonic() < deadline_s, answer.stderr
            time.sleep(0.2)

    def _remove_links(self) -> None:
        """Also what an interrupted test left."""
        for index in range(len(self.addresses)):
            for pid in self.processes_of(index) if Path(f"/run/netns/sret-{index + 1}").exists() else []:
                os.kill(pid, 9)
            subprocess.run(["ip", "netns", "delete", f"sret-{index + 1}"], capture_output=True, check=False)
            subprocess.run(["ip", "link", "delete", f"sret-{index + 1}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)
