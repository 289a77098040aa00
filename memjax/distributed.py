"""Several processes, one program (JAX multi-controller): they come together, and when one is lost all stop and name it.

JAX's own runtime only says that some task died, and aborts. So each process has a supervisor, which knows no JAX: it starts
the command once more as its child when all supervisors have found each other, and they tell one another how the children
end. A child that waits for a lost process in a collective is ended, and `--resume` continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memjax.errors import ConfigError, HostsError

ADDRESS, COUNT, NUMBER = "MEMJAX_COORDINATOR", "MEMJAX_PROCESSES", "MEMJAX_PROCESS"
CONNECT, LOST = "MEMJAX_CONNECT_SECONDS", "MEMJAX_LOST_SECONDS"
_CHILD = "MEMJAX_SUPERVISED"
# How long a child's own failure waits for the news that another was lost before: its collectives fail within milliseconds.
_NEWS_SECONDS = 3.0
_ASKED_TO_STOP = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who takes part: `coordinator` is host:port of process 0 (the port after it is the supervisors'), `process` from 0.

    connect_seconds: how long to wait for all processes; lost_seconds: how long one may be silent before it counts as lost.
    """

    coordinator: str
    processes: int
    process: int
    connect_seconds: int = 300
    lost_seconds: int = 60

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"the coordinator is {self.coordinator!r}; give host:port of process 0 in {ADDRESS}")
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"process {self.process} of {self.processes} does not exist; {NUMBER} counts from 0, {COUNT} says how many"
            )
        if min(self.connect_seconds, self.lost_seconds) < 1:
            raise ConfigError(f"{CONNECT} and {LOST} are seconds; give at least 1")

    @property
    def meeting(self) -> tuple[str, int]:
        """Where supervisors meet."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def hosts_from(environment: Mapping[str, str]) -> Hosts | None:
    """What the environment says of the processes; None where it names no coordinator. ConfigError without the rest."""
    if not environment.get(ADDRESS):
        return None
    numbers = {}
    for name, default in ((COUNT, None), (NUMBER, None), (CONNECT, "300"), (LOST, "60")):
        text = environment.get(name, default)
        if text is None or not text.isdigit():
            raise ConfigError(f"{ADDRESS} is set, and {name} is {text!r}; give a number")
        numbers[name] = int(text)
    return Hosts(environment[ADDRESS], numbers[COUNT], numbers[NUMBER], numbers[CONNECT], numbers[LOST])


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Around a command that may run as one of several processes; true in the first, also where it is the only one.

    In the process that a person or launcher starts it supervises and never enters the body: it ends with the child's exit
    status, or with HostsError where a process is lost or does not come. In the child, JAX joins the others, before any
    device is used.
    """
    hosts = hosts_from(os.environ)
    if hosts is None:
        yield True
        return
    if not os.environ.get(_CHILD):
        status = supervise(hosts, [sys.executable, *sys.orig_argv[1:]])
        raise SystemExit(status)
    threading.Thread(target=_end_with, args=(int(os.environ[_CHILD]),), daemon=True).start()
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        hosts.coordinator,
        hosts.processes,
        hosts.process,
        initialization_timeout=hosts.connect_seconds,
        # Longer than the supervisors': theirs is the message that names the lost process.
        heartbeat_timeout_seconds=2 * hosts.lost_seconds + 30,
        shutdown_timeout_seconds=hosts.lost_seconds,
    )
    yield hosts.process == 0
    jax.distributed.shutdown()


def agreed(value: bool) -> bool:
    """What the first process says, in every one of them; all must call it. Itself where there is one process.

    For what a process knows by itself (a clock, a file), before it decides what all of them compute together.
    """
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _end_with(supervisor: int) -> None:
    """Ends this process when its supervisor is gone: nobody else would end it where it waits for another."""
    os.read(supervisor, 1)
    os._exit(HostsError.exit_code)


