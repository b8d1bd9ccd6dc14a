"""Notes below the tables of a report: what words and marks mean, checks, caveats, origins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.reports.labels import pluralize, three_digits
from cpbench.reports.tables.mask_seeds import MIN_SEEDS_P95, MIN_SEEDS_SIGN_TEST, SeedGroup
from cpbench.reports.tables.summary import MethodRanking, is_checked
from cpbench.results.contest import MIN_LAUNCHES, turns_needed
from cpbench.results.record import APPROXIMATE, LAUNCHES_DIFFER, UNCHECKED, UNFINISHED

if TYPE_CHECKING:
    import pandas as pd

    from cpbench.reports.collection import Collection

FLAG_MEANINGS = {
    "contended": "other processes took processor time: times too high",
    "oversubscribed": "more threads than cores, ranks shared cores: times too high",
    "throttled": "clocks were throttled: times too high",
    "power-capped": "the power limit reduced clocks",
    "nvml-missing": "NVML is missing: throttling is unknown",
    APPROXIMATE: "computes part of attention: not ranked",
    "changed-state": "changed what operators share in a process, see notes in the records",
    "more-threads": "ran more threads than allowed: times too low",
    LAUNCHES_DIFFER: "its launches returned different results for the same inputs: not ranked",
    "launch-bound": "the host's launches decided the time: the GPU waited for them",
    "async": "its work went on after the call: times too low",
    "memory-gap": "used memory that torch did not allocate: peak too low",
    "untracked-traffic": "sent more than its communicator counted",
    "error-grows": "errors at size are well above those of the small check",
    UNCHECKED: "a check was off or did not fit in memory, see notes in the records: not ranked",
    UNFINISHED: "interrupted between its turns; repeat the command, with this --out, to resume",
}


def contest_notes(rankings: Sequence[MethodRanking]) -> list[str]:
    """Explanations of ties, and of contests with too little evidence."""
    lines, verdicts = [], {ranking.verdict for ranking in rankings}
    if "tie" in verdicts:
        lines.append(
            "tie: no method is faster than all others at the 5 % level, over launches or turns."
        )
    shortages = Counter(
        str(ranking.contest.shortage) for ranking in rankings if ranking.verdict == "inconclusive"
    )
    for shortage, count in shortages.most_common():
        lines.append(f"inconclusive: {pluralize(count, 'problem')} with {shortage}.")
    if shortages:
        lines.append(
            f"More evidence: cpbench run SWEEP --launches {MIN_LAUNCHES}, which adds launches; or "
            f"measured again in turn within one launch, --interleave {turns_needed(2)} --remeasure."
        )
    return lines


def seed_notes(seed_groups: Sequence[SeedGroup], cases: bool = True) -> list[str]:
    """Explanations of the tables across mask seeds; of those of cases, if they are shown."""
    if not seed_groups:
        return []
    verdicts = {group.verdict for group in seed_groups if group.compared}
    few = any(group.num_common_seeds < MIN_SEEDS_P95 for group in seed_groups)
    lines = ["Across mask seeds: ms is the median."]
    if cases:
        lines[0] += " worst is the slowest seed; a / b is median / worst."
    if few:
        lines[0] += f" p95 needs {MIN_SEEDS_P95} mask seeds."
    if verdicts - {"uncontested"}:
        lines += [
            f"{'vs best, lead' if cases else 'lead'}: geometric mean over mask seeds of the ratio "
            "of times on the same seed.",
            "at p95, at worst: method with the lowest 95th percentile, or maximum (few seeds).",
        ]
    if "tie" in verdicts:
        lines.append(
            "tie across mask seeds: not significant in a sign test at 5 %, or the geometric mean "
            "disagrees."
        )
    if "inconclusive" in verdicts:
        lines.append(
            f"inconclusive across mask seeds: the sign test needs at least {MIN_SEEDS_SIGN_TEST}."
        )
    return lines


def check_notes(ok_rows: pd.DataFrame, cases: bool = True) -> list[str]:
    """How many ok cases were checked, their largest error, and what is per rank."""
    lines, errors = [], ok_rows.loc[is_checked(ok_rows), "worst_error"].dropna()
    if len(ok_rows):
        largest = f"; largest relative L2 error {errors.max():.1e}" if len(errors) else ""
        lines.append(
            f"Checked against float64: {len(errors)} of {len(ok_rows)} cases that are ok{largest}."
        )
    if ok_rows["time_ms"].notna().any() and ok_rows["world_size"].max() > 1:
        more = "ms, peak MB and sent MB are max per rank" if cases else "ms is of the slowest rank"
        lines.append(f"FLOP/s are per rank; {more}.")
    return lines + _rope_notes(ok_rows)


def _rope_notes(ok_rows: pd.DataFrame) -> list[str]:
    """Time of the rotation of the inputs, and what speaks against its frequencies."""
    ms = ok_rows["rope_ms"].dropna()
    lines = []
    if len(ms):
        ends = [f"{three_digits(x)}" for x in (ms.min(), ms.max())]
        text = " to ".join(dict.fromkeys(ends))
        lines.append(f"Rotating queries and keys (RoPE) takes {text} ms, in no other time.")
    notes = [note for notes in ok_rows["notes"].dropna() for note in notes.split("; ")]
    warnings = dict.fromkeys(note for note in notes if note.startswith("rope "))
    return lines + [f"Warning: {warning}." for warning in warnings]


def caveat_notes(ok_rows: pd.DataFrame, marks: dict[str, str]) -> list[str]:
    """Flags of timed cases, counted and explained."""
    counts = Counter(flag for flags in ok_rows["flags"] for flag in flags.split())
    return [
        f"Caveat{' ' + marks[flag] if flag in marks else ''}: {count} of {len(ok_rows)} timed "
        f"cases {'is' if count == 1 else 'are'} {flag} "
        f"({FLAG_MEANINGS.get(flag, 'see the documentation')})."
        for flag, count in counts.most_common()
    ]


def origin_notes(collection: Collection) -> list[str]:
    """Warnings, environments and paths of the records."""
    lines = [f"Warning: {warning}" for warning in collection.warnings]
    ids_by_text: dict[str, list[str]] = {}  # environments of gangs differ in transient facts
    for environment in collection.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        hosts = {str(rank.get("host")) for rank in environment.get("ranks", [])}
        text = (
            f"{', '.join(sorted(hosts)) or environment.get('host')}; "
            f"{device.get('name') or environment.get('processor')}, {environment.get('cores')} "
            f"cores, torch {packages.get('torch')}, cpbench {environment.get('commit') or ''}"
        )
        ids_by_text.setdefault(text, []).append(environment["id"])
    for text, ids in ids_by_text.items():
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        lines.append(f"Environment {ids[0]}{more}: {text}")
    folders = ", ".join(f"{run}/records" for run in collection.runs)
    lines.append(f"Records: {folders}, one JSON per line; columns: cpbench report --columns")
    return lines
