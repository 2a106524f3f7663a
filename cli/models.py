"""`forebay models`: what is served, what is in the cache, what can be fetched."""

from rich.console import Console
from rich.table import Table

from cli import state
from cli.target import ApiKey, GatewayUrl, client, model_names, url_of
from shared.models import store

TIMEOUT_S = 10.0
WIDTH = 1_000


def models(
    url: GatewayUrl = "",
    api_key: ApiKey = "",
) -> None:
    """List the models that are served now and those that `forebay up --model` knows by name."""
    run = state.find(store.default_cache())
    served: set[str] = set()
    if url or (run and run.url):
        with client(url_of(url), TIMEOUT_S, api_key) as http:
            served = set(model_names(http))
    table = Table("model", "served", "size", "path", box=None, pad_edge=False)
    known = {entry.name: entry for entry in store.entries()}
    for name in sorted(served | known.keys()):
        entry = known.get(name)
        size = f"{entry.size_bytes / 1e6:.0f} MB" if entry and entry.path else ""
        path = str(entry.path) if entry and entry.path else "fetched when first used" if entry else ""
        table.add_row(name, "yes" if name in served else "", size, path)
    Console(width=WIDTH).print(table)  # a path that is cut can be used for nothing
