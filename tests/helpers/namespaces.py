"""Network namespaces joined by a bridge: machines of their own, as far as a network goes, with a
link that may be shaped.  They have no names and vanish with the processes that hold them.

Needs root, and Debian's iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def missing() -> str:
    """What keeps namespaces from being made here; empty when nothing is known to."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    lacking = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    return f"needs {', '.join(lacking)}: apt-get install iproute2 util-linux" if lacking else ""


def inside(holder: int) -> tuple[str, ...]:
    """Words that run a command in the namespace of a process."""
    return ("nsenter", f"--net=/proc/{holder}/ns/net")


@contextmanager
def namespaces(size: int, rate: str = "") -> Iterator[list[int]]:
    """Each with an ``eth0``, 10.77.0.1 and up; yields a process in each, which end with this one.

    Args:
        rate: what leaves each of them is held to, as tc takes it (``1gbit``); "" for no limit.
            What stays inside, between processes of one namespace, is not.

    Raises:
        OSError: when they cannot be made.
    """
    with ExitStack() as stack:
        switch, *holders = [stack.enter_context(_namespace()) for _ in range(size + 1)]
        _inside(switch, "ip -batch -", "link add bridge type bridge\nlink set bridge up")
        for i, holder in enumerate(holders):
            port = f"link add port{i} type veth peer name eth0 netns {holder}"
            _inside(switch, "ip -batch -", f"{port}\nlink set port{i} master bridge up")
            address = f"address add 10.77.0.{i + 1}/24 dev eth0"
            _inside(holder, "ip -batch -", f"{address}\nlink set eth0 up\nlink set lo up")
            if rate:  # a token bucket: netem is not in every kernel
                shape = f"qdisc add dev eth0 root tbf rate {rate} burst 128kb latency 20ms"
                _inside(holder, "tc -batch -", shape)
        # One processor for the bridge: else packets overtake each other and TCP sends them again.
        one = "for f in /sys/class/net/port*/queues/rx-0/rps_cpus; do echo 1 > $f; done"
        _inside(switch, "unshare --mount sh -e", f"mount -t sysfs none /sys\n{one}")
        yield holders


@contextmanager
def _namespace() -> Iterator[int]:
    """The id of a process in a network namespace of its own."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        try:
            ours, theirs = (Path(f"/proc/{pid}/ns/net") for pid in ("self", holder.pid))
            deadline = time.monotonic() + 10
            while theirs.readlink() == ours.readlink():
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise OSError("unshare --net made no network namespace")
                time.sleep(0.005)
            yield holder.pid
        finally:
            holder.kill()


def _inside(holder: int, command: str, words: str) -> None:
    """Run a command in the namespace of a process, with words on its stdin."""
    done = subprocess.run(
        [*inside(holder), *command.split()],
        input=words, text=True, capture_output=True, timeout=30,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")
