"""Serve a recommender over HTTP, with a page to try it.

accelerate launch recipes/serve.py --model runs/demo/fused
accelerate launch recipes/serve.py --model you/my-recommender --port 9000

The page is at http://127.0.0.1:8000, the interface below /v1, its schema at /openapi.json. It listens on this machine
only; for others, `--host 0.0.0.0` and a bearer token in the environment variable REASONREC_TOKEN.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import socket
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.loaded_model import AskedModel
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say

TOKEN = "REASONREC_TOKEN"


@dataclass
class ServeConfig(AskedModel):
    """Configuration of a server."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; this machine only by default"})
    port: int = field(default=8000, metadata={"help": "port to listen on", "at_least": 0, "at_most": 65535})
    name: str | None = field(default=None, metadata={"help": "what the model is called; the folder's name if unset"})
    allowed_hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "names under which the server may be reached; this machine's if unset"},
    )
    max_batch: int = field(default=16, metadata={"help": "users that are ranked together", "at_least": 1})
    wait_ms: float = field(
        default=5.0, metadata={"help": "milliseconds that a user may wait for others to share a batch", "at_least": 0}
    )
    capacity: int = field(
        default=128, metadata={"help": "users that wait or are answered at a time; more get 429", "at_least": 1}
    )
    remember_mb: float = field(
        default=64.0, metadata={"help": "megabytes of lists kept for who asks the same again; 0: none", "at_least": 0}
    )
    timeout: float = field(default=30.0, metadata={"help": "seconds until a request is given up", "above": 0})
    max_k: int = field(default=100, metadata={"help": "longest list", "at_least": 1})
    max_history: int = field(default=1000, metadata={"help": "longest history in a request", "at_least": 1})
    max_users: int = field(default=64, metadata={"help": "most users in a request", "at_least": 1})
    max_body: int = field(default=1_000_000, metadata={"help": "longest request in bytes", "at_least": 1})
    num_beams: int = field(default=50, metadata={"help": "width of the item search", "at_least": 1})
    max_chain: int = field(default=128, metadata={"help": "longest chain in tokens", "at_least": 1})
    unproven: bool = field(
        default=False, metadata={"help": "think even where it was not shown to help (judge_reasoning.py)"}
    )

    def __post_init__(self) -> None:
        missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]
        if missing:
            raise UserError(f"serving needs {', '.join(missing)}: pip install 'reasonrec[serve]'")
        if not is_loopback(self.host) and not os.environ.get(TOKEN):
            raise UserError(
                f"host={self.host} can be reached from other machines: put a token that they have to send into the "
                f"environment variable {TOKEN}, or listen on 127.0.0.1"
            )

    @property
    def hosts(self) -> list[str]:
        """Names under which the server may be reached; none for any, where a token keeps strangers out."""
        if self.allowed_hosts or not is_loopback(self.host):
            return [name.lower() for name in self.allowed_hosts]
        return ["localhost", "127.0.0.1", "[::1]", self.host.lower()]


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 chooses a free one.

    Raises:
        UserError: If the address cannot be had.
    """
    made = None
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        if made is not None:
            made.close()
        raise UserError(f"host={host}, port={port} cannot be listened on ({error}): choose another --port") from error
    return made


def main() -> None:
    """Parse, load, serve until a signal comes."""
    (config,) = parse([ServeConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    import uvicorn

    from reasonrec.recipes.serving.app import build_app
    from reasonrec.recipes.serving.engine import Engine, EngineSettings
    from reasonrec.recipes.serving.guards import Guard
    from reasonrec.recipes.serving.metrics import Metrics
    from reasonrec.recipes.serving.service import Limits, Service
    from reasonrec.recipes.serving.watch import CatalogueWatch

    if not is_first_process():
        return
    listening = listen(config.host.strip("[]"), config.port)
    recommender = config.recommender()
    # Said of a user to that user (`unknown`), and not once more for each of them here.
    warnings.filterwarnings("ignore", message=".*histories are empty")
    metrics = Metrics()
    settings = EngineSettings(
        max_batch=config.max_batch,
        wait=config.wait_ms / 1000,
        capacity=config.capacity,
        num_beams=config.num_beams,
        max_chain=config.max_chain,
        unproven=config.unproven,
        remember=int(config.remember_mb * 1_000_000),
    )
    engine = Engine(recommender, settings, metrics.batch)
    limits = Limits(config.max_k, config.max_history, config.max_users, config.timeout)
    service = Service(engine, config.name or Path(config.model).name, limits)
    if config.catalogue is not None:
        CatalogueWatch(service, config.catalogue, config.without)
    app = build_app(service, metrics)
    guarded = Guard(app, token=os.environ.get(TOKEN) or None, hosts=config.hosts, max_body=config.max_body)
    server = uvicorn.Server(
        uvicorn.Config(
            guarded,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(config.timeout) + 1,
        )
    )
    say(f"serving {config.model} on http://{config.host}:{listening.getsockname()[1]} (Ctrl-C stops)")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn finishes what is open, then passes the signal on
        server.run(sockets=[listening])
    say("stopped")


if __name__ == "__main__":
    run(main)()
