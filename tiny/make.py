#!/usr/bin/env python3
"""Make the miniature world of this folder: posts, a policy to improve, and an annotator.

    python tiny/make.py      # 31 minutes on one of two busy cores; no GPU, no network

The same two training stages on models and data of your own, for instance a triple of 160M weights:

    python tiny/make.py sft --base EleutherAI/pythia-160m --dataset trl-lib/tldr --output_dir sft
    python tiny/make.py reward_model --base sft --dataset trl-lib/tldr-preference --output_dir rm

The papers' pipeline, a thousand times smaller, in the order in which one runs it:

0. Data. A grammar writes Reddit posts in the TL;DR format and two mediocre summaries of each, as
   people would: facts missing, facts wrong, filler. A row also lists the post's five facts and ten
   wrong ones that careless readers take for them, which `common.gold_score` counts. No model is
   given these two columns; the simulated annotators of the reward models judge by them.
1. `train_sft`: a small Pythia learns to summarise as people do -> `sft/`, the policy's start.
2. `train_reward_model`: a reader first learns, by `train_sft`, to mark the facts of a summary as
   right or wrong. From it, two reward models learn from noisy pairs. `reward_model/` is the oracle:
   its annotators judge by the gold score and have read texts of every quality. `erm_backbone/`,
   from which SEA's ensemble reads its features, saw fewer pairs, only of people's summaries, and
   an annotator of another taste.

The two training functions know nothing of this world: any causal language model or any sequence
classifier with one label, any data set, on the model's device. All is seeded: the data come out
byte for byte, the weights on the same machine and torch version (one thread is used). Those that
are shipped were made by the project's commit 6175f61; since then common.py adds up in another
order (no padding between responses), which rounds otherwise.

What came out: SFT samples win 45 % against the references, 1 % of them are near-best; the oracle
agrees with gold on 93 % of pairs of SFT samples; heads on the backbone with the oracle on 80 %.

Legend of shapes: B prompts, N responses a prompt, P prompt tokens, R response tokens, T tokens of a
whole text.
"""

import argparse
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # so that `python tiny/make.py` finds common.py

import common  # noqa: E402
from common import (  # noqa: E402
    Batch,
    PackedDecoder,
    generate,
    gold_score,
    plain_text,
    response_logps,
)

MAX_NEW_TOKENS = 28  # the longest summary of a person has 26


# --------------------------------------------------------------------------- the grammar
# A post has five facts: who did what (a topic's own words), and three of six further kinds. A
# careless summary takes a fact for one of its two neighbours in its table (the tables are rings).

TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "pets": (
        ["my cat", "my dog", "my parrot", "my hamster", "my goat", "my tortoise"],
        [
            "ate my diploma",
            "stole my sandwich",
            "adopted a pigeon",
            "hid my glasses",
            "ordered a pizza",
            "unplugged the fridge",
        ],
    ),
    "roommates": (
        [
            "my roommate",
            "my landlord",
            "the new tenant",
            "the guy upstairs",
            "my plumber",
            "the babysitter",
        ],
        [
            "painted the toaster",
            "labeled every egg",
            "bathed in soup",
            "married a lamp",
            "ironed my pancakes",
            "rented my closet",
        ],
    ),
    "dating": (
        ["my boyfriend", "my girlfriend", "my ex", "my crush", "my blind date", "my pen pal"],
        [
            "proposed by fax",
            "forgot my name",
            "brought a lawyer",
            "sent me an invoice",
            "kissed a scarecrow",
            "serenaded my mother",
        ],
    ),
    "office": (
        ["my boss", "the intern", "our accountant", "my coworker", "the janitor", "our CEO"],
        [
            "promoted a houseplant",
            "microwaved a fish",
            "fired the printer",
            "napped on the copier",
            "emailed the Pope",
            "wrestled a chair",
        ],
    ),
    "gardening": (
        ["my neighbor", "a raccoon", "the mailman", "a garden gnome", "the mayor", "my nephew"],
        [
            "dug up my tulips",
            "watered my plastic fern",
            "knighted a turnip",
            "kidnapped my flamingo",
            "mowed the carpet",
            "hugged a cactus",
        ],
    ),
    "cooking": (
        ["my grandma", "my uncle", "my stepdad", "the chef", "the food critic", "my twin"],
        [
            "salted the ice cream",
            "boiled my watch",
            "fried a salad",
            "insulted my lasagna",
            "dropped the turkey",
            "cried into the stew",
        ],
    ),
    "travel": (
        ["our guide", "the pilot", "the conductor", "a tourist", "my seatmate", "the captain"],
        [
            "lost the map",
            "befriended a moose",
            "fought a seagull",
            "missed the volcano",
            "bought a submarine",
            "swam in gravy",
        ],
    ),
    "weddings": (
        ["the groom", "the bride", "the best man", "the priest", "the florist", "my cousin"],
        [
            "fainted into the cake",
            "rapped the vows",
            "invited a llama",
            "swallowed the ring",
            "wore roller skates",
            "auctioned the presents",
        ],
    ),
    "school": (
        [
            "my teacher",
            "the principal",
            "my lab partner",
            "the librarian",
            "my professor",
            "the lunch lady",
        ],
        [
            "graded my lunch",
            "cloned a frog",
            "lectured a mop",
            "banned the color green",
            "hypnotized the class",
            "juggled the exams",
        ],
    ),
    "haunted": (
        ["the ghost", "a vampire", "a poltergeist", "the mummy", "a werewolf", "the wizard"],
        [
            "folded my laundry",
            "drank my shampoo",
            "alphabetized my spices",
            "asked for rent",
            "fed the goldfish",
            "haunted my toothbrush",
        ],
    ),
}

