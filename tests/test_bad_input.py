"""Does a mistake end in one sentence that names the flag or file, exit code 2, nothing lost?"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
import transformers

import common
import sea

ROOT = Path(__file__).resolve().parent.parent
CLASSIFIER = transformers.AutoModelForSequenceClassification


def arguments(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def refused(flags, folder, monkeypatch, capsys):
    """Run sea.py's command line with some flags changed; return its one sentence."""

    def run(*words: str, **changes) -> str:
        given = flags | {"erm_backbone": folder / "erm_backbone"} | changes
        monkeypatch.setattr(sys, "argv", ["sea.py", *arguments(given), *words])
        with pytest.raises(SystemExit) as stop:
            common.main(sea.Config, sea.train, sea.__doc__)
        printed = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in printed
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed
        return lines[0]

    return run


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", "0"), ("beta", "nan"), ("beta", "-1"), ("temperature", "0"), ("seed", "-1"),
        ("learning_rate", "-1e-4"), ("learning_rate", "inf"), ("num_queries", "0"),
        ("batch_size", "0"), ("batch_size", "1.5"), ("eval_prompts", "0"), ("gamma", "1.5"),
        ("gamma", "0"), ("num_candidates", "1"), ("num_heads", "0"), ("burn_in", "-1"),
        ("best_of_n", "1"), ("anchor", "strong"), ("anchor", "-1"), ("prior_std", "0"),
        ("labels", "maybe"), ("explore", "thompson"), ("loss", "simpo"), ("device", "abacus"),
        ("micro_batch_size", "0"), ("max_new_tokens", "0"), ("max_grad_norm", "0"),
        ("chat_template", "on"),
    ],
)  # fmt: skip
def test_a_flag_out_of_range_is_named(refused, name, value):
    assert name in refused(**{name: value})


def test_unknown_and_shortened_flags_are_refused(refused):
    assert "--lerning_rate" in refused("--lerning_rate", "1")
    assert "--num_quer" in refused("--num_quer", "8")


