"""Check the key of a request, as a dependency of its route."""

from collections.abc import Awaitable, Callable

from fastapi import Request

from treeswarm_client.gateway.config import ApiKeys
from treeswarm_client.gateway.errors import WrongKey

CallerOf = Callable[[Request], Awaitable[bytes]]
"""A dependency that returns an identifier of the caller, or raises WrongKey."""


def key_check(keys: ApiKeys) -> CallerOf:
    """Return the dependency for these keys, which are read from `Authorization`, or from Anthropic's `x-api-key`."""

    async def caller_of(request: Request) -> bytes:
        header = request.headers.get("authorization")
        if header is None and (key := request.headers.get("x-api-key")) is not None:
            header = f"Bearer {key}"
        caller = keys.caller(header)
        if caller is None:
            raise WrongKey("this gateway needs an API key: send `Authorization: Bearer KEY` with one of its keys")
        return caller

    return caller_of
