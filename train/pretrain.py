"""Train a small Qwen3 base from random weights: `python -m train.pretrain`.

The base replaces a released Qwen3 where none can be downloaded, and is saved like one: a Hugging
Face directory with config, weights, its own BPE tokenizer and a chat template. It learns the made
problems, or the questions and answers of a file. Knows no diffusion view.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from orthrus_jax import checkpoint, runtime
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding.sampling import NOISE
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Segment, View, params
from orthrus_jax.tokenizer import Tokenizer, check_vocabulary, encode
from orthrus_jax.values import check_whole
from train import cli, lock, settings
from train.data import Rows, TokenizedDialogue, pack, stack
from train.problems import WordProblem, problems
from train.prompts import COLUMNS, file_rows, local_files
from train.responses import ANSWERS, Responses

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = "<|im_end|>"
POSITIONS = 2048
LEAST_VOCABULARY = 256 + len(SPECIAL) + 1  # every byte, and MASK
FIXED = ("max_position_embeddings", "eos_token_ids", "mask_token_id", "dtype")
REQUIRED = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` - 1 ids: the last id stays free for MASK.

    Each digit is a token, so that the model computes digit by digit.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerFast

    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TURN,
        pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_problem(tokenizer: Tokenizer, problem: WordProblem) -> TokenizedDialogue:
    """Encode a problem with the chat template of generation, and its worked answer."""
    answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    return TokenizedDialogue(encode(tokenizer, problem.question, chat=True), [*answer, end])


def next_token_loss(
    model: Model, weights: Any, rows: Rows, question_weight: float
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted mean cross-entropy of the next token, and the mean over answer tokens.

    Args:
      rows: packed batch, arrays [B, L].
      question_weight: of tokens outside of answers, whose weight is 1.
    """
    tokens = jnp.asarray(rows.tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment = Segment(tokens, positions, View.AR, start=jnp.asarray(rows.start))
    (hidden,), _ = model.forward(weights, [segment], None)
    logits = model.logits(weights, hidden[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    answer = jnp.asarray(rows.answer[:, 1:], jnp.float32)
    inside = rows.used[:, 1:] & (rows.start[:, 1:] == rows.start[:, :-1])
    weight = jnp.where(inside, answer + question_weight * (1 - answer), 0.0)
    return (loss * weight).sum() / weight.sum(), (loss * answer).sum() / answer.sum()


def fit(config: Any, model: Model, rows: Any) -> params.Params:
    """Train the base on an iterator of batches with AdamW and a cosine schedule."""
    steps = config.pretrain.steps
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.pretrain.learning_rate, int(steps * config.pretrain.warmup), steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    )
    frozen, _ = params.split(params.init(model, jax.random.key(config.seed, impl=NOISE)))
    state = optimizer.init(frozen)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, rows: Rows) -> tuple[Any, Any, jax.Array]:
        loss = lambda w: next_token_loss(model, w, rows, config.pretrain.question_weight)
        gradient, answer_loss = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, answer_loss

    with tqdm(total=steps, desc="pretrain", unit="step") as bar:
        for i in range(steps):
            frozen, state, loss = step(frozen, state, next(rows))
            bar.update()
            if i % 20 == 0:
                bar.set_postfix(answer_loss=f"{float(loss):.3f}")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(frozen)):
        raise UserError(
            "the base's weights are NaN or infinite: lower config.pretrain.learning_rate="
            f"{config.pretrain.learning_rate}; nothing was written"
        )
    return frozen


def coarsen(weights: params.Params, bits: int) -> params.Params:
    """Round every weight to `bits` significant bits, so that the base compresses to half its size.

    bfloat16 has 8; with 5 the rounding error is at most a 64th of each weight.
    """

    def rounded(x: jax.Array) -> np.ndarray:
        mantissa, exponent = np.frexp(np.asarray(x, np.float32))
        return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)

    return jax.tree.map(rounded, weights)


