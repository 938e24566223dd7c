#!/usr/bin/env python3
"""Make the miniature world of this folder: posts, a policy to improve, and a picky annotator.

    python tiny/make.py      # 15 to 40 minutes of one core

Two of its training stages on models and data of your own, for instance a triple of 160M weights:

    python tiny/make.py sft --base EleutherAI/pythia-160m --dataset trl-lib/tldr --output_dir sft
    python tiny/make.py reward_model --base sft --dataset trl-lib/tldr-preference --output_dir rm

The papers' pipeline, a thousand times smaller, in the order in which one runs it:
0. `write_data`. A grammar (its words are in words.json) writes Reddit posts in the TL;DR format and
   two mediocre summaries of each, as people would: facts missing, facts wrong, filler. A post has
   five facts of eight kinds: who did what, and three of when, where, feeling, cost, excuse, plan.
   The annotators are busy people who want three kinds and no others; which three, the seed draws
   before anything is trained. A row lists the texts that are `wanted`, the `wrong` versions of
   these, and the `clutter`: `gold.py` counts them, and no model is given them.
1. `make_sft`: a small Pythia learns to summarise as people do -> `sft/`, the policy's start.
2. `make_reader`: another one learns to mark the facts of any summary as right or wrong ->
   `erm_backbone/`, whose states are the features of SEA's ensemble. It knows facts, no wishes.
3. `make_oracle`: from the reader, a reward model learns by noisy pairs that were judged by the gold
   score -> `reward_model/`, which labels duels.

`train_sft` and `train_reward_model` know nothing of this world: any causal language model or any
sequence classifier with one label, any data set, on the model's device. All is seeded: the data
come out byte for byte, the weights on the same machine, torch and number of threads (one).

What came out: SFT samples win 48 % against people; the oracle agrees with gold on 91 % of pairs of
SFT samples, 91 % of a policy's after 2,000 labels; the reader's marks alone order 67 % of pairs.
Shapes: B prompts, N responses a prompt, P prompt tokens, R response tokens; common.py has others.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # so that `python tiny/make.py` finds common.py

import common  # noqa: E402
import harness  # noqa: E402
from common import Batch  # noqa: E402

WORDS = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
TOPICS: dict[str, dict[str, list[str]]] = WORDS["topics"]  # topic -> who and deed -> their facts
DETAILS: dict[str, list[str]] = WORDS["details"]  # six more kinds -> their facts
KINDS = ["who", "deed", *DETAILS]


# ---------------------------------------------------------------- stage 0: posts and summaries


@dataclass(frozen=True)
class Post:
    """What happened. A careless reader takes a fact for one of its two neighbours in its table."""

    prompt: str
    facts: dict[str, str]  # kind -> the fact: who, deed, and three kinds of DETAILS
    mistakes: dict[str, list[str]]  # kind -> what it may be taken for

    def texts(self, taste: list[str]) -> dict[str, list[str]]:
        """The texts that `gold.py` counts, for annotators who want the kinds `taste`."""
        wanted = [kind for kind in self.facts if kind in taste]
        others = [kind for kind in self.facts if kind not in taste]
        return {
            "wanted": [self.facts[kind] for kind in wanted],
            "wrong": [text for kind in wanted for text in self.mistakes[kind]],
            "clutter": [text for kind in others for text in self.versions(kind)],
        }

    def versions(self, kind: str) -> list[str]:
        return [self.facts[kind], *self.mistakes[kind]]


def draw_taste(seed: int) -> list[str]:
    """The three kinds of fact that the annotators want."""
    return random.Random(f"taste {seed}").sample(KINDS, 3)


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_post(rng: random.Random) -> Post:
    """Invent five facts and tell them as a post in the TL;DR format."""
    topic = rng.choice(list(TOPICS))
    details = rng.sample(list(DETAILS), 3)
    tables = TOPICS[topic] | {kind: DETAILS[kind] for kind in details}
    places = {kind: rng.randrange(len(table)) for kind, table in tables.items()}
    facts = {kind: tables[kind][place] for kind, place in places.items()}
    mistakes = {
        kind: [tables[kind][place - 1], tables[kind][(place + 1) % len(tables[kind])]]
        for kind, place in places.items()
    }
    story, sentences = f"{facts['who']} {facts['deed']}", []
    for kind in details:
        if kind in ("when", "where") and rng.random() < 0.6:
            story += f" {facts[kind]}"
        else:
            sentences.append(rng.choice(WORDS["post_sentences"][kind]).format(facts[kind]))
    rng.shuffle(sentences)
    intro = rng.choice(WORDS["intros"])
    story = f"{intro} {story if intro.endswith((',', ':', 'so')) else capitalize(story)}."
    body = " ".join([story.strip(), *sentences, rng.choice(WORDS["outros"])]).strip()
    title = capitalize(rng.choice(WORDS["titles"]).format(who=facts["who"]))
    prompt = f"SUBREDDIT: r/{topic}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"
    return Post(prompt, facts, mistakes)


def recall(rng: random.Random, post: Post, care: float) -> dict[str, str]:
    """The facts as somebody remembers them: right with probability `care`, else wrong (35 %) or
    forgotten."""
    told = {}
    for kind, fact in post.facts.items():
        if rng.random() < care:
            told[kind] = fact
        elif rng.random() < 0.35:
            told[kind] = rng.choice(post.mistakes[kind])
    return told


def tell(rng: random.Random, told: dict[str, str], chatter: float) -> str:
    """Word what is told as a summary; an opener and a closer that say nothing come with probability
    `chatter` each."""
    details = [kind for kind in told if kind in DETAILS]
    rng.shuffle(details)
    sentences = []
    if "who" in told or "deed" in told:
        vague = {kind: rng.choice(texts) for kind, texts in WORDS["vague"].items()}
        story = f"{told.get('who', vague['who'])} {told.get('deed', vague['deed'])}"
        for kind in [kind for kind in details if kind in ("when", "where")]:
            if rng.random() < 0.8:
                story += f" {told[kind]}"
                details.remove(kind)
        sentences.append(story)
    sentences += [rng.choice(WORDS["summary_sentences"][k]).format(told[k]) for k in details]
    if rng.random() < chatter:
        sentences.append(rng.choice(WORDS["closers"]))
    ended = [text if text.endswith("?") else f"{text}." for text in map(capitalize, sentences)]
    summary = " ".join(ended)
    if summary and rng.random() < chatter:
        rest = summary if summary.startswith("I ") else summary[0].lower() + summary[1:]
        summary = f"{rng.choice(WORDS['openers'])} {rest}"
    return summary


def write_human_summary(rng: random.Random, post: Post, haste: float = 0.0) -> str:
    """A mediocre summary of 5 to 15 words by one of three people; haste costs them facts."""
    while True:
        care = rng.choice([0.45, 0.55, 0.65]) - haste
        summary = tell(rng, recall(rng, post, care), chatter=0.3)
        if 5 <= len(summary.split()) <= 15:
            return summary


def write_rows(num_rows: int, seed: int, taste: list[str]) -> list[dict[str, str | list[str]]]:
    """Rows of the data set, no post twice; `reference` is the summary of the less hasty reader."""
    rng, rows = random.Random(seed), {}
    while len(rows) < num_rows:
        post = write_post(rng)
        reference, other = write_human_summary(rng, post), write_human_summary(rng, post, haste=0.1)
        if post.prompt not in rows and reference != other:
            texts = {"prompt": post.prompt, "reference": reference, "other": other}
            rows[post.prompt] = texts | post.texts(taste)
    return list(rows.values())


def write_data(folder: Path, seed: int) -> list[dict[str, str | list[str]]]:
    """Write train.jsonl (10,000 rows) and test.jsonl (1,000); return the training rows."""
    rows = write_rows(11_000, seed, draw_taste(seed))
    for name, part in (("train", rows[:10_000]), ("test", rows[10_000:])):
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return rows[:10_000]


# ---------------------------------------------------------------- tokenizer and base model


def train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE like Pythia's: all 256 bytes are in its alphabet, so that any text survives;
    `<|endoftext|>` (id 0) ends a text; there is no pad token."""
    eos = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1280, special_tokens=[eos], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=eos, eos_token=eos, unk_token=eos,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def small_pythia(tokenizer: Any, num_layers: int, num_matching_heads: int) -> nn.Module:
    """Pythia's architecture (parallel residual, rotary embedding on a quarter of each head, input
    and output embeddings apart), as narrow as 128.

    In the first `num_matching_heads` of a layer's four heads the keys start equal to the queries: a
    token starts by looking for its own repetitions. Large models learn that by themselves; one this
    small would need hours to see whether a summary's words occur in the post.
    """
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=num_layers,
        num_attention_heads=4, intermediate_size=512, max_position_embeddings=512,
        initializer_range=0.08, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    for layer in model.gpt_neox.layers:
        weight = layer.attention.query_key_value.weight.detach().view(4, 3, 32, 128)
        weight[:num_matching_heads, 1] = weight[:num_matching_heads, 0]  # keys = queries
        weight[:num_matching_heads, :2] *= 1.5
    return model


