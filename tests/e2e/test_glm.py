"""A tiny GLM-5.2 through four services, in float32, by token ids: it has no tokenizer."""

from pathlib import Path

import httpx
import pytest

from shared.engine.models import tiny
from tests.e2e.cluster import running
from tests.oracle import driver

PROMPT = [token * 37 % 499 for token in range(700)]


@pytest.mark.parametrize(
    ("length", "kv_dtype"),
    [(20, "auto"), (700, "auto"), (700, "fp8")],
    ids=["prefilled on the decode worker", "handed over", "handed over in fp8"],
)
async def test_a_cluster_gives_the_tokens_of_the_bare_model(length: int, kv_dtype: str, tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path / "glm")
    expected = driver.generate(driver.load(tmp_path / "glm", kv_dtype=kv_dtype), PROMPT[:length], 12)
    with running("--model", str(tmp_path / "glm"), "--dtype", "float32", "--kv-dtype", kv_dtype) as cluster:
        body = {"model": cluster.model, "prompt": PROMPT[:length], "max_tokens": 12, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            answers = [(await http.post("/v1/completions", json=body)).json() for _ in range(2)]
            text = await http.post("/v1/completions", json=body | {"prompt": "text"})
        worker = "prefill-0" if length == 700 else "decode-0"
        await cluster.until(lambda rows: rows[worker]["pages"]["cached"] >= length // 16)
        await cluster.until_pages_are_free()
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [expected, expected]
    assert text.status_code == 400
    assert "token ids" in text.json()["error"]["message"]