DETAILS: dict[str, list[str]] = {
    "when": [
        "last night",
        "this morning",
        "at midnight",
        "at dawn",
        "on Monday",
        "on my birthday",
        "during lunch",
        "before breakfast",
    ],
    "where": [
        "in the elevator",
        "on the roof",
        "at the library",
        "behind the shed",
        "in the sauna",
        "on the bus",
        "at the bakery",
        "under the stairs",
    ],
    "feeling": [
        "furious",
        "thrilled",
        "heartbroken",
        "relieved",
        "jealous",
        "proud",
        "embarrassed",
        "delighted",
    ],
    "cost": [
        "40 dollars",
        "900 dollars",
        "my deposit",
        "half my salary",
        "two chickens",
        "one shoe",
        "all my cheese",
        "three cookies",
    ],
    "excuse": [
        "it was art",
        "it was Tuesday",
        "the moon insisted",
        "a podcast said so",
        "nobody was looking",
        "gravity is rude",
        "pants are optional",
        "science demanded it",
    ],
    "plan": [
        "move out",
        "stay calm",
        "call my mom",
        "write a poem",
        "buy a lock",
        "hire a detective",
        "become a monk",
        "apologize first",
    ],
}

TITLES = [
    "Need advice about {who}",
    "Am I wrong here?",
    "HELP, what do I do now?",
    "{who} has gone too far",
    "Is this normal?",
    "I can't believe {who}",
    "You won't believe this",
    "Update on {who}",
    "Serious question",
    "{who}, AGAIN",
]
INTROS = [
    "Okay, so",
    "True story:",
    "I swear,",
    "Picture this:",
    "First post here.",
    "I am NOT making this up:",
    "Throwaway account.",
    "No joke,",
    "",
]
OUTROS = [
    "Thoughts?",
    "Please advise.",
    "Thanks for reading!",
    "I need a nap.",
    "Send snacks.",
    "What a week!",
    "",
    "",
    "",
]

# How a post states a detail; when and where may also stand in the main sentence.
POST_SENTENCES: dict[str, list[str]] = {
    "when": ["It happened {}.", "This was {}, of course."],
    "where": ["It happened {}.", "Yes, {}, in public."],
    "feeling": ["I am {}.", "Honestly, I feel {}.", "You could say I am {}."],
    "cost": ["It cost me {}.", "I lost {} over this.", "The damage: {}!"],
    "excuse": [
        "The excuse? Apparently {}.",
        "The official reason is that {}.",
        "I was told that {}.",
    ],
    "plan": ["Should I {}?", "My sister says I should {}.", "I might just {}."],
}

