"""The server as a Ray Serve application: `serve run orthrus_jax.replicas:build model=DIR_OR_ID`.

Decides nothing: replicas, autoscaling, draining and rolling updates are Ray's. Needs the extra
`ray`.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve

from orthrus_jax.serve import parsed, service_of
from orthrus_jax.server import create_app


def build(arguments: Mapping[str, Any]) -> Any:
    """The application of `serve run`.

    Args:
      arguments: flags of orthrus_jax.serve without their dashes, model=DIR max_batch=4; a flag
        without a value is true. Address, key and signals of the command do not apply: Ray has them.

    Raises:
      UserError: for flags that do not fit each other.
    """
    argv: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        argv += [flag] if str(value).lower() == "true" else [flag, str(value)]
    parsed(argv)
    return DEPLOYMENT.bind(argv)


class Replica:
    """One model on the devices of one host, behind Ray's proxy."""

    def __init__(self, argv: list[str]) -> None:
        self._service = service_of(parsed(argv))

    def __serve_build_asgi_app__(self) -> Any:
        """The application, once per replica."""
        return create_app(self._service)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self._service.healthy:
            raise RuntimeError("the engine does not run")


DEPLOYMENT: Any = serve.deployment(name="orthrus", max_ongoing_requests=256)(
    serve.ingress()(Replica)
)