@pytest.mark.parametrize("name", ["model", "ref_model", "dataset", "reward_model", "erm_backbone"])
def test_a_path_that_is_not_there_is_named_and_the_hub_is_not_asked(refused, name, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    assert f"--{name} ./nowhere" in refused(**{name: "./nowhere"})


@pytest.mark.parametrize(
    "explore, words",
    [
        ("passive", ["--gamma", "0.7"]), ("passive", ["--num_candidates", "20"]),
        ("passive", ["--num_heads", "20"]), ("apl", ["--gamma", "0.5"]),
        ("apl", ["--loss", "ipo"]), ("bai", ["--num_heads", "1"]),
    ],
)  # fmt: skip
def test_an_explicit_contradiction_is_an_error(refused, explore, words):
    message = refused(*words, explore=explore)
    assert words[0] in message or explore in message


def test_a_data_set_without_the_prompt_column_is_refused_with_its_columns(refused):
    message = refused(prompt_column="question")
    assert "question" in message and "reference" in message


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_or_null_prompt_is_refused_with_its_row(refused, tmp_path, prompt):
    good = [{"prompt": f"cat {i}"} for i in range(10)]
    data = write_rows(tmp_path / "data.jsonl", [*good[:3], {"prompt": prompt}, *good])
    message = refused(dataset=data)
    assert "row [3]" in message and str(data) in message


def test_no_prompt_within_the_limit_is_refused(refused):
    assert "--max_prompt_length 2" in refused(max_prompt_length=2)


def test_over_long_prompts_are_dropped_whole_rows_with_a_count(flags, folder, tmp_path, capsys):
    rows = [{"prompt": "cat " * (90 if i % 4 == 0 else 2) + str(i), "reference": str(i)}
            for i in range(20)]  # fmt: skip
    data = write_rows(tmp_path / "data.jsonl", rows)
    run = common.Run(sea.Config(**flags | {"dataset": str(data), "explore": "passive"}))
    assert "of 15 prompts" in capsys.readouterr().out
    kept = run.prompts.columns
    assert len(kept["prompt"]) == 11
    assert all(x.endswith(" " + y) for x, y in zip(kept["prompt"], kept["reference"]))


@pytest.mark.parametrize("text", ["", "not json\n", "[1, 2\n"])
def test_an_unreadable_data_set_is_named(refused, tmp_path, text):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    assert str(data) in refused(dataset=data)


def test_a_data_set_of_one_row_cannot_be_held_out(refused, tmp_path):
    assert "--dataset" in refused(dataset=write_rows(tmp_path / "d.jsonl", [{"prompt": "cat"}]))


def test_strange_prompts_are_legal(flags, folder, tmp_path):
    strange = ["🐈" * 5, "שלום קיטי", "a\x00b", "cat <|endoftext|> dog", "\u202ecat", "x" * 100_000]
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": text} for text in strange * 4])
    more = {"dataset": str(data), "explore": "passive", "num_queries": 4}
    run = sea.train(sea.Config(**flags | more))
    assert run.oracle.queries == 4


def test_a_reward_model_of_two_labels_is_refused(refused, tmp_path):
    model = conftest.make_model(CLASSIFIER, "gpt_neox", 0, num_labels=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "rm")
    conftest.make_tokenizer().save_pretrained(tmp_path / "rm")
    assert "--reward_model" in refused(reward_model=tmp_path / "rm")


def test_a_causal_model_is_no_reward_model(refused, flags):
    message = refused(reward_model=flags["model"])
    assert "--reward_model" in message and "score.weight" in message


def test_a_model_with_missing_weights_is_refused(refused, flags, tmp_path):
    shutil.copytree(flags["model"], tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    message = refused(model=tmp_path / "model")
    assert "layers.1.mlp.dense_h_to_4h.weight" in message and "--model" in message


def test_a_cut_off_weights_file_is_refused(refused, flags, tmp_path):
    shutil.copytree(flags["model"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"--model {tmp_path / 'model'}" in refused(model=tmp_path / "model")


def test_a_reference_with_another_vocabulary_is_refused(refused, tmp_path, flags):
    shutil.copytree(flags["model"], tmp_path / "ref")
    path = tmp_path / "ref" / "tokenizer.json"
    path.write_text(path.read_text().replace('"cat"', '"dog"').replace('"\u0120c"', '"\u0120zz"'))
    conftest.make_tokenizer()
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = list(vocabulary)[-1]
    vocabulary[token + "\u0120\u0120"] = vocabulary.pop(token)
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))
    assert "vocabulary" in refused(ref_model=tmp_path / "ref")


def test_a_tokenizer_without_eos_is_refused(refused, flags, tmp_path):
    shutil.copytree(flags["model"], tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer_config.json"):
        settings = json.loads(path.read_text())
        settings.pop("eos_token")
        path.write_text(json.dumps(settings))
    assert "EOS" in refused(model=tmp_path / "model")


def test_prompts_beyond_the_context_are_refused(refused):
    assert "128" in refused(max_prompt_length=200)


def test_a_model_that_misreads_packed_rows_is_refused(refused, tmp_path):
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    conftest.make_tokenizer().save_pretrained(tmp_path / "bloom")
    assert "packed" in refused(model=tmp_path / "bloom")


def test_a_used_folder_is_refused_and_left_as_it_was(refused, flags, folder):
    sea.train(sea.Config(**flags, explore="passive"))
    before = {path: path.stat().st_mtime_ns for path in Path(flags["output_dir"]).rglob("*")}
    assert "--overwrite" in refused(explore="passive")
    assert before == {p: p.stat().st_mtime_ns for p in Path(flags["output_dir"]).rglob("*")}
    message = refused("--resume", explore="passive", beta=0.2, seed=1)
    assert "--beta" in message and "--seed" in message and "--num_queries" not in message


def test_a_failed_start_leaves_no_folder_behind(refused, flags):
    refused(reward_model="./nowhere")
    assert not Path(flags["output_dir"]).exists()


def test_resume_without_a_run_and_a_file_as_folder_are_refused(refused, tmp_path):
    assert "--resume" in refused("--resume")
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(output_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_named(refused, flags, folder):
    backbone = str(folder / "erm_backbone")
    sea.train(sea.Config(**flags, explore="passive", erm_backbone=backbone))
    path = Path(flags["output_dir"]) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    assert "checkpoint.pt" in refused("--resume", explore="passive")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run(refused, monkeypatch, value):
    def forward(self, ids, attention_mask):
        from types import SimpleNamespace

        return SimpleNamespace(logits=torch.full((len(ids), 1), value))

    monkeypatch.setattr(transformers.GPTNeoXForSequenceClassification, "forward", forward)
    assert "finite" in refused()


def test_a_loss_that_is_not_finite_stops_with_the_round_and_the_pair(refused, flags, monkeypatch):
    calls = []

    def nan_later(logps, ref_logps, beta):
        calls.append(1)
        return logps.sum(1) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(common, "dpo", nan_later)
    message = refused(explore="passive")
    assert "round 2" in message and "TL;DR:" in message
    state = torch.load(Path(flags["output_dir"]) / "checkpoint.pt", weights_only=True)
    assert state["counts"]["rounds"] == 2  # the last good one
    assert all(weight.isfinite().all() for weight in state["policy"].values())


def test_ctrl_c_saves_says_how_to_resume_and_exits_130(flags, folder):
    command = [sys.executable, str(ROOT / "sea.py"), *arguments(flags | {"num_queries": 4000}),
               "--explore", "passive", "--checkpoint_every", "100000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pairs = Path(flags["output_dir"]) / "preferences.jsonl"
    while not (pairs.exists() and pairs.stat().st_size):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in out and "Traceback" not in err
    assert (pairs.parent / "checkpoint.pt").exists()


def test_debug_shows_the_traceback(flags):
    command = [sys.executable, str(ROOT / "sea.py"), "--model", "./nowhere", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode != 0 and "Traceback" in done.stderr
