"""Numbers of ranks that cannot be are refused at once by every command that takes them."""

from __future__ import annotations

import pytest

from cpbench import masks
from cpbench.cli import main
from cpbench.core.spec import Spec
from cpbench.masks.head_masks import Mask


@pytest.mark.parametrize("size", ["0", "-1", "2,0", "999999", "x"])
@pytest.mark.parametrize("words", ["predict ring", "recommend", "traffic ring", "verify", "bench"])
def test_numbers_of_ranks_are_refused_before_masks_are_built(
    words: str, size: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = masks.build_heads

    def build_tiny(spec: Spec | str, seq_len: int, num_heads: int) -> Mask:
        assert seq_len == 1, "a mask is built"
        return build(spec, seq_len, num_heads)

    monkeypatch.setattr(masks, "build_heads", build_tiny)
    assert main.invoke([*words.split(), f"--world-size={size}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "world_size" in line
