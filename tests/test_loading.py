"""Which models and data sets are read, and read rightly? What cannot be is refused in words."""

import shutil

import harness
from common import UserError

import datasets
import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, rows, save
from test_run import SCRIPTS, change, config_of, train, write

CAUSAL = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification
TEMPLATE = "<|start|>{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


def load(flags: dict, script: str = "pilaf", **changes) -> tuple:
    """The training and the held-out prompts of a run with changed flags, and the tokenizer."""
    config = config_of(script, flags, **changes)
    tokenizer = harness.load_pretrained(CAUSAL, "model", config)[1]
    return *harness.load_prompts(config, tokenizer), tokenizer


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_file_of_each_kind_is_read_and_its_last_rows_are_held_out(kind, flags, tmp_path):
    table = [dict(question=f"Why cats {i}?", answer=f"cats {i}", number=i) for i in range(20)]
    path = tmp_path / f"data.{kind}"
    getattr(datasets.Dataset.from_list(table), f"to_{kind.removesuffix('l')}")(path)
    more = dict(dataset=str(path), prompt_column="question", reference_column="answer")
    prompts, held_out, _ = load(flags, **more)
    assert prompts.columns["prompt"] == [f"Why cats {i}?" for i in range(15)]
    assert held_out.columns["reference"] == [f"cats {i}" for i in range(15, 20)]
    assert set(prompts.columns) == {"prompt", "reference"}
    prompts, held_out, _ = load(flags, **more, eval_prompts=100)
    assert len(prompts) == len(held_out) == 10  # half at most
    with pytest.raises(UserError, match="--dataset .*one.jsonl has one row"):
        load(flags, dataset=write(tmp_path / "one.jsonl", [{"prompt": "cat"}]))


@pytest.mark.parametrize("splits, used", [
    ("train validation test", "test"), ("train dev", "dev"), ("validation test", "test"),
])  # fmt: skip
def test_the_test_split_of_a_folder_is_held_out_else_validation(splits, used, flags, tmp_path):
    for name in splits.split():
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} cat {i}"} for i in range(8)])
    prompts, held_out, _ = load(flags, dataset=str(tmp_path))
    assert prompts.columns["prompt"] == [f"{splits.split()[0]} cat {i}" for i in range(8)]
    assert held_out.columns["prompt"] == [f"{used} cat {i}" for i in range(5)]  # --eval_prompts


def test_prompts_are_padded_left_and_dropped_with_a_count_if_too_long(flags, tmp_path, capsys):
    texts = ["cat " * (80 if i % 4 == 0 else i) + str(i) for i in range(20)]
    table = [{"prompt": text, "reference": str(i)} for i, text in enumerate(texts)]
    prompts, held_out, tokenizer = load(flags, dataset=write(tmp_path / "data.jsonl", table))
    assert "dropped    4 of 15 prompts: --max_prompt_length" in capsys.readouterr().out
    kept = [i for i in range(15) if i % 4]
    assert prompts.columns["reference"] == [str(i) for i in kept] and len(held_out) == 4
    for i, ids, mask in zip(kept, prompts.prompt_ids, prompts.prompt_mask):
        real = tokenizer(texts[i])["input_ids"]
        assert ids[-len(real) :].tolist() == real and real.count(1) == 1  # one BOS
        assert mask.tolist() == [0] * (len(ids) - len(real)) + [1] * len(real)
    with pytest.raises(UserError, match="--max_prompt_length 2"):
        load(flags, max_prompt_length=2)


def test_the_order_of_prompts_changes_with_seed_and_epoch_and_an_epoch_has_each_once(flags):
    prompts, *_ = load(flags)
    stretches = [(start, seed) for seed in (0, 1) for start in (0, 40)]
    orders = [tuple(harness.next_prompts(prompts, start, 40, seed).columns["prompt"])
              for start, seed in stretches]  # fmt: skip
    assert len(set(orders)) == 4 and {*map(frozenset, orders)} == {frozenset(orders[0])}
    across = harness.next_prompts(prompts, 35, 10, 0).columns["prompt"]  # two epochs' prompts
    assert len(set(orders[0])) == 40 and across == [*orders[0][35:], *orders[1][:5]]


@pytest.mark.parametrize("prompt", ["", " \n", None, 3, [], {"a": "b"}, [{"role": "assistant"}]])
def test_a_prompt_that_is_empty_or_no_text_is_refused(prompt, flags, tmp_path):
    is_text = prompt is None or isinstance(prompt, str)
    table = [{"prompt": "cat" if is_text else prompt}] * 8
    table[2 if is_text else 0] = {"prompt": prompt}
    data = write(tmp_path / "data.jsonl", table)
    with pytest.raises((UserError, TypeError)):
        load(flags, dataset=data)


@pytest.mark.parametrize("script, name", [*zip(SCRIPTS, ("reference", "other", "prompt"))])
def test_a_column_that_was_named_and_is_not_there_is_an_error(script, name, flags, tmp_path):
    for wrong in ("answr", ""):
        with pytest.raises(UserError, match=f"--{name}_column {wrong}; it has .*wanted"):
            load(flags, script, **{f"{name}_column": wrong})
    data = write(tmp_path / "data.jsonl", [{"text": "cat"}] * 8)
    with pytest.raises(UserError, match=f"--{name}_column {name}; it has text"):  # by its own name
        load(flags, script, **dict(dataset=data, prompt_column="text") | {f"{name}_column": name})


