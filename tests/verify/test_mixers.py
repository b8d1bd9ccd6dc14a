"""Sequence mixers through the harness: checked against their own recurrence, faults found."""

from __future__ import annotations

from pathlib import Path

import naive_mixers
import numpy as np
import pytest
import torch
from paths import HELPERS
from whole_runs import run_cases

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry, tolerance
from cpbench.core.operator import Unsupported, declared_limits
from cpbench.core.problem import Case, Problem
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.kernels.mixers import forms
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World
from cpbench.results.record import Record
from cpbench.sweep import sweep_file
from cpbench.sweep.verification import cases as verification
from cpbench.verify import check, mixing
from cpbench.verify.fingerprint import Fingerprinter
from cpbench.verify.variants import InputVariants

OPERATORS = HELPERS / "planted" / "wrong_mixers.py"
DOCUMENTS = "causal_document:doc_lens=[100,7,193,800]"
MIXERS = sorted(name for name, info in registry.operators().items() if info.mixer == name)
ALONE = check.RankContext("cpu")


def prepare(
    operator: str,
    mask: str = "causal",
    tokens: int = 90,
    dtype: str = "float32",
    heads: int = 3,
    initial_state: bool = False,
) -> Attention:
    problem = Problem(
        batch=2, seq_q=tokens, seq_k=tokens, heads_q=heads, heads_kv=heads, head_dim=8,
        head_dim_v=6, dtype=dtype, initial_state=initial_state,
    )  # fmt: skip
    built, layout = masks.build(mask, tokens), layouts.build("contiguous", tokens, 1)
    return Attention(operator, "single", World.of(problem, built, layout), 0, "cpu")


def gates(seed: int = 0) -> Recipe:
    return Recipe(seed, Spec("gates"))


def test_every_mixer_is_an_operator_of_its_own_kind() -> None:
    assert sorted(forms.FORMS) == MIXERS
    for name in MIXERS:
        info, form = registry.operators()[name], forms.FORMS[name]
        assert info.kind == "mixer"
        taken = dict(info.gates)
        assert ("beta" in taken) == form.delta
        assert ("g" in taken) == (form.gate is not None and name != "retention")
        assert (taken.get("g") == "key") == (form.gate == "diagonal")
    for info in registry.operators().values():  # adapters to libraries are of the same kinds
        assert (info.kind == "mixer") == (info.mixer in MIXERS)


@pytest.mark.parametrize(
    ("mask", "initial_state"),
    [("causal", False), ("causal", True), ("causal_document:doc_lens=[20,1,40,29]", True)],
)
@pytest.mark.parametrize("name", MIXERS)
def test_the_references_agree_with_another_recurrence(
    name: str, mask: str, initial_state: bool
) -> None:
    """The small reference, and the chunked one at size, against the recurrence of the tests."""
    work = prepare(f"{name}:chunk=16", mask, initial_state=initial_state)
    inputs = check.rank_inputs(work, gates(), "cpu")
    small = mixing.small_results(work, gates(), "cpu")
    x = {key: y for key, y in inputs.items() if key != "dout"}
    if name == "retention":
        decays = torch.log1p(-(2.0 ** (-5.0 - torch.arange(3).double())))
        x["g"] = decays.expand(2, 90, 3)
    x.setdefault("initial_state", torch.zeros(2, 3, 8, 6))
    starts = (0,) if mask == "causal" else (0, 20, 21, 61)
    found, out, state = naive_mixers.gradients(
        x, name, work.problem.softmax_scale, inputs["dout"], torch.zeros(2, 3, 8, 6), starts, 16
    )
    wanted = {"out": out, **{f"d{key}": found[key] for key in work.problem.inputs}}
    for key, value in wanted.items():
        by_head = value if key in check.STATES else check.as_matrices(value).transpose(1, 2)
        torch.testing.assert_close(small[key], by_head)
    torch.testing.assert_close(small["state"], state)
    results = {"state": state, **wanted}
    whole = mixing.check_in_full(work, results, gates(), 0, 60.0, ALONE)
    assert whole.covered == 1.0
    assert set(whole.errors) == set(results)
    assert max(one["rel_l2"] for one in whole.errors.values()) < 1e-12


@pytest.mark.parametrize("name", MIXERS)
def test_signs_of_lanes_change_results_by_signs_alone(name: str) -> None:
    """To the last bit: so timed calls are compared with the checked one."""
    documents = "causal_document:doc_lens=[30,60]"
    work = prepare(f"{name}:chunk=16", documents, dtype="bfloat16", initial_state=True)
    first, second = (check.rank_inputs(work, gates(seed), "cpu") for seed in (0, 1))
    before = {key: x.clone() for key, x in first.items()}
    expected = {False: Fingerprinter(work).take(check.run_pass(work, first, None))}
    variants = InputVariants(work, first, second, 0, 0.0, expected)
    variants.swap()
    variants.expect(check.run_pass(work, first, None))
    variants.swap()
    for _ in range(4):
        variants.before_call()
        variants.after_call(check.run_pass(work, first, None))
    assert variants.finish() == ""
    for key, x in before.items():
        assert torch.equal(first[key], x), key