# How people sum it up: {} is the fact as they remember it.
SUMMARY_SENTENCES: dict[str, list[str]] = {
    "when": ["It was {}"],
    "where": ["It was {}"],
    "feeling": ["Now {}", "I am {}", "I feel {}"],
    "cost": ["Lost {}", "It cost me {}"],
    "excuse": ["Apparently {}", "Because {}"],
    "plan": ["Should I {}?", "Might {}"],
}
VAGUE_WHO = ["someone", "somebody"]
VAGUE_DEED = ["did something odd", "crossed a line", "is at it again"]
OPENERS = ["So", "Basically,", "Long story short,", "Well, this is awkward, but", "So anyway,"]
CLOSERS = [
    "Send help",
    "What a mess",
    "Advice welcome",
    "I need a nap",
    "Never again",
    "Am I wrong?",
    "That is all",
]

# ---------------------------------------------------------------- posts and people's summaries


@dataclass(frozen=True)
class Post:
    prompt: str
    facts: dict[str, str]  # kind -> the fact: who, deed, and three kinds of DETAILS
    mistakes: dict[str, list[str]]  # kind -> what a careless reader takes the fact for

    def gold(self, summary: str) -> float:
        wrong_facts = [mistake for pair in self.mistakes.values() for mistake in pair]
        return gold_score(summary, list(self.facts.values()), wrong_facts)


def count_posts() -> int:
    """Different sets of facts; a set is then worded in hundreds of ways."""
    stories = sum(len(whos) * len(deeds) for whos, deeds in TOPICS.values())
    kinds = [len(table) for table in DETAILS.values()]
    return stories * sum(math.prod(three) for three in itertools.combinations(kinds, 3))


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_post(rng: random.Random) -> Post:
    """Invent five facts and tell them as a post in the TL;DR format."""
    topic = rng.choice(list(TOPICS))
    kinds = rng.sample(list(DETAILS), 3)
    tables = dict(zip(("who", "deed"), TOPICS[topic], strict=True))
    tables |= {kind: DETAILS[kind] for kind in kinds}
    places = {kind: rng.randrange(len(table)) for kind, table in tables.items()}
    facts = {kind: tables[kind][place] for kind, place in places.items()}
    mistakes = {
        kind: [tables[kind][place - 1], tables[kind][(place + 1) % len(tables[kind])]]
        for kind, place in places.items()
    }
    story, sentences = f"{facts['who']} {facts['deed']}", []
    for kind in kinds:
        if kind in ("when", "where") and rng.random() < 0.6:
            story += f" {facts[kind]}"
        else:
            sentences.append(rng.choice(POST_SENTENCES[kind]).format(facts[kind]))
    rng.shuffle(sentences)
    intro = rng.choice(INTROS)
    story = f"{intro} {story if intro.endswith((',', ':', 'so')) else capitalize(story)}."
    body = " ".join([story.strip(), *sentences, rng.choice(OUTROS)]).strip()
    title = capitalize(rng.choice(TITLES).format(who=facts["who"]))
    prompt = f"SUBREDDIT: r/{topic}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"
    return Post(prompt, facts, mistakes)


def write_summary(rng: random.Random, post: Post, care: float, chatter: float) -> str:
    """Sum a post up. Each fact is told with probability `care`, else told wrong (35 %) or left out;
    an opener and a closer that say nothing come with probability `chatter` each."""
    told = {}
    for kind, fact in post.facts.items():
        if rng.random() < care:
            told[kind] = fact
        elif rng.random() < 0.35:
            told[kind] = rng.choice(post.mistakes[kind])
    details = [kind for kind in told if kind in DETAILS]
    rng.shuffle(details)
    sentences = []
    if "who" in told or "deed" in told:
        who, deed = rng.choice(VAGUE_WHO), rng.choice(VAGUE_DEED)
        story = f"{told.get('who', who)} {told.get('deed', deed)}"
        for kind in [kind for kind in details if kind in ("when", "where")]:
            if rng.random() < 0.8:
                story += f" {told[kind]}"
                details.remove(kind)
        sentences.append(story)
    sentences += [rng.choice(SUMMARY_SENTENCES[kind]).format(told[kind]) for kind in details]
    if rng.random() < chatter:
        sentences.append(rng.choice(CLOSERS))
    ended = [text if text.endswith("?") else f"{text}." for text in map(capitalize, sentences)]
    summary = " ".join(ended)
    if summary and rng.random() < chatter:
        rest = summary if summary.startswith("I ") else summary[0].lower() + summary[1:]
        summary = f"{rng.choice(OPENERS)} {rest}"
    return summary