def supervise(hosts: Hosts, command: Sequence[str]) -> int:
    """Runs the command as this process's child, once all supervisors have met, and returns its exit status.

    HostsError where not all come within `connect_seconds`, or one is lost: its child was killed or failed, its machine is
    silent. The child here is killed then.
    """
    with contextlib.closing(_meet(hosts)) as ring:
        # The child holds one end of a pipe, whose other end is closed when this process is gone, however it went.
        watched, held = os.pipe()
        child = subprocess.Popen(command, env={**os.environ, _CHILD: str(watched)}, pass_fds=(watched,))
        os.close(watched)
        before = {n: signal.signal(n, lambda number, _: child.send_signal(number)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while child.poll() is None:
                ring.listen(0.2)
            return _ended(hosts, ring, child.returncode)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            os.close(held)
            for number, handler in before.items():
                signal.signal(number, handler)


def _ended(hosts: Hosts, ring: _Ring, status: int) -> int:
    """Tells the others how the child here ended; its exit status. Raises HostsError where another was lost before."""
    code = status if status >= 0 else 128 - status
    if code not in _ASKED_TO_STOP and status != -signal.SIGKILL:
        until = time.monotonic() + _NEWS_SECONDS
        while time.monotonic() < until:
            ring.listen(0.2)
    ring.tell({"end": status})
    if hosts.process == 0 and code in _ASKED_TO_STOP:  # the middle of the star stays until the others are done
        until = time.monotonic() + hosts.lost_seconds
        while ring.waiting() and time.monotonic() < until:
            ring.listen(0.2)
    return code


@dataclasses.dataclass
class _Peer:
    """The other end of a connection: its process, what it was last heard of, and what it has sent of a line so far."""

    link: socket.socket
    number: int = -1
    host: str = ""
    heard: float = dataclasses.field(default_factory=time.monotonic)
    text: bytes = b""
    ended: bool = False


class _Ring:
    """The supervisors' connections: all of them to that of process 0, which passes on what it hears of a lost one."""

    def __init__(self, hosts: Hosts, peers: Sequence[_Peer]) -> None:
        self._hosts, self._peers = hosts, list(peers)
        self._beat = 0.0
        self._selector = selectors.DefaultSelector()
        for peer in self._peers:
            peer.heard = time.monotonic()
            self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def tell(self, message: Mapping[str, Any], but: _Peer | None = None) -> None:
        """Sends a message to all that are connected."""
        for peer in self._peers:
            if peer is not but:
                with contextlib.suppress(OSError):  # its silence is noticed where it is listened to
                    peer.link.sendall(json.dumps(message).encode() + b"\n")

    def waiting(self) -> bool:
        """Whether another process has not ended yet."""
        return any(not peer.ended for peer in self._peers)

    def listen(self, seconds: float) -> None:
        """Hears what others say for up to that long, and tells them that this one lives. HostsError for a lost one."""
        now = time.monotonic()
        if now - self._beat > min(1.0, self._hosts.lost_seconds / 4):
            self._beat = now
            self.tell({"alive": True})
        for key, _ in self._selector.select(seconds):
            peer = key.data
            messages, closed = _receive(peer)
            for message in messages:
                if "lost" in message:
                    raise HostsError(message["lost"])
                if "end" in message:
                    peer.ended = True
                    code = message["end"] if message["end"] >= 0 else 128 - message["end"]
                    if code not in _ASKED_TO_STOP:
                        self._lost(peer, _how(message["end"]))
            if closed:
                self._selector.unregister(peer.link)
                if not peer.ended:
                    self._lost(peer, "is gone: its connection is closed")
        for peer in self._peers:
            if not peer.ended and time.monotonic() - peer.heard > self._hosts.lost_seconds:
                self._lost(peer, f"has been silent for {self._hosts.lost_seconds} s")

    def _lost(self, peer: _Peer, how: str) -> None:
        named = f"process {peer.number} of {self._hosts.processes} on {peer.host}"
        text = f"{named} {how}; all stop, start them again with --resume"
        if self._hosts.process == 0:
            self.tell({"lost": text}, but=peer)
        raise HostsError(text)

    def close(self) -> None:
        self._selector.close()
        for peer in self._peers:
            peer.link.close()


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _receive(peer: _Peer) -> tuple[list[dict[str, Any]], bool]:
    """(messages, whether the connection is closed)."""
    try:
        data = peer.link.recv(65536)
    except OSError:
        data = b""
    peer.heard = time.monotonic()
    *lines, peer.text = (peer.text + data).split(b"\n")
    return [json.loads(line) for line in lines if line], not data


def _meet(hosts: Hosts) -> _Ring:
    """The connections once all supervisors are there. HostsError after `connect_seconds`, with those that did not come."""
    until = time.monotonic() + hosts.connect_seconds
    return _wait_for_all(hosts, until) if hosts.process == 0 else _find_first(hosts, until)


def _wait_for_all(hosts: Hosts, until: float) -> _Ring:
    family = socket.AF_INET6 if ":" in hosts.meeting[0] else socket.AF_INET
    peers: dict[int, _Peer] = {}
    with socket.create_server(("", hosts.meeting[1]), family=family) as server:
        while len(peers) < hosts.processes - 1:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                link, _ = server.accept()
                link.settimeout(5)
                peer = _Peer(link)
                hello = _first_message(peer)
                peer.number, peer.host = int(hello["process"]), str(hello["host"])
            except TimeoutError:
                if time.monotonic() < until:
                    continue  # somebody else's connection
                missing = [str(i) for i in range(1, hosts.processes) if i not in peers]
                text = (
                    f"{len(peers) + 1} of {hosts.processes} processes came within {hosts.connect_seconds} s; "
                    f"missing: {', '.join(missing)}"
                )
                _Ring(hosts, list(peers.values())).tell({"lost": text})
                raise HostsError(text) from None
            except (OSError, ValueError, KeyError):
                continue
            if peer.number in peers or hello["processes"] != hosts.processes:
                text = f"process {peer.number} of {hello['processes']} on {peer.host} came twice or to other processes"
                _Ring(hosts, [*peers.values(), peer]).tell({"lost": text})
                raise HostsError(text)
            peers[peer.number] = peer
    ring = _Ring(hosts, list(peers.values()))
    ring.tell({"host": socket.gethostname()})
    return ring


def _find_first(hosts: Hosts, until: float) -> _Ring:
    while True:
        try:
            link = socket.create_connection(hosts.meeting, timeout=max(until - time.monotonic(), 0.1))
            break
        except OSError as error:
            if time.monotonic() > until:
                raise HostsError(
                    f"process 0 of {hosts.processes} at {hosts.coordinator} did not answer within {hosts.connect_seconds} "
                    f"s ({error}); is it running, and is the port after it open?"
                ) from None
            time.sleep(0.2)
    peer = _Peer(link, 0, hosts.meeting[0])
    hello = {"process": hosts.process, "processes": hosts.processes, "host": socket.gethostname()}
    link.sendall(json.dumps(hello).encode() + b"\n")
    # Until all have come, process 0 is silent; it gives up by itself before this does.
    link.settimeout(max(until - time.monotonic(), 0.1) + 10)
    try:
        answer = _first_message(peer)
    except (OSError, ValueError):
        raise HostsError(f"process 0 of {hosts.processes} at {hosts.coordinator} is gone before all had come") from None
    if "lost" in answer:
        raise HostsError(answer["lost"])
    peer.host = answer["host"]
    return _Ring(hosts, [peer])


def _first_message(peer: _Peer) -> dict[str, Any]:
    """The first line from the other end; what follows it is kept. ValueError where the connection ends before."""
    while b"\n" not in peer.text:
        data = peer.link.recv(4096)
        if not data:
            raise ValueError("closed")
        peer.text += data
    line, _, peer.text = peer.text.partition(b"\n")
    return json.loads(line)