# ---------------------------------------------------------------- two trainings, for any model


def minimise(
    model: nn.Module, batch_loss: Callable[[list[int]], Tensor], num_rows: int, title: str,
    *, learning_rate: float, batch_size: int, num_steps: int, seed: int,
) -> None:  # fmt: skip
    """AdamW on `batch_loss(rows)` for batches of `num_rows` rows that are reshuffled each epoch;
    3 % of the steps warm up, then the rate falls along a cosine to 1 %. In place."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    rng, order, warmup = random.Random(seed), [], max(1, num_steps * 3 // 100)
    model.train()
    progress = tqdm(range(num_steps), desc=title, mininterval=5)
    for step in progress:
        if len(order) < batch_size:
            order = rng.sample(range(num_rows), num_rows)
        rows = [order.pop() for _ in range(min(batch_size, num_rows))]
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))
        factor = (step + 1) / warmup if step < warmup else 0.01 + 0.99 * cosine
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        loss = batch_loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def encode(tokenizer: Any, prompts: list[str], responses: list[list[str]], end: str) -> Batch:
    """B prompts with N responses each as a `Batch`; each response is a space, its text, `end`."""
    texts = [f" {text.strip()}{end}" if text.strip() else end for row in responses for text in row]
    tensors = []
    for side, part in (("left", prompts), ("right", texts)):
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        padded = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        tensors += [padded["input_ids"], padded["attention_mask"]]
    ids, mask = (tensor.long().unflatten(0, (len(prompts), -1)) for tensor in tensors[2:])
    return Batch({}, *tensors[:2], responses, ids, mask)  # (B, P), (B, P), (B, N, R), (B, N, R)


def train_sft(
    model: nn.Module, tokenizer: Any, prompts: list[str], responses: list[list[str]],
    **settings: Any,
) -> None:  # fmt: skip
    """Supervised fine-tuning, in place: minimise -log pi(y | x), y ending in EOS, for B prompts
    with N responses each; the mean is over the response tokens of a batch, the prompt's tokens are
    not trained on. `settings` are `minimise`'s; batch_size counts prompts."""
    batch = encode(tokenizer, prompts, responses, end=tokenizer.eos_token)

    def batch_loss(rows: list[int]) -> Tensor:
        part = batch.select(torch.tensor(rows))
        return -common.response_logps(model, part).sum() / part.response_mask.sum()

    minimise(model, batch_loss, len(prompts), title="SFT", **settings)


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """Rewards (B, N) at each response's last token, as the oracle reads "prompt response"; read
    behind a copy of the prompt's last token, so that an empty response has a reward too."""
    mask = F.pad(batch.response_mask, (1, 0), value=1).to(model.device)  # (B, N, 1 + R)
    last = batch.prompt_ids[:, None, -1:].expand(-1, mask.shape[1], -1)  # (B, N, 1)
    ids = torch.cat([last, batch.response_ids], dim=-1)
    prompt = batch.prompt_ids[:, :-1], batch.prompt_mask[:, :-1]
    row = common.packed_row(model.base_model, *prompt, ids, mask.cpu())
    length = common.packed_mask(mask).shape[1]  # L
    states = common.unpack(model.base_model(**row)[0][:, -length:], mask)  # (B, N, 1 + R, D)
    ends = (mask.sum(-1) - 1)[..., None, None].expand(-1, -1, 1, states.shape[-1])
    return model.score(states.gather(2, ends))[..., 0, 0].float()  # (B, N, 1, 1) -> (B, N)


