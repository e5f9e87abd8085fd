"""Serve a model over HTTP: `python -m orthrus_jax.serve --model DIR_OR_ID`.

Decides how the server begins and ends: what is refused before a model is loaded, and what a signal
does. Knows no requests: server/ answers them.
"""

import argparse
import asyncio
import dataclasses
import logging
import os
import pathlib
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from orthrus_jax.cli import (
    add_kv_cache,
    add_mode,
    add_runtime,
    add_strategy,
    chosen_decoding,
    decoding_of,
    runtime_options,
)
from orthrus_jax.errors import UserError, check_extra, missing_packages, program_name, run_command
from orthrus_jax.llm import load

if TYPE_CHECKING:
    from orthrus_jax.server import Service, Settings

KEY_VARIABLE = "ORTHRUS_API_KEY"
CONTEXT = 4096  # tokens of a prompt and its answer, where neither flag nor model says otherwise
HEADER_BYTES = 32 << 10
CONNECTIONS = 1024
SLACK = 10.0  # seconds for the last responses, after the answers have ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("serve"),
        description="Serve a model over HTTP as the OpenAI protocol has it; see docs/serving.md.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    add_mode(parser)
    add_strategy(parser)
    add_runtime(parser)
    add_kv_cache(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 is any")
    parser.add_argument(
        "--served-name", metavar="NAME", help="the model's name for clients; default: --model's"
    )
    whole = lambda flag, default, text: parser.add_argument(
        flag, type=int, default=default, metavar="N", help=f"{text}; default: %(default)s"
    )
    whole("--max-batch", 8, "answers decoded together")
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help=f"tokens of a prompt and its answer; default: {CONTEXT}, or the model's if fewer",
    )
    whole("--max-queue", 64, "answers that may wait; more are told to come back (429)")
    whole("--max-body", 2 << 20, "bytes of a request's body")
    seconds = lambda flag, default, text: parser.add_argument(
        flag, type=float, default=default, metavar="SECONDS", help=f"{text}; default: %(default)g"
    )
    seconds("--request-timeout", 600.0, "from a request's arrival to its last token")
    seconds("--drain-timeout", 30.0, "for running answers, after SIGTERM")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"clients must send it as a bearer token; default: {KEY_VARIABLE}, or none",
    )
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also serve NAME:ar, without drafts, which the page's race needs; default: yes",
    )
    parser.add_argument(
        "--structured",
        action=argparse.BooleanOptionalAction,
        help="serve response_format and guided_regex; default: if llguidance is installed",
    )
    parser.add_argument(
        "--log-prompts", action="store_true", help="write prompts and answers to the log"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parsed(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for name in ("orthrus_jax", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    settings = settings_of(args)  # refused before an address is taken and a model is loaded
    with listening(args.host, args.port, settings.send_timeout) as bound:
        serve(service_of(args), bound)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what is not installed and what does not fit refused.

    Raises:
      UserError: naming the flag or the package.
    """
    args = _parser().parse_args(argv)
    decoding_of(args)
    check_extra("serve")
    if args.structured:
        check_extra("structured")
    return args


def service_of(args: argparse.Namespace) -> "Service":
    """Load the model and prepare its service.

    Raises:
      UserError: for a model that cannot be loaded, or that the flags do not fit.
    """
    from orthrus_jax.server import Service

    settings = settings_of(args)
    model = load(args.model, **runtime_options(args))
    if args.max_context is None:
        context = min(CONTEXT, model.config.max_position_embeddings)
        settings = dataclasses.replace(settings, max_context=context)
    return Service(model, chosen_decoding(args, model, settings.max_batch), settings)


def settings_of(args: argparse.Namespace) -> "Settings":
    """The settings given by the flags; without --max-context, of a model that can hold CONTEXT.

    Raises:
      UserError: naming the flag.
    """
    from orthrus_jax.server import Settings
    from orthrus_jax.server.gate import LOOPBACK, is_loopback

    structured = not missing_packages("structured") if args.structured is None else args.structured
    return Settings(
        name=args.served_name or pathlib.Path(args.model).name or "model",
        max_batch=args.max_batch,
        max_context=CONTEXT if args.max_context is None else args.max_context,
        max_queue=args.max_queue,
        max_body=args.max_body,
        baseline=args.baseline,
        structured=structured,
        request_timeout=args.request_timeout,
        drain_timeout=args.drain_timeout,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE, ""),
        hosts=LOOPBACK if is_loopback(args.host) else (),
        log_prompts=args.log_prompts,
    )


def listening(host: str, port: int, send_timeout: float) -> socket.socket:
    """A socket bound to the address, before minutes are spent on a model.

    Linux ends its connections when a client has taken nothing of what it was sent for
    `send_timeout` seconds; without, a closed stream would be kept until its last byte is read.

    Raises:
      UserError: naming the flag.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: expected 0 to {(1 << 16) - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = max(1, int(send_timeout * 1000))
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}") from None
    return bound


def serve(service: "Service", bound: socket.socket) -> None:
    """Serve on a bound socket until a signal; then finish or end what runs, see `Service.drain`."""
    server_of(service, bound).run([bound])


def server_of(service: "Service", bound: socket.socket) -> Any:
    """The HTTP server of a service, a `uvicorn.Server`."""
    import uvicorn

    from orthrus_jax.server import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)
            if self.started:
                host, port = bound.getsockname()[:2]
                print(f"ready: http://{host}:{port}", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.started:  # no answer runs, and what compiles cannot be interrupted
                os._exit(128 + sig)
            super().handle_exit(sig, frame)
            drain = lambda: self.loop.create_task(service.drain())
            self.loop.call_soon_threadsafe(drain)

    config = uvicorn.Config(
        create_app(service),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(service.settings.drain_timeout + SLACK),
    )
    return Server(config)


if __name__ == "__main__":
    run_command(main)
