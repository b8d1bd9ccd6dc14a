"""Commands of launchers, batch scripts and their quoting, and site profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench.launchers import local, mpi, srun, torchrun
from cpbench.launchers.protocol import Command, GangSpec, Place
from cpbench.worker.rendezvous import RankPlace, own_address, slurm_rank_place

JOB = Path("/runs/a b/jobs/w/job.json")
ODD = "a b;$(touch pwned)`touch pwned`'\"\\#%j &|<>*?"


def command_line(command: Command) -> str:
    return " ".join(command.argv)


# --- launchers -----------------------------------------------------------------------------------


def test_local_has_one_command_per_rank() -> None:
    commands = local.commands(GangSpec(JOB, 3, environ={}))
    assert [command.env["RANK"] for command in commands] == ["0", "1", "2"]
    assert {command.env["GLOO_SOCKET_IFNAME"] for command in commands} == {"lo"}
    assert commands[1].argv[-2:] == ("cpbench.worker.main", str(JOB))


def test_the_user_s_environment_takes_precedence() -> None:
    environ = {"OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "eth7"}
    for commands in (local.commands, torchrun.commands, srun.direct):
        (env, *_) = (command.env for command in commands(GangSpec(JOB, 2, environ=environ)))
        assert (env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"]) == ("4", "eth7")


def test_torchrun_on_one_and_two_nodes() -> None:
    (single_node,) = torchrun.commands(GangSpec(JOB, 4, environ={}))
    assert "--nnodes 1 --nproc-per-node 4" in command_line(single_node)
    assert "--rdzv-endpoint 127.0.0.1:0" in command_line(single_node)
    place = Place(nodes=2, address="10.0.0.1:4000", interface="ib0")
    (first,) = torchrun.commands(GangSpec(JOB, 4, place, environ={}))
    assert "--nnodes 2 --nproc-per-node 2" in command_line(first)
    assert "--rdzv-endpoint 10.0.0.1:4000 --rdzv-id w " in command_line(first)
    assert first.env["NCCL_SOCKET_IFNAME"] == first.env["GLOO_SOCKET_IFNAME"] == "ib0"


def test_ranks_that_do_not_divide_are_refused_by_torchrun() -> None:
    with pytest.raises(ValueError, match="5 ranks do not divide evenly over 2 nodes"):
        torchrun.commands(GangSpec(JOB, 5, Place(nodes=2, hosts=("a", "b")), environ={}))


def test_the_last_node_of_mpi_may_have_fewer_ranks() -> None:
    spec = GangSpec(JOB, 5, Place(nodes=2, hosts=("a", "b")), environ={})
    (open_mpi,) = mpi.commands(spec, mpi=("/x/mpiexec", mpi.OPEN_MPI))
    assert "-n 5 --host a:3,b:3 --map-by ppr:3:node:oversubscribe -x " in command_line(open_mpi)
    (mpich,) = mpi.commands(spec, mpi=("/x/mpiexec", mpi.MPICH))
    assert "-n 5 -hosts a,b -ppn 3 " in command_line(mpich)


def test_mpi_commands_of_open_mpi_and_mpich() -> None:
    spec = GangSpec(JOB, 4, Place(nodes=2, hosts=("a", "b")), environ={})
    (open_mpi,) = mpi.commands(spec, mpi=("/x/mpiexec", mpi.OPEN_MPI))
    assert "-n 4 --host a:2,b:2 --map-by ppr:2:node:oversubscribe -x " in command_line(open_mpi)
    assert open_mpi.env["CPBENCH_RANKS"] == "mpi"
    assert open_mpi.remote
    (mpich,) = mpi.commands(spec, mpi=("/x/mpiexec", mpi.MPICH))
    assert "-n 4 -hosts a,b -ppn 2 " in command_line(mpich)
    (single_node,) = mpi.commands(GangSpec(JOB, 4, environ={}), mpi=("/x/mpiexec", mpi.MPICH))
    assert not single_node.remote
    assert "-hosts" not in command_line(single_node)


def test_srun_starts_ranks_or_agents() -> None:
    place = Place(nodes=2, address="10.0.0.1:4000", options=("--cpus-per-task=3",))
    (ranks,) = srun.direct(GangSpec(JOB, 4, place, environ={}))
    assert "srun --nodes 2 --ntasks 4 --ntasks-per-node 2 --kill-on-bad-exit=1" in command_line(
        ranks
    )
    (uneven,) = srun.direct(GangSpec(JOB, 3, place, environ={}))
    assert "--ntasks-per-node" not in command_line(uneven)
    (agents,) = srun.agents(GangSpec(JOB, 4, place, environ={}))
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 " in command_line(agents)
    assert "--nproc-per-node 2" in command_line(agents)
    assert all(command.remote for command in (ranks, agents))


def test_rank_place_of_an_srun_task() -> None:
    environ = {
        "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1,1",
    }  # fmt: skip
    assert slurm_rank_place(environ) == RankPlace(6, 8, 0, 1)
    assert slurm_rank_place({**environ, "SLURM_NODEID": "1"}).local_world_size == 2


def test_own_address() -> None:
    assert own_address("lo") == "127.0.0.1"
    assert own_address("no-such-interface").count(".") == 3


SRUN = """
srun: error: n1: task 0: Exited with exit code 70
srun: launch/slurm: _step_signal: Terminating StepId=14.0
srun: error: n1: task 1: Killed
srun: error: n2: tasks 2-3,5: Terminated
srun: Force Terminated StepId=14.0
"""
OPEN_MPI = """
prterun noticed that process rank 1 with PID 4567 on node vm exited on
signal 9 (Killed).
"""
OPEN_MPI_CODE = """
   Process name: [prterun-vm-778@1,3]
   Exit code:    70
"""
MPICH = """
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 4567 RUNNING AT vm
=   EXIT CODE: 9
"""


def test_exit_codes_are_parsed_from_the_output_of_launchers() -> None:
    assert srun.parse_exit_codes(SRUN, {}) == {0: 70, 1: -9}
    assert srun.parse_exit_codes(
        "srun: error: n1: tasks 0-1: Segmentation fault (core dumped)", {}
    ) == {
        0: -11,
        1: -11,
    }
    assert mpi.parse_exit_codes(OPEN_MPI, {}) == {1: -9}
    assert mpi.parse_exit_codes(OPEN_MPI_CODE, {}) == {3: 70}
    assert mpi.parse_exit_codes(MPICH, {4567: 2}) == {2: -9}
    assert mpi.parse_exit_codes(MPICH.replace(": 9", ": 70"), {4567: 2}) == {2: 70}
    assert mpi.parse_exit_codes(MPICH, {}) == {}