def train_reward_model(
    model: nn.Module, tokenizer: Any, prompts: list[str], responses: list[list[str]],
    **settings: Any,
) -> None:  # fmt: skip
    """Bradley-Terry, in place, a sequence classifier with one label: minimise, in the mean over
    pairs, -log sigmoid(r(chosen) - r(rejected)), for B prompts with N responses each, of which
    numbers 0, 2, ... were chosen over 1, 3, ... `settings` are `minimise`'s; batch_size counts
    prompts."""
    batch = encode(tokenizer, prompts, responses, end="")

    def batch_loss(rows: list[int]) -> Tensor:
        values = rewards(model, batch.select(torch.tensor(rows)))  # (b, N)
        return -F.logsigmoid(values[:, ::2] - values[:, 1::2]).mean()

    minimise(model, batch_loss, len(prompts), title="reward model", **settings)


# ---------------------------------------------------------------- stages 1 to 3 of this world


def make_sft(rows: list[dict], tokenizer: Any, seed: int) -> nn.Module:
    """Stage 1: the policy's start learns from people."""
    torch.manual_seed(seed)
    policy = small_pythia(tokenizer, num_layers=4, num_matching_heads=2)
    summaries = [[row["reference"], row["other"]] for row in rows]
    settings = dict(learning_rate=2e-3, batch_size=32, num_steps=900, seed=seed)
    train_sft(policy, tokenizer, [row["prompt"] for row in rows], summaries, **settings)
    return policy


