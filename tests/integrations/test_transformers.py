"""Operators as the attention of Hugging Face models, and q, k and v captured from models."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limits import LIMIT_S
from run_cpbench import cpbench as run_cpbench

import cpbench
from cpbench import masks
from cpbench.integrations import capture as capture_process
from cpbench.integrations import transformers as cpbench_transformers
from cpbench.integrations.capture import capture_layers, capture_modules
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert import from_dense

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
WINDOW = {"sliding_window": 16}
MODELS = {
    "Llama": {},
    "Mistral": WINDOW,
    "Qwen3": {},
}
MODULE = f"""
def llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{TINY!r}))


def text():
    return "text"


TEXT = "text"
"""


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    import transformers  # takes a second, which collecting tests need not

    config = getattr(transformers, f"{name}Config")(**TINY, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens_of(batch: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def padding_of(tokens: torch.Tensor, left: int) -> torch.Tensor:
    padding = torch.ones_like(tokens)
    padding[1, :left] = 0
    return padding


@pytest.fixture(autouse=True)
def _registered() -> None:
    cpbench_transformers.register()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("left", [0, 7])
def test_logits_are_those_of_sdpa(name: str, left: int) -> None:
    model, tokens = tiny(name), tokens_of()
    padding = padding_of(tokens, left)
    logits = {}
    for attention in ("sdpa", "cpbench"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(tokens, attention_mask=padding).logits[padding.bool()]
    torch.testing.assert_close(logits["cpbench"], logits["sdpa"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_generation_and_training(name: str) -> None:
    model, tokens = tiny(name), tokens_of()
    padding = padding_of(tokens, 5)
    texts, gradients = {}, {}
    for attention in ("sdpa", "cpbench"):
        model.set_attn_implementation(attention)
        texts[attention] = model.generate(
            tokens, attention_mask=padding, max_new_tokens=8, do_sample=False
        )
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients[attention] = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    assert torch.equal(texts["sdpa"], texts["cpbench"])
    torch.testing.assert_close(gradients["cpbench"], gradients["sdpa"], atol=1e-6, rtol=1e-4)


def test_a_static_cache() -> None:
    model, tokens = tiny("Llama"), tokens_of()
    texts = []
    for attention in ("sdpa", "cpbench"):
        model.set_attn_implementation(attention)
        texts.append(
            model.generate(
                tokens, max_new_tokens=4, cache_implementation="static", disable_compile=True,
                pad_token_id=0, do_sample=False,
            )
        )  # fmt: skip
    assert torch.equal(*texts)


@pytest.mark.parametrize("hidden", [-1e9, -1e4, -torch.inf, torch.finfo(torch.float32).min])
def test_masks_that_are_added(hidden: float) -> None:
    model, tokens = tiny("Llama"), tokens_of(2, 12)
    visible = torch.ones(12, 12, dtype=torch.bool).tril(-1) | torch.eye(12, dtype=torch.bool)
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~visible, hidden)
    logits = []
    for attention in ("sdpa", "cpbench"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(tokens, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((1, 1, 8, 8), -0.5), "holds a bias: cpbench adds none to scores"),
        (torch.ones(1, 1, 8, 8, dtype=torch.int64), "must be boolean or floating-point"),
        (torch.ones(1, 8, dtype=torch.bool), "must be boolean or floating-point"),
        (torch.rand(1, 2, 8, 8) > 0.5, "differs from head to head"),
    ],
)
def test_masks_that_are_refused(mask: torch.Tensor, message: str) -> None:
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=message):
        cpbench_transformers.attention_forward(torch.nn.Module(), q, q, q, mask, operator="bands")


def test_masks_that_are_broadcast() -> None:
    q = torch.randn(1, 2, 8, 16)
    keys = (torch.arange(8) < 5).view(1, 1, 1, 8)
    for mask in (keys, keys.expand(1, 2, 8, 8)):
        out, _ = cpbench_transformers.attention_forward(
            torch.nn.Module(), q, q, q, mask, operator="bands"
        )
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keys)
        torch.testing.assert_close(out, expected.transpose(1, 2))


def test_packed_sequences_and_a_selector() -> None:
    model, tokens = tiny("Llama"), tokens_of(1, 40)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    logits = {}
    for attention in ("sdpa", "cpbench"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(logits["cpbench"], logits["sdpa"], atol=1e-5, rtol=1e-4)
    cpbench_transformers.register("quest", name="cpbench_quest")
    model.set_attn_implementation("cpbench_quest")
    with torch.no_grad():
        assert model(tokens).logits.isfinite().all()


def test_what_no_operator_computes_is_refused() -> None:
    module = torch.nn.Module()
    q = torch.randn(1, 2, 8, 16)
    for options, words in (
        ({"dropout": 0.1}, "set that of the model.s attention to 0, not 0.1"),
        ({"softcap": 50.0}, "has softcap, which cpbench has not"),
        ({"s_aux": torch.zeros(2)}, "has s_aux, which cpbench has not"),
    ):
        with pytest.raises(ValueError, match=words):
            cpbench_transformers.attention_forward(
                module, q, q, q, None, operator="bands", **options
            )


def test_a_mask_from_booleans() -> None:
    for name in ("causal", "sliding_window:window=5", "streaming:num_sinks=2,window=4"):
        mask = masks.build(name, 37)
        dense = mask.to_dense()
        assert np.array_equal(from_dense([dense[:10], dense[10:]]).to_dense(), dense)
    assert from_dense([masks.build("causal", 64).to_dense()]) == masks.build("causal", 64)
    random = np.random.default_rng(0).random((20, 30)) < 0.3
    assert np.array_equal(from_dense([random]).to_dense(), random)
    assert from_dense([np.zeros((3, 4), bool)]) == AttnMask.from_slices(3, 4, [])


def test_layers_of_a_model() -> None:
    model, tokens = tiny("Llama"), tokens_of(1)
    found = capture_layers(model, [0, 2], tokens)
    assert {layer: list(x.k.shape) for layer, x in found.items()} == {
        0: [1, 48, 2, 16],
        2: [1, 48, 2, 16],
    }
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
    values = layer.self_attn.v_proj(hidden).unflatten(-1, (2, 16))
    torch.testing.assert_close(found[0].v, values.detach())
    with pytest.raises(ValueError, match="no layer 7; it has layers 0 to 2"):
        capture_layers(model, [7], tokens)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_queries_and_keys_of_a_layer_before_rope(name: str) -> None:
    model, tokens = tiny(name), tokens_of(1)
    after, before = (capture_layers(model, [0, 2], tokens, early) for early in (False, True))
    base = model.config.rope_parameters["rope_theta"]
    for layer, x in before.items():
        for tensor in "qk":
            rotated = cpbench.rope(getattr(x, tensor), base=base)
            torch.testing.assert_close(rotated, getattr(after[layer], tensor))
        assert torch.equal(x.v, after[layer].v)
        assert (x.rotated, after[layer].rotated) == (False, True)
    home = importlib.import_module(type(model).__module__)
    assert not hasattr(home.apply_rotary_pos_emb, "__wrapped__")  # put back


def test_a_layer_without_rope_has_no_queries_before_it() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(ValueError, match="layer 0 does not rotate whole queries and keys"):
        capture_layers(model, [0], tokens_of(1), before_rope=True)


@pytest.mark.parametrize("scale", [0.1, 0.5, 16**-0.5])
def test_the_scale_of_a_layer_is_in_q(scale: float) -> None:
    """Inputs of a sweep have no scale: attention with the default one is the layer's."""
    model, tokens = tiny("Mistral"), tokens_of(1)
    attention = model.model.layers[1].self_attn
    attention.scaling = scale
    outputs: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    captured = capture_layers(model, [1], tokens)[1]
    assert captured.window == 16
    assert captured.factor == pytest.approx(scale * 4)
    mask = masks.build("sliding_window_causal", tokens.shape[1], window=15)
    out, _ = cpbench.attention(captured.q, captured.k, captured.v, mask)
    torch.testing.assert_close(out.flatten(2), outputs[0], atol=1e-5, rtol=1e-4)


