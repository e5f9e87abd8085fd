"""The OpenAI-compatible server: HTTP outside, the engine's resident queue inside.

Needs the extra `serve`; structured output needs `structured`. Knows no command line.
"""

from orthrus_jax.server.app import create_app
from orthrus_jax.server.service import Service
from orthrus_jax.server.settings import Settings

__all__ = ["Service", "Settings", "create_app"]
