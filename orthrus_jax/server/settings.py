"""What an operator decides: sizes, limits, the key. Knows no HTTP."""

import dataclasses
import math

from orthrus_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """A server's sizes and limits; the defaults are the command's.

    Attributes:
      name: the model's name in the protocol; NAME:ar is the same model without drafts.
      max_batch: answers decoded together.
      max_context: tokens of a prompt and its answer.
      max_queue: answers that may wait for a row; more are told to come back (429).
      baseline: also serve NAME:ar, which the page's race needs: one more row of cache.
      structured: compile the programs of response_format and guided_regex.
      request_timeout: seconds from a request's arrival to its last token.
      read_timeout: seconds in which its body must arrive.
      send_timeout: seconds in which a client must take one piece of a stream.
      drain_timeout: seconds that running answers get when the server is stopped.
      max_body: bytes of a request's body.
      api_key: clients must send it as a bearer token; "" asks for none.
      hosts: names that a request's Host header may have; () is any.
      log_prompts: write prompts and answers to the log.
    """

    name: str = "model"
    max_batch: int = 8
    max_context: int = 4096
    max_queue: int = 64
    baseline: bool = True
    structured: bool = True
    request_timeout: float = 600.0
    read_timeout: float = 30.0
    send_timeout: float = 60.0
    drain_timeout: float = 30.0
    max_body: int = 2 << 20
    api_key: str = ""
    hosts: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_context": 2, "max_queue": 0, "max_body": 1024}
        for name, limit in least.items():
            if (value := getattr(self, name)) < limit:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {limit}")
        for name in ("request_timeout", "read_timeout", "send_timeout", "drain_timeout"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected seconds above 0")
        if not self.name.strip() or ":" in self.name:
            raise UserError(f"--served-name {self.name!r}: expected a name without a colon")
