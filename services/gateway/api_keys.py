"""Who may come, and whose requests theirs are."""

import hmac
from collections.abc import Sequence

from shared.errors import Unauthenticated


def first_key(entries: str) -> str:
    """The key that a client sends whose user has these entries (KEY or KEY=TENANT, the first counts); empty if none."""
    return entries.split(",", maxsplit=1)[0].partition("=")[0].strip()


def bearer(entries: str) -> dict[str, str]:
    """The headers with which it is sent, or none."""
    key = first_key(entries)
    return {"Authorization": f"Bearer {key}"} if key else {}


class ApiKeys:
    """Keys as configured, each KEY or KEY=TENANT; without any, everybody may come and say whose request it is."""

    def __init__(self, entries: Sequence[str]) -> None:
        pairs = [entry.partition("=") for entry in entries]
        self._tenants = {key.encode(): tenant for key, _, tenant in pairs}

    def tenant(self, authorization: str, named: str) -> str:
        """The tenant of a request with this Authorization header: the key's; the one that the request names, if the
        key is nobody's in particular. Raises Unauthenticated."""
        if not self._tenants:
            return named
        scheme, _, given = authorization.partition(" ")
        found = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, each in constant time: how long it takes tells nothing of them.
        matches = [tenant for key, tenant in self._tenants.items() if hmac.compare_digest(key, found)]
        if not matches:
            raise Unauthenticated("send a valid API key as 'Authorization: Bearer KEY'")
        return matches[0] or named
