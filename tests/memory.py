"""What `sea.py` holds at Pythia's shapes, counted from the configuration, and checked on a CPU.

`python tests/benchmark.py --memory` prints which micro-batch fits which card; with --check, two
rounds at the shape of 160m are measured beside the count.

All the time: policy, reference and AdamW's two states in float32, and the oracle, in bfloat16 on a
GPU. A round's phases come one after another; each holds besides, for a micro-batch of B prompts:

- generation: the keys and values of prompts and candidates, and four float32 copies of the logits
  (B, N, V): the last step's, packed ones, and what unpacks them;
- features: one layer's tensors, for packed rows of all candidates, and the mask (B, 1, S, S);
- oracle: one layer's tensors of packed pairs, in its own width;
- reference: one layer's tensors of packed pairs; then two copies of the logits (B, L, V);
- update: the gradient, from the second micro-batch on; what each layer saves for its backward pass
  (with checkpointing its input alone); and the logits' moment, which is four float32 copies;
- step: the gradient, and on a CPU two copies of the largest weight.

Under autocast each holds bfloat16 copies of the weights that it multiplies with, and each layer
saves its own copy of the mask. Not counted: masks and ids of tokens, cosines, the heads (on the
CPU), a library's workspaces. A GPU's attention is taken to be the memory-efficient one, which
needs a mask of rows of a multiple of 16; a CPU's keeps its output in two layouts. Neither holds
the S x S products.
"""

import functools
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import sizes
import torch
import transformers
from torch import nn

GIB, FLOAT = 2**30, 4  # bytes
CARDS = (8, 16, 24, 40, 80)  # GB, taken for GiB; a tenth is left to CUDA and to fragments
MODELS = ("160m", "410m", "1b", "2.8b")


@functools.cache
def num_weights(size: str) -> dict[str, int]:
    """Of all modules, of the matrices that are cast under autocast, of one layer's matrices, and
    of the head, which is as large as the embedding."""
    with torch.device("meta"):
        config = sizes.model_config(size)
        model = transformers.AutoModelForCausalLM.from_config(config)

    def count(module: nn.Module) -> int:
        matrices = [part for part in module.modules() if isinstance(part, nn.Linear)]
        return sum(weight.numel() for part in matrices for weight in part.parameters())

    counts = {"all": model.num_parameters(), "head": model.lm_head.weight.numel()}
    return counts | {"cast": count(model), "layer": count(model.gpt_neox.layers[0])}


def widest_moment(stream: int, width: int) -> int:
    """Bytes that a forward pass without a gradient holds a token and hidden dimension, where it
    holds most. `stream` and `width` are bytes of a value between layers and of one within."""
    casts = 2 * width if width < stream else 0  # rotated queries and keys are float32 again
    attention = 3 * width + 2 * stream + casts + width  # q, k, v; rotated q, k; the output
    mlp = width + 2 * 4 * width  # attention's output; before and after GELU
    return 3 * stream + max(attention, mlp)  # embeddings, the layer's input, normalised


