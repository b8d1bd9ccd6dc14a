"""Selectors that take a file, of gates or of scores: their selections by definition, and files that
do not fit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import choosing
import naive_selectors
import pytest
import torch
from choosing import BATCH, DIM, DOCUMENTS, HEADS_KV, HEADS_Q, TOKENS, kept_blocks, select
from naive_selectors import Head, assert_top_k
from safetensors.torch import save_file

import cpbench
from cpbench import masks
from cpbench.selectors.selections import Tokens
from cpbench.sweep import content_hash, sweep_file


def _scores_file(path: Path, scores: torch.Tensor) -> str:
    save_file({"scores": scores}, path)
    return f"scored:top_k=20,scores={path}"


@pytest.mark.parametrize("mask", ["causal", DOCUMENTS])
@pytest.mark.parametrize("shape", [None, (4, 210), (2, 2, 203), (1, 203)])
def test_scored_selects_the_keys_with_the_highest_scores(
    tmp_path: Path, shape: tuple[int, ...] | None, mask: str
) -> None:
    _, k, _, _ = choosing.inputs()
    scores, spec = -k.double().norm(dim=-1).transpose(1, 2), "scored:top_k=20"
    if shape:
        given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        given[..., 3] = -torch.inf  # a key that no query selects
        scores, spec = given.double(), _scores_file(tmp_path / "s.safetensors", given)
    (branch,) = select(spec, mask)
    assert isinstance(branch.mask, Tokens)
    rows = branch.mask.dense_rows(0, TOKENS)
    visible = torch.as_tensor(masks.build(mask, TOKENS).to_dense())
    for b, h, t in itertools.product(range(BATCH), range(HEADS_Q), range(0, TOKENS, 3)):
        of_batch = scores[b] if scores.ndim == 3 else scores
        own = of_batch[h * len(of_batch) // HEADS_Q][:TOKENS]
        assert_top_k(rows[b, h, t], own.tolist(), visible[t] & own.isfinite(), set(), 20)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 202), r"is \[4, 202\]; the case needs \[4 or 2 or 1, at least 203\] or \[2, 4 or"),
        ((3, 203), r"is \[3, 203\]"),
        ((3, 4, 203), r"is \[3, 4, 203\]"),
        ((203,), r"is \[203\]"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple, words: str) -> None:
    q, k, v, _ = choosing.inputs()
    spec = _scores_file(tmp_path / "s.safetensors", torch.zeros(shape))
    with pytest.raises(ValueError, match=words) as caught:
        cpbench.attention(q, k, v, masks.build("causal", TOKENS), operator=spec)
    assert "\n" not in str(caught.value)


def test_scores_without_a_file_or_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    q, k, v, _ = choosing.inputs()
    mask, file = masks.build("causal", TOKENS), tmp_path / "s.safetensors"
    save_file({"weights": torch.zeros(1)}, file)
    for spec, words in (
        ("scored:scores=none.safetensors", "there is no file 'none.safetensors'; write scores="),
        (f"scored:scores={file}", "has no tensor 'scores'; it has weights"),
        (_scores_file(tmp_path / "nan.safetensors", torch.full((1, 203), math.nan)), "not numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            cpbench.attention(q, k, v, mask, operator=spec)


def _seer_file(path: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, path)
    return f"seer:block_size=16,keep=0.3,gates={path}"


@pytest.mark.parametrize("weights", [True, False])
def test_seer_selects_blocks_by_the_gate(tmp_path: Path, weights: bool) -> None:
    q, k, _, _ = choosing.inputs()
    generator = torch.Generator().manual_seed(1)
    q_weight = torch.randn(HEADS_Q, DIM, 5, generator=generator)
    k_weight = torch.randn(HEADS_KV, 3 * DIM, 5, generator=generator)
    spec = "seer:block_size=16,keep=0.3"
    if weights:
        spec = _seer_file(tmp_path / "g.safetensors", q_weight=q_weight, k_weight=k_weight)
    kept = kept_blocks(select(spec, "causal")[0])
    for b, h in itertools.product(range(BATCH), range(HEADS_Q)):
        own = (q_weight[h].double(), k_weight[h // 2].double()) if weights else (None, None)
        for x, row in enumerate(naive_selectors.seer(Head(q, k, b, h), 16, *own)):
            allowed = torch.arange(13) <= x
            assert_top_k(kept[b, h, x], row, allowed, {x}, choosing.budget(x + 1, 0.3))


def test_seer_takes_gates_of_at_least_as_many_blocks(tmp_path: Path) -> None:
    gates = torch.randn(HEADS_Q, 15, 14, generator=torch.Generator().manual_seed(1))
    kept = kept_blocks(select(_seer_file(tmp_path / "g.safetensors", gates=gates), "causal")[0])
    for b, h, x in itertools.product(range(BATCH), range(HEADS_Q), range(13)):
        allowed, count = torch.arange(13) <= x, choosing.budget(x + 1, 0.3)
        assert_top_k(kept[b, h, x], gates[h, x].tolist(), allowed, {x}, count)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"gates": (4, 12, 13)}, r"gates of .* is \[4, 12, 13\]; the case needs \[4, at least 13"),
        ({"q_weight": (4, 16, 5), "k_weight": (2, 16, 5)}, r"needs \[4, 16, E\] and \[2, 48, E\]"),
        ({"weights": (4, 16, 5)}, "has no tensor 'gates', .* it has weights"),
        ({}, "is not a safetensors file"),
    ],
)
def test_gates_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict, words: str) -> None:
    file = tmp_path / "g.safetensors"
    file.write_text("no tensors")
    if tensors:
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    q, k, v, _ = choosing.inputs()
    mask = masks.build("causal", TOKENS)
    with pytest.raises(ValueError, match=words) as caught:
        cpbench.attention(q, k, v, mask, operator=f"seer:block_size=16,gates={file}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gates", "scores"])
def test_files_enter_the_id_of_a_case_by_their_content(tmp_path: Path, name: str) -> None:
    file, ids = tmp_path / "g.safetensors", []
    for value in (0.0, 1.0):
        tensor = torch.full((4, 64, 64) if name == "gates" else (1, 1024), value)
        spec = _seer_file(file, gates=tensor) if name == "gates" else _scores_file(file, tensor)
        ids.append(sweep_file.expand({"sweep": {"operator": spec}}, "s").cases[0].id)
    assert ids[0] != ids[1]


def test_the_files_of_a_sweep_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of captured activations may have gigabytes, and a sweep a hundred cases of it."""
    file, read = _scores_file(tmp_path / "g.safetensors", torch.zeros(1, 1024)), []
    hashed = content_hash._sha256
    monkeypatch.setattr(content_hash, "_sha256", lambda path: read.append(path) or hashed(path))
    sweep = {"operator": [file, file.replace("=20", "=30")], "mask": ["full", "causal"]}
    assert len(sweep_file.expand({"sweep": sweep}, "s").cases) == 4
    assert len(read) == 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"gates": (4, 63, 64)}, r"gates of .* is \[4, 63, 64\]; the case needs \[4, at least 64"),
        ({"q_weight": (4, 64, 5), "k_weight": (4, 64, 5)}, r"needs \[4, 64, E\] and \[4, 192, E\]"),
        ({"gates": math.nan}, "seer: gates of .* values that are not numbers"),
        ({"scores": (4, 1000)}, r"scores of .* is \[4, 1000\]; the case needs"),
        ({"scores": math.nan}, "scored: scores of .* values that are not numbers"),
    ],
)
def test_a_sweep_refuses_files_that_do_not_fit_its_cases(
    tmp_path: Path, tensors: dict, words: str
) -> None:
    tensors = {
        name: torch.zeros(shape) if isinstance(shape, tuple) else torch.full((1, 4, 1024), shape)
        for name, shape in tensors.items()
    }
    file = tmp_path / "g.safetensors"
    save_file(tensors, file)
    operator = (
        f"scored:scores={file}" if "scores" in tensors else f"seer:block_size=16,gates={file}"
    )
    with pytest.raises(ValueError, match=words):
        sweep_file.expand({"sweep": {"operator": operator}}, "s")