def sizes(config: Any, ends: tuple[int, ...] = ()) -> ModelConfig:
    """The base of `config.model`: the last id is MASK, and the embedding is also the head.

    Raises:
      UserError: for sizes that are missing, unknown or refused.
    """
    model = dict(settings.group(config, "model"))
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - set(FIXED)
    for name in sorted(fields.symmetric_difference(model)):
        if name in REQUIRED or name in model:
            fault = "lacks" if name in REQUIRED else "has no"
            raise UserError(f"the configuration's model {fault} {name}")
    check_whole("config.model.vocab_size", model["vocab_size"], 1)
    return ModelConfig(
        **model,
        max_position_embeddings=POSITIONS,
        eos_token_ids=ends,
        mask_token_id=model["vocab_size"] - 1,
        dtype="float32",
    )


def texts(config: Any) -> list[str]:
    """Texts to train the tokenizer on."""
    if not config.pretrain.data:
        return [f"{p.question}\n{p.answer}" for p in problems("train", config.seed, 20_000)]
    columns = (*COLUMNS, *ANSWERS)
    rows = itertools.chain.from_iterable(map(file_rows, local_files(config.pretrain.data)))
    joined = [
        "\n".join(row[name] for name in columns if isinstance(row.get(name), str))
        for row in rows
        if isinstance(row, dict)
    ]
    return [text for text in joined if text]


def dialogues(config: Any, tokenizer: Tokenizer) -> Iterator[TokenizedDialogue]:
    """Endless training data: made problems, or a file's rows in a new order every epoch.

    Raises:
      UserError: for a file without a usable row.
    """
    if not config.pretrain.data:
        yield from (encode_problem(tokenizer, p) for p in problems("train", config.seed + 1))
    responses = Responses(config.pretrain.data, tokenizer)
    usable = list(responses)
    reasons = ", ".join(f"{count} {reason}" for reason, count in responses.skipped.most_common())
    if not usable:
        raise UserError(
            f"config.pretrain.data={config.pretrain.data} has no row with a prompt and an answer "
            f"({reasons or 'it is empty'})"
        )
    if reasons:
        print(f"{config.pretrain.data}: skipped {reasons}")
    rng = np.random.default_rng(config.seed)
    while True:
        yield from (usable[i] for i in rng.permutation(len(usable)))


def main(config: Any, overwrite: bool) -> None:
    """Train the tokenizer and the base, and write both to `config.base`.

    Raises:
      UserError: for a value, a file or a target that cannot do, before any training; when the loss
        is not finite.
    """
    settings.check(config, "base", "seed", "pretrain")
    runtime.check_devices()
    checkpoint.check_target(config.base, overwrite=overwrite)
    lock.check_writable("config.base", config.base)
    positions = sizes(config).max_position_embeddings  # raises for what no model can have
    check_whole("config.model.vocab_size", config.model.vocab_size, LEAST_VOCABULARY)
    check_whole("config.pretrain.row_length", config.pretrain.row_length, 2, positions)
    tokenizer = train_tokenizer(texts(config), config.model.vocab_size)
    size = sizes(config, tuple(tokenizer.convert_tokens_to_ids([END_OF_TURN, SPECIAL[0]])))
    check_vocabulary(tokenizer, size)
    packed = pack(
        dialogues(config, tokenizer), config.pretrain.row_length, pad=tokenizer.pad_token_id
    )
    rows = iter(lambda: stack(itertools.islice(packed, config.pretrain.batch_size)), None)
    frozen = fit(config, Model(size), rows)
    if config.pretrain.significant_bits:
        frozen = coarsen(frozen, config.pretrain.significant_bits)
    checkpoint.save_checkpoint(
        config.base, size, frozen, tokenizer=tokenizer, dtype="bfloat16", overwrite=overwrite
    )
    print(f"base of {params.count(frozen) / 1e6:.2f} M parameters written to {config.base}")


if __name__ == "__main__":
    cli.run(
        main,
        default="configs/tiny.py",
        description=__doc__ or "",
        switches=cli.OVERWRITE,
    )
