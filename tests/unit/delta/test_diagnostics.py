from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delta_models import layered, load, nudged, save, write_pair

from pipeline.delta.diagnostics import block_of
from pipeline.delta.subtract import subtract


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("self_attn.q_proj.weight", "attention"),
        ("self_attn.q_proj.bias", "attention"),
        ("attn.c_attn.weight", "attention"),
        ("attn.c_proj.weight", "attention"),
        ("self_attention.query_key_value.weight", "attention"),
        ("mlp.c_fc.weight", "mlp"),
        ("mlp.dense_h_to_4h.weight", "mlp"),
        ("mlp.gate_proj.weight", "mlp"),
        ("post_attention_layernorm.weight", "other"),
        ("self_attn.q_norm.weight", "other"),
        ("ln_1.weight", "other"),
    ],
)
def test_tensors_belong_to_attention_or_mlp(name: str, block: str) -> None:
    assert block_of(name) == block


def test_layers_have_the_norms_of_their_blocks_and_matrices(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    rows = subtract(base, tuned, 0.3, tmp_path / "out").manifest["layers"]
    before, after = load(base), load(tuned)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        prefix = f"model.layers.{row['layer']}"
        norms = {}
        for block, matrix in (("attention", "self_attn.q_proj"), ("mlp", "mlp.up_proj")):
            name = f"{prefix}.{matrix}.weight"
            norms[block] = torch.linalg.norm(after[name].double() - before[name].double()).item()
            assert row["matrices"][matrix] == pytest.approx(norms[block], rel=1e-4)
            assert row[block]["delta_norm"] == pytest.approx(norms[block], rel=1e-4)
            assert row[block]["relative_norm"] == pytest.approx(
                norms[block] / torch.linalg.norm(before[name].double()).item(), rel=1e-4
            )
        assert row["other"]["num_elements"] == 33


def test_every_tensor_has_its_own_survival(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    tensors = subtract(base, tuned, 0.3, tmp_path / "out", dtype="same").manifest["tensors"]
    made, before = load(tmp_path / "out"), load(base)
    for name, tensor in tensors.items():
        changed = (made[name] != before[name]).double().mean().item()
        assert tensor["survival"]["share_changed"] == pytest.approx(changed, rel=1e-4)


def test_a_change_that_16_bits_swallow_is_warned_of(tmp_path: Path) -> None:
    base = layered(0) | {"model.norm.weight": torch.ones(33, dtype=torch.bfloat16)}
    save(tmp_path / "base", base)
    (tmp_path / "base/config.json").write_text("{}")
    save(tmp_path / "tuned", nudged(base, 1, std=2e-5))
    warnings = subtract(tmp_path / "base", tmp_path / "tuned", 0.1, tmp_path / "out", dtype="same").manifest[
        "warnings"
    ]
    assert "of the intended change survives in bfloat16" in warnings[0]
    assert "did not change at all" in warnings[1] and "model.norm.weight" in warnings[1]
    assert subtract(tmp_path / "base", tmp_path / "tuned", 0.1, tmp_path / "full").manifest["warnings"] == []


def test_nothing_to_subtract_is_warned_of(tmp_path: Path) -> None:
    base = save(tmp_path / "base", layered(0))
    (base / "config.json").write_text("{}")
    save(tmp_path / "tuned", layered(0))
    assert subtract(base, tmp_path / "tuned", 0.3, tmp_path / "out").manifest["warnings"] == [
        "the tuned model equals the base: there was nothing to subtract"
    ]
