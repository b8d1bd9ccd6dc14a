"""A real Slurm cluster on one host, for tests: one controller, several nodes, no accounting.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge.  All nodes share the network and
the file system of the host; each has its own slurmd.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from limits import LIMIT_S

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONF = """
ClusterName=cpb
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/s,cred_expire=5
SlurmctldPidFile={home}/ctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmdSpoolDir={home}/spool.%n
StateSaveLocation={home}/state
MaxArraySize=2
SlurmctldLogFile={home}/log/ctld.log
SlurmdLogFile={home}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc={home}/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
KillWait=2
InactiveLimit=0
MinJobAge={min_job_age}
ReturnToService=2
SlurmdTimeout=30
MessageTimeout=60
BatchStartTimeout=60
TCPTimeout=20
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Sockets=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2"
)


def missing_requirement() -> str:
    """Why no cluster can be started on this host; "" if one can."""
    if os.geteuid() != 0:
        return "the Slurm cluster for tests needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(f"{folder}/gpu", 0o20666, os.makedev(1, 3))
        except OSError as error:
            return f"simulated GPUs need device files: {error.strerror}"
    for tool in TOOLS:
        if shutil.which(tool, path=PATH) is None:
            return f"no {tool}: apt-get install slurmctld slurmd slurm-client munge"
    return ""


class Cluster:
    """A cluster that is started on construction and ended by :meth:`stop`.

    Args:
        home: folder for its files, with a short path, since it contains sockets.
        nodes: number of nodes, which are named n1, n2, ...
        cpus: CPUs per node.
        min_job_age: seconds after which the controller forgets a job that has ended.
    """

    def __init__(self, home: Path, nodes: int = 2, cpus: int = 2, min_job_age: int = 300) -> None:
        self.home, self._daemons = home, dict[str, "subprocess.Popen[bytes]"]()
        self.names = [f"n{i + 1}" for i in range(nodes)]
        for name in ("munge", "state", "log", "dev", *(f"spool.{name}" for name in self.names)):
            (home / name).mkdir(parents=True)
        (home / "munge").chmod(0o755)
        for i in range(2):
            os.mknod(home / f"dev/gpu{i}", 0o20666, os.makedev(1, 3))
        ports = _free_ports(nodes + 1)
        conf = home / "slurm.conf"
        lines = [
            NODE.format(name=name, port=port, cpus=cpus)
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        text = CONF.format(
            port=ports[0], home=home, nodes="\n".join(lines), min_job_age=min_job_age
        )
        conf.write_text(text)
        gres = [f"NodeName={name} Name=gpu File={home}/dev/gpu[0-1]" for name in self.names]
        (home / "gres.conf").write_text("\n".join(gres) + "\n")
        self.env = {"SLURM_CONF": str(conf), "PATH": PATH}
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def _start_all(self) -> None:
        key, munge = self.home / "munge.key", self.home / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [
            f"--{what}={munge / name}"
            for what, name in (
                ("socket", "s"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")
            )
        ]  # fmt: skip
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *files)
        _wait_until(lambda: (munge / "s").exists())
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
        for name in self.names:
            self.start_node(name)
        _wait_until(lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").count("idle")
               == len(self.names))  # fmt: skip

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._daemon(name, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"])

    def kill_node(self, name: str) -> None:
        """Simulate a machine that goes down: kill its daemon and all processes of its jobs at once,
        without informing the controller."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        variable = f"SLURMD_NODENAME={name}\0".encode()
        tasks = {pid: parent for pid, parent, environ in _processes() if variable in environ}
        for pid in [*(set(tasks.values()) - set(tasks) - {1}), *tasks]:  # slurmstepd first
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def revive(self) -> None:
        """Restart the nodes that were killed, and resume them."""
        for name in self.names:
            if name not in self._daemons:
                self.start_node(name)
                self.run("scontrol", "update", f"node={name}", "state=resume")

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.home / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env={**os.environ, **self.env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, *command: str) -> str:
        """Run a client command; its output and errors."""
        result = subprocess.run(
            command, env={**os.environ, **self.env}, text=True, timeout=LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job, such as ``RUNNING``; "" once Slurm has forgotten it."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def stop(self) -> None:
        """End all daemons."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()
        self._daemons.clear()


def _processes() -> Iterator[tuple[int, int, bytes]]:
    """Process id, parent's id and environment of every process."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                yield int(entry.name), int(parent), (entry / "environ").read_bytes() + b"\0"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _wait_until(condition: object, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the Slurm cluster did not come up"
        time.sleep(0.05)
