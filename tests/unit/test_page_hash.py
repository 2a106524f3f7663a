"""Page hashes: equal prefixes, and only they, have equal hashes."""

import pytest

from shared.page_hash import HASH_BYTES, chain, join, split, tenant_key


def test_only_full_pages_are_named() -> None:
    assert len(chain(b"k", range(47), 16)) == 2


def test_a_hash_names_the_whole_prefix() -> None:
    one, other = list(range(64)), [9, *range(1, 64)]
    assert all(a != b for a, b in zip(chain(b"k", one, 16), chain(b"k", other, 16), strict=True))


def test_equal_prefixes_have_equal_hashes_whatever_follows() -> None:
    assert chain(b"k", range(40), 16) == chain(b"k", [*range(32), 7, 7], 16)


def test_a_chain_can_be_continued_behind_its_parent() -> None:
    whole = chain(b"k", range(64), 16)
    assert whole[2:] == chain(b"k", range(32, 64), 16, parent=whole[1])


def test_tenants_and_salts_do_not_share_hashes() -> None:
    keys = [tenant_key("a"), tenant_key("b"), tenant_key("a", "salt"), tenant_key("", "a")]
    assert len({chain(key, range(16), 16)[0] for key in keys}) == len(keys)


def test_the_wire_form_is_read_back_and_a_broken_one_refused() -> None:
    hashes = chain(b"k", range(64), 16)
    assert split(join(hashes)) == hashes
    with pytest.raises(ValueError, match="16-byte"):
        split(b"x" * (HASH_BYTES + 1))
