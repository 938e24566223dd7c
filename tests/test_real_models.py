"""Do other families, tokenizers, chat templates and file formats work, in all three scripts?"""

import json
import subprocess
import sys
from pathlib import Path

import conftest
import datasets
import pytest
import torch
import transformers

import common
import pilaf
import sea
import selm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sea": sea, "selm": selm, "pilaf": pilaf}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def save(model: torch.nn.Module, folder: Path, template: str | None = None) -> str:
    tokenizer = conftest.make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def others(tmp_path, monkeypatch) -> dict:
    """Flags of a Llama policy with a chat template and a BERT reward model without one."""
    monkeypatch.setitem(conftest.SIZES, "max_position_embeddings", 256)
    causal, classifier = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSequenceClassification,
    )
    policy = conftest.make_model(causal, "llama", 1)
    rows = [
        dict(question=f"Why do cats {i}?", answer=f"cats {i}", bad=f"dogs {i}") for i in range(40)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward_model = conftest.make_model(classifier, "bert", 2, num_labels=1, pad_token_id=0)
    return dict(
        model=save(policy, tmp_path / "llama", TEMPLATE),
        reward_model=save(reward_model, tmp_path / "bert"),
        dataset=str(tmp_path / "data.jsonl"), prompt_column="question", reference_column="answer",
        output_dir=str(tmp_path / "run"), num_queries=6, batch_size=4, max_prompt_length=64,
        max_new_tokens=6, eval_every=4, eval_prompts=5,
    )  # fmt: skip


def config_of(script: str, flags: dict):
    own = dict(sea=dict(erm_backbone="reference"), selm=dict(other_column="bad"), pilaf={})
    return SCRIPTS[script].Config(**flags | own[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_policy_with_a_chat_template_learns_from_a_reward_model_of_another_family(script, others):
    run = SCRIPTS[script].train(config_of(script, others))
    assert run.oracle.queries == 6
    row = int(run.prompts.prompt_mask[0].argmax())
    text = run.tokenizer.decode(run.prompts.prompt_ids[0, row:])
    assert text == f"<user>{run.prompts.columns['prompt'][0]}</><assistant>"
    pairs = (run.folder / "preferences.jsonl").read_text().splitlines()
    assert all(json.loads(pair)["prompt"].startswith("Why do cats") for pair in pairs)


@pytest.mark.parametrize("setting, is_chat", [("off", False), ("auto", True), ("on", True)])
def test_the_chat_template_flag_decides_how_prompts_are_read(setting, is_chat, others):
    config = config_of("pilaf", others | dict(chat_template=setting))
    _, _, tokenizer = common.load_policies(config)
    prompts, _ = common.load_prompts(config, tokenizer)
    assert ("<user>" in tokenizer.decode(prompts.prompt_ids[0])) == is_chat


def test_a_reward_model_with_a_chat_template_reads_prompt_as_user_and_response_as_assistant(
    others, tmp_path
):
    classifier = transformers.AutoModelForSequenceClassification
    reward_model = classifier.from_pretrained(others["reward_model"])
    folder = save(reward_model, tmp_path / "chatty", TEMPLATE)
    chatty = common.Oracle(config_of("pilaf", others | dict(reward_model=folder)))
    plain = common.Oracle(
        config_of("pilaf", others | dict(reward_model=folder, chat_template="off"))
    )
    found = chatty.score(["Why?"], [["Because.", ""]])
    for oracle, texts in (
        (chatty, ["<user>Why?</><assistant>Because.</>", "<user>Why?</><assistant></>"]),
        (plain, ["Why? Because.", "Why?"]),
    ):
        for n, text in enumerate(texts):
            ids = torch.tensor([oracle.tokenizer(text, add_special_tokens=False)["input_ids"]])
            expected = oracle.model(ids, attention_mask=torch.ones_like(ids)).logits.item()
            value = oracle.score(["Why?"], [["Because.", ""]])[0, n].item()
            assert value == pytest.approx(expected, abs=1e-5)
    assert not torch.equal(found, plain.score(["Why?"], [["Because.", ""]]))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "splits"])
def test_prompts_come_from_files_and_folders_of_each_kind(kind, others, tmp_path):
    rows = [dict(question=f"Why do cats {i}?", answer=f"cats {i}") for i in range(20)]
    table = datasets.Dataset.from_list(rows)
    path = tmp_path / f"table.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        table.to_json(path)
    elif kind in ("csv", "parquet"):
        getattr(table, f"to_{kind}")(path)
    else:
        path.mkdir()
        table.to_json(path / "train.jsonl")
        if kind == "splits":
            (path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    config = config_of("pilaf", others | dict(dataset=str(path)))
    _, _, tokenizer = common.load_policies(config)
    train, held_out = common.load_prompts(config, tokenizer)
    num_held_out = 3 if kind == "splits" else 5
    assert len(held_out) == num_held_out
    assert len(train) == (20 if kind == "splits" else 15)
    assert train.columns["prompt"][0] == "Why do cats 0?"
    assert train.columns["reference"][0] == "cats 0"


def test_the_training_stages_make_a_policy_and_a_reward_model_from_another_base_and_data(
    others, tmp_path
):
    rows = [dict(prompt=f"Why do cats {i}?", completion=f"cats {i}") for i in range(20)]
    pairs = [dict(prompt=row["prompt"], chosen=row["completion"], rejected="no") for row in rows]
    for name, table in (("texts", rows), ("pairs", pairs)):
        datasets.Dataset.from_list(table).to_json(tmp_path / f"{name}.jsonl")
    make = [sys.executable, str(ROOT / "tiny" / "make.py")]
    settings = ["--num_steps", "3", "--batch_size", "4", "--max_prompt_length", "64"]
    for stage, data in (("sft", "texts"), ("reward_model", "pairs")):
        words = ["--base", others["model"], "--dataset", str(tmp_path / f"{data}.jsonl")]
        words += ["--output_dir", str(tmp_path / stage), *settings]
        done = subprocess.run([*make, stage, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    made = {"model": str(tmp_path / "sft"), "reward_model": str(tmp_path / "reward_model")}
    run = pilaf.train(config_of("pilaf", others | made))
    assert run.oracle.queries == 6
    before = transformers.AutoModelForCausalLM.from_pretrained(others["model"]).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(made["model"]).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
