"""Is anything lost, silent or left to chance? All three scripts, from outside as processes."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import pilaf
import sea
import selm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sea": sea, "selm": selm, "pilaf": pilaf}
FILES = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl", "model/model.safetensors")

# Runs a script's command line, and stops in the middle of the nth call of one function, for a kill.
STOPPED = """
import pathlib, sys, time
import torch, common, {script} as script
marker, owner, name, nth = {marker!r}, {owner}, {name!r}, {nth}
original, calls = getattr(owner, name), []
def stop(*args, **options):
    calls.append(1)
    if len(calls) == nth:
        if name == "save":  # half a file under the name that torch was given
            pathlib.Path(args[1]).write_bytes(b"half")
        pathlib.Path(marker).touch()
        time.sleep(600)
    return original(*args, **options)
setattr(owner, name, stop)
common.main(script.Config, script.train, script.__doc__)
"""
MOMENTS = {
    "while a checkpoint is written": ("torch", "save", 2),
    "in an evaluation": ("common", "gold_score", 20),  # 16 a time: in the second one
    "between pairs and step": ("common.Run", "learn", 3),
    "while the oracle answers": ("common.Oracle", "score", 5),
    "before anything is saved": ("common.Run", "write", 1),
}


def arguments(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def tiny_flags(folder: Path) -> dict:
    """Of a run of seconds on the shipped world."""
    return dict(num_queries=96, eval_every=32, eval_prompts=16, checkpoint_every=1,
                max_new_tokens=12, output_dir=str(folder))  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def run_process(script: str, flags: dict, *words: str, code: str | None = None) -> subprocess.Popen:
    program = ["-c", code] if code else [str(ROOT / f"{script}.py")]
    command = [sys.executable, *program, *arguments(flags), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def finish(script: str, flags: dict, *words: str) -> str:
    process = run_process(script, flags, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def resume(script: str, flags: dict) -> None:
    """As a user would: --resume, or the plain command if nothing was written yet."""
    is_begun = (Path(flags["output_dir"]) / "config.json").exists()
    finish(script, flags, *["--resume"] * is_begun)


def kill_at(script: str, flags: dict, moment: str, marker: Path) -> None:
    owner, name, nth = MOMENTS[moment]
    code = STOPPED.format(script=script, marker=str(marker), owner=owner, name=name, nth=nth)
    process = run_process(script, flags, code=code)
    wait_for(marker, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each script writes when nothing interrupts it."""
    written = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp("whole") / script
        finish(script, tiny_flags(folder))
        written[script] = contents(folder)
    return written