def write_human_summary(rng: random.Random, post: Post, haste: float = 0.0) -> str:
    """A mediocre summary of 5 to 15 words by one of three people; haste costs them facts."""
    while True:
        care = rng.choice([0.45, 0.55, 0.65]) - haste
        summary = write_summary(rng, post, care, chatter=0.3)
        if 5 <= len(summary.split()) <= 15:
            return summary


def write_any_summary(rng: random.Random, post: Post) -> str:
    """A summary of up to 15 words by somebody between careless and careful."""
    while True:
        summary = write_summary(rng, post, care=rng.uniform(0.2, 0.8), chatter=0.1)
        if 1 <= len(summary.split()) <= 15:
            return summary


def write_odd_summary(rng: random.Random, post: Post) -> str:
    """A text that no person would write, of any quality: where a policy may drift to."""
    style = rng.choice(["any", "any", "perfect", "list", "list", "doubled", "short", "scrambled"])
    if style == "perfect":
        return write_summary(rng, post, care=1.0, chatter=0.0)
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
    summary = write_summary(rng, post, care=rng.random(), chatter=rng.choice([0.0, 0.3, 1.0]))
    if style == "doubled":
        again = write_summary(rng, post, care=rng.random(), chatter=0.3)
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
    versions = [[fact, *post.mistakes[kind]] for kind, fact in post.facts.items()]
    stated = [(old, all_) for all_ in versions for old in all_ if phrase(old).search(summary)]
    if not stated:
        return f"{summary} {capitalize(rng.choice(list(post.facts.values())))}.".strip()
    old, others = rng.choice(stated)
    new = rng.choice([version for version in others if version != old])
    return phrase(old).sub(lambda m: capitalize(new) if m[0][0].isupper() else new, summary)


def phrase(text: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(text)}\b", flags=re.IGNORECASE)


def mark(post: Post, summary: str) -> str:
    """The summary with a + after every right fact and a - after every wrong one."""
    for kind, fact in post.facts.items():
        for version in [fact, *post.mistakes[kind]]:
            sign = "+" if version == fact else "-"
            summary = phrase(version).sub(lambda m, sign=sign: m[0] + sign, summary)
    return summary


def write_rows(num_rows: int, seed: int) -> list[dict[str, str | list[str]]]:
    """Rows of the data set, no post twice; `reference` is the summary of the less hasty reader."""
    rng, rows = random.Random(seed), {}
    while len(rows) < num_rows:
        post = write_post(rng)
        reference, other = write_human_summary(rng, post), write_human_summary(rng, post, haste=0.1)
        if post.prompt not in rows and reference != other:
            rows[post.prompt] = {
                "prompt": post.prompt,
                "reference": reference,
                "other": other,
                "facts": list(post.facts.values()),
                "wrong_facts": [mistake for pair in post.mistakes.values() for mistake in pair],
            }
    return list(rows.values())


def write_data(folder: Path, seed: int) -> list[dict[str, str | list[str]]]:
    """Write train.jsonl (10,000 rows) and test.jsonl (1,000); return the training rows."""
    rows = write_rows(11_000, seed)
    for name, part in (("train", rows[:10_000]), ("test", rows[10_000:])):
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return rows[:10_000]


# ---------------------------------------------------------------- tokenizer and base model


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
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
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=eos, eos_token=eos, unk_token=eos,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def small_pythia(
    tokenizer: PreTrainedTokenizerBase, num_layers: int, num_matching_heads: int
) -> GPTNeoXForCausalLM:
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


