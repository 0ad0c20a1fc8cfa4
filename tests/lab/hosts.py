"""Several "hosts" on one machine: each has a network, a name, processes and an sshd of its own. Needs root.

A host is a set of Linux namespaces (net, uts, pid, mount) with a veth pair to one bridge. Nothing leaves the machine.
Everything is ended by the process ids that were started here.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["WITH_US", "Host", "Hosts", "missing_for_hosts", "pretended", "run"]

WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before the words of a daemon: it ends when we do, however that is."""

_ENTER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
if [ -n "$4" ]; then mount --bind "$3" "$4"; fi
shift 4
exec "$@"
"""


def run(*words: str, check: bool = True) -> str:
    """Standard output of a command; its errors are part of the exception."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout


def missing_for_hosts() -> str:
    """What this machine lacks, in words; empty where it has all."""
    if os.geteuid() != 0:
        return "it needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    wanted = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "nsenter": "util-linux"}
    lacking = [package for tool, package in wanted.items() if shutil.which(tool, path=path) is None]
    return f"apt-get install {' '.join(lacking)}" if lacking else _forbidden()


def _forbidden() -> str:
    """Why hosts cannot be pretended here, as in a container without the rights to; empty where they can."""
    name = f"mw{secrets.token_hex(3)}t"  # numbers of processes come again
    veth = ["ip", "link", "add", f"{name}v"[-15:], "type", "veth", "peer", "name", "eth0", "netns", name]
    own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private", "true"]
    try:
        for words in (["ip", "netns", "add", name], veth, own):
            run(*words)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"this machine does not let hosts be pretended: {error}"
    finally:
        run("ip", "netns", "del", name, check=False)
    return ""


class Host:
    """One pretended machine.

    Args:
        name: its name.
        address: IPv4.
        namespace: of its network.
        folder: of its files.
    """

    def __init__(self, name: str, address: str, namespace: str, folder: Path) -> None:
        self.name, self.address, self.namespace, self.folder = name, address, namespace, folder
        self.children: list[subprocess.Popen[bytes]] = []
        self._daemons: list[tuple[Sequence[str], Path | None]] = []
        self._private = self.folder / "private"
        self._private.mkdir(parents=True)

    def start(self, words: Sequence[str], *, private: Path | None = None) -> "subprocess.Popen[bytes]":
        """Starts a daemon on this host as the first process of its own; `private` is another directory here."""
        self._daemons.append((words, private))
        hosts = str(self.folder.parent / "hosts")
        inner = ["bash", "-c", _ENTER, "_", self.name, hosts, str(self._private), str(private or ""), *words]
        own = ["--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private"]
        log = (self.folder / "daemon.log").open("ab")
        with log:
            child = subprocess.Popen(
                [*WITH_US, "nsenter", f"--net=/run/netns/{self.namespace}", "unshare", *own, *inner],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.children.append(child)
        return child

    def boot(self) -> None:
        """Starts again what ran on this host before it ended."""
        before = list(self._daemons)
        self._daemons.clear()
        for words, private in before:
            self.start(words, private=private)

    def link(self, state: str) -> None:
        """Plugs the network cable in or out: "up", "down"."""
        run("ip", "-n", self.namespace, "link", "set", "eth0", state)

    def fill(self, folder: Path) -> None:
        """Leaves no room in a folder, for what runs on this host and what that starts, until they end."""
        run("mkdir", "-p", str(folder))
        spaces: dict[str, str] = {}
        for pid in run("ip", "netns", "pids", self.namespace).split():
            with suppress(OSError):  # it has ended
                spaces.setdefault(os.readlink(f"/proc/{pid}/ns/mnt"), pid)
        for pid in spaces.values():
            run(
                "nsenter", f"--mount=/proc/{pid}/ns/mnt", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)
            )

    def listening(self) -> set[str]:
        """address:port of everything that listens on this host."""
        found = run("nsenter", f"--net=/run/netns/{self.namespace}", "cat", "/proc/net/tcp", "/proc/net/tcp6")
        lines = [line.split() for line in found.splitlines() if ":" in line.split()[1]]
        return {_address(each[1]) for each in lines if each[3] == "0A"}

    def end(self) -> None:
        """Ends what was started here, with everything that came of it."""
        for child in self.children:
            child.send_signal(signal.SIGKILL)
            child.wait()
        self.children.clear()
        for pid in run("ip", "netns", "pids", self.namespace, check=False).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _address(text: str) -> str:
    host, _, port = text.partition(":")
    if len(host) == 32:
        return f"[{'::' if not host.strip('0') else host}]:{int(port, 16)}"
    return f"{'.'.join(str(each) for each in bytes.fromhex(host)[::-1])}:{int(port, 16)}"


