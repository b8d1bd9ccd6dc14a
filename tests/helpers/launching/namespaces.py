"""Network namespaces joined by a bridge, which simulate machines with links of a limited rate.

They have no names, and end with the processes that hold them.

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

from limits import LIMIT_S


def missing_requirement() -> str:
    """Why no namespaces can be created on this host; "" if no reason is known."""
    if os.geteuid() != 0:
        return "needs root to create network namespaces"
    tools = ("ip", "tc", "nsenter", "unshare")
    missing_tools = [tool for tool in tools if shutil.which(tool) is None]
    if missing_tools:
        return f"needs {', '.join(missing_tools)}: apt-get install iproute2 util-linux"
    return ""


def enter_command(holder: int) -> tuple[str, ...]:
    """The command prefix that runs a command in the namespace of a process."""
    return ("nsenter", f"--net=/proc/{holder}/ns/net")


@contextmanager
def namespaces(size: int, rate: str = "") -> Iterator[list[int]]:
    """Create namespaces, each with an ``eth0`` (10.77.0.1 and up); yields a process id in each.

    Args:
        rate: limit on the outgoing traffic of each namespace, in the format of tc (``1gbit``); ""
            for no limit.  Traffic between processes of one namespace is not limited.

    Raises:
        OSError: when they cannot be created.
    """
    with ExitStack() as stack:
        switch, *holders = [stack.enter_context(_namespace()) for _ in range(size + 1)]
        _run_inside(switch, "ip -batch -", "link add bridge type bridge\nlink set bridge up")
        for i, holder in enumerate(holders):
            port = f"link add port{i} type veth peer name eth0 netns {holder}"
            _run_inside(switch, "ip -batch -", f"{port}\nlink set port{i} master bridge up")
            address = f"address add 10.77.0.{i + 1}/24 dev eth0"
            _run_inside(holder, "ip -batch -", f"{address}\nlink set eth0 up\nlink set lo up")
            if rate:  # a token bucket: netem is not in every kernel
                shape = f"qdisc add dev eth0 root tbf rate {rate} burst 128kb latency 20ms"
                _run_inside(holder, "tc -batch -", shape)
        # Run the bridge on one CPU: otherwise packets are reordered, and TCP retransmits them.
        use_cpu_0 = "for f in /sys/class/net/port*/queues/rx-0/rps_cpus; do echo 1 > $f; done"
        _run_inside(switch, "unshare --mount sh -e", f"mount -t sysfs none /sys\n{use_cpu_0}")
        yield holders


@contextmanager
def _namespace() -> Iterator[int]:
    """The id of a process in a network namespace of its own."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        try:
            own, new = (Path(f"/proc/{pid}/ns/net") for pid in ("self", holder.pid))
            deadline = time.monotonic() + 10
            while new.readlink() == own.readlink():
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise OSError("unshare --net created no network namespace")
                time.sleep(0.005)
            yield holder.pid
        finally:
            holder.kill()


def _run_inside(holder: int, command: str, stdin: str) -> None:
    """Run a command in the namespace of a process."""
    result = subprocess.run(
        [*enter_command(holder), *command.split()],
        input=stdin, text=True, capture_output=True, timeout=LIMIT_S,
    )  # fmt: skip
    if result.returncode:
        raise OSError(f"{command}: {result.stderr.strip()}")