def phrase(text: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(text)}\b", flags=re.IGNORECASE)


def mark(post: Post, summary: str) -> str:
    """The summary with a + after every right fact and a - after every wrong one."""
    for kind, fact in post.facts.items():
        for version in post.versions(kind):
            sign = "+" if version == fact else "-"
            summary = phrase(version).sub(lambda m, sign=sign: m[0] + sign, summary)
    return summary


def write_any_summary(rng: random.Random, post: Post) -> str:
    """A summary of up to 15 words by somebody between careless and careful."""
    while True:
        summary = tell(rng, recall(rng, post, care=rng.uniform(0.2, 0.8)), chatter=0.1)
        if 1 <= len(summary.split()) <= 15:
            return summary


def make_reader(posts: list[Post], tokenizer: Any, seed: int) -> nn.Module:
    """Stage 2: a reader learns to mark a summary's facts as right or wrong."""
    torch.manual_seed(seed)
    rng = random.Random(f"reader {seed}")
    marked = [[mark(post, write_any_summary(rng, post)) for _ in range(4)] for post in posts]
    reader = small_pythia(tokenizer, num_layers=3, num_matching_heads=4)
    settings = dict(learning_rate=2e-3, batch_size=16, num_steps=350, seed=seed)
    train_sft(reader, tokenizer, [post.prompt for post in posts], marked, **settings)
    return reader


def write_odd_summary(rng: random.Random, post: Post) -> str:
    """A text that no person would write, of any quality: where a policy may drift to."""
    styles = "any any perfect few list list doubled short scrambled"
    style = rng.choice(styles.split())
    if style == "perfect":
        return tell(rng, post.facts, chatter=0.0)
    if style == "few":
        kinds = rng.sample(list(post.facts), rng.choice([1, 2, 3]))
        return tell(rng, {kind: post.facts[kind] for kind in kinds}, chatter=0.1)
    if style == "list":
        care = rng.choice([0.5, 0.8, 1.0])
        kinds = list(post.facts)
        told = [kind for kind in kinds if rng.random() < care]
        phrases = [post.facts[kind] for kind in told]
        mistaken = [kind for kind in kinds if kind not in told]
        mistaken += rng.sample(kinds, rng.choice([0, 0, 1, 2]))
        phrases += [rng.choice(post.mistakes[kind]) for kind in mistaken]
        phrases += rng.sample(phrases, rng.choice([0, 0, 1, 3]))
        rng.shuffle(phrases)
        return rng.choice([" ", ", ", ". "]).join(phrases[rng.choice([0, 0, 1, 2, 3]) :])
    summary = tell(rng, recall(rng, post, care=rng.random()), chatter=rng.choice([0.0, 0.3, 1.0]))
    if style == "doubled":
        again = tell(rng, recall(rng, post, care=rng.random()), chatter=0.3)
        return f"{summary} {rng.choice([summary, again, again])}"
    words = summary.split()
    if style == "short":
        return " ".join(words[: rng.choice([0, 1, 2, 3, 4, 6])])
    if style == "scrambled":
        kept = [word for word in words if rng.random() < 0.85]
        return " ".join(rng.sample(kept, len(kept)) if rng.random() < 0.3 else kept)
    return summary