class Hosts:
    """A bridge with hosts h1, h2, ...; this machine is .254 on it, and is called ctl.

    Args:
        folder: of keys, settings and logs; every host sees it.
        number: of hosts.
        token: tells several such labs of one machine apart.
    """

    def __init__(self, folder: Path, number: int = 2, *, token: int | None = None) -> None:
        token = (os.getpid() if token is None else token) % 10000
        self.token = token
        self.folder, self.bridge, self._veth = folder, f"mw{token}br", f"mw{token}v"
        self.net = f"10.{64 + token % 60}.{token % 250}"
        self.known_hosts, self.key = folder / "known_hosts", folder / "key"
        names = {f"h{index}": f"{self.net}.{index}" for index in range(1, number + 1)}
        self.hosts = [Host(name, addr, f"mw{token}-{name}", folder / name) for name, addr in names.items()]

    def up(self, *, private: Path | None = None) -> None:
        """Builds everything; `private` is a directory of which each host has its own."""
        if f" {self.net}." in run("ip", "-4", "-o", "addr", "show"):
            raise RuntimeError(f"network {self.net}.0/24 is in use")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        lines = ["127.0.0.1 localhost", f"{self.net}.254 ctl", *(f"{h.address} {h.name}" for h in self.hosts)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.net}.254/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for index, host in enumerate(self.hosts, start=1):
            veth = f"{self._veth}{index}"
            run("ip", "netns", "add", host.namespace)
            run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            run("ip", "link", "set", veth, "master", self.bridge, "up")
            run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            self._sshd(host, private)
        self._write_config()

    def _sshd(self, host: Host, private: Path | None) -> None:
        key = host.folder / "hostkey"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        settings = host.folder / "sshd_config"
        settings.write_text(
            f"Port 22\nHostKey {key}\nPidFile none\nAuthorizedKeysFile {self.key}.pub\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nMaxStartups 100:30:200\n"
            "SetEnv SHLVL=1\n"  # then bash reads no .bashrc, which is that of whoever runs the lab
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", str(settings)], private=private)
        public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
        with self.known_hosts.open("a") as known:
            known.write(f"{host.name},{host.address} {public}\n")

    def _write_config(self) -> None:
        lines = [f"Host {host.name}\n  HostName {host.address}" for host in self.hosts]
        (self.folder / "ssh_config").write_text("\n".join(lines) + "\n")

    def pids(self) -> set[int]:
        """Ids of all processes of all hosts."""
        return {int(pid) for host in self.hosts for pid in run("ip", "netns", "pids", host.namespace).split()}

    def wait(self, timeout_s: float = 10.0) -> None:
        """Waits until every sshd answers."""
        end_s = time.monotonic() + timeout_s
        while not all("0.0.0.0:22" in host.listening() for host in self.hosts):
            if time.monotonic() > end_s:
                raise RuntimeError(f"sshd does not start: see {self.folder}/h*/daemon.log")
            time.sleep(0.05)

    def down(self) -> None:
        """Takes everything down again."""
        for index, host in enumerate(self.hosts, start=1):
            host.end()
            run("ip", "link", "del", f"{self._veth}{index}", check=False)
            run("ip", "netns", "del", host.namespace, check=False)
        run("ip", "link", "del", self.bridge, check=False)


@contextmanager
def pretended(
    folder: Path, number: int = 2, *, token: int | None = None, private: Path | None = None
) -> Iterator[Hosts]:
    """Hosts that answer, for a while; see `Hosts`, and `up` for `private`."""
    found = Hosts(folder, number, token=token)
    try:
        found.up(private=private)
        found.wait()
        yield found
    finally:
        found.down()