def test_gates_are_made_for_mixers_that_take_them() -> None:
    kept = {name: check.rank_inputs(prepare(name), gates(), "cpu") for name in MIXERS}
    assert set(kept["linear"]) == set(kept["retention"]) == {"q", "k", "v", "dout"}
    assert kept["gla"]["g"].shape == (2, 90, 3, 8)
    assert kept["gated_deltanet"]["g"].shape == kept["gated_deltanet"]["beta"].shape == (2, 90, 3)
    half = check.rank_inputs(prepare("gated_deltanet", dtype="bfloat16"), gates(), "cpu")
    assert half["k"].dtype == torch.bfloat16
    assert half["g"].dtype == half["beta"].dtype == torch.float32


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    names = [
        "right", "no_documents", "no_exchange", "other_far_tokens", "looks_ahead",
        "no_state_in_the_gate", "itself_unseen", "rounded_state", "unlike_gate",
    ]  # fmt: skip
    records = run_cases(
        tmp_path_factory.mktemp("run"), {"time": False},
        operator=[f"{OPERATORS}:{name}" for name in names], mask=DOCUMENTS,
        dtype=["float32", "bfloat16"],
    )  # fmt: skip
    return {(r.case.operator.name.rpartition(":")[2], r.case.dtype): r for r in records}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_documents", "differs from float64"),
        ("no_exchange", "differs from float64"),
        ("other_far_tokens", "out differs from float64"),
        ("looks_ahead", "out differs from float64"),
        ("no_state_in_the_gate", "dg differs from float64"),
        ("itself_unseen", "out differs from float64"),
        ("rounded_state", "differs from float64"),
        ("unlike_gate", "dg has shape"),
    ],
)
def test_planted_faults_are_found(
    faulty: dict[tuple[str, str], Record], name: str, reason: str, dtype: str
) -> None:
    right, wrong = faulty["right", dtype], faulty[name, dtype]
    assert right.status == "ok", right.reason
    assert wrong.status == "wrong", wrong.errors
    assert reason in str(wrong.reason)


def test_a_mixer_is_measured(tmp_path: Path) -> None:
    mixer, attention = run_cases(
        tmp_path, {"max_iterations": 3, "min_iterations": 3},
        operator=["gated_deltanet", "bands"], inputs="gates",
    )  # fmt: skip
    assert mixer.status == attention.status == "ok", (mixer.reason, attention.reason)
    assert set(mixer.errors) == {"small", "full"}
    assert set(mixer.errors["full"]) == {
        "out", "state", "dq", "dk", "dv", "dg", "dbeta"
    }  # fmt: skip
    assert mixer.checked["heads"] > 0
    assert mixer.computes == "gated_deltanet"
    assert attention.computes == "attention"
    assert mixer.flops == {"fwd": 2 * 1100 * 6 * 16 * 16, "bwd": 2 * 1100 * 16 * 16 * 16}
    assert mixer.balance is None
    assert mixer.memory_bytes["peak"][0] > 0
    assert mixer.tflops_per_rank
    assert set(mixer.fingerprint) == {"out", "dq", "dk", "dv", "dg", "dbeta"}


def refused(operator: str, **fields: object) -> str:
    case = Case(operator=Spec.parse(operator), inputs=Spec("gates"), seq_len=64, **fields)  # type: ignore[arg-type]
    with pytest.raises(Unsupported) as error:
        Attention(operator, case.strategy, World.of_case(case, 1), 0, "cpu")
    return str(error.value)


def test_initial_states_are_checked(tmp_path: Path) -> None:
    measure = {"max_iterations": 3, "min_iterations": 3}
    table = {"inputs": "gates:initial=true", "seq_len": 640}
    right = run_cases(
        tmp_path / "right", measure, operator=["gated_deltanet", "ttt:chunk=16"],
        strategy=["scan", "ulysses"], world_size=2, **table,
    )  # fmt: skip
    assert all(record.predicted_bytes == record.bytes_sent for record in right)
    right += run_cases(  # the third rank has no heads, and ranks cut the first document
        tmp_path / "cut", {"time": False}, operator="kda", layout="zigzag", world_size=3,
        mask="causal_document:doc_lens=[300,7,333]",
        strategy=["scan:by=doubling", "ulysses:pad=true"], **table,
    )  # fmt: skip
    for record in right:
        assert record.status == "ok", record.reason
        assert "dinitial_state" in record.errors["small"].keys() & record.errors["full"].keys()
    faults = {"no_initial_state": "out", "half_initial_gradient": "dinitial_state"}
    names = [f"{OPERATORS}:{name}" for name in faults]
    wrong = run_cases(tmp_path / "wrong", {"time": False}, operator=names, **table)
    for record, tensor in zip(wrong, faults.values(), strict=True):
        assert record.status == "wrong", record.errors
        assert f"{tensor} differs from float64" in str(record.reason)


