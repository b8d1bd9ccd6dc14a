"""The checks of one case on one rank, and what they add to its record.

All methods are collective: ranks agree on what was found.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core import tolerance
from cpbench.core.problem import DECODE
from cpbench.core.registry import OperatorInfo, operator_info
from cpbench.inputs import Recipe
from cpbench.inputs.rope import rotation_of
from cpbench.masks.paged.batch import PagedBatch
from cpbench.results.record import APPROXIMATE, UNCHECKED
from cpbench.verify import at_size, check, fingerprint, mixing, quality, tiles
from cpbench.verify import selection as check_selection
from cpbench.verify.fit import DoesNotFit
from cpbench.verify.gathered import OneRank, run_pass_as_one_rank
from cpbench.verify.variants import InputVariants
from cpbench.worker import decoding

if TYPE_CHECKING:
    from cpbench.api import Attention
    from cpbench.core.problem import Case
    from cpbench.core.settings import MeasureSettings
    from cpbench.results.record import Record
    from cpbench.verify.errors import Errors
    from cpbench.verify.variants import Expected

SECOND_SEED = 1 << 48  # added to the seed of the inputs for the second set
MAX_SECOND_SHARE = 0.03  # of a GPU's memory: larger second sets of inputs are in host memory
FINGERPRINT = "the comparison of timed calls"
TILE_PASSES, MIN_TILE_SECONDS = 3, 1.0  # time limit of the check of tiles: passes, at least seconds


class Checks:
    """The checks of the cases of one rank.

    Args:
        context: device and communicators of the rank.
        settings: which checks to make.
        seed: of the choice of lines, tiles and signs, another one for every launch.
        report_phase: called with the name of each phase at its start.
    """

    def __init__(
        self,
        context: check.RankContext,
        settings: MeasureSettings,
        seed: int,
        report_phase: Callable[[str], None],
    ) -> None:
        self._context, self._settings, self._seed = context, settings, seed
        self._report_phase = report_phase

    def check_small(self, reduced: Attention, record: Record) -> None:
        """Check a computation of ``check.reduced_world`` in full."""
        self._report_phase("check")
        recipe = recipe_of(record.case)
        with _may_not_fit("the small check", record):
            if reduced.op.info.selects:
                inputs = check.rank_inputs(reduced, recipe, reduced.home)
                errors = check_selection.check_small(reduced, inputs, self._context)
            else:
                check_small = mixing.check_small if reduced.op.info.mixer else check.check_small
                errors = check_small(reduced, recipe, self._context)
            self._store("small", errors, reduced.op.info, record)

    def check_at_size(self, work: Attention, inputs: check.Tensors, record: Record) -> Expected:
        """Run a pass at the measured size and check its results; returns what timed calls have to
        return for these inputs, where calls are timed."""
        work.op.pairs = 0
        check_results = self._check_selection if work.op.info.selects else self._check_results
        results = check_results(work, inputs, record)
        expected: Expected = {}
        if self._settings.time:
            take = functools.partial(fingerprint.Fingerprinter(work).take, results)
            with _may_not_fit(FINGERPRINT, record):
                expected[False] = self._context.compute(take)
        return expected

    def _check_results(
        self, work: Attention, inputs: check.Tensors, record: Record
    ) -> check.Tensors:
        """Run a pass and check lines and tiles of its results; returns them."""
        case, context = record.case, self._context
        start = time.monotonic()
        results = check.run_checked_pass(work, inputs, context)
        seconds = max(context.gather(time.monotonic() - start))
        record.balance = None if work.op.info.mixer else context.gather(work.op.pairs)
        if case.page_size:
            self._check_decoding(work, inputs, results, recipe_of(case), record)
        elif self._settings.check_sampled and case.seq_len > check.SMALL_TOKENS:
            self._report_phase("check at size")
            limit = max(TILE_PASSES * seconds, MIN_TILE_SECONDS)
            if self._settings.thorough:
                limit = self._settings.timeout_s / 2
            if work.op.info.mixer:
                self._check_mixer(work, results, recipe_of(case), record, limit)
            else:
                self._check_lines_and_tiles(work, inputs, results, record, limit)
        if self._errors_grow(record):
            record.flags.append("error-grows")
        if self._settings.quality and not work.op.info.mixer:
            queries = work.world.queries.positions(work.rank)
            shown = quality.count_shown(results["out"], queries, work.problem, recipe_of(case))
            record.quality = quality.found_figures(context.gather(shown))
        return results

    def _check_lines_and_tiles(
        self,
        work: Attention,
        inputs: check.Tensors,
        results: check.Tensors,
        record: Record,
        limit_s: float,
    ) -> None:
        """Check lines, and as many tiles as the time allows."""
        recipe = recipe_of(record.case)
        with _may_not_fit("the check at size", record):
            statistics = at_size.query_statistics(work, inputs, results, self._context)
            self._check_lines(work, inputs, results, recipe, record, statistics)
            checked = tiles.check_tiles(
                work, inputs, results, recipe, self._seed, limit_s, self._context, statistics
            )
            self._store("tiles", checked.errors, work.op.info, record)
            record.checked["tiles"] = checked.covered

    def make_variants(
        self, work: Attention, inputs: check.Tensors, expected: Expected, record: Record
    ) -> InputVariants:
        """Variants of the inputs for timed calls, after a check of the second set.

        Args:
            expected: what :meth:`check_at_size` returned for ``inputs``.
        """
        if expected:
            record.fingerprint = self._summarize(expected[False])
        variants = self._new_variants(work, inputs, record, expected)
        if not variants.has_second:
            return variants
        variants.swap()
        if work.op.info.selects:
            results, one, _ = run_pass_as_one_rank(work, variants.inputs, self._context)
            self._check_selected_lines(work, one, record)
        else:
            results = check.run_checked_pass(work, variants.inputs, self._context)
            recipe = second_recipe_of(record.case)
            if record.case.page_size:
                self._check_decoding(work, variants.inputs, results, recipe, record)
            elif self._settings.check_sampled and record.case.seq_len > check.SMALL_TOKENS:
                if work.op.info.mixer:
                    self._check_mixer(work, results, recipe, record, 0.0)
                else:
                    with _may_not_fit("the check at size", record):
                        self._check_lines(work, variants.inputs, results, recipe, record)
        with _may_not_fit(FINGERPRINT, record):
            self._context.compute(lambda: variants.expect(results))
        variants.swap()
        return variants

    def make_later_variants(
        self, work: Attention, inputs: check.Tensors, record: Record, expected: Expected
    ) -> InputVariants:
        """Variants of the inputs for a later turn, with the results of an earlier one."""
        return self._new_variants(work, inputs, record, expected)

    def finish(self, variants: InputVariants, record: Record) -> str:
        """End the comparison of timed calls; returns what was found on this rank, or an empty
        text."""
        mismatch = variants.finish()
        with _may_not_fit(FINGERPRINT, record):
            self._context.require_fit(variants.unfit)
        return mismatch

    def _new_variants(
        self, work: Attention, inputs: check.Tensors, record: Record, expected: Expected
    ) -> InputVariants:
        device, keep_on = self._context.device, None
        if work.offloaded or (device == "cuda" and _share_of_memory(inputs) > MAX_SECOND_SHARE):
            keep_on = "cpu"
        # With several threads, libraries may divide the work by the load of the machine.
        one_thread = device != "cpu" or self._settings.threads == 1
        # On GPUs libraries compute with kernels of their own.
        own_kernel = device == "cpu" or work.info.traced
        exact = work.op.is_deterministic(work.problem) and one_thread and own_kernel
        allowed = fingerprint.tolerance(record.case.dtype, exact)

        def variants(second: check.Tensors) -> InputVariants:
            return InputVariants(work, inputs, second, self._seed, allowed, expected)

        recipe = second_recipe_of(record.case)
        with _may_not_fit("a second set of inputs", record):
            return self._context.compute(
                lambda: variants(check.rank_inputs(work, recipe, work.home, keep_on))
            )
        return variants({})

    def _summarize(self, own: fingerprint.Fingerprint) -> dict[str, list[float]]:
        """The fingerprint of all ranks together, for the record."""
        ranks = self._context.gather({name: tensor.summary() for name, tensor in own.items()})
        return {name: np.sum([rank[name] for rank in ranks], axis=0).tolist() for name in own}

    def _check_lines(
        self,
        work: Attention,
        inputs: check.Tensors,
        results: check.Tensors,
        recipe: Recipe,
        record: Record,
        statistics: at_size.Statistics | None = None,
    ) -> None:
        seed = self._seed + recipe.seed
        lines = at_size.check_sampled(
            work, inputs, results, recipe, seed, self._context, statistics
        )
        self._store("sampled", lines.errors, work.op.info, record)
        record.checked["seed"] = self._seed
        for kind, count in (("rows", lines.rows), ("columns", lines.columns)):
            record.checked[kind] = record.checked.get(kind, 0) + count

    def _check_mixer(
        self,
        work: Attention,
        results: check.Tensors,
        recipe: Recipe,
        record: Record,
        limit_s: float,
    ) -> None:
        """Compare the results of a mixer with float64, of as many heads as the time allows, one at
        least."""
        seed = self._seed + recipe.seed
        with _may_not_fit("the check at size", record):
            checked = mixing.check_in_full(work, results, recipe, seed, limit_s, self._context)
            self._store("full", checked.errors, work.op.info, record)
            record.checked["seed"] = self._seed
            record.checked["heads"] = max(checked.covered, record.checked.get("heads", 0.0))

    def _check_decoding(
        self,
        work: Attention,
        inputs: check.Tensors,
        results: check.Tensors,
        recipe: Recipe,
        record: Record,
    ) -> None:
        """Compare every output of decoding with float64."""
        if not (self._settings.check_small or self._settings.check_sampled):
            return
        self._report_phase("check")
        with _may_not_fit("the check at size", record):
            errors = decoding.check_in_full(
                work, record.case, inputs, results, recipe, self._context
            )
            self._store("full", errors, work.op.info, record)

    def _check_selection(
        self, work: Attention, inputs: check.Tensors, record: Record
    ) -> check.Tensors:
        """Check the results of a selector given its selection, and measure the quality of the
        selection."""
        case = record.case
        results, one, pairs = run_pass_as_one_rank(work, inputs, self._context)
        selection = one.selection.branches if one else ()
        (area, *_) = self._context.gather(sum(branch.mask.area for branch in selection))
        if work.world.size > 1:
            record.balance = self._context.gather(pairs)
        flops = case.problem.flops(area)
        record.flags.append(APPROXIMATE)
        record.area, record.flops = area, {phase: flops[phase] for phase in record.flops}
        self._report_phase("check at size")
        self._check_selected_lines(work, one, record)
        if self._settings.quality and record.status == "ok":
            self._report_phase("quality")

            def measure() -> dict[str, float]:
                if one is None:
                    return {}
                queries, recipe = np.arange(work.problem.seq_q), recipe_of(case)
                shown = quality.count_shown(one.results["out"], queries, one.work.problem, recipe)
                return quality.measure_quality(*one[:4]) | quality.found_figures([shown])

            with _may_not_fit("the quality of the selection", record, flags=()):
                figures, *_ = self._context.gather(self._context.compute(measure))
                record.quality = {name: x for name, x in figures.items() if math.isfinite(x)}
        return results

    def _check_selected_lines(
        self,
        work: Attention,
        one: OneRank | None,
        record: Record,
    ) -> None:
        """Check lines of a selector, given its selection; and note how much of this is not what one
        rank selects."""
        case = record.case
        if work.world.size > 1:
            different = max(self._context.gather(one.different if one else 0.0))
            before = record.checked.get("selected_otherwise", 0.0)
            record.checked["selected_otherwise"] = max(before, different)
        if self._settings.check_sampled and case.seq_len > check.SELECTION_TOKENS:
            with _may_not_fit("the check at size", record):
                seed = case.seed + self._seed
                errors = check_selection.check_sampled_pass(one, seed, self._context)
                self._store("sampled", errors, work.op.info, record)

    def _store(self, name: str, errors: Errors, info: OperatorInfo, record: Record) -> None:
        """Store the errors of a check, the larger ones if it was made before; the record becomes
        ``wrong`` if one exceeds its limit."""
        case = record.case
        violation = tolerance.violation(errors, case.dtype, info, case.seq_len)
        if violation is not None and record.status == "ok":
            record.status, record.reason = "wrong", violation
        stored = record.errors.setdefault(name, {})
        for tensor, metrics in _finite(errors).items():
            known = stored.setdefault(tensor, metrics)
            for metric, value in metrics.items():
                before = known[metric]
                known[metric] = None if value is None or before is None else max(before, value)

    def _errors_grow(self, record: Record) -> bool:
        """Whether errors at size are well above those of the small check."""
        small, at_size = record.errors.get("small"), record.errors.get("sampled")
        at_size = at_size or record.errors.get("full")
        if not small or not at_size:
            return False
        return tolerance.grows(small, at_size, record.case.dtype)


@contextlib.contextmanager
def _may_not_fit(
    what: str, record: Record, flags: tuple[str, ...] = (UNCHECKED,)
) -> Iterator[None]:
    """Part of the checks: where it does not fit in memory beside the case, the case goes on without
    it, with a note and ``flags``."""
    try:
        yield
    except DoesNotFit as error:
        record.flags = sorted({*record.flags, *flags})
        note = f"{'' if not flags else f'{UNCHECKED}: '}{what} did not fit in memory: {error}"
        record.notes = sorted({*record.notes, note})


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case's inputs."""
    turned_later = operator_info(case.operator.name).rotates
    decoded = PagedBatch.of_case(case) if case.phase == DECODE else None
    return Recipe(case.seed, case.inputs, rotation_of(case), turned_later, decoded)


def second_recipe_of(case: Case) -> Recipe:
    """The recipe of the second set of inputs, for every other timed call."""
    return replace(recipe_of(case), seed=case.seed + SECOND_SEED)


def _share_of_memory(tensors: check.Tensors) -> float:
    """Bytes of tensors over the memory of the GPU."""
    import torch

    _, total = torch.cuda.mem_get_info()
    return sum(x.nbytes for x in tensors.values()) / float(total)


def _finite(errors: Errors) -> dict[str, dict[str, float | None]]:
    """The errors with infinite and undefined ones as None, since JSON has neither."""
    return {
        tensor: {metric: x if math.isfinite(x) else None for metric, x in metrics.items()}
        for tensor, metrics in errors.items()
    }
