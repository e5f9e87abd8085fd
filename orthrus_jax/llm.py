"""The Python API, text in and text out: load a model, generate, stream.

Decides how texts and chat messages become ids. The engine works on ids, and knows no checkpoints
and no chat template.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Generator, Iterable, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from orthrus_jax import checkpoint as checkpoint_lib
from orthrus_jax.attention.kv_config import KVCacheConfig, kv_cache_of
from orthrus_jax.checkpoint import load_checkpoint, open_view
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import (
    Auto,
    Completion,
    Contender,
    Engine,
    Plan,
    Request,
    SamplingParams,
    Session,
    planner,
)
from orthrus_jax.engine.planner import Calibration
from orthrus_jax.errors import UserError
from orthrus_jax.model import Params
from orthrus_jax.model.pairwise import HEAD
from orthrus_jax.tokenizer import (
    Tokenizer,
    check_vocabulary,
    encode_messages,
    load_tokenizer,
    with_mask_token,
)
from orthrus_jax.tokenizer import encode as encode_text
from orthrus_jax.values import check_switch, check_type, shown

MODES = ("auto", "orthrus", "ar")
Messages = Sequence[Mapping[str, str]]  # of a dialogue: {"role": "user", "content": "Hi"}, ...
Prompt = str | Messages
Pieces = Generator[str, None, Completion]  # text as it grows; returns the Completion


class LLM:
    """A loaded model that answers prompts; programs compile once per shape bucket and are kept.

    `trained` is False if the diffusion view is only a copy: exact all the same, but slow.
    `draft_length` is the default of calls that name none; None is the trained K. `mesh` has the
    devices of the parameters, if there are several. `calibration` has the measurements from which
    `plan` chooses, and the drafting view's temperature. `kv_cache` quantises the cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer = None,
        *,
        trained: bool = True,
        draft_length: int | None = None,
        mesh: Mesh | None = None,
        calibration: Calibration | None = None,
        kv_cache: KVCacheConfig | str | None = None,
    ) -> None:
        temperature = 1.0 if calibration is None else calibration.draft_temperature
        self.engine = Engine(config, params, tokenizer, mesh, temperature, kv_cache_of(kv_cache))
        self.config, self.tokenizer, self.trained = config, tokenizer, trained
        self.draft_length, self.calibration = draft_length, calibration

    @property
    def params(self) -> Params:
        """Both views' parameters and the pairwise head's, if there is one.

        May be replaced by others of the same shapes.
        """
        return self.engine.params

    @params.setter
    def params(self, params: Params) -> None:
        self.engine.params = params

    def plan(self, rows: int, batch_size: int = 1) -> Strategy:
        """The fastest strategy of at most `rows` rows per forward, according to eval.calibrate.

        `model.generate(prompts, strategy=model.plan(160))`. Without figures a rule decides.
        """
        block = self.config.block_size
        return planner.choose(self.calibration, rows, batch_size, block).strategy

    def contenders(self, batch_size: int = 1, auto: Auto | None = None) -> tuple[Contender, ...]:
        """The strategies that "auto" chooses among, the one to begin with first.

        AR alone where there is no trained view. Of a quantised cache only those that fit its tail.
        """
        auto, config = auto or Auto(), self.config
        if not self.trained or config.mask_token_id is None:
            return (Contender(Strategy("ar"), 1.0, 1.0),)
        expected = planner.contenders(
            self.calibration, batch_size, config.block_size, self.draft_length
        )
        how = lambda strategy: dataclasses.replace(
            strategy, accept=auto.accept, pairwise=auto.pairwise
        )
        cache = self.engine.kv_cache
        fits = lambda strategy: cache is None or strategy.reach <= cache.longest_pass
        return tuple(
            c if c.strategy.method == "ar" else dataclasses.replace(c, strategy=how(c.strategy))
            for c in expected
            if c.strategy.method == "ar" or fits(c.strategy)
        )

    def plan_of(
        self,
        strategy: Strategy | Auto | str | None = None,
        mode: str | None = None,
        **fields: Any,
    ) -> Plan:
        """The engine's plan; arguments are those of `complete`, `fields` of Plan."""
        if strategy is not None and mode is not None:
            raise UserError(f"mode={shown(mode)} beside strategy={shown(strategy)}: give one")
        if mode not in (None, *MODES):
            raise UserError(f"mode={shown(mode)} must be one of {', '.join(MODES)}")
        if strategy is None and mode in (None, "auto"):
            strategy = Auto()
        if not isinstance(strategy, Auto):
            return Plan(self.strategy(mode if strategy is None else strategy), **fields)
        plan = Plan(**fields)  # checked, before the batch decides
        contenders = self.contenders(plan.batch_size, strategy)
        return dataclasses.replace(plan, strategy=contenders[0].strategy, auto=contenders)

    def strategy(self, strategy: Strategy | str | None = None) -> Strategy:
        """Complete a strategy, a method's name or None (the paper's) by this model's length."""
        if strategy is None or isinstance(strategy, str):
            strategy = Strategy() if strategy is None else Strategy(strategy)
        check_type("strategy", strategy, Strategy, "a Strategy, Auto, a method's name or None")
        if strategy.draft_length is None and strategy.method != "ar":
            strategy = dataclasses.replace(strategy, draft_length=self.draft_length)
        return strategy

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = True,
        thinking: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Answer each prompt; greedy unless `sampling` says otherwise.

        Args:
          prompts: one prompt or several. A prompt is a string, or a list of chat messages such as
            {"role": "user", "content": "Hi"}, which the answer continues.
          sampling: how tokens are chosen and when answers end; one for all, or one per prompt.
          chat: wrap each string in the tokenizer's chat template; False reads it as plain text.
          thinking: let the template open a thinking part.
          options: those of `complete`.

        Returns:
          One completion per prompt and sample, in a list even for one prompt.

        Raises:
          UserError: for an empty prompt, one that does not fit, or a bad argument.
        """
        every = [prompts] if isinstance(prompts, str) or _is_dialogue(prompts) else prompts
        if not isinstance(every, Iterable) or isinstance(every, bytes | Mapping | Set):
            raise UserError(
                f"prompts={shown(prompts)} must be a string, a list of chat messages, or a list of "
                "either"
            )
        ids = [self._encode(p, i, chat, thinking) for i, p in enumerate(every)]
        return self.complete(ids, sampling, **options)

    def _encode(self, prompt: Any, number: int, chat: bool, thinking: bool) -> list[int]:
        """Return the ids of a prompt, which messages call prompt `number`."""
        check_switch("chat", chat)
        check_switch("thinking", thinking)
        if self.tokenizer is None:
            raise UserError("this model was loaded without a tokenizer: use complete() with ids")
        if isinstance(prompt, str):
            return encode_text(self.tokenizer, prompt, chat=chat, thinking=thinking)
        if not _is_dialogue(prompt):
            raise UserError(
                f"prompt {number} is {shown(prompt)}: expected a string, or a list of chat "
                'messages like {"role": "user", "content": "Hi"}'
            )
        if not chat:
            raise UserError(f"prompt {number} is a list of chat messages: chat=False takes strings")
        for at, message in enumerate(prompt):
            for key in ("role", "content"):
                if not isinstance(value := message.get(key), str):
                    raise UserError(
                        f"prompt {number}, message {at}: {key}={shown(value)} must be a string"
                    )
        messages = [dict(message) for message in prompt]
        return encode_messages(self.tokenizer, messages, thinking=thinking)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: str | None = None,
        strategy: Strategy | Auto | str | None = None,
        batch_size: int = 1,
        refill: bool = True,
        progress: bool = False,
        **fields: Any,
    ) -> list[Completion]:
        """Answer each prompt, as `generate` does, but from ids.

        Args:
          prompts: ids per prompt.
          sampling: one for all prompts, or one per prompt.
          mode: "auto", the default, chooses while it decodes whatever earns most here; "orthrus" is
            the paper's cycle with the draft length that was measured to be best here; "ar" is one
            token per forward. The text is the same in all.
          strategy: in place of `mode`, how to decode in full, or a method's name.
          batch_size: rows decoded together; a finished row goes to the next prompt.
          refill: False decodes whole batches one after another.
          progress: show a bar on standard error.
          fields: of SamplingParams, in place of `sampling`'s: max_new_tokens=64, temperature=0.7.
            Without either, an answer has at most 256 tokens, or those that the positions leave.

        Returns:
          One completion per prompt and sample, the samples of a prompt side by side.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray):
            raise UserError(f"prompts={shown(prompts)} must be a list of lists of token ids")
        check_switch("progress", progress)
        plan = self.plan_of(strategy, mode, batch_size=batch_size, refill=refill)
        given = _one_each(sampling, len(prompts))
        samplings = [self._sampling(*pair, fields) for pair in zip(prompts, given, strict=True)]
        for one in samplings:
            if one.n > batch_size:
                raise UserError(f"n={one.n} is over batch_size={batch_size}")
        pairs = [(i, sample) for i, one in enumerate(samplings) for sample in range(one.n)]
        requests = [Request(prompts[i], samplings[i], sample) for i, sample in pairs]
        completions: dict[int, Completion] = {}
        name = "auto" if plan.auto else plan.strategy.method
        with tqdm(total=len(pairs), desc=name, unit="answer", disable=not progress) as bar:
            for event in self.engine.serve(requests, plan) if requests else ():
                if event.completion is not None:
                    place = pairs[event.index][0]
                    completions[event.index] = dataclasses.replace(event.completion, prompt=place)
                    bar.update()
        return [completions[j] for j in range(len(pairs))]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        chat: bool = True,
        thinking: bool = False,
        **options: Any,
    ) -> Pieces:
        """Answer one prompt in pieces: whole characters, nothing from a stop string on.

        The pieces together are `generate`'s text. The iterator returns the Completion, which
        `completion = yield from model.stream(...)` gives. Arguments are those of `generate`.
        """
        return self.stream_ids(self._encode(prompt, 0, chat, thinking), sampling, **options)

    def stream_ids(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        mode: str | None = None,
        strategy: Strategy | Auto | str | None = None,
        session: Session | None = None,
        **fields: Any,
    ) -> Pieces:
        """Answer as `stream` does, but from ids; tokens that the `session` holds are not read."""
        sampling = self._sampling(prompt, sampling, fields)
        if sampling.n > 1:
            raise UserError(f"n={sampling.n}: a stream is of one sample")
        plan = self.plan_of(strategy, mode, stream=True)
        request = Request(prompt, sampling)
        self.engine.check([request], plan)
        return self._pieces(request, plan, session)

    def _sampling(
        self, prompt: Any, sampling: SamplingParams | None, fields: dict[str, Any]
    ) -> SamplingParams:
        """Return a prompt's sampling parameters: `sampling`, or the defaults, with `fields`.

        A budget that nobody gave is at most the positions that the prompt leaves.
        """
        if sampling is None and "max_new_tokens" not in fields and isinstance(prompt, Sized):
            room = self.config.max_position_embeddings - len(prompt)
            fields = fields | {"max_new_tokens": max(1, min(SamplingParams.max_new_tokens, room))}
        return _with_fields(sampling, fields)

    def _pieces(self, request: Request, plan: Plan, session: Session | None) -> Pieces:
        with contextlib.closing(self.engine.serve([request], plan, session)) as events:
            for event in events:
                if event.text:
                    yield event.text
                if event.completion is not None:
                    return event.completion
        raise AssertionError("a served request ends with its completion")