def test_names_that_cannot_work_are_refused_at_once() -> None:
    for words, message in (
        ({"operator": "bnds"}, "no operator 'bnds'"),
        ({"operator": "bands:size=3"}, "has no parameter 'size'"),
        ({"operator": "lm_infinite"}, "lm_infinite applies RoPE, which models of transformers do"),
        ({"name": "cpb_flash"}, "transformers takes names with flash for FlashAttention"),
    ):
        with pytest.raises(ValueError, match=message):
            cpbench_transformers.register(**words)


class Plain(torch.nn.Module):
    """A module that calls torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = torch.nn.Linear(64, 3 * 64)
        self.block = torch.nn.Sequential(torch.nn.Embedding(128, 64), Attends())


class Attends(torch.nn.Module):
    """Causal attention of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 3 * 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, value=v, is_causal=True)


def test_modules_by_name() -> None:
    model, tokens = Plain(), tokens_of(1)
    found = capture_modules(model.block, ["1"], tokens)
    q, _, v = model.block[1].project(model.block[0](tokens)).unflatten(-1, (3, 4, 16)).unbind(2)
    torch.testing.assert_close(found["1"].q, q.detach())
    torch.testing.assert_close(found["1"].v, v.detach())
    both = capture_modules(torch.nn.Sequential(model.block), ["0", "0.1"], tokens)
    assert torch.equal(both["0"].q, both["0.1"].q)
    with pytest.raises(ValueError, match=r"no module 'two'; there are: 0, 1, 1\.project"):
        capture_modules(model.block, ["two"], tokens)
    with pytest.raises(ValueError, match="'0' did not call scaled_dot_product_attention"):
        capture_modules(model.block, ["0"], tokens)