def test_what_mixers_refuse() -> None:
    assert refused("gla", num_heads_q=4, num_heads_kv=2) == (
        "gla is a sequence mixer, with as many key/value heads as query heads, not 2 for 4"
    )
    window = Spec.parse("sliding_window_causal:window=8")
    assert refused("gla", mask=window) == (
        "gla takes causal, causal_document masks; this one is bands"
    )
    assert "this one is full" in refused("gla", mask=Spec("full"))
    assert "takes causal, causal_document masks" in refused("gla", queries=8)
    assert refused("ssd", strategy=Spec("ring"), world_size=1) == (
        "ring distributes attention; ssd is a sequence mixer"
    )
    assert refused("ssd", strategy=Spec.parse("single:offload=host")) == (
        "ssd is a sequence mixer, which takes no offload"
    )


def test_libraries_start_from_0() -> None:
    case = Case(operator=Spec("ssd"), inputs=Spec.parse("gates:initial=true"), seq_len=64)
    assert case.problem.inputs == ("q", "k", "v", "initial_state")
    info = registry.operator_info("fla.naive_ssd")
    assert declared_limits(info, case.problem, "cpu") == (
        "fla.naive_ssd starts from a state of 0; use inputs without initial=true"
    )
    attention = World.of_case(case, 1).with_inputs_of(registry.operator_info("bands"))
    assert attention.problem.inputs == ("q", "k", "v")


@pytest.mark.parametrize(
    ("operator", "dtype"), [("ssd", "bfloat16"), ("gated_deltanet", "float32")]
)
def test_triton_kernels_pass_the_checks(operator: str, dtype: str) -> None:
    pytest.importorskip("triton")
    documents = "causal_document:doc_lens=[20,21]"
    work = prepare(
        f"{operator}:kernel=triton,chunk=16", documents, 41, dtype, heads=1, initial_state=True
    )
    found = mixing.check_small(work, gates(), ALONE)
    assert set(found) == set(work.result_names)
    assert tolerance.violation(found, dtype, work.op.info, 41) is None


def test_what_triton_kernels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert refused("gla:kernel=triton") == (
        "kernel=triton computes at most one decay per head and token, not gla"
    )
    assert refused("ssd:chunk=128,kernel=triton") == (
        "kernel=triton takes a chunk of 16, 32, 64, not 128"
    )
    assert refused("ssd:kernel=triton", head_dim=256) == (
        "kernel=triton takes keys of up to 128 dimensions, not 256"
    )
    on_ranks = refused("ssd:kernel=triton", strategy=Spec("scan"), world_size=2)
    assert on_ranks == "scan: ssd: kernel=triton computes no summaries of runs: use kernel=torch"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "set TRITON_INTERPRET=1" in refused("ssd:kernel=triton")


def test_the_public_function_of_attention_refuses_mixers() -> None:
    q = torch.zeros(1, 8, 1, 4)
    with pytest.raises(Unsupported, match=r"ssd is a sequence mixer, which cpbench\.mix computes"):
        cpbench.attention(q, q, q, masks.build("causal", 8), operator="ssd")


def test_sweeps_give_mixers_inputs_with_gates() -> None:
    def expand(**table: object) -> list[Case]:
        return sweep_file.expand_table({"seq_len": 64, **table})

    bands, gla = expand(operator=["bands", "gla"])
    assert (str(bands.inputs), str(gla.inputs)) == ("normal", "gates")
    with pytest.raises(ValueError, match="gla is a sequence mixer, whose inputs are file or gates"):
        expand(operator="gla", inputs="normal")


def test_strategies_of_attention_are_left_out() -> None:
    swept = sweep_file.expand(
        {"sweep": {"operator": ["bands", "ssd"], "strategy": ["single", "ring"], "seq_len": 64}},
        "s",
    )
    kept = {(case.operator.name, case.strategy.name) for case in swept.cases}
    assert kept == {("bands", "single"), ("ssd", "single"), ("bands", "ring")}
    assert dict(swept.left_out) == {"ring distributes attention; ssd is a sequence mixer": 1}


