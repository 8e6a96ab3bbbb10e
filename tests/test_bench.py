"""bench: what it counts, what it writes, what it refuses. Nothing here depends on speed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch

from launcher.__main__ import main
from launcher.host import bandwidth
from launcher.host.load import LoadMark, other_cores
from launcher.resolve import DEMO
from launcher.tasks.bench.case import Runner
from launcher.tasks.bench.record import Host, Measured, make_record
from launcher.tasks.bench.simulate import CollectiveCost
from launcher.tasks.bench.work import Case, Work, decode_work, prefill_work
from parallel.checkpoint.memory import Memory
from parallel.checkpoint.open import open_checkpoint, open_random
from parallel.group import LoneGroup
from quant.scheme import QuantScheme
from tests.models import RTN, generate, load, run_ranks
from tests.test_command import COMMAND, run, run_dir

TINY = (
    "model=llama2_70b", "model.num_hidden_layers=2", "model.hidden_size=128", "model.vocab_size=96",
    "model.intermediate_size=80", "model.num_attention_heads=16",
)  # fmt: skip
QUICK = ("bench.prompt_lengths=[8]", "bench.new_tokens=3", "bench.repeats=2")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model at two sizes, where matplotlib cannot be imported."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "matplotlib.py").write_text("raise ImportError")
    words = ("bench", "bench.tp=[1,2]", "bench.batch_sizes=[1,2]", "bench.profile=true", *QUICK)
    done = run(folder, *words, PYTHONPATH=f"{folder}:{Path(__file__).parents[1]}")
    assert done.returncode == 0, done.stderr
    return done, run_dir(folder)


def test_every_size_batch_and_phase_has_a_record(demo):
    found = records(demo[1] / "result.jsonl")
    seen = [(r["tp"], r["batch_size"], r["prompt_length"], r["phase"]) for r in found]
    phases = ("prefill", "decode")
    assert seen == [(tp, batch, 8, p) for tp in (1, 2) for batch in (1, 2) for p in phases]
    assert found[:4] == records(demo[1] / "tp_1" / "result.jsonl")


def test_figures_of_a_record_follow_from_each_other(demo):
    for record in records(demo[1] / "result.jsonl"):
        typical = median(record["seconds"])
        assert len(record["seconds"]) == record["repeats"] == 2
        assert record["seconds_median"] == typical
        per_sequence = 8 if record["phase"] == "prefill" else 3
        assert record["tokens"] == record["batch_size"] * per_sequence
        for figure in ("tokens", "bytes", "operations"):
            assert record[f"{figure}_per_s"] == pytest.approx(record[figure] / typical)
        assert record["bandwidth_share"] == pytest.approx(
            record["bytes_per_s"] / record["bandwidth_bytes_per_s"]
        )
        assert 0 <= record["communication_share"] <= 1
        assert record["skew"] >= 1
        assert len(record["peak_bytes"]) == len(record["compute_s"]) == record["tp"]
        assert min(record["peak_bytes"]) > 1e6
        assert record["other_cores"] >= 0
        assert not record["estimate"]


def test_the_run_says_what_ran_and_what_is_missing(demo):
    done, path = demo
    assert "lm_head bfloat16" in done.stdout
    assert "of bandwidth" in done.stdout
    assert "pip install 'shardrun[bench]'" in done.stdout
    assert "aten::" in (path / "tp_2" / "profile.txt").read_text()
    assert (path / "run.yaml").exists()


def test_a_rank_of_a_larger_job_runs_alone_and_is_marked_as_an_estimate(tmp_path):
    pytest.importorskip("matplotlib")
    done = run(
        tmp_path, "bench", *TINY, *QUICK, "quant=rtn_a16w8", "parallel.tp=8", "seed=3",
        "parallel.simulate_rank=1", "bench.batch_sizes=[1]", "bench.collective_latency_us=1e6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE of tp=8 from rank 1 alone" in done.stdout
    assert (run_dir(tmp_path) / "decode.png").read_bytes().startswith(b"\x89PNG")
    *_, decode = records(run_dir(tmp_path) / "result.jsonl")
    assert decode["estimate"]
    assert (decode["tp"], decode["simulated_rank"], len(decode["peak_bytes"])) == (8, 1, 1)
    assert decode["weights"] == "random weights of seed 3"
    # Two all-reduces a layer, the embedding, the logits, the token: a second each, nobody waits.
    assert decode["seconds_median"] / 3 == pytest.approx(2 * 2 + 3, abs=1)
    assert decode["communication_share"] > 0.9


def test_ranks_that_torchrun_started_run_one_size(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ("task=bench", *TINY, *QUICK, "bench.batch_sizes=[1]", "bench.plot=false")
    done = run(tmp_path, *words, command=[*command, *COMMAND[1:]])
    assert done.returncode == 0, done.stderr
    assert [r["tp"] for r in records(run_dir(tmp_path) / "result.jsonl")] == [2, 2]


REFUSED = [
    (("bench", "bench.tp=[1,2]", "parallel.tp=2"), "both given"),
    (("bench", "bench.tp=[2,2]"), "`bench.tp` must name each size once"),
    (("bench", "bench.tp=[3]"), "valid sizes: 1, 2, 4, 8"),
    (("bench", "bench.tp=[]"), "`bench.tp` must be a list of sizes of at least 1"),
    (("bench", "bench.batch_sizes=[0]"), "`bench.batch_sizes` must be"),
    (("bench", "bench.prompt_lengths=[500]"), "context of 512 tokens"),
    (("bench", "bench.collective_gb_s=1"), "no effect while parallel.simulate_rank is null"),
    (("bench", "parallel.simulate_rank=0"), "parallel.tp, which is not given"),
    (("bench", "parallel.simulate_rank=8", "parallel.tp=8"), "must be 0 to 7 at tp=8, but is 8"),
    (("bench", "model.hidden_size=64"), "`model`"),
    (("bench", "model=llama3_405b", "model.num_hidden_layers=4096"), "GB of memory"),
    (("bench", "prompt=hello"), "`prompt` has no effect on bench"),
    (("bench", "generation.temperature=2"), "`generation.temperature` has no effect on bench"),
    (("bench", "plan.tp=[1]"), "`plan.tp` has no effect on bench"),
    (("bench", "output=x"), "`output`"),
    (("generate", "bench.repeats=2"), "`bench.repeats` has no effect on generate"),
    (("generate", "parallel.simulate_rank=0"), "has no effect on generate"),
    (("generate", "seed=1"), "`seed` has no effect on generate"),
    (("generate", "model=llama2_13b"), "a shape without weights"),
    (("verify", "model=llama2_13b"), "a shape without weights"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=lambda case: str(case)[:60])
def test_bad_words_are_refused_in_a_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_simulating_is_for_bench_also_when_a_file_asks_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("parallel: {simulate_rank: 0, tp: 2}\n")
    assert main(["generate", "config=run.yaml"]) == 2
    assert "`parallel.simulate_rank` is for bench" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("chunk", [512, 5])
def test_a_case_makes_the_steps_of_the_generation_loop(size, chunk):
    case = Case(batch_size=3, prompt_length=7, new_tokens=6, chunk=chunk)
    ids_BP = torch.randint(2048, (3, 7), generator=torch.Generator().manual_seed(0))
    wanted = generate(DEMO, ids_BP.tolist(), size, new_tokens=7, chunk=chunk)
    checkpoint = open_checkpoint(DEMO)

    def work(group):
        decoder = load(checkpoint, group, length=case.length)
        runner = _Recorder(decoder, decoder.new_cache(3, case.length), group.barrier)
        runner.run(ids_BP, case)
        return runner.said

    for index, completion in wanted.items():
        if completion.finish_reason == "length":
            for said in run_ranks(size, work):
                # Prefill says a token of each prompt, in one step or several; then decode steps.
                flat = [token for tokens in said for token in tokens]
                assert tuple(flat[index::3]) == completion.token_ids


class _Recorder(Runner):
    @property
    def said(self):
        return self.__dict__.setdefault("_said", [])

    def _step(self, step):
        self.said.append(super()._step(step))
        return self.said[-1]


SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16, "head_dim": 8,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
LINEARS = 16 * 32 * 2 + 16 * 16 * 2 + 16 * 24 * 3  # q and o, k and v, the FFN
# As C packs them, in blocks of 32 channels, with float32 scales: q k v, o, gate up, down.
PACKED = 64 * 16 + 32 * 32 + 64 * 16 + 32 * 24 + 4 * (64 + 16 + 48 + 16)
CASE = Case(batch_size=2, prompt_length=5, new_tokens=2, chunk=4)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("scheme", [QuantScheme(), RTN], ids=["none", "w8a16"])
def test_decode_reads_every_weight_but_the_embedding_and_the_cache_once_a_step(scheme, is_tied):
    shape = {**SHAPE, "tie_word_embeddings": is_tied}
    memory = Memory(open_random(shape, scheme, seed=0).layout(scheme), "bfloat16")
    weights = 3 * (PACKED if scheme is RTN else 2 * LINEARS)
    weights += 2 * (16 * 7 + 40 * 16)  # norms and lm_head
    cached = 2 * (6 + 7) * (2 * 3 * 2 * 8) * 2  # sequences, positions, numbers of each, bytes
    found = decode_work(memory, CASE, [0], 1)
    assert found.num_bytes == 2 * weights + cached
    assert found.tokens == 4
    attention = 2 * (6 + 7) * 4 * 3 * 4 * 8
    assert found.operations == 4 * 2 * (3 * LINEARS + 40 * 16) + attention
    prefill = prefill_work(memory, CASE, [0], 1)
    assert prefill.num_bytes == 3 * weights  # ten tokens in chunks of four
    assert prefill.operations == 2 * (30 * LINEARS + 2 * 40 * 16) + 2 * 15 * 4 * 3 * 4 * 8


@dataclass(frozen=True)
class Seen:
    seconds: float
    calls_s: tuple[float, ...]

    @property
    def communication_s(self):
        return sum(self.calls_s)


def test_waiting_is_told_apart_from_communication():
    # Of two calls a rank waits in one each; what the last to come spends there is communication.
    run = [Seen(10.0, (5.0, 1.0)), Seen(10.0, (1.0, 1.0))]
    found = make_record(
        {}, Measured("decode", CASE, [run], Work(4, 100, 50), [5.0, 20.0], Host([1, 2], 0.0))
    )
    assert found["communication_share"] == pytest.approx(0.2)
    assert found["waiting_share"] == pytest.approx(0.4)
    assert found["compute_s"] == [4.0, 8.0]
    assert found["skew"] == pytest.approx(2.0)
    assert found["bandwidth_share"] == pytest.approx(10 / 20)


def test_the_modelled_cost_is_that_of_a_ring():
    cost = CollectiveCost(size=4, latency_us=10, gb_s=2)
    assert cost("all_reduce", 1000) == pytest.approx(10e-6 + 1500 / 2e9)
    assert cost("gather", 1000) == pytest.approx(10e-6 + 3000 / 2e9)
    assert cost("broadcast", 1000) == pytest.approx(10e-6 + 1000 / 2e9)
    assert CollectiveCost(size=1)("all_reduce", 1000) == 0


def test_cores_of_others_are_what_the_host_did_beside_the_ranks():
    start, end = LoadMark(10.0, 100.0, 5.0), LoadMark(20.0, 135.0, 9.0)
    assert other_cores(start, end, [4.0, 6.0]) == pytest.approx(2.5)
    assert other_cores(start, end, [40.0]) == 0
    assert LoadMark.now().host_s > 0


@pytest.mark.parametrize("size", [1, 2])
def test_bandwidth_is_measured_with_all_ranks_at_once(size, monkeypatch):
    monkeypatch.setattr(bandwidth, "_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda: 0)
    cpu = torch.device("cpu")
    first, *others = run_ranks(size, lambda g: bandwidth.measure_group_bandwidth(g, cpu))
    assert len(first) >= 3
    assert min(first) > 0
    assert others == [[]] * (size - 1)
    assert bandwidth.measure_group_bandwidth(LoneGroup(), cpu)