def capture(folder: Path, *arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "cpbench", "capture", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return result.returncode, result.stdout, result.stderr


def test_the_command_writes_inputs_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny_model.py").write_text(MODULE)
    (tmp_path / "ids.json").write_text(json.dumps(list(range(100))))
    (tmp_path / "far.json").write_text("[1, 500]")
    (tmp_path / "broken.json").write_text("[1 2")
    options = ("--model", "tiny_model:llama", "--prompt", "ids.json", "-o", "qkv.safetensors")
    code, out, err = capture(tmp_path, *options, "--layers", "0,2", "--json")
    assert code == 0, err
    assert [row["file"] for row in json.loads(out)] == ["qkv-0.safetensors", "qkv-2.safetensors"]
    shape = ("--num-heads-q", "4", "--num-heads-kv", "2", "--head-dim", "16", "--seq-len", "100")
    file = tmp_path / "qkv-2.safetensors"
    assert file.stat().st_mode == (tmp_path / "ids.json").stat().st_mode
    code, err = run_cpbench("bench", "--inputs", f"file:{file}", *shape, "--out", tmp_path / "run")
    assert code == 0, err
    code, out, err = capture(tmp_path, *options, "--before-rope")
    assert (code, "q and k are those before RoPE: give --rope" in out) == (0, True), err
    operators = ("--operator", "bands,lm_infinite:window=20")
    for name, status in (("qkv", 0), ("qkv-2", 2)):
        file = tmp_path / f"{name}.safetensors"
        code, err = run_cpbench("bench", *operators, "--inputs", f"file:{file}", *shape)
        assert code == status, err
    assert "lm_infinite applies RoPE, which q and k of qkv-2.safetensors have already" in err
    for wrong, message in (
        (("--before-rope", "--modules", "x"), "--before-rope: RoPE is seen in --layers"),
        (("--layers", "x"), "--layers x: must be numbers of layers, such as 0,12"),
        (("--prompt", "no.txt"), "there is no file no.txt"),
        (("-o", "qkv.bin"), "the name must end in .safetensors"),
        (("--prompt", "far.json"), "--prompt far.json: token id 500 is not in the vocabulary"),
    ):
        code, _, err = capture(tmp_path, *options, *wrong)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert message in err
    request = {
        "model": "tiny_model:llama", "prompt": "ids.json", "output": "no.safetensors",
        "layers": [0], "modules": [], "before_rope": False,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for change, message in (
        ({"layers": [9]}, "the model has no layer 9; it has layers 0 to 2"),
        ({"model": "nowhere"}, "'nowhere' is neither a folder nor module:function"),
        ({"model": "tiny_model:none"}, "module 'tiny_model' has no attribute 'none'"),
        ({"model": "tiny_model:text"}, "tiny_model:text returned str, not a torch.nn.Module"),
        ({"model": "tiny_model:TEXT"}, "tiny_model:TEXT is no function"),
        ({"prompt": "broken.json"}, "--prompt broken.json is not JSON"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({**request, **change})))
        assert capture_process.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_model_of_a_folder(tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "model")
    (tmp_path / "ids.json").write_text(json.dumps([1, 2, 3, 4]))
    (tmp_path / "text.txt").write_text("hello")
    options = ("--model", "model", "-o", "qkv.safetensors")
    code, out, err = capture(tmp_path, *options, "--prompt", "ids.json", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["tokens"] == 4
    code, _, err = capture(tmp_path, *options, "--prompt", "text.txt")
    assert code == 2
    assert "model has no tokenizer: give token ids as .json" in err