def _is_dialogue(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _one_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    """Return the sampling parameters given for each of `count` prompts."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * count
    if not isinstance(sampling, Sequence) or len(sampling) != count:
        raise UserError(
            f"sampling={shown(sampling)} must be one SamplingParams, or one per prompt: {count}"
        )
    return sampling


def _with_fields(sampling: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    """Return `sampling`, or the defaults, with these fields replaced."""
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"unknown option {', '.join(unknown)}: sampling has {', '.join(known)}")
    if sampling is None:
        return SamplingParams(**fields)
    if not isinstance(sampling, SamplingParams):
        raise UserError(f"sampling={shown(sampling)} must be SamplingParams")
    return dataclasses.replace(sampling, **fields)


def load(
    source: str | pathlib.Path,
    *,
    view: str | pathlib.Path | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    kv_cache: KVCacheConfig | str | None = None,
) -> LLM:
    """Load a base or an Orthrus checkpoint, from a directory or a hub id, with its tokenizer.

    A base (Qwen3, Qwen2, Llama, Mistral) gets a diffusion view that copies its attention: exact,
    and slow until trained.
    The default draft length is the one that eval.calibrate measured on this kind of device, if any.

    Args:
      source: directory or "owner/name".
      view: a diffusion view that `save_view` wrote, in place of the checkpoint's own: its file, or
        a directory or "owner/name" that holds it.
      dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
      mesh: devices to decode on, from sharding.make_mesh: weights go straight to their shards, the
        rows of a batch are divided over its data axis, heads over its tensor axis.
      kv_cache: quantises the cache: a KVCacheConfig, or "k4v4", "k4v2", "k2v2".

    Raises:
      UserError: naming the file that is missing or broken, or what differs between the base and
        the one that the view was trained for.
    """
    if mesh is not None:
        check_type("mesh", mesh, Mesh, "a Mesh, from sharding.make_mesh")
    opened = None if view is None else open_view(view)
    kv_cache = kv_cache_of(kv_cache)
    checkpoint = load_checkpoint(source, dtype=dtype, mesh=mesh, view=opened)
    tokenizer = load_tokenizer(checkpoint.directory)
    check_vocabulary(tokenizer, checkpoint.config)
    config = with_mask_token(checkpoint.config, tokenizer)
    calibration = planner.load(checkpoint.directory)
    head = {} if checkpoint.head is None else {HEAD: checkpoint.head}
    return LLM(
        config,
        checkpoint.params | head,
        tokenizer,
        trained=checkpoint.trained,
        draft_length=planner.preferred_draft_length(calibration, checkpoint.config.block_size),
        mesh=mesh,
        calibration=calibration,
        kv_cache=kv_cache,
    )


def save_view(
    model: LLM,
    target: str | pathlib.Path,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write a model's diffusion view alone, to be used as `load(base, view=...)`.

    Its pairwise head, if it has one, lies in the same file.

    Args:
      model: whose view; its base is remembered by checksums.
      target: a file that ends in .safetensors, or a directory, for view.safetensors.
      rank: keep each projection as its best difference of this rank to the AR view's; None keeps
        it whole. Fewer accepted drafts, never another text.
      dtype: of the tensors; None keeps the model's.
      overwrite: replace a file that is there.

    Returns:
      The file's path.

    Raises:
      UserError: when the file is there, or cannot be written.
    """
    return checkpoint_lib.save_view(
        target,
        model.config,
        model.params,
        head=model.params.get(HEAD),
        rank=rank,
        dtype=dtype,
        overwrite=overwrite,
    )