def test_verify_has_cases_of_mixers(tmp_path: Path) -> None:
    def cases(operators: str | None, strategies: str | None = None) -> list[Case]:
        request = verification.build_request(
            operators=operators, strategies=strategies, masks=None, world_sizes=None, dtypes=None,
            device="cpu", launcher="local", out=tmp_path, timeout_s=60.0,
        )  # fmt: skip
        return list(request.cases)

    found = cases("bands,gla,linear")
    mixed = [case for case in found if case.operator.name != "bands"]
    assert {case.operator.name for case in mixed} == {"gla", "linear"}
    assert {(case.strategy.name, case.num_heads_q - case.num_heads_kv) for case in mixed} == {
        ("single", 0)
    }
    assert {case.mask.name for case in mixed if case.operator.name == "gla"} == {
        "causal", "causal_document"
    }  # fmt: skip
    assert "full" in {case.mask.name for case in mixed if case.operator.name == "linear"}
    assert {str(case.inputs) for case in mixed} == {
        "gates", "gates:shortest=0.03", "gates:initial=true"
    }  # fmt: skip
    assert max(case.seq_len for case in mixed) > check.SMALL_TOKENS
    assert {case.operator.name for case in cases(None)} == set(registry.operators())
    with pytest.raises(
        ValueError, match="nothing to verify: mixers run under single, scan, ulysses"
    ):
        cases("gla", "ring")


def test_verify_has_cases_of_mixers_on_ranks(tmp_path: Path) -> None:
    def cases(operators: str | None, strategies: str | None, sizes: str | None) -> list[Case]:
        request = verification.build_request(
            operators=operators, strategies=strategies, masks=None, world_sizes=sizes, dtypes=None,
            device="cpu", launcher="local", out=tmp_path, timeout_s=60.0,
        )  # fmt: skip
        return [c for c in request.cases if registry.operator_info(c.operator.name).mixer]

    few = [case for case in cases(None, None, None) if case.world_size > 1]
    assert {case.strategy.name for case in few} == {"scan", "ulysses"}
    assert len(few) < 30
    whole = cases("mixers", "scan,ulysses", "3,8")
    assert {case.operator.name for case in whole} == set(MIXERS)
    assert {case.world_size for case in whole} == {3, 8}
    for name in MIXERS:
        ways = {str(case.strategy) for case in whole if case.operator.name == name}
        assert ways == {
            "scan", "scan:by=ring", "scan:blocks=2,by=ring", "scan:by=doubling", "ulysses",
            "ulysses:pad=true",
        }  # fmt: skip
        of_name = [case for case in whole if case.operator.name == name]
        assert {c.mask.name for c in of_name} == {"causal", "causal_document"}
        assert {c.direction for c in of_name} == {"fwd", "fwd_bwd"}
        assert {c.dtype for c in of_name} == {"float32", "bfloat16"}
        assert {c.layout.name for c in of_name} >= {"contiguous", "zigzag"}
        given = [c for c in of_name if c.inputs.kwargs.get("initial")]
        assert {str(case.strategy) for case in given} == ways
        assert name == "ttt" or {"zigzag_document", "dispatch"} <= {c.layout.name for c in given}
    assert max(case.seq_len for case in whole) > check.SMALL_TOKENS


def test_inputs_of_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shape = (1, 400, 2)
    x = {name: torch.randn(*shape, 8, generator=generator) for name in "qkv"}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    x |= {"g": -torch.rand(shape, generator=generator) / 9, "beta": torch.rand(shape)}
    path = tmp_path / "captured.safetensors"
    save_file(x, path)
    shapes = {"seq_len": 400, "num_heads_q": 2, "head_dim": 8, "inputs": f"file:{path}"}
    (record,) = run_cases(
        tmp_path / "run", {"time": False}, operator="gated_deltanet", direction="fwd_bwd", **shapes
    )
    assert record.status == "ok", record.reason
    with pytest.raises(ValueError, match=r"g of captured.safetensors is \[1, 400, 2\]; the case"):
        sweep_file.expand_table({"operator": "gla", **shapes})
    save_file({name: x[name] for name in "qkv"}, tmp_path / "captured.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'g', which ssd takes"):
        sweep_file.expand_table({"operator": "ssd", **shapes})


def test_a_part_of_the_inputs_is_made_alone() -> None:
    """Rows depend on seed, position, head and name alone, so that ranks make their part."""
    work = prepare("kda", heads=4)
    positions = np.arange(90)
    for name in ("g", "beta"):
        args = {"batches": [0, 1], "device": "cpu"}
        whole = gates().make(name, work.problem, positions, heads=range(4), **args)  # type: ignore[arg-type]
        part = gates().make(name, work.problem, positions[7:50:3], heads=[3, 1], **args)  # type: ignore[arg-type]
        assert torch.equal(part, whole[:, 7:50:3][:, :, [3, 1]])
        other = gates(1).make(name, work.problem, positions, heads=range(4), **args)  # type: ignore[arg-type]
        assert not torch.equal(other, whole)
