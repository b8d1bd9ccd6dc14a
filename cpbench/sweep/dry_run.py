"""``cpbench run --dry-run``: what would run, and for how long."""

from __future__ import annotations

import json
import shlex
from typing import Any

from cpbench.launchers import supervisor
from cpbench.launchers.protocol import GangSpec
from cpbench.launchers.registry import LAUNCHERS
from cpbench.sweep.remaining import remaining_cases
from cpbench.sweep.request import Request
from cpbench.sweep.runs import estimator, order_cases


def print_plan(request: Request, as_json: bool) -> int:
    """Print the remaining cases and the worker commands, without starting anything."""
    todo = remaining_cases(request)
    estimates = estimator(request)
    turns = estimates.turns(todo)
    todo = order_cases(request, todo, turns)
    gangs: list[dict[str, Any]] = []
    for group in supervisor.group_by_world_size(todo):
        size = group[0].world_size
        job = request.plan.job(group, f"{request.launcher}-p{size}-STAMP")
        path, place = job.folder.resolve() / "job.json", request.plan.place(size)
        commands = LAUNCHERS[request.launcher].commands(GangSpec(path, size, place))
        commands = [request.plan.wrap_command(command) for command in commands]
        gangs.append(
            {
                "world_size": size,
                "cases": len(group),
                "commands": [command.to_json() for command in commands],
            }
        )
    if as_json:
        cases = [{"id": case.id, **case.to_json()} for case in todo]
        print(
            json.dumps(
                {"sweep": request.name, "out": str(request.out), "cases": cases, "gangs": gangs},
                indent=1,
            )
        )
        return 0
    for case in todo:
        print(f"{case.id}  {case.label}")
    for gang in gangs:
        print(f"\n{gang['cases']} cases on {gang['world_size']} ranks:")
        for command in gang["commands"]:
            env = " ".join(f"{key}={shlex.quote(value)}" for key, value in command["env"].items())
            print(f"  {env} {shlex.join(command['argv'])}")
    print(f"\n{len(todo)} of {len(request.cases)} cases to run into {request.out}")
    costs = [estimates.seconds(case, turns.get(case.id, 1)) / 3600 for case in todo]
    hours = sum(costs)
    rank_hours = sum(case.world_size * cost for case, cost in zip(todo, costs, strict=True))
    unit = "GPU-hours" if request.device == "cuda" else "rank-hours"
    print(f"about {hours:.2f} hours, {rank_hours:.2f} {unit}: {estimates.describe_sources(todo)}")
    return 0