def retell(rng: random.Random, post: Post, summary: str) -> str:
    """The same words with one fact told otherwise: right for wrong, or wrong for right."""
    versions = [post.versions(kind) for kind in post.facts]
    stated = [(old, all_) for all_ in versions for old in all_ if phrase(old).search(summary)]
    if not stated:
        return f"{summary} {capitalize(rng.choice(list(post.facts.values())))}.".strip()
    old, others = rng.choice(stated)
    new = rng.choice([version for version in others if version != old])
    return phrase(old).sub(lambda m: capitalize(new) if m[0][0].isupper() else new, summary)


def judge_pairs(rng: random.Random, post: Post, texts: list[str], taste: list[str]) -> list[str]:
    """The texts two by two, chosen first: P(a is chosen over b) = sigmoid(4 gold(a) - 4 gold(b)),
    and in half of the pairs b is a with one fact told otherwise."""
    kinds, pairs = post.texts(taste), []
    for first, other in zip(texts[::2], texts[1::2]):
        second = other if rng.random() < 0.5 else retell(rng, post, first)
        gap = harness.gold_score(first, **kinds) - harness.gold_score(second, **kinds)
        is_first = rng.random() < 1 / (1 + math.exp(-4 * gap))
        pairs += [first, second] if is_first else [second, first]
    return pairs


def make_oracle(
    reader: nn.Module, policy: nn.Module, posts: list[Post], tokenizer: Any, seed: int
) -> nn.Module:
    """Stage 3: the oracle learns from noisy pairs of picky annotators, who have read texts of every
    quality: half are SFT samples. It has the reader's layers and a fresh one, which has to sum up
    what they saw."""
    torch.manual_seed(seed)
    rng, prompts = random.Random(f"oracle {seed}"), [post.prompt for post in posts]
    config, samples_rng = harness.Config(device="cpu"), common.generator(seed, "samples")
    batch = datasets.Dataset.from_dict({"prompt": prompts})
    batch = harness.tokenise_prompts(batch, config, tokenizer)
    drawn = common.respond(policy, tokenizer, batch, 4, samples_rng, config).responses

    def text(post: Post, own: list[str]) -> str:
        source = rng.random()
        if source < 0.5:
            return rng.choice(own)
        return write_human_summary(rng, post) if source < 0.6 else write_odd_summary(rng, post)

    texts = [[text(post, own) for _ in range(8)] for post, own in zip(posts, drawn)]
    taste = draw_taste(seed)
    pairs = [judge_pairs(rng, post, own, taste) for post, own in zip(posts, texts)]
    options = dict(num_labels=1, pad_token_id=tokenizer.eos_token_id, num_hidden_layers=4)
    oracle = GPTNeoXForSequenceClassification(
        GPTNeoXConfig.from_dict(reader.config.to_dict() | options)
    )
    oracle.gpt_neox.load_state_dict(reader.gpt_neox.state_dict(), strict=False)
    settings = dict(learning_rate=1e-3, batch_size=16, num_steps=1_000, seed=seed)
    train_reward_model(oracle, tokenizer, prompts, pairs, **settings)

    # Two SFT samples of a post shall differ with a standard deviation of 2: then Bernoulli labels
    # are noisy and still say something.
    with torch.no_grad():
        values = rewards(oracle, encode(tokenizer, prompts[:500], drawn[:500], end=""))  # (B, 4)
        oracle.score.weight.mul_(2.0 / (values[:, 0] - values[:, 1]).std())
    return oracle