@pytest.mark.parametrize(
    "script, moment",
    [
        ("sea", "while a checkpoint is written"),
        ("selm", "in an evaluation"),
        ("pilaf", "between pairs and step"),
    ],
)
def test_a_killed_run_resumes_to_the_very_bytes_of_an_uninterrupted_one(
    script, moment, whole, tmp_path
):
    flags = tiny_flags(tmp_path / "run")
    kill_at(script, flags, moment, tmp_path / "marker")
    resume(script, flags)
    assert contents(tmp_path / "run") == whole[script]
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_each_moment_and_once_more_at_random(script, moment, whole, tmp_path):
    flags = tiny_flags(tmp_path / "run")
    kill_at(script, flags, moment, tmp_path / "marker")
    is_begun = (tmp_path / "run" / "config.json").exists()
    process = run_process(script, flags, *["--resume"] * is_begun)
    seconds = random.Random(script + moment).uniform(3, 12)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    resume(script, flags)
    assert contents(tmp_path / "run") == whole[script]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, words",
    [
        ("selm", ["--bonus", "xpo"]),
        ("selm", ["--first_iteration", "offline"]),
        ("pilaf", ["--num_iterations", "2", "--num_epochs", "2"]),
        ("pilaf", ["--importance_weights", "1", "--beta", "0.5"]),
        ("sea", ["--explore", "ee", "--gamma", "0.5", "--burn_in", "16"]),
    ],
)
def test_other_arms_killed_at_random_moments(script, words, tmp_path):
    finish(script, tiny_flags(tmp_path / "whole"), *words)
    flags = tiny_flags(tmp_path / "run")
    rng = random.Random(" ".join(words))
    for _ in range(4):
        is_begun = (tmp_path / "run" / "config.json").exists()
        process = run_process(script, flags, *words, *["--resume"] * is_begun)
        try:
            process.communicate(timeout=rng.uniform(4, 9))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    finish(script, flags, *words, "--resume")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_saves_says_how_to_resume_and_exits_130(script, tmp_path, whole):
    flags = tiny_flags(tmp_path / "run") | {"checkpoint_every": 1000}
    process = run_process(script, flags)
    wait_for(tmp_path / "run" / "preferences.jsonl", process)
    while not (tmp_path / "run" / "preferences.jsonl").stat().st_size:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "--resume" in out and "Traceback" not in err
    finish(script, flags, "--resume")
    assert contents(tmp_path / "run") == whole[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_used_folder_is_refused_and_other_flags_are_named_on_resume(script, tmp_path):
    flags = tiny_flags(tmp_path / "run") | {"num_queries": 6, "max_new_tokens": 4}
    finish(script, flags)
    before = contents(tmp_path / "run")
    for words, named in (
        ([], ["--overwrite"]),
        (["--resume", "--beta", "0.2", "--seed", "3"], ["--beta", "--seed"]),
        (["--resume", "--num_queries", "5"], ["--num_queries 5", "has 6 labels"]),
    ):
        process = run_process(script, flags, *words)
        _, err = process.communicate(timeout=100)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in err
        assert all(name in lines[0] for name in named)
        assert ("--num_queries" in lines[0]) == ("--num_queries" in words)
    assert contents(tmp_path / "run") == before


# ------------------------------------------------------------------ determinism, in one process


def train(script: str, flags: dict, folder: Path, name: str, **more) -> Path:
    if script == "sea":
        more |= {"erm_backbone": str(folder / "erm_backbone"), "burn_in": 4}
    output_dir = Path(flags["output_dir"]).parent / name
    given = flags | {"num_queries": 24} | more | {"output_dir": str(output_dir)}
    SCRIPTS[script].train(SCRIPTS[script].Config(**given))
    return output_dir


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ARMS = [
    ("sea", {}), ("selm", {}), ("selm", {"bonus": "xpo"}), ("selm", {"ranker_candidates": 2}),
    ("pilaf", {}), ("pilaf", {"sampler": "hybrid"}), ("pilaf", {"sampler": "best_of_n"}),
    ("pilaf", {"importance_weights": True, "num_iterations": 2, "num_epochs": 2}),
]  # fmt: skip


@pytest.mark.parametrize("script, arm", ARMS)
def test_one_seed_twice_is_the_same_another_differs_and_evaluation_changes_no_training(
    script, arm, flags, folder
):
    first = train(script, flags, folder, "a", **arm)
    again = train(script, flags, folder, "b", **arm)
    assert contents(first) == contents(again)
    other = train(script, flags, folder, "c", seed=1, **arm)
    assert (first / FILES[1]).read_bytes() != (other / FILES[1]).read_bytes()
    seldom = train(script, flags, folder, "d", eval_every=1000, eval_prompts=3, **arm)
    for name in ("preferences.jsonl", "model/model.safetensors"):
        assert (first / name).read_bytes() == (seldom / name).read_bytes(), name


@pytest.mark.parametrize("script, arm", ARMS)
def test_micro_batches_change_nothing_beyond_float_tolerance(script, arm, flags, folder):
    more = arm | {
        "learning_rate": 1e-5
    }  # Adam makes large steps of gradients that are mere rounding
    whole = train(script, flags, folder, "whole", **more)
    parts = train(script, flags, folder, "parts", micro_batch_size=3, **more)
    assert rows(whole / "preferences.jsonl") == rows(parts / "preferences.jsonl")
    for a, b in zip(rows(whole / FILES[0]), rows(parts / FILES[0]), strict=True):
        assert a.pop("compared_with") == b.pop("compared_with")
        assert b == pytest.approx(a, rel=2e-3, abs=1e-3)


# ------------------------------------------------------------------ wrong values of every flag


def kinds(hint) -> tuple:
    """The types that a flag takes: of float | None, (float, NoneType)."""
    inner = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
    return tuple(get_args(kind)[0] if get_origin(kind) is list else kind for kind in inner)


CASES = [
    (script, field.name, kinds(get_type_hints(SCRIPTS[script].Config)[field.name]))
    for script in SCRIPTS
    for field in dataclasses.fields(SCRIPTS[script].Config)
]
NUMBERS = [case for case in CASES if int in case[2] or float in case[2]]


@pytest.mark.parametrize("script, name, types", CASES)
def test_a_value_of_another_type_is_refused_by_name(script, name, types):
    wrong = {str: "cat", bool: True, int: 3, float: 0.5, bytes: b"1", tuple: (1,), dict: {}}
    for kind, value in wrong.items():
        is_legal = kind in types or (kind is int and float in types)
        is_legal |= kind is str and name in ("output_dir", "ref_model")
        if not is_legal:
            with pytest.raises(common.UserError, match=name):
                SCRIPTS[script].Config(**{name: value})


@pytest.mark.parametrize("script, name, types", NUMBERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_number_out_of_range_is_refused_by_name(script, name, types, data):
    below = st.integers(max_value=-1)
    if float in types:
        negative = st.floats(max_value=0, exclude_max=True, allow_infinity=True)
        below = st.one_of(negative, st.sampled_from([math.nan, math.inf]))
    with pytest.raises(common.UserError, match=name):
        SCRIPTS[script].Config(**{name: data.draw(below)})
    if name not in SCRIPTS[script].Config.may_be_zero:
        with pytest.raises(common.UserError, match=name):
            SCRIPTS[script].Config(**{name: 0})


@pytest.mark.parametrize("script, name, types", NUMBERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_number_in_range_is_taken_or_refused_with_a_sentence_and_never_a_traceback(
    script, name, types, data
):
    legal = st.integers(min_value=1) if float not in types else st.floats(min_value=0)
    try:
        config = SCRIPTS[script].Config(**{name: data.draw(legal)})
    except common.UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert math.isfinite(getattr(config, name))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["batch_size", "beta", "labels", "device", "resume"])
def test_the_command_line_refuses_what_the_dataclass_refuses(script, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", f"--{name}", "no-such-thing"])
    with pytest.raises(SystemExit) as stop:
        common.main(SCRIPTS[script].Config, SCRIPTS[script].train, "title")
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and name in printed and printed.count("error: ") == 1


# ------------------------------------------------------------------ data, models, oracles


@pytest.fixture
def refused(flags, folder, capsys, monkeypatch):
    """Run a script's command line on changed flags; return its one sentence."""

    def run(script: str, **changes) -> str:
        given = flags | changes
        if script == "sea":
            given["erm_backbone"] = folder / "erm_backbone"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments(given)])
        with pytest.raises(SystemExit) as stop:
            common.main(SCRIPTS[script].Config, SCRIPTS[script].train, "title")
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in printed, printed
        return lines[0]

    return run


STRANGE = ["🐈" * 5, "שלום קיטי", "a\x00b", "cat <|endoftext|> dog", "\u202ecat", "cat " * 25_000]


@pytest.mark.parametrize("script", SCRIPTS)
def test_strange_texts_are_legal_prompts_and_responses(script, flags, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [dict(prompt=text, reference=text[:50], other=text[:9]) for text in STRANGE * 8]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = dict(dataset=str(data), num_queries=6)
    folder = train(script, flags, folder, "strange", **more)
    prompts = {row["prompt"] for row in rows(folder / "preferences.jsonl")}
    assert prompts <= set(STRANGE[:-1]) and prompts  # the last one is too long
    assert rows(folder / "metrics.jsonl")[-1]["queries"] == 6


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_data_set_of_no_row_or_one_is_refused(script, num_rows, refused, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "cat", "reference": "a", "other": "b"}\n' * num_rows)
    assert "--dataset" in refused(script, dataset=data)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cut_off_reward_model_and_a_folder_that_is_a_file_are_refused(
    script, refused, flags, tmp_path
):
    import shutil

    shutil.copytree(flags["reward_model"], tmp_path / "rm")
    weights = tmp_path / "rm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-999])
    assert f"--reward_model {tmp_path / 'rm'}" in refused(script, reward_model=tmp_path / "rm")
    (tmp_path / "file").write_text("mine")
    assert "--output_dir" in refused(script, output_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_whose_eos_never_comes_trains_on_cut_off_responses(script, flags, folder, tmp_path):
    """Its unembedding makes the EOS, token 0, impossible; every sample has all the tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(flags["model"])
    with torch.no_grad():
        states = model.gpt_neox.final_layer_norm
        states.bias.zero_()
        states.bias[0] = 100.0
        states.weight.mul_(0.1)
        unembedding = model.get_output_embeddings().weight
        unembedding[:, 0] = 0.0
        unembedding[0] = 0.0
        unembedding[0, 0] = -10.0
    model.save_pretrained(tmp_path / "endless")
    transformers.AutoTokenizer.from_pretrained(flags["model"]).save_pretrained(tmp_path / "endless")
    folder = train(script, flags, folder, "run", model=str(tmp_path / "endless"), num_queries=6)
    assert rows(folder / "metrics.jsonl")[-1]["length"] == flags["max_new_tokens"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tokenizer_without_pad_token_is_given_eos_and_one_without_eos_is_refused(
    script, refused, flags, folder, tmp_path
):
    import shutil

    settings_file = Path(flags["model"]) / "tokenizer_config.json"
    assert "pad_token" not in json.loads(settings_file.read_text())  # Pythia's has none either
    train(script, flags, folder, "padded", num_queries=6)
    shutil.copytree(flags["model"], tmp_path / "model")
    kept = json.loads(settings_file.read_text())
    kept.pop("eos_token")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(kept))
    assert "EOS" in refused(script, model=tmp_path / "model")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_stops_at_once(script, value, refused, monkeypatch):
    from types import SimpleNamespace

    def forward(self, ids, attention_mask):
        return SimpleNamespace(logits=torch.full((len(ids), 1), value))

    monkeypatch.setattr(transformers.GPTNeoXForSequenceClassification, "forward", forward)
    assert "finite" in refused(script)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_round_and_pair_and_keeps_the_last_checkpoint(
    script, value, refused, flags, monkeypatch
):
    update, calls = common.update, []

    def bad_later(policy, optimizer, groups, pair_loss, config):
        calls.append(1)
        factor = value if len(calls) > 3 else 1.0
        return update(policy, optimizer, groups, lambda *a: pair_loss(*a) * factor, config)

    monkeypatch.setattr(common, "update", bad_later)
    message = refused(script, num_queries=60)
    assert "round " in message and "TL;DR:" in message
    path = Path(flags["output_dir"]) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert all(weight.isfinite().all() for weight in state["policy"].values())
    assert state["counts"]["rounds"] == int(message.split("round ")[1].split(":")[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_is_said_in_one_sentence_and_keeps_the_last_checkpoint(
    script, refused, tmp_path
):
    """Needs the right to mount; the disk fills up while the second checkpoint is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        message = refused(script, output_dir=disk / "run")
        assert "cannot be written" in message and str(disk) in message
        assert not list((disk / "run").glob("*.tmp"))
        if (disk / "run" / "checkpoint.pt").exists():
            torch.load(disk / "run" / "checkpoint.pt", weights_only=True)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ------------------------------------------------------------------ a long run


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_thousand_labels_take_no_more_memory_at_the_end_than_at_the_start(script, tmp_path):
    """Resident memory, read twice a second: peak of the last tenth against the second tenth."""
    flags = dict(num_queries=10_000, output_dir=str(tmp_path / "run"))
    process, sizes = run_process(script, flags), []
    done = Path(f"/proc/{process.pid}/statm")
    while process.poll() is None:
        pages = done.read_text().split()
        sizes.append((time.monotonic(), int(pages[1]) * os.sysconf("SC_PAGE_SIZE")))
        time.sleep(0.5)
    assert process.returncode == 0, process.communicate()
    tenth = len(sizes) // 10
    early = max(size for _, size in sizes[tenth : 2 * tenth])
    late = max(size for _, size in sizes[-tenth:])
    print(f"{script}: {early / 2**20:.0f} MiB in the second tenth, {late / 2**20:.0f} in the last")
    assert late <= 1.05 * early
