"""Invalid sweeps: exit code 2, one line on stderr that says what is wrong and what is allowed, no
output and no files."""

from __future__ import annotations

from pathlib import Path

import malformed
import pytest

# A sweep file, and texts that the error message must contain: what is wrong, what is allowed.
SWEEPS: dict[str, tuple[str, list[str]]] = {
    "no table": ("", ["[sweep]", "nothing to run"]),
    "empty sweep": ("[sweep]", ["[sweep]", "nothing to run"]),
    "unknown table": ("[swep]\nmask = 'full'", ["'swep'", "sweep, include, exclude, measure"]),
    "unknown key": ("[sweep]\nmasks = 'full'", ["'masks'", "mask, inputs, rope, batch, seq_len"]),
    "unknown include key": ("[[include]]\nrank = 1", ["'rank'", "world_size"]),
    "unknown exclude key": ("[sweep]\nseed = 1\n[[exclude]]\nx = 1", ["'x'", "world_size"]),
    "unknown measure key": ("[sweep]\nseed = 1\n[measure]\niters = 3", ["'iters'", "warmup"]),
    "sweep is no table": ("sweep = 3", ["sweep", "[sweep]"]),
    "include is one table": ("[include]\nseed = 1", ["include", "[[include]]"]),
    "exclude is one table": ("[sweep]\nseed = 1\n[exclude]\nseed = 1", ["[[exclude]]"]),
    "include of numbers": ("include = [1]", ["include", "[include]"]),
    "empty exclude": ("exclude = [{}]\n[sweep]\nseed = 1", ["exclude", "empty", "strategy"]),
    "measure is no table": ("measure = 1\n[sweep]\nseed = 1", ["measure", "[measure]"]),
    "description no text": ("description = 3\n[sweep]\nseed = 1", ["description", "string"]),
    "all excluded": ("[sweep]\nseed = 1\n[[exclude]]\nseed = 1", ["excluded", "nothing to run"]),
    "TOML value": ("[sweep]\nseq_len = ", ["not TOML", "Invalid value"]),
    "TOML bracket": ("[sweep\n", ["not TOML", "line 1"]),
    "TOML key twice": ("[sweep]\nmask = 'full'\nmask = 'causal'\nseed = 1", ["not TOML", "line 3"]),
    "TOML nested": ("x = " + "[" * 5000, ["nested too deeply"]),
    "TOML huge number": ("[sweep]\nseq_len = " + "9" * 5000, ["s.toml", "4300 digits"]),
    "operator": ("[sweep]\noperator = 'bnds'", ["operator 'bnds'", "bands, ", " more"]),
    "refused operator": ("[sweep]\noperator = 'LazyLLM'", ["LazyLLM", "drops tokens between"]),
    "deep memory": ("[sweep]\noperator = 'titans'", ["titans", "not affine in the state"]),
    "file of gates": ("[sweep]\noperator = 'seer:gates=no.file'", ["'no.file'", "gates="]),
    "index": ("[sweep]\noperator = 'retrieval:index=x'", ["'x'", "exact, hnsw"]),
    "operator parameter": ("[sweep]\noperator = 'bands:x=1'", ["'x'", "it takes"]),
    "operator number": ("[sweep]\noperator = 5", ["operator: 5", "name"]),
    "operator without name": ("[sweep]\noperator = {x = 1}", ["operator:", "name = "]),
    "strategy": ("[sweep]\nstrategy = 'rng'", ["strategy 'rng'", "ring, ", "ulysses"]),
    "strategy parameter": ("[sweep]\nstrategy = 'ring:x=1'", ["'ring'", "'x'", "takes grad_dtype"]),
    "layout": (
        "[sweep]\nlayout = 'zig'",
        ["layout 'zig'", "contiguous, dispatch, striped, zigzag"],
    ),
    "layout parameter": ("[sweep]\nlayout = 'zigzag:x=1'", ["'zigzag'", "'x'", "no parameters"]),
    "rope": (
        "[sweep]\nrope = 'yan'",
        ["rope: no scaling 'yan'", "none, unscaled, pi, ntk, yarn, table"],
    ),
    "rope parameter": ("[sweep]\nrope = 'yarn:x=1'", ["rope: scaling 'yarn' has no parameter 'x'"]),
    "rope table": ("[sweep]\nrope = {factor = 2}", ["'factor'", "takes base, positions"]),
    "rope base": ("[sweep]\nrope = 'unscaled:base=1'", ["base = 1", "above 1"]),
    "rope base as text": ("[sweep]\nrope = 'unscaled:base=x'", ["base = 'x'", "number"]),
    "rope factor": ("[sweep]\nrope = 'pi:factor=0.5'", ["factor = 0.5", "at least 1"]),
    "rope pi": ("[sweep]\nrope = 'pi'", ["pi needs the factor", "factor=8"]),
    "rope ntk": ("[sweep]\nrope = {scaling = 'ntk', base = 5e5}", ["ntk needs the factor"]),
    "rope yarn": ("[sweep]\nrope = 'yarn:original_length=8k'", ["yarn needs the factor"]),
    "rope of a selector": (
        "[sweep]\noperator = 'lm_infinite:scaling=ntk'",
        ["lm_infinite: ", "ntk needs the factor"],
    ),
    "rope length": ("[sweep]\nrope = 'yarn:factor=8'", ["original_length", "training"]),
    "rope positions": ("[sweep]\nrope = 'pi:factor=2,positions=x'", ["'x'", "sequence, document"]),
    "rope documents": (
        "[sweep]\nrope = 'pi:factor=2,positions=document'\nmask = 'vertical_slash'",
        ["document", "vertical_slash"],
    ),
    "rope file": ("[sweep]\nrope = 'table:file=none.txt'", ["no file 'none.txt'", "table:file="]),
    "rope without file": ("[sweep]\nrope = 'table'", ["needs a file", "table:file="]),
    "rope file of text": ("[sweep]\nrope = 'table:file=s.toml'", ["s.toml", "numbers"]),
    "rope odd": ("[sweep]\nrope = 'unscaled'\nhead_dim = 15", ["even head_dim", "15"]),
    "phase": ("[sweep]\nphase = 'prefill'", ["'prefill'", "sequence, decode"]),
    "page without phase": ("[sweep]\npage_size = 16", ["page_size", "phase = 'decode'"]),
    "lengths without phase": ("[sweep]\nkey_lens = [16]", ["key_lens", "phase = 'decode'"]),
    "page size": ("[sweep]\nphase = 'decode'\npage_size = 8", ["8", "from 16 to 256"]),
    "lengths": ("[sweep]\nphase = 'decode'\nkey_lens = 'x'", ["'x'", "[8192, 70]"]),
    "length of text": ("[sweep]\nphase = 'decode'\nkey_lens = ['x']", ["'x'", "[8192, 70]"]),
    "no lengths": ("[sweep]\nphase = 'decode'\nkey_lens = []", ["key_lens = []", "at least one"]),
    "length 0": ("[sweep]\nphase = 'decode'\nkey_lens = [0]", ["[0]", "at least 1"]),
    "lengths and batch": (
        "[sweep]\nphase = 'decode'\nkey_lens = [5, 6]\nbatch = 3",
        ["batch = 3", "key_lens say 2"],
    ),
    "lengths and mask": (
        "[sweep]\nphase = 'decode'\nkey_lens = [1, 6]\nmask = 'streaming:num_sinks=4,window=2'",
        ["num_sinks", "<= 1"],
    ),
    "decoding backward": ("[sweep]\nphase = 'decode'\ndirection = 'bwd'", ["'bwd'", "fwd alone"]),
    "decoding queries": ("[sweep]\nphase = 'decode'\nqueries = 3", ["queries = 3", "1 for each"]),
    "decoding selector": ("[sweep]\nphase = 'decode'\noperator = 'moba'", ["moba", "selector"]),
    "decoding mixer": ("[sweep]\nphase = 'decode'\noperator = 'gla'", ["gla", "mixer"]),
    "decoding inputs": ("[sweep]\nphase = 'decode'\ninputs = 'sinks'", ["normal", "sinks"]),
    "decoding chain": (
        "[sweep]\nphase = 'decode'\ninputs = 'haystack:hops=3'",
        ["hops = 3", "hops = 1"],
    ),
    "needles in no file": (
        "[sweep]\ninputs = 'haystack:file=none.safetensors,depth=0.3'",
        ["no file 'none.safetensors'"],
    ),
    "decoding layout": ("[sweep]\nphase = 'decode'\nlayout = 'zigzag'", ["contiguous", "zigzag"]),
    "decoding heads": (
        "[sweep]\nphase = 'decode'\nmask = 'vertical_slash'",
        ["vertical_slash", "head to head"],
    ),
    "excluded strategy": (
        "[sweep]\nseed = 1\n[[exclude]]\nstrategy = 'ulyses'",
        ["'ulyses'", "ulysses"],
    ),
    "mask": ("[sweep]\nmask = 'casual'", ["mask 'casual'", "causal, "]),
    "mask parameter": ("[sweep]\nmask = 'sliding_window:w=3'", ["'w'", "takes window"]),
    "mask parameter twice": (
        "[sweep]\nmask = 'sliding_window:window=1,window=2'",
        ["'window'", "twice"],
    ),
    "mask parameter name": ("[sweep]\nmask = 'causal:name=3'", ["'name'", "parameter"]),
    "mask parameter cls": ("[sweep]\nmask = 'causal:cls=3'", ["'cls'", "takes seq_q, offset"]),
    "mask grammar": ("[sweep]\nmask = 'causal:'", ["'causal:'", "key=value"]),
    "mask comma": ("[sweep]\nmask = 'causal,full'", ["'causal,full'", "key=value"]),
    "mask negative": ("[sweep]\nmask = 'sliding_window:window=-1'", ["window", ">= 0", "-1"]),
    "mask boolean": ("[sweep]\nmask = 'sliding_window:window=true'", ["window", ">= 0", "True"]),
    "mask fraction": ("[sweep]\nmask = 'sliding_window:window=1.5'", ["window", "integer", "1.5"]),
    "mask nan": ("[sweep]\nmask = 'sliding_window:window=nan'", ["nan", "finite"]),
    "mask inf": ("[sweep]\nmask = {name = 'sliding_window', window = inf}", ["inf", "finite"]),
    "mask date": (
        "[sweep]\nmask = {name = 'sliding_window', window = 2020-01-01}",
        ["window", "a number, a string"],
    ),
    "mask no seeds": ("[sweep]\nmask = {name = 'causal_document', seed = []}", ["seed", "empty"]),
    "mask too wide": (
        "[sweep]\nmask = 'streaming:num_sinks=9k'\nseq_len = '4k'",
        ["num_sinks", "<= 4096"],
    ),
    "mask not square": ("[sweep]\nmask = 'causal:seq_q=5'", ["5 x 1024", "square"]),
    "mask corpus": ("[sweep]\nmask = 'full_document:corpus=bible'", ["'bible'", "pile, "]),
    "mask seed": ("[sweep]\nmask = 'full_document:seed=-1'", ["seed", ">= 0", "-1"]),
    "doc_lens zero": (
        "[sweep]\nmask = 'full_document:doc_lens=[0,1024]'",
        ["doc_lens", "from 1 to 2**40"],
    ),
    "doc_lens empty": ("[sweep]\nmask = 'full_document:doc_lens=[]'", ["doc_lens", "at least one"]),
    "doc_lens words": ("[sweep]\nmask = 'full_document:doc_lens=[a,b]'", ["'a'", "size"]),
    "two document sources": (
        "[sweep]\nmask = 'full_document:corpus=pile,doc_lens=[1024]'",
        ["doc_lens and corpus", "one of"],
    ),
    "lengths file": ("[sweep]\nmask = 'full_document:file=no.txt'", ["'no.txt'", "no file"]),
    "lengths file kind": ("[sweep]\nmask = 'full_document:file=s.toml'", [".txt, .json"]),
    "size word": ("[sweep]\nseq_len = '64q'", ["seq_len", "'64q'", "64k, 1m"]),
    "size zero": ("[sweep]\nseq_len = 0", ["seq_len = 0", "positive"]),
    "size negative": ("[sweep]\nbatch = -1", ["batch = -1", "positive"]),
    "size fraction": ("[sweep]\nhead_dim = 64.0", ["head_dim = 64.0", "integer"]),
    "size boolean": ("[sweep]\nworld_size = true", ["world_size = True", "integer"]),
    "size nan": ("[sweep]\nseq_len = nan", ["seq_len = nan", "integer"]),
    "size list in list": ("[sweep]\nseq_len = [[1, 2]]", ["seq_len = [1, 2]", "integer"]),
    "size table": ("[sweep]\nseq_len = {a = 1}", ["seq_len", "integer"]),
    "empty list": ("[sweep]\nseq_len = []", ["seq_len = []", "at least one"]),
    "empty mask list": ("[sweep]\nmask = []", ["mask = []", "at least one"]),
    "huge sequence": ("[sweep]\nseq_len = '1000000m'", ["seq_len = 1000000m", "at most 64m"]),
    "huge digits": ("[sweep]\nseq_len = '" + "9" * 400 + "'", ["seq_len", "at most 19 digits"]),
    "huge world": ("[sweep]\nworld_size = 100000", ["world_size = 100000", "at most 16k"]),
    "huge batch": ("[sweep]\nbatch = '1m'", ["batch = 1m", "at most 64k"]),
    "huge head_dim": ("[sweep]\nhead_dim = '1m'", ["head_dim = 1m", "at most 16k"]),
    "huge seed": ("[sweep]\nseed = 9223372036854775808", ["seed", "at most"]),
    "negative seed": ("[sweep]\nseed = -1", ["seed = -1", "0 or more"]),
    "too many cases": (
        "[sweep]\n"
        + "".join(
            f"{key} = {[*range(1, 101)]}\n" for key in ("seed", "seq_len", "batch", "world_size")
        ),
        ["100000000 cases", "at most 100000"],
    ),
    "heads": ("[sweep]\nnum_heads_q = 4\nnum_heads_kv = 3", ["(4)", "multiple", "(3)"]),
    "dtype": ("[sweep]\ndtype = 'float8'", ["dtype = 'float8'", "float32, bfloat16, float16"]),
    "dtype number": ("[sweep]\ndtype = 32", ["dtype = 32", "float32, bfloat16, float16"]),
    "direction": ("[sweep]\ndirection = 'up'", ["direction = 'up'", "fwd, bwd, fwd_bwd"]),
    "timeout nan": ("[sweep]\nseed = 1\n[measure]\ntimeout_s = nan", ["timeout_s = nan", "finite"]),
    "timeout inf": ("[sweep]\nseed = 1\n[measure]\ntimeout_s = inf", ["timeout_s = inf", "finite"]),
    "timeout zero": ("[sweep]\nseed = 1\n[measure]\ntimeout_s = 0", ["timeout_s", "positive"]),
    "precision negative": ("[sweep]\nseed = 1\n[measure]\nprecision = -0.1", ["-0.1", "0 or more"]),
    "iterations text": ("[sweep]\nseed = 1\n[measure]\nmax_iterations = '9'", ["'9'", "type int"]),
    "iterations boolean": ("[sweep]\nseed = 1\n[measure]\nwarmup = true", ["True", "type int"]),
    "iterations order": (
        "[sweep]\nseed = 1\n[measure]\nmin_iterations = 9\nmax_iterations = 3",
        ["min_iterations (9)", "<= max_iterations"],
    ),
    "threads": ("[sweep]\nseed = 1\n[measure]\nthreads = 1000000", ["threads", "at most 1024"]),
    "time number": ("[sweep]\nseed = 1\n[measure]\ntime = 1", ["time = 1", "type bool"]),
    "operator file": ("[sweep]\noperator = './no.py:op'", ["'./no.py'", "no file"]),
    "operator file syntax": ("[sweep]\noperator = './bad.py:op'", ["bad.py", "SyntaxError"]),
    "operator file raises": ("[sweep]\noperator = './exits.py:op'", ["exits.py", "SystemExit"]),
    "operator file binary": ("[sweep]\noperator = './binary.py:op'", ["binary.py", "null bytes"]),
    "operator attribute": ("[sweep]\noperator = './good.py:nosuch'", ["'nosuch'", "my_op"]),
    "operator of wrong kind": (
        "[sweep]\nstrategy = './good.py:my_op'",
        ["'my_op'", "StrategyInfo", "none"],
    ),
    "operator not Python": ("[sweep]\noperator = './good.txt:my_op'", ["good.txt", "name"]),
    "mask file attribute": ("[sweep]\nmask = './good.py:number'", ["'number'", "function"]),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return malformed.working_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, parts = SWEEPS[name]
    (folder / "s.toml").write_text(text)
    malformed.check_command(["run", "s.toml"], ["s.toml", *parts], folder, capfd)