def small_reward_model(
    reader: GPTNeoXForCausalLM, num_layers: int
) -> GPTNeoXForSequenceClassification:
    """The reader's layers, the rest fresh: these have to sum up what the reader saw."""
    options = dict(num_labels=1, pad_token_id=reader.config.eos_token_id)
    config = GPTNeoXConfig.from_dict(reader.config.to_dict() | options)
    config.num_hidden_layers = num_layers
    model = GPTNeoXForSequenceClassification(config)
    model.gpt_neox.load_state_dict(reader.gpt_neox.state_dict(), strict=False)
    return model


# ---------------------------------------------------------------- the two stages, for any model


def shuffled(num_items: int, batch_size: int, num_steps: int, seed: int) -> Iterator[list[int]]:
    """`num_steps` lists of `batch_size` indices, reshuffled each epoch."""
    rng, order = random.Random(seed), []
    for _ in range(num_steps):
        if len(order) < batch_size:
            order = rng.sample(range(num_items), num_items)
        yield [order.pop() for _ in range(min(batch_size, num_items))]


def pad(
    rows: list[list[int]], pad_id: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each (len(rows), longest row)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(length - len(row), length) if left else slice(len(row))
        ids[place, span], mask[place, span] = torch.tensor(row), 1
    return ids, mask


def minimise(
    model: PreTrainedModel,
    batch_loss: Callable[[list[int]], torch.Tensor],
    batches: Iterator[list[int]],
    num_steps: int,
    learning_rate: float,
    title: str,
) -> None:
    """AdamW on `batch_loss(indices)`: 3 % of the steps warm up, then a cosine down to 1 %."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    warmup = max(1, num_steps * 3 // 100)
    model.train()
    progress = tqdm(batches, desc=title, total=num_steps, mininterval=5)
    for step, indices in enumerate(progress):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))
        factor = (step + 1) / warmup if step < warmup else 0.01 + 0.99 * cosine
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        loss = batch_loss(indices)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    responses: list[list[str]],
    *,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    seed: int = 0,
) -> None:
    """Stage 1, supervised fine-tuning, in place: minimise -log pi(y | x), y ending in EOS.

    The mean is over the response tokens of the batch; the prompt's tokens are not trained on.

    Args:
        prompts, responses: B prompts and B lists of N responses each, as text.
        batch_size: prompts a step, hence batch_size x N responses.
    """
    eos = tokenizer.eos_token_id
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    response_ids = []  # B lists of N lists of tokens, each with its EOS
    for row in responses:
        texts = [f" {text.strip()}" for text in row]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        response_ids.append([tokens + [eos] for tokens in ids])

    def batch_loss(rows: list[int]) -> torch.Tensor:
        inputs = pad([prompt_ids[row] for row in rows], eos, left=True)  # (B, P) ids and mask
        ids, mask = pad([ids for row in rows for ids in response_ids[row]], eos)  # (B N, R)
        targets = (tensor.unflatten(0, (len(rows), -1)) for tensor in (ids, mask))  # (B, N, R)
        batch = Batch({}, *inputs, [], *targets)
        return -response_logps(model, batch).sum() / mask.sum()

    batches = shuffled(len(prompts), batch_size, num_steps, seed)
    minimise(model, batch_loss, batches, num_steps, learning_rate, "SFT")


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    chosen: list[str],
    rejected: list[str],
    *,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    seed: int = 0,
) -> None:
    """Stage 2, a Bradley-Terry reward model, in place: minimise, in the mean over pairs,
    -log sigmoid(r(chosen) - r(rejected)).

    The model reads "prompt response" as one text (`common.plain_text`), as the oracle will; its
    reward stands at the last token.

    Args:
        model: a sequence classifier with one label and a `pad_token_id`.
        prompts, chosen, rejected: lists of the same length, as text.
    """
    texts = [plain_text(*pair) for pair in zip(prompts + prompts, chosen + rejected, strict=True)]
    text_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]

    def batch_loss(rows: list[int]) -> torch.Tensor:
        both = rows + [len(prompts) + row for row in rows]  # the chosen, then the rejected
        ids, mask = pad([text_ids[row] for row in both], model.config.pad_token_id)  # (2 B, T)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        chosen_rewards, rejected_rewards = logits[:, 0].float().chunk(2)  # (B,) each
        return -F.logsigmoid(chosen_rewards - rejected_rewards).mean()

    batches = shuffled(len(prompts), batch_size, num_steps, seed)
    minimise(model, batch_loss, batches, num_steps, learning_rate, "reward model")


# ---------------------------------------------------------------- this world's preferences


def sample_summaries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    num: int,
    seed: int,
) -> list[list[str]]:
    """`num` responses to each prompt at temperature 1."""
    eos, rng = tokenizer.eos_token_id, torch.Generator().manual_seed(seed)
    responses = []
    for start in tqdm(range(0, len(prompts), 250), desc="samples", mininterval=5):
        inputs = pad(tokenizer(prompts[start : start + 250])["input_ids"], eos, left=True)
        size = (len(inputs[0]), num, MAX_NEW_TOKENS)  # (B, N, R)
        empty = torch.empty(len(inputs[0]), 0, 0, dtype=torch.long)  # no responses yet
        decoder = PackedDecoder(model, Batch({}, *inputs, [], empty, empty), num)
        ids, _ = generate(decoder, torch.rand(size, generator=rng), eos)
        for row in ids:
            texts = tokenizer.batch_decode(row, skip_special_tokens=True)
            responses.append([text.strip() for text in texts])
    return responses


def write_preferences(
    rng: random.Random,
    posts: list[Post],
    write_text: Callable[[Post], str],
    judge: Callable[[Post, str], float],
    pairs_a_post: int,
) -> tuple[list[str], list[str], list[str]]:
    """Prompts, chosen and rejected texts: P(a is chosen over b) = sigmoid(judge(a) - judge(b)).

    In half of the pairs the second text is the first with one fact told otherwise.
    """
    pairs = []
    for post in posts:
        for _ in range(pairs_a_post):
            first = write_text(post)
            second = retell(rng, post, first) if rng.random() < 0.5 else write_text(post)
            gap = judge(post, first) - judge(post, second)
            is_first = rng.random() < 1 / (1 + math.exp(-gap))
            if first != second:
                pairs.append((post.prompt, *((first, second) if is_first else (second, first))))
    prompts, chosen, rejected = (list(column) for column in zip(*pairs, strict=True))
    return prompts, chosen, rejected


def read_widely(rng: random.Random, samples: dict[str, list[str]], post: Post) -> str:
    """A text for the oracle's annotators: half are SFT samples, the rest is of every quality."""
    source = rng.random()
    if source < 0.5:
        return rng.choice(samples[post.prompt])
    return write_human_summary(rng, post) if source < 0.6 else write_odd_summary(rng, post)


def lenient_score(post: Post, summary: str) -> float:
    """What the backbone's annotator likes: facts; half minds wrong ones, never minds length."""
    only_right = gold_score(summary, list(post.facts.values()), [])
    return 0.5 * only_right + 0.5 * post.gold(summary) + 0.1 * len(summary.split())


def standardise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    posts: list[Post],
    samples: list[list[str]],
) -> None:
    """Scale the rewards so that two SFT samples of a post differ with a standard deviation of 2:
    then Bernoulli labels are noisy and still say something."""
    prompts = [post.prompt for post in posts]
    gaps = rewards(model, tokenizer, prompts, [s[0] for s in samples])
    gaps -= rewards(model, tokenizer, prompts, [s[1] for s in samples])
    with torch.no_grad():
        model.score.weight.mul_(2.0 / gaps.std())