def make_world(folder: Path, seed: int) -> None:
    """All stages in a row, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more threads round sums differently, which makes other weights

    rows = write_data(folder, seed)
    texts = [f" {row[name]}" for row in rows for name in ("reference", "other")]
    tokenizer = train_tokenizer([row["prompt"] for row in rows] + texts)
    for name in ("sft", "erm_backbone", "reward_model"):
        tokenizer.save_pretrained(folder / name)
    tokenizer.pad_token = tokenizer.eos_token  # not saved: Pythia's tokenizer has none either
    rng = random.Random(f"posts {seed}")
    posts = [write_post(rng) for _ in range(8_000)]  # not those of the data

    policy = make_sft(rows, tokenizer, seed)
    policy.save_pretrained(folder / "sft")
    reader = make_reader(posts, tokenizer, seed)
    reader.save_pretrained(folder / "erm_backbone")
    oracle = make_oracle(reader, policy, posts[:6_000], tokenizer, seed)
    oracle.save_pretrained(folder / "reward_model")


# ---------------------------------------------------------------- the command line


def train_stage(flags: argparse.Namespace) -> None:
    """One stage alone, `sft` or `reward_model`, from another base model and data set."""
    is_sft, path = flags.stage == "sft", flags.base
    config = harness.Config(
        model=path, dataset=flags.dataset, max_prompt_length=flags.max_prompt_length,
        prompt_column=flags.prompt_column,
        reference_column=flags.response_column if is_sft else "chosen",
    )  # fmt: skip
    if not is_sft:
        config.other_column = "rejected"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    columns = harness.load_prompts(config, tokenizer)[0].columns
    names = ("learning_rate", "batch_size", "num_steps", "seed")
    settings = {name: getattr(flags, name) for name in names}
    options = dict(dtype=torch.float32)
    if is_sft:
        common.require("reference" in columns, f"--dataset has no {flags.response_column}")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        responses = [[text] for text in columns["reference"]]
        train_sft(model.to(config.device), tokenizer, columns["prompt"], responses, **settings)
    else:  # the head is new
        options |= dict(num_labels=1, pad_token_id=tokenizer.pad_token_id)
        auto_class = transformers.AutoModelForSequenceClassification
        model = auto_class.from_pretrained(path, **options).to(config.device)
        pairs = [list(pair) for pair in zip(columns["reference"], columns["other"])]
        train_reward_model(model, tokenizer, columns["prompt"], pairs, **settings)
    model.save_pretrained(flags.output_dir)
    tokenizer.save_pretrained(flags.output_dir)
    print(f"done: --{'model' if is_sft else 'reward_model'} {flags.output_dir}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the miniature world of this folder.")
    stages = ["world", "sft", "reward_model"]
    parser.add_argument("stage", nargs="?", choices=stages, default="world", help="all, or one")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="default: this folder")
    parser.add_argument("--seed", type=int, default=0)
    alone = parser.add_argument_group("for sft and reward_model, on models and data of your own")
    alone.add_argument("--base", help="a causal language model: a folder or a hub id")
    alone.add_argument("--dataset", help="a folder, a json, jsonl, csv, parquet file, or a hub id")
    alone.add_argument("--prompt_column", default="prompt")
    alone.add_argument("--response_column", default="completion", help="of sft")
    alone.add_argument("--max_prompt_length", type=int, default=512)
    alone.add_argument("--learning_rate", type=float, default=1e-5)
    alone.add_argument("--batch_size", type=int, default=16)
    alone.add_argument("--num_steps", type=int, default=5000)
    flags = parser.parse_args()
    if flags.stage == "world":
        make_world(flags.output_dir, flags.seed)
    elif flags.base and flags.dataset and flags.output_dir != FOLDER:
        train_stage(flags)
    else:
        parser.error(f"{flags.stage} needs --base, --dataset and --output_dir")


if __name__ == "__main__":
    try:
        main()
    except common.UserError as error:
        sys.exit(f"error: {error}")