@pytest.mark.parametrize("column", [{"other": 3}, {"other": ""}, {"wanted": ["a"]}])
def test_a_column_that_a_script_does_not_read_may_hold_anything(column, flags, tmp_path):
    """PILAF and SEA know no second response, and wanted facts without the rest are no gold."""
    table = [{"prompt": f"cat {i}", "reference": "a"} | column for i in range(20)]
    folder = train("pilaf", flags, dataset=write(tmp_path / "data.jsonl", table), num_queries=4)
    assert "gold" not in rows(folder / "metrics.jsonl")[-1]


def chat(*turns: str) -> list[dict]:
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


def test_a_chat_is_read_by_the_template_and_judged_by_its_last_user_turn(flags, tmp_path):
    chatty = save(make_model(CAUSAL, "llama", 1), tmp_path / "chatty", chat_template=TEMPLATE)
    chats = [chat("Hi", "Yes?", f"Why {i}?") for i in range(20)]
    table = [dict(prompt=c, reference=chat("x", f"So {i}")) for i, c in enumerate(chats)]
    data = write(tmp_path / "chats.jsonl", table)
    more = dict(model=chatty, dataset=data, max_prompt_length=100)
    prompts, held_out, tokenizer = load(flags, **more)
    for i, (ids, mask) in enumerate(zip(prompts.prompt_ids, prompts.prompt_mask)):
        expected = f"<|start|><user>Hi</><assistant>Yes?</><user>Why {i}?</><assistant>"
        assert tokenizer.decode(ids[mask.bool()]) == expected  # with one BOS
    assert held_out.columns["prompt"] == [f"Why {i}?" for i in range(15, 20)]
    assert prompts.columns["reference"] == [f"So {i}" for i in range(15)]
    pairs = rows(train("pilaf", flags, **more) / "preferences.jsonl")
    assert {pair["prompt"] for pair in pairs} <= {*prompts.columns["prompt"]} and len(pairs) == 12
    with pytest.raises(ValueError, match="chat_template is not set"):
        load(flags, dataset=data)
    prompts, _, tokenizer = load(flags, model=chatty)  # texts become user turns
    text = tokenizer.decode(prompts.prompt_ids[0][prompts.prompt_mask[0].bool()])
    assert text == f"<|start|><user>{prompts.columns['prompt'][0]}</><assistant>"


def gpt2(num_positions: int = 128) -> torch.nn.Module:
    sizes = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
    return CAUSAL.from_config(transformers.GPT2Config(**sizes, n_positions=num_positions))


def test_a_model_with_learned_positions_trains_and_its_kl_starts_at_zero(flags, tmp_path):
    folder = train("pilaf", flags, model=save(gpt2(), tmp_path / "gpt2"))
    assert rows(folder / "metrics.jsonl")[0]["kl"] == 0


BLOOM = dict(hidden_size=32, n_layer=2, n_head=4)
MISTRAL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=8, sliding_window=44)


@pytest.mark.parametrize("family, sizes", [("bloom", BLOOM), ("mistral", MISTRAL)])
def test_a_model_that_misreads_packed_rows_is_refused(family, sizes, flags, tmp_path):
    """ALiBi counts distances in the row; a window of 44 tokens shows at full length, 48 + 6."""
    config = transformers.AutoConfig.for_model(family, vocab_size=300, **sizes)
    name = save(CAUSAL.from_config(config), tmp_path / "odd")
    with pytest.raises(UserError, match=f"--model {name} .*packed rows"):
        harness.load_policies(config_of("pilaf", flags, model=name))


@pytest.mark.parametrize("name", ["ref_model", "erm_backbone"])
def test_a_short_context_and_another_vocabulary_are_refused(name, flags, tmp_path):
    short = save(gpt2(53), tmp_path / "short")  # 48 + 6 are needed
    with pytest.raises(UserError, match=f"--{name} {short} reads 53 tokens.* 54"):
        train("sea", flags, **{name: short})
    (tokenizer := make_tokenizer()).add_tokens(["meow"])
    tokenizer.save_pretrained(other := save(gpt2(), tmp_path / "other"))
    with pytest.raises(UserError, match=f"--{name} {other} has another vocabulary than --model"):
        train("sea", flags, **{name: other})


def test_no_or_a_short_reward_model_several_labels_and_a_model_without_eos_are_refused(
    flags, tmp_path
):
    with pytest.raises(UserError, match="--reward_model .*sft lacks weights.*score.weight"):
        train("pilaf", flags, reward_model=flags["model"])
    two = make_model(CLASSIFIER, "gpt_neox", 0, num_labels=2, pad_token_id=0)
    with pytest.raises(UserError, match="--reward_model has several labels"):
        train("pilaf", flags, reward_model=save(two, tmp_path / "two"))
    short = shutil.copytree(flags["reward_model"], tmp_path / "short")
    change(short / "config.json", max_position_embeddings=53)
    with pytest.raises(UserError, match="--reward_model .*short reads 53 tokens.* 54"):
        train("pilaf", flags, reward_model=str(short))
    endless = save(gpt2(), tmp_path / "endless", eos_token=None)
    with pytest.raises(UserError, match=f"--model {endless} has no EOS"):
        train("pilaf", flags, model=endless)
