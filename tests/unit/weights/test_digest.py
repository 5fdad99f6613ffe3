"""A digest follows content, not place, and sees any matrix that changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from delta_models import save

from pipeline.weights.digest import content_digest

MIB = 1 << 20


def test_digest_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "weights.bin").write_bytes(bytes(range(256)) * (40 << 12))
    here, there = content_digest(tmp_path / "here"), content_digest(tmp_path / "there")
    assert here == there
    (tmp_path / "there" / "config.json").write_text("{ }")
    assert content_digest(tmp_path / "there") != here


@pytest.mark.parametrize("offset", [0, 5, 17 * MIB + 4097, 30 * MIB - 1, 39 * MIB - 4096])
def test_a_changed_mebibyte_is_seen_wherever_it_is(tmp_path: Path, offset: int) -> None:
    content = bytearray(40 * MIB)
    (tmp_path / "a").write_bytes(content)
    content[offset : offset + MIB + 4096] = b"\1" * (MIB + 4096)
    (tmp_path / "b").write_bytes(content)
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")


def test_every_changed_tensor_is_seen(tmp_path: Path) -> None:
    shapes = {"wide": (1100, 1000), "narrow": (128, 896), "norm": (7,)}
    tensors = {f"layers.{i}.{name}": torch.zeros(shape) for i in range(4) for name, shape in shapes.items()}
    save(tmp_path / "model", tensors)
    digests = {content_digest(tmp_path / "model")}
    for name in tensors:
        save(tmp_path / name, {**tensors, name: torch.ones_like(tensors[name])})
        digests.add(content_digest(tmp_path / name))
    assert len(digests) == 1 + len(tensors)


def test_a_changed_tensor_of_torchs_own_format_is_seen(tmp_path: Path) -> None:
    """Its file ends with a checksum of each tensor."""
    tensors = {f"{i}": torch.zeros(5000 if i % 2 else MIB) for i in range(6)}
    torch.save(tensors, tmp_path / "model.bin")
    digests = {content_digest(tmp_path / "model.bin")}
    for name in tensors:
        torch.save({**tensors, name: torch.ones_like(tensors[name])}, tmp_path / "model.bin")
        digests.add(content_digest(tmp_path / "model.bin"))
    assert len(digests) == 1 + len(tensors)


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(os.urandom(10 * MIB))
    right = content_digest(tmp_path / "a")
    read: Callable[..., int] = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, views, offset: read(descriptor, [views[0][:1000]], offset)
    )
    assert content_digest(tmp_path / "a") == right


def test_a_large_adapter_is_read_whole(tmp_path: Path) -> None:
    """An undo has no other digest of it."""
    folder = save(tmp_path, {"lora_A.weight": torch.zeros(3 << 20)})
    path = (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    before = content_digest(folder)
    content = bytearray(path.read_bytes())
    content[5 * MIB + 50_000] ^= 1
    path.write_bytes(content)
    assert content_digest(folder) != before
