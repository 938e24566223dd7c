"""Small models with random weights, in Hugging Face format, and what several tests need."""

import json
import os
from pathlib import Path

from common import Batch

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)  # small tensors; and a busy second core would stall every operation
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The cat sat on my keyboard again, so the report about Jack reads: aaaaaaa. TL;DR: cats!"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=0)  # fmt: skip


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """It starts a text with a BOS of its own, so that one that should not be there shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|start|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    start = dict(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(**start)
    tokens = dict(eos_token="<|endoftext|>", bos_token="<|start|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def make_model(auto_class, family: str, seed: int, **options) -> torch.nn.Module:
    """A random model whose outputs are far from uniform, so that an error would show."""
    torch.manual_seed(seed)
    sizes = SIZES | ({"num_key_value_heads": 2} if family == "llama" else {})
    config = transformers.AutoConfig.for_model(family, vocab_size=300, **sizes, **options)
    model = auto_class.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def save(model: torch.nn.Module, folder: Path, **changes) -> str:
    """The model and a tokenizer with changed attributes, as a folder."""
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session", params=["gpt_neox", "llama"])
def model(request):
    return make_model(transformers.AutoModelForCausalLM, request.param, seed=0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data set with a policy, a reward model, and an encoder, as --model and so on take them."""
    root = tmp_path_factory.mktemp("world")
    causal = transformers.AutoModelForCausalLM
    classifier = transformers.AutoModelForSequenceClassification
    save(make_model(causal, "gpt_neox", 1), root / "sft")
    for name, seed in (("reward_model", 2), ("erm_backbone", 3)):
        options = dict(num_labels=1, pad_token_id=0)
        save(make_model(classifier, "gpt_neox", seed, **options), root / name)
    for name, size in (("train", 40), ("test", 10)):
        same = dict(wanted=["cat"], wrong=["dog"], clutter=["mat"])
        prompts = [f"The cat {name} number {i}. TL;DR:" for i in range(size)]
        rows = [same | dict(prompt=prompt, reference=f"cat {i}", other=f"a cat {i}")
                for i, prompt in enumerate(prompts)]  # fmt: skip
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def flags(folder, tmp_path) -> dict:
    """Flags of a run of seconds on those models."""
    return dict(
        model=str(folder / "sft"), dataset=str(folder), reward_model=str(folder / "reward_model"),
        output_dir=str(tmp_path / "run"), num_queries=12, batch_size=4, max_prompt_length=48,
        max_new_tokens=6, eval_every=4, eval_prompts=5, checkpoint_every=1, warmup_steps=0, seed=3,
    )  # fmt: skip


def rows(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """What two equal runs must share byte for byte."""
    names = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl", "labels.jsonl")
    return {name: (folder / name).read_bytes() for name in (*names, "model/model.safetensors")}


def make_batch(
    prompt_lengths: list[int], response_lengths: list[list[int]], seed: int = 0
) -> Batch:
    """Random prompts and responses of these lengths. EOS and padding, 0, is in long prompts too."""
    rng = torch.Generator().manual_seed(seed)
    prompt_ids = torch.zeros(len(prompt_lengths), max(prompt_lengths), dtype=torch.long)
    sizes = (len(response_lengths), len(response_lengths[0]), max(map(max, response_lengths)))
    response_ids = torch.zeros(sizes, dtype=torch.long)
    prompt_mask, response_mask = torch.zeros_like(prompt_ids), torch.zeros_like(response_ids)
    for b, length in enumerate(prompt_lengths):
        prompt_ids[b, -length:] = torch.randint(1, 300, (length,), generator=rng)
        prompt_mask[b, -length:] = 1
        prompt_ids[b, -length + 1 : -1] *= torch.arange(length - 2) != 0 if length > 2 else 1
        for n, size in enumerate(response_lengths[b]):
            response_ids[b, n, :size] = torch.randint(1, 300, (size,), generator=rng)
            response_mask[b, n, :size] = 1
    texts = [[f"response {b} {n}" for n in range(sizes[1])] for b in range(sizes[0])]
    columns = {"prompt": [f"prompt {b}" for b in range(sizes[0])]}
    return Batch(columns, prompt_ids, prompt_mask, texts, response_ids, response_mask)


def real_ids(batch: Batch, b: int, n: int) -> tuple[list[int], list[int]]:
    """Prompt b and its response n as lists of tokens, without padding."""
    prompt = [i for i, m in zip(batch.prompt_ids[b].tolist(), batch.prompt_mask[b]) if m]
    response = zip(batch.response_ids[b, n].tolist(), batch.response_mask[b, n])
    return prompt, [i for i, m in response if m]


@torch.no_grad()
def plain_response(model, prompt: list[int], uniforms: list, eos: list, temperature: float) -> list:
    """A response, recomputed at each step; greedy with uniforms of 0.5 at temperatures near 0."""
    response = []
    for uniform in uniforms:
        logits = model(torch.tensor([prompt + response])).logits[0, -1].double()
        cumulative = (logits / temperature).softmax(-1).cumsum(-1).tolist()
        response.append(next(k for k, total in enumerate(cumulative) if total > uniform))
        if response[-1] in eos:
            break
    return response


def plain_token_logps(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """log pi(y_t | x, y_<t), (B, N, R), from one unpadded forward a response: the definition."""
    num_prompts, num_responses, length = batch.response_ids.shape
    rows = []
    for b in range(num_prompts):
        for n in range(num_responses):
            prompt, response = real_ids(batch, b, n)
            logits = model(torch.tensor([prompt + response])).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            own = logps[range(len(response)), response]
            rows.append(torch.nn.functional.pad(own, (0, length - len(response))))
    return torch.stack(rows).view(num_prompts, num_responses, length)