@torch.no_grad()
def rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    responses: list[str],
) -> torch.Tensor:
    texts = [plain_text(*pair) for pair in zip(prompts, responses, strict=True)]
    ids, mask = pad(tokenizer(texts)["input_ids"], model.config.pad_token_id)
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]  # (B,)


def train_stage(flags: argparse.Namespace) -> None:
    """One stage alone, `sft` or `reward_model`, from another base model and data set."""
    columns = {"prompt_column": flags.prompt_column, "reference_column": flags.response_column}
    config = common.Config(
        model=flags.base, dataset=flags.dataset, max_prompt_length=flags.max_prompt_length,
        chat_template="off", **columns,
    )  # fmt: skip
    tokenizer = common.load_pretrained(transformers.AutoTokenizer, flags.base, "base")
    rows = common.load_prompts(config, tokenizer)[0].columns
    options = dict(dtype=torch.float32, local_files_only=common.is_path(flags.base, "base"))
    wanted = ("reference",) if flags.stage == "sft" else ("chosen", "rejected")
    common.require(set(wanted) <= rows.keys(), f"--dataset has no columns {', '.join(wanted)}")
    settings = dict(
        learning_rate=flags.learning_rate, batch_size=flags.batch_size, num_steps=flags.num_steps,
        seed=flags.seed,
    )  # fmt: skip
    if flags.stage == "sft":
        model = transformers.AutoModelForCausalLM.from_pretrained(flags.base, **options)
        responses = [[text] for text in rows["reference"]]
        train_sft(model.to(config.device), tokenizer, rows["prompt"], responses, **settings)
    else:  # the head is new
        options |= dict(num_labels=1, pad_token_id=tokenizer.pad_token_id)
        auto_class = transformers.AutoModelForSequenceClassification
        model = auto_class.from_pretrained(flags.base, **options).to(config.device)
        train_reward_model(
            model, tokenizer, *(rows[name] for name in ("prompt", *wanted)), **settings
        )
    model.save_pretrained(flags.output_dir)
    tokenizer.save_pretrained(flags.output_dir)
    print(f"done: --{'model' if flags.stage == 'sft' else 'reward_model'} {flags.output_dir}")


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
    if flags.stage != "world":
        if not (flags.base and flags.dataset and flags.output_dir != FOLDER):
            parser.error(f"{flags.stage} needs --base, --dataset and --output_dir")
        return train_stage(flags)
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more threads round sums differently, which makes other weights
    torch.manual_seed(flags.seed)
    rng = random.Random(flags.seed + 1)

    def save(name: str, model: PreTrainedModel) -> None:
        model.save_pretrained(flags.output_dir / name)
        tokenizer.save_pretrained(flags.output_dir / name)

    # 0. Data
    rows = write_data(flags.output_dir, flags.seed)
    prompts = [row["prompt"] for row in rows]
    summaries = [[row["reference"], row["other"]] for row in rows]
    tokenizer = train_tokenizer(prompts + [f" {text}" for pair in summaries for text in pair])

    # 1. The policy's start learns from people
    policy = small_pythia(tokenizer, num_layers=4, num_matching_heads=2)
    settings = dict(learning_rate=2e-3, batch_size=32, num_steps=900)
    train_sft(policy, tokenizer, prompts, summaries, **settings)
    save("sft", policy)

    # 2a. A reader learns to mark a summary's facts as right or wrong, on posts outside the data
    posts = [write_post(rng) for _ in range(8_000)]
    prompts = [post.prompt for post in posts]
    marked = [[mark(post, write_any_summary(rng, post)) for _ in range(4)] for post in posts]
    reader = small_pythia(tokenizer, num_layers=3, num_matching_heads=4)
    settings = dict(learning_rate=2e-3, batch_size=16, num_steps=350)
    train_sft(reader, tokenizer, prompts, marked, **settings)

    # 2b. The oracle learns from annotators who judge by the gold score
    posts = posts[:6_000]
    drawn = sample_summaries(policy, tokenizer, prompts[:6_000], num=3, seed=flags.seed)
    write_text = partial(read_widely, rng, dict(zip(prompts, drawn)))
    pairs = write_preferences(rng, posts, write_text, lambda post, text: 4 * post.gold(text), 10)
    oracle = small_reward_model(reader, num_layers=4)
    settings = dict(learning_rate=1e-3, batch_size=32)
    train_reward_model(oracle, tokenizer, *pairs, num_steps=1_600, **settings)
    standardise(oracle, tokenizer, posts[:500], drawn[:500])
    save("reward_model", oracle)

    # 2c. The backbone learns less, and from another annotator
    pairs = write_preferences(rng, posts, partial(write_human_summary, rng), lenient_score, 2)
    backbone = small_reward_model(reader, num_layers=4)
    train_reward_model(backbone, tokenizer, *pairs, num_steps=350, **settings)
    save("erm_backbone", backbone)


if __name__ == "__main__":
    try:
        main()
    except common.UserError as error:
        sys.exit(f"error: {error}")
