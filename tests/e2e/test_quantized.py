"""A quantized tiny GLM-5.2 through four services: its tokens are those of the weights that it means."""

from pathlib import Path

import httpx

from shared.engine.models import tiny
from tests.e2e.cluster import HAND_OVER, running
from tests.oracle import driver
from tests.oracle.test_quantizer import dequantize, quantize

PROMPT = [token * 37 % 499 for token in range(300)]


async def test_a_cluster_serves_a_quantized_checkpoint(tmp_path: Path) -> None:
    tiny.write("glm-5.2-even", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "glm")
    dequantize(tmp_path / "glm", tmp_path / "meant")
    expected = driver.generate(driver.load(tmp_path / "meant"), PROMPT, 16)
    with running("--model", str(tmp_path / "glm"), "--dtype", "float32", HAND_OVER) as cluster:
        body = {"model": cluster.model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
            answer = (await http.post("/v1/completions", json=body)).json()
        await cluster.until(lambda rows: rows["prefill-0"]["pages"]["cached"] >= len(PROMPT) // 16)
    assert answer["choices"][0]["token_ids"] == expected
    assert expected != driver.generate(driver.load(tmp_path / "source"), PROMPT, 16)
