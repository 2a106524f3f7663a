"""What a reader insists on before it reads."""

from typing import Any

import pytest

from shared.engine.kv.layout import pack
from shared.errors import BadManifest
from shared.worker import manifests

LAYOUT = pack(16, {"mla_latent": (7, "float32", 4480), "indexer_keys": (4, "float32", 1024)})


def test_a_complete_manifest_is_taken() -> None:
    manifests.check(manifests.manifest(LAYOUT, 3, [5, 9, 2], 41), LAYOUT, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.state_classes.pop(), "indexer_keys"),
        (lambda m: m.state_classes.add(name="extra", num_bytes=1), "extra"),
        (lambda m: m.state_classes.add(name="mla_latent", num_bytes=3 * 4480), "hands over"),
        (lambda m: setattr(m.state_classes[0], "num_bytes", 1), "hands over"),
        (lambda m: setattr(m, "first_page", 2), "begins at page 2"),
        (lambda m: setattr(m, "num_tokens", 49), "49 tokens"),
        (lambda m: setattr(m, "num_tokens", 32), "32 tokens"),
        (lambda m: m.page_ids.append(7), "41 tokens"),
    ],
)
def test_an_incomplete_or_contradictory_manifest_is_refused(change: Any, message: str) -> None:
    made = manifests.manifest(LAYOUT, 3, [5, 9, 2], 41)
    change(made)
    with pytest.raises(BadManifest, match=message):
        manifests.check(made, LAYOUT, 3)
