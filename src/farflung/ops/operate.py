"""Commands of the operator, with the admin token or the coordinator's own key: close the circuit breaker, roll back."""

import sys
from collections.abc import Awaitable, Callable, Sequence

from farflung.config import Config
from farflung.net.admin import read_token
from farflung.net.client import Client
from farflung.net.session import Index
from farflung.protocol.identity import Key
from farflung.protocol.messages import Done, Empty, Rollback, Status
from farflung.protocol.shown import visible

ADMIN = "/v1/admin"
CLOSED = "the circuit breaker is closed"


async def close_breaker(url: str, config: Config) -> None:
    """Let verdicts and training go on."""

    async def send(client: Client, path: str) -> str:
        done = await client.post(f"{ADMIN}{path}/breaker/close", Empty(), Done)
        return "the circuit breaker is closed again" if done.changed else "the circuit breaker was not open"

    await _tell(url, config, send)


async def show_breaker(url: str, config: Config) -> None:
    """Say whether the circuit breaker is open, for all or for some numerics profiles, and why."""

    async def send(client: Client, path: str) -> str:
        status = await client.get(f"/v1{path}/status", Status)
        return "\n".join(filter(None, [status.breaker, *status.breaker_profiles.values()])) or CLOSED

    await _tell(url, config, send)


async def roll_back(url: str, config: Config, to_step: int, without: Sequence[str]) -> None:
    """Have the next step restore an earlier one."""

    async def send(client: Client, path: str) -> str:
        done = await client.post(f"{ADMIN}{path}/rollback", Rollback(to_step=to_step, without=list(without)), Done)
        text = f", without {', '.join(without)}" if without else ""
        return f"step {done.changed} takes up step {to_step} again{text}"

    await _tell(url, config, send)


async def _tell(url: str, config: Config, send: Callable[[Client, str], Awaitable[str]]) -> None:
    client = Client(url, Key.load_or_make(config.folder / "keys" / "coordinator"), patience_s=5.0)
    client.admin_token = read_token(config.coordinator.admin_token_file)
    try:
        client.tag = (await client.get("/v1", Index)).coordinator
        sys.stdout.write(visible(await send(client, f"/runs/{config.run.name}")) + "\n")
    finally:
        await client.close()
