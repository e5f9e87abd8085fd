"""The engine: ids in, ids out, through a few compiled programs.

Decides which requests a model can answer, which shapes they need and which loop decodes them. The
host's side of a running batch is queue.py; choosing and verifying tokens is decoding/.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from orthrus_jax import decoding
from orthrus_jax.attention import KVCacheConfig
from orthrus_jax.config import INT32, ModelConfig
from orthrus_jax.decoding import Filters, Sampler, Strategy, constrained
from orthrus_jax.decoding.constrained import MASKED_METHODS
from orthrus_jax.drafters import drafter_of, first_carry, loop_of
from orthrus_jax.engine.auto import Chooser
from orthrus_jax.engine.capacity import Capacity
from orthrus_jax.engine.programs import Programs, bucket
from orthrus_jax.engine.queue import Queue
from orthrus_jax.engine.request import (
    Event,
    Plan,
    Request,
    SamplingParams,
)
from orthrus_jax.engine.resident import ResidentQueue
from orthrus_jax.engine.session import Session
from orthrus_jax.errors import PromptLengthError, UserError
from orthrus_jax.memory import check_memory, decoding_bytes
from orthrus_jax.model import Model, Params
from orthrus_jax.model.pairwise import HEAD
from orthrus_jax.tokenizer import Tokenizer
from orthrus_jax.values import check_type, check_whole, is_whole, shown


class Engine:
    """A model and its compiled programs.

    On a `mesh` the rows of a batch are divided over `data` and `fsdp`, heads over `tensor`; the
    parameters lie there already (`sharding.tree_shardings`). `draft_temperature` is this model's,
    for strategies that name none. `kv_cache` is how the cache is quantised, if it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer = None,
        mesh: Mesh | None = None,
        draft_temperature: float = 1.0,
        kv_cache: KVCacheConfig | None = None,
    ) -> None:
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.draft_temperature, self.kv_cache = draft_temperature, kv_cache
        self.model = Model(config, mesh, kv_cache=kv_cache)
        self.programs = Programs(mesh)
        self._choosers: dict[Any, Chooser] = {}

    @property
    def compile_seconds(self) -> float:
        """Wall-clock time spent on compiling so far."""
        return self.programs.compile_seconds

    def check(self, requests: Sequence[Request], plan: Plan) -> None:
        """Refuse a plan that this model cannot follow, and requests that it cannot answer.

        Raises:
          UserError: naming the value and its limit.
        """
        check_type("plan", plan, Plan, "a Plan")
        for strategy in map(self.resolve, plan.strategies):
            if self.kv_cache is not None and strategy.reach > self.kv_cache.longest_pass:
                raise UserError(
                    f"tree_nodes={strategy.tree_nodes}: a cycle of {strategy.reach} slots is over "
                    f"the {self.kv_cache.longest_pass} of kv_cache={self.kv_cache.name}"
                )
        if plan.stream and self.tokenizer is None:
            raise UserError("streaming needs a tokenizer: this model was loaded without one")
        for i, request in enumerate(requests):
            self.check_request(request, i)

    def check_request(self, request: Request, number: int) -> None:
        """Refuse a request that this model cannot answer; the message calls it prompt `number`.

        Raises:
          PromptLengthError: when prompt and answer are over the model's positions.
          UserError: naming another value and its limit.
        """
        check_type(f"request {number}", request, Request, "a Request")
        config, sampling = self.config, request.sampling
        check_type("sampling", sampling, SamplingParams, "SamplingParams")
        check_whole("sample", request.sample, 0, INT32)
        self._check_prompt(request.prompt, number)
        length, new = len(request.prompt), sampling.max_new_tokens
        if length + new > config.max_position_embeddings:
            raise PromptLengthError(
                f"prompt {number} has {length} tokens; with max_new_tokens={shown(new)} that is "
                f"over the model's {config.max_position_embeddings} positions"
            )
        beyond = [t for t in sampling.stop_token_ids if t >= config.vocab_size]
        if beyond:
            raise UserError(
                f"stop_token_ids={beyond} are not below the vocabulary's {config.vocab_size}"
            )
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer: this model was loaded without one")

    def _check_prompt(self, prompt: Sequence[int], number: int) -> None:
        is_array = isinstance(prompt, np.ndarray) and prompt.ndim == 1
        if isinstance(prompt, str | bytes) or not (isinstance(prompt, Sequence) or is_array):
            raise UserError(f"prompt {number} is {shown(prompt)}: expected a sequence of token ids")
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: give at least one token")
        vocab = self.config.vocab_size
        if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) < vocab:
            return  # the usual case, without a loop in Python
        for at, token in enumerate(prompt):
            if not is_whole(token) or not 0 <= token < vocab:
                raise UserError(
                    f"prompt {number}, token {at}: {shown(token)} is not an id from 0 to "
                    f"{vocab - 1}"
                )

    def slots(self, prompt: int, new: int, plan: Plan) -> int:
        """Cache slots for a prompt and its answer, of at most that many tokens."""
        return bucket(bucket(prompt) + bucket(new) + self.lookahead(plan) + 1)

    def lookahead(self, plan: Plan) -> int:
        """Cache slots that a cycle writes after its anchor."""
        return max(self.config.block_size - 1, *(s.tree_nodes for s in plan.strategies))

    def chooser(self, plan: Plan, capacity: Capacity) -> Chooser | None:
        """What chooses among the plan's contenders; None if there is nothing to choose.

        Queues of the same contenders and shapes share one: what it has learned is of use to the
        next. Several hosts would choose by clocks of their own, and must run the same programs:
        they keep to the first contender.
        """
        if len(plan.auto) < 2 or jax.process_count() > 1:
            return None
        key = (plan.auto, plan.batch_size, capacity.slots)
        return self._choosers.setdefault(key, Chooser(plan.auto))

    def capacity(self, requests: Sequence[Request], plan: Plan) -> Capacity:
        """The capacity of a queue that fits `requests`, at least one."""
        longest = max(len(request.prompt) for request in requests)
        new = max(request.sampling.max_new_tokens for request in requests)
        slots = max(self.slots(longest, new, plan), bucket(plan.slots))
        return Capacity.of(requests, slots, len(self.config.eos_token_ids))

    def open(self, plan: Plan, capacity: Capacity, session: Session | None = None) -> Queue:
        """Open a queue, which requests may be submitted to at any time.

        Args:
          plan: how its requests are decoded, `plan.batch_size` of them together.
          capacity: the most that any of them may ask for.
          session: a dialogue that each request continues, and that keeps its cache afterwards.
            While a request runs the session is empty; if a program is interrupted, it stays so.

        Raises:
          UserError: for a plan that this model cannot follow, or that the memory has no room for.
        """
        self.check([], plan)
        check_type("capacity", capacity, Capacity, "a Capacity")
        if session is not None:
            check_type("session", session, Session, "a Session")
            if plan.batch_size != 1:
                raise UserError(f"batch_size={plan.batch_size} must be 1 with a session")
            capacity = dataclasses.replace(capacity, slots=session.grow(capacity.slots))
        if session is None or session.cache is None:
            self._check_memory(plan, capacity)
        return Queue(self, plan, capacity, session)

    def open_resident(self, plan: Plan, capacity: Capacity) -> ResidentQueue:
        """Open a queue for a server: finished rows keep their caches for prompts that begin alike.

        Raises:
          UserError: for a plan that this model or a capacity with a grammar cannot follow.
        """
        self.check([], plan)
        if capacity.grammar and not {s.method for s in plan.strategies} & {*MASKED_METHODS}:
            raise UserError(
                f"method={plan.strategy.method!r} follows no grammar: use one of "
                f"{', '.join(MASKED_METHODS)}"
            )
        self._check_memory(plan, capacity)
        return ResidentQueue(self, plan, capacity)

    def _check_memory(self, plan: Plan, capacity: Capacity) -> None:
        """Refuse a queue whose cache and largest forward do not fit the devices."""
        batch = plan.batch_size
        rows = max(self.resolve(strategy).rows for strategy in plan.strategies)
        mesh = self.programs.mesh
        check_memory(
            decoding_bytes(self.model, batch, capacity.slots, rows),
            f"decoding batch_size={batch} with {capacity.slots} cache slots and {rows} rows per "
            "forward",
            "lower the batch size, max_new_tokens or the strategy's rows",
            None if mesh is None else list(mesh.devices.flat),
        )

    def serve(
        self, requests: Sequence[Request], plan: Plan, session: Session | None = None
    ) -> Generator[Event, None, None]:
        """Answer all requests; yield events in the order in which rows finish.

        Args:
          requests: at least one. An event's index is a request's place here.
          plan: how they are decoded.
          session: see `open`.

        Raises:
          UserError: before anything starts, naming the value and its limit.
        """
        if not requests:
            raise UserError("requests is empty: give at least one")
        self.check(requests, plan)
        queue = self.open(plan, self.capacity(requests, plan), session)
        try:
            for request in requests:
                queue.submit(request)
            while queue.busy:
                yield from queue.step()
        finally:
            queue.close()

    def prefill(
        self,
        rows: Sequence[Request | None],
        plan: Plan,
        capacity: Capacity,
        cache: Any = None,
        kept: int = 0,
        end: int | None = None,
    ) -> decoding.DecodeState:
        """Read prompts as one batch, and emit each one's first token.

        Args:
          rows: the request per row; None is a filler, which is done at once.
          plan: how they are decoded afterwards.
          capacity: the shape of the state.
          cache: with one row, the cache to continue; it is donated.
          kept: its slots that hold the first tokens of the prompt.
          end: with one row, read the prompt's tokens before this one; None reads all.
        """
        prompts = [[0] if row is None else list(row.prompt)[kept:end] for row in rows]
        ids = np.zeros((len(rows), capacity.width(max(map(len, prompts)))), np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
        samplings = [row.sampling if row else None for row in rows]
        ends = np.full((len(rows), capacity.ends), -1, np.int32)
        for i, sampling in enumerate(samplings):
            own = (*self.config.eos_token_ids, *(sampling.stop_token_ids if sampling else ()))
            ends[i, : len(own)] = own
        per_row = lambda get: jnp.array([get(s) if s else 0 for s in samplings], jnp.int32)
        resumed = {"cache": cache, "start": jnp.array([kept], jnp.int32)} if kept else {}
        state = self._run(
            decoding.prefill,
            jnp.array(ids),
            jnp.array([len(prompt) for prompt in prompts], jnp.int32),
            per_row(lambda s: s.max_new_tokens),
            jnp.array(ends),
            sampler=self._sampler(rows, capacity),
            min_tokens=per_row(lambda s: s.min_new_tokens) if capacity.min_tokens else None,
            **resumed,
            static={
                "slots": capacity.slots,
                "max_new_tokens": capacity.max_new_tokens,
                "logprobs": capacity.logprobs,
                "lookahead": self.lookahead(plan),
            },
        )
        return self.restart_drafts(state, plan, capacity)

    def restart_drafts(
        self, state: decoding.DecodeState, plan: Plan, capacity: Capacity
    ) -> decoding.DecodeState:
        """The state with nothing drafted yet, as the loop of `plan.strategy` begins.

        Its cache is what AR decoding would have written: any loop may follow any other.
        """
        strategy, batch = self.resolve(plan.strategy), len(state.anchor)
        carry = first_carry(strategy, self.model, batch, capacity.slots)
        return state.replace(drafter=carry)

    def _sampler(self, rows: Sequence[Request | None], capacity: Capacity) -> Sampler | None:
        if not capacity.sampled:
            return None
        filler = Request([0], SamplingParams())
        requests = [row or filler for row in rows]
        array = lambda get, dtype: jnp.array(np.array([get(r) for r in requests], dtype))
        filters = None
        if capacity.filtered:
            filters = Filters(
                top_k=array(lambda r: r.sampling.top_k, np.int32),
                top_p=array(lambda r: r.sampling.top_p, np.float32),
                min_p=array(lambda r: r.sampling.min_p, np.float32),
            )
        return Sampler(
            temperature=array(lambda r: r.sampling.temperature, np.float32),
            seed=array(lambda r: r.sampling.seed, np.uint32),
            noise_id=array(lambda r: r.noise_id, np.uint32),
            filters=filters,
        )

    def decode(
        self,
        state: decoding.DecodeState,
        plan: Plan,
        max_cycles: int,
        min_active: int,
        *,
        plain: bool = False,
    ) -> decoding.DecodeState:
        """Run the plan's loop until `max_cycles`, or at most `min_active` rows are unfinished.

        `state` is donated: it is lost even if the call is interrupted. With `plain` the loop knows
        no sampling and no log p: for rows none of which asks for them.
        """
        aside = {"sampler": state.sampler, "logprobs": state.logprobs} if plain else {}
        state = state.replace(**dict.fromkeys(aside))
        pause = {"max_cycles": jnp.int32(max_cycles), "min_active": jnp.int32(min_active)}
        sampled = state.sampler is not None
        strategy = self.resolve(plan.strategy)
        loop, static = loop_of(strategy, self.model, sampled=sampled)
        state = self._run(loop, state, head=bool(strategy.pairwise), **pause, static=static)
        return state.replace(**aside)

    def propose(self, state: decoding.DecodeState, plan: Plan) -> jax.Array:
        """The drafts of the next cycle, int32[B, K-1], for one of MASKED_METHODS."""
        strategy = self.resolve(plan.strategy)
        if strategy.method == "ar":
            return jnp.zeros((len(state.anchor), 0), jnp.int32)
        drafter = drafter_of(strategy, self.model)
        head = bool(strategy.pairwise)
        return self._run(constrained.propose, state, head=head, static={"drafter": drafter})

    def masked_cycle(
        self, state: decoding.DecodeState, plan: Plan, drafts: jax.Array, allowed: np.ndarray
    ) -> decoding.DecodeState:
        """Verify drafts under masks uint32[B, K, W]; see `constrained`. `state` is donated."""
        static = {"rule": decoding.AcceptRule(plan.strategy.accept)}
        return self._run(
            constrained.masked_cycle, state, drafts, jnp.asarray(allowed), static=static
        )

    def resolve(self, strategy: Strategy) -> Strategy:
        """The strategy with every value filled in for this model.

        Raises:
          UserError: naming the field, for what this model cannot run.
        """
        return strategy.resolve(self.config, self.draft_temperature, head=HEAD in self.params)

    def _run(self, function: Any, *arguments: Any, head: bool = False, **named: Any) -> Any:
        """Run a function of decoding/ that takes this model and its parameters first.

        One that does not use the pairwise head does not get it: its program is that of a model
        without.
        """
        params = {name: part for name, part in self.params.items() if head or name != HEAD}
        return self.programs.run(function, *arguments, model=(self.model, params), **named)
