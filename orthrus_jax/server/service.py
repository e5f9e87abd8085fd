"""Between HTTP and the engine: requests to ids, admission, news of answers.

Decides who is let in, which lane answers, and when a call has taken too long. Lives on the event
loop; tokenizing and grammars run on a thread of their own, the engine on another.
"""

import asyncio
import concurrent.futures
import copy
import dataclasses
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from orthrus_jax.decoding import Strategy
from orthrus_jax.decoding.constrained import MASKED_METHODS
from orthrus_jax.engine import Auto, Capacity, Matcher, Plan, Request, SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.server.figures import Figures
from orthrus_jax.server.problems import ApiError, invalid, out_of_time, stopping
from orthrus_jax.server.schema import ChatRequest, CompletionRequest, Options
from orthrus_jax.server.settings import Settings
from orthrus_jax.server.worker import Call, News, Worker
from orthrus_jax.tokenizer import encode as encode_text
from orthrus_jax.tokenizer import encode_messages

BASELINE = "ar"  # the lane without drafts: the model NAME:ar
LONGEST_RETRY = 60  # seconds


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Requests of one call, checked, with the lane that answers them."""

    lane: str
    requests: list[Request]


class Service:
    """A model behind a server. `start` compiles; `open_call` and `news` answer.

    Attributes:
      plans: of each lane, by the model's name in the protocol.
      figures: what /metrics reports.
    """

    def __init__(self, model: LLM, strategy: Strategy | Auto, settings: Settings) -> None:
        """Prepare lanes; nothing is compiled and no thread runs yet.

        Args:
          model: with its tokenizer.
          strategy: how to decode.
          settings: the operator's.

        Raises:
          UserError: for a strategy that the model cannot run, or a context that it cannot hold.
        """
        if model.tokenizer is None:
            raise UserError("a server needs a model with its tokenizer")
        limit = model.config.max_position_embeddings
        if settings.max_context > limit:
            raise UserError(
                f"--max-context {settings.max_context}: the model has {limit} positions"
            )
        self.model, self.settings, self.figures = model, settings, Figures()
        # A copy for the thread that encodes: encoding may change a tokenizer's settings.
        self._tokenizer = copy.deepcopy(model.tokenizer)
        self._grammars = _grammars(model, settings)
        self.plans = {settings.name: self._plan(strategy, settings.max_batch)}
        if settings.baseline and {s.method for s in self.plans[settings.name].strategies} != {"ar"}:
            self.plans[f"{settings.name}:{BASELINE}"] = self._plan(Strategy("ar"), 1)
        self._capacities: dict[str, Capacity] = {}
        queues = {}
        for name, plan in self.plans.items():
            maskable = any(one.method in MASKED_METHODS for one in plan.strategies)
            self._capacities[name] = Capacity.announced(
                settings.max_context,
                model.engine.lookahead(plan),
                ends=max(4, len(model.config.eos_token_ids)),
                grammar=self._grammars is not None and maskable,
            )
            queues[name] = model.engine.open_resident(plan, self._capacities[name])
        self._worker = Worker(queues, self.figures.stepped)
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")
        self._calls: dict[Call, set[int]] = {}  # the answers that have not ended
        self._preparing = 0  # requests that are being encoded
        self._seconds = 1.0  # that an answer took of late
        self._stopping = False

    def _plan(self, strategy: Strategy | Auto, batch_size: int) -> Plan:
        plan = self.model.plan_of(strategy, batch_size=batch_size, stream=True)
        resolve = self.model.engine.resolve
        if plan.auto:
            auto = [dataclasses.replace(c, strategy=resolve(c.strategy)) for c in plan.auto]
            plan = dataclasses.replace(plan, auto=tuple(auto))
        return dataclasses.replace(plan, strategy=resolve(plan.strategy))

    def start(self) -> None:
        """Compile all programs; return when requests can be served."""
        self._worker.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self._worker.alive and not self._stopping

    @property
    def open_answers(self) -> int:
        """Answers that run or wait."""
        return sum(map(len, list(self._calls.values())))  # a copy: calls come and go meanwhile

    @property
    def load(self) -> tuple[int, int]:
        """Answers that run, and that wait."""
        return self._worker.load

    # Requests to ids

    async def prepare(self, request: ChatRequest | CompletionRequest) -> Prepared:
        """Turn a request into the engine's, and check that it fits.

        Raises:
          ApiError: naming the field.
        """
        self.find_model(request.options.model)
        self._admit(1)
        self._preparing += 1
        try:
            prepare = lambda: self._prepare(request)
            return await asyncio.get_running_loop().run_in_executor(self._encoder, prepare)
        finally:
            self._preparing -= 1

    def find_model(self, name: str) -> Plan:
        """The plan of a model of the protocol.

        Raises:
          ApiError: 404 if there is none of this name.
        """
        if name not in self.plans:
            known = ", ".join(self.plans)
            raise ApiError(
                404, f"model={name[:80]!r}: this server has {known}", "model", "model_not_found"
            )
        return self.plans[name]

    def _prepare(self, request: ChatRequest | CompletionRequest) -> Prepared:
        options = request.options
        try:
            if isinstance(request, ChatRequest):
                prompts, where = [self._dialogue(request)], "messages"
            else:
                where = "prompt"
                prompts = [
                    encode_text(self._tokenizer, one, chat=False) if isinstance(one, str) else one
                    for one in request.prompts
                ]
            for prompt in prompts:
                self._check_length(prompt, options, where)
            grammar = self._grammar(options)
            requests = [
                Request(prompt, self._sampling(options, prompt), sample, grammar)
                for prompt in prompts
                for sample in range(options.n)
            ]
            for number, one in enumerate(requests):
                self._check(one, number, options.model)
        except UserError as error:
            raise invalid(str(error)) from None
        return Prepared(options.model, requests)

    def _dialogue(self, request: ChatRequest) -> list[int]:
        return encode_messages(
            self._tokenizer,
            request.messages,
            thinking=request.thinking,
            tools=request.tools,
        )

    def _check_length(self, prompt: Sequence[int], options: Options, where: str) -> None:
        most, new = self.settings.max_context, options.max_tokens or 1
        if len(prompt) + new > most:
            raise invalid(
                f"{where} has {len(prompt)} tokens; with {new} for the answer that is over this "
                f"server's context of {most}",
                where,
                "context_length_exceeded",
            )

    def _sampling(self, options: Options, prompt: Sequence[int]) -> SamplingParams:
        seed = options.seed
        if seed is None:
            seed = secrets.randbits(32) if options.temperature else 0
        return SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=seed,
            max_new_tokens=options.max_tokens or self.settings.max_context - len(prompt),
            stop=options.stop,
            logprobs=options.logprobs,
            n=options.n,
        )

    def _check(self, request: Request, number: int, model: str) -> None:
        engine = self.model.engine
        engine.check_request(request, number)
        lookahead = engine.lookahead(self.plans[model])
        ends = len(engine.config.eos_token_ids)
        self._capacities[model].check(request, number, ends, lookahead)

    def _grammar(self, options: Options) -> Callable[[], Matcher] | None:
        spec = options.grammar
        if spec is None:
            return None
        if self._grammars is None or not self._capacities[options.model].grammar:
            raise invalid(
                f"{spec.param} is not supported: this server was started without structured "
                "output, or with a cycle that has none",
                spec.param,
                "unsupported_parameter",
            )
        return self._grammars.compile(spec)

    # Calls

    def open_call(self, prepared: Prepared) -> Call:
        """Put a call in line; `news` must follow, or `close_call`.

        Raises:
          ApiError: 429 if too many answers wait, 503 if the server stops or its engine is dead.
        """
        wanted, limit = len(prepared.requests), self.settings.max_batch + self.settings.max_queue
        if wanted > limit:
            raise invalid(f"{wanted} answers in one request: this server takes {limit}", "n")
        self._admit(wanted)
        call = Call(prepared.requests, prepared.lane, asyncio.get_running_loop())
        self._calls[call] = set(range(wanted))
        self._worker.submit(call)
        return call

    def _admit(self, wanted: int) -> None:
        """Refuse so many more answers if there is no room, or nobody to write them."""
        if self._stopping:
            raise stopping()
        if not self._worker.alive:
            raise ApiError(503, "the engine does not run", code="engine_dead")
        limit = self.settings.max_batch + self.settings.max_queue
        if self.open_answers + self._preparing + wanted > limit:
            raise ApiError(
                429,
                f"{self.open_answers} answers run or wait: this server takes {limit}",
                code="queue_full",
                retry_after=self._retry_after(),
            )

    async def news(self, call: Call) -> AsyncGenerator[News, None]:
        """The news of a call until all of its answers have ended; then it is closed.

        Raises:
          ApiError: when an answer fails, or the call takes too long.
        """
        limit, began = self.settings.request_timeout, time.monotonic()
        try:
            while self._calls.get(call):
                left = began + limit - time.monotonic()
                try:
                    news = await asyncio.wait_for(call.news.get(), max(left, 0))
                except TimeoutError:
                    raise out_of_time(limit) from None
                if news.failure is not None:
                    raise news.failure
                if news.last:
                    self._calls[call].discard(news.choice)
                    self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
                yield news
        finally:
            self.close_call(call)

    def close_call(self, call: Call) -> None:
        """Forget a call; answers that still run are cancelled within one pause."""
        if self._calls.pop(call, None):
            self._worker.cancel(call)

    def _retry_after(self) -> int:
        """Seconds in which the answers in line will have got rows, at the pace of late."""
        rounds = 1 + self.settings.max_queue / self.settings.max_batch
        return max(1, min(math.ceil(rounds * self._seconds), LONGEST_RETRY))

    # The end

    async def drain(self) -> None:
        """Take no more calls; end those that run after `drain_timeout` seconds."""
        self._stopping = True
        deadline = time.monotonic() + self.settings.drain_timeout
        while self._calls and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._worker.abort(stopping())

    def close(self) -> None:
        """End the threads."""
        self._stopping = True
        self._worker.abort(stopping())
        self._worker.stop(5.0)
        self._encoder.shutdown(wait=False, cancel_futures=True)


def _grammars(model: LLM, settings: Settings) -> Any:
    """What compiles grammars for this model's tokenizer; None without structured output."""
    if not settings.structured:
        return None
    from orthrus_jax.server.grammar import Grammars

    return Grammars(model.tokenizer, model.config)