def update_moments(
    size: str, num: int, is_accumulated: bool, checkpointing: bool, width: int
) -> list[int]:
    """Bytes held at moments of the update on a micro-batch of `num` pairs, besides what is held
    all the time: the end of the forward pass, the loss's gradient, the head's, the last layer's,
    the embedding's."""
    hidden, layers, heads, _ = sizes.SHAPES[size]
    count, is_cast = num_weights(size), width < FLOAT
    length = 2 * sizes.RESPONSE_LENGTH  # L: each response is read behind the prompt's last token
    row = sizes.PROMPT_LENGTH - 1 + length  # S
    logits, tokens = num * length * sizes.VOCABULARY, num * row
    mask = num * row * (-(-row // 16) * 16 if is_cast else row) * width
    # A layer's input; normalised twice, q, k, v, rotated q, k, attention's output (a CPU: two
    # layouts), before and after GELU; the sums of exponentials of attention.
    values = hidden * (FLOAT + (2 + 3 + 2 + (1 if is_cast else 2) + 8) * width) + heads * FLOAT
    layer = tokens * values + (mask if is_cast else 0)
    saved, casts = layers * layer + (0 if is_cast else mask), count["cast"]
    if checkpointing:
        saved, casts = layers * tokens * hidden * FLOAT + num * row * row * FLOAT, count["head"]
    saved += tokens * hidden * FLOAT  # the last layer's output
    gradient = FLOAT * count["all"] if is_accumulated else 0
    all_casts, casts = (width * n if is_cast else 0 for n in (count["cast"], casts))
    both = FLOAT + (width if is_cast else 0)  # a gradient is cast back
    within = tokens * hidden * (FLOAT + 8 * width) + both * 4 * hidden**2
    again = layer + (width * count["layer"] if is_cast else 0) if checkpointing else 0
    return [
        gradient + saved + all_casts + both * logits,
        gradient + saved + casts + 4 * FLOAT * logits,
        gradient + saved + casts + max(width * (logits + count["head"]), FLOAT * count["head"]),
        max(gradient, FLOAT * count["head"]) + saved + casts + within + again,
        FLOAT * count["all"] + (FLOAT * count["head"] if is_accumulated else 0),
    ]


def phases(
    size: str, micro_batch: int, batch_size: int, checkpointing: bool = False,
    device: str = "cuda", num_candidates: int = 20,
) -> dict[str, float]:  # fmt: skip
    """GiB held at most in each phase of a round, all weights and states included."""
    hidden, layers, _, _ = sizes.SHAPES[size]
    count, num = num_weights(size), min(micro_batch, batch_size)
    is_cast = not device.startswith("cpu")
    width = 2 if is_cast else FLOAT
    casts = width * count["cast"] if is_cast else 0
    prompt, response = sizes.PROMPT_LENGTH, sizes.RESPONSE_LENGTH
    always = 4 * FLOAT * count["all"] + width * (count["all"] - count["head"])

    def forward(row: int, stream: int = FLOAT) -> int:
        masks = FLOAT + (2 * width if is_cast else 0)  # cast, and padded
        return num * row * (hidden * widest_moment(stream, width) + row * masks)

    def cache(row: int) -> int:
        return num * row * layers * 2 * hidden * width

    row = prompt + num_candidates * response
    logits = num * num_candidates * sizes.VOCABULARY * FLOAT
    held = {"generation": casts + cache(row - 1) + 4 * logits}
    held["features"] = max(0, casts - width * count["head"]) + forward(row)
    row = prompt + 2 * response
    held["oracle"] = forward(row, width)
    row = prompt - 1 + 2 * response
    logits = num * 2 * response * sizes.VOCABULARY
    inside = max(forward(row), (FLOAT + width if is_cast else FLOAT) * logits)
    held["reference"] = max(casts + inside, FLOAT * (2 * logits + num * row * row))
    is_accumulated = batch_size > micro_batch
    held["update"] = max(update_moments(size, num, is_accumulated, checkpointing, width))
    held["step"] = FLOAT * (count["all"] + (0 if is_cast else 2 * count["head"]))
    return {name: (always + value) / GIB for name, value in held.items()}


def computed_peak(size: str, *args: int, **options: object) -> float:
    """GiB at the peak of a round: `phases`' arguments, and the largest of them."""
    return max(phases(size, *args, **options).values())


# ------------------------------------------------------------------ which micro-batch fits


def print_cards(batch_size: int) -> None:
    """The largest power of two of prompts a forward pass whose count leaves a tenth free."""
    print(f"{batch_size} prompts of {sizes.PROMPT_LENGTH} tokens a round, 20 candidates of "
          f"{sizes.RESPONSE_LENGTH}; computed: micro-batch (GiB at the peak)\n")  # fmt: skip
    print("| model | checkpointing |", " | ".join(f"{card} GB" for card in CARDS), "|")
    print("|---" * (2 + len(CARDS)) + "|")
    powers = [2**n for n in range(batch_size.bit_length())]
    for size in MODELS:
        for checkpointing in (False, True):
            peaks = {n: computed_peak(size, n, batch_size, checkpointing) for n in powers}
            cells = []
            for card in CARDS:
                fits = [n for n, peak in peaks.items() if peak <= 0.9 * card]
                cells.append(f"{fits[-1]} ({peaks[fits[-1]]:.1f})" if fits else "-")
            print("|", " | ".join((size, "yes" if checkpointing else "no", *cells)), "|")


# ------------------------------------------------------------------ the count beside a CPU


def resident(name: str) -> float:
    """GiB of this process now, VmRSS, or at its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(name))


def measured_peak(size: str, micro_batch: int, batch_size: int, checkpointing: bool) -> float:
    """GiB that two rounds take beyond what a process with its imports holds."""
    import datasets  # noqa: F401

    transformers.logging.disable_progress_bar()
    before, (script, more) = resident("VmRSS"), sizes.RUNS["SEA, 20 candidates, 20 heads"]
    with tempfile.TemporaryDirectory() as folder:
        flags = sizes.PUBLISHED | more | sizes.write_models(Path(folder), size, "cpu")
        flags |= {"dataset": sizes.write_prompts(Path(folder), 2 * batch_size), "device": "cpu"}
        flags |= {"batch_size": batch_size, "num_queries": 8 * batch_size}
        flags |= {"micro_batch_size": micro_batch, "gradient_checkpointing": checkpointing}
        sizes.time_rounds(script, flags, 2, None)
    return resident("VmHWM") - before


def print_check(micro_batches: list[int], batch_size: int | None, checkpointing: bool) -> None:
    """Each tensor above 64 KiB gets pages of its own, which go back when it is freed: else glibc
    keeps freed memory, and its holes count, too."""
    print("| size, micro-batch | batch | computed GiB | measured GiB | measured / computed |")
    print("|---|---|---|---|---|")
    for num in micro_batches:
        total = batch_size or max(2, num)
        args = "160m", num, total, checkpointing
        with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measured = pool.submit(measured_peak, *args).result()
        computed = computed_peak(*args, device="cpu")
        cells = f"{computed:.2f} | {measured:.2f} | {measured / computed:.2f}"
        print(f"| 160m, {num} | {total} | {cells} |", flush=True)
