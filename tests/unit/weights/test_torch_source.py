"""Files of torch.save: read in place, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.weights.formats.open import open_source
from pipeline.weights.formats.torch_file import ShapedTensor, TorchFile

several = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

WEIGHT = torch.randn(5, 7)
STATE = OrderedDict(
    weight=WEIGHT,
    tied=WEIGHT,
    rows=WEIGHT[1:3],
    half=torch.nn.Parameter(torch.randn(3).bfloat16()),
    scalar=torch.tensor(3),
    empty=torch.zeros(0, 4),
    mask=torch.tensor([True, False]),
)


def repack(
    path: Path, pickled: bytes | None = None, compression: int = zipfile.ZIP_STORED, without: str = "\0"
) -> Path:
    """The torch file at `path` with another pickle, compressed, or without some entry."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            if without not in name:
                archive.writestr(
                    name, pickled if pickled is not None and name.endswith("data.pkl") else content
                )
    return path


def saved(folder: Path, content: Any, **settings: Any) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(content, path, **settings)
    return path


def test_every_tensor_is_what_was_saved(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path, STATE).parent)
    assert source.kind == "torch" and source.aliases == {"tied": "weight"}
    assert source.tensors.keys() == STATE.keys() - {"tied"}
    for name, info in source.tensors.items():
        values = tensor(source, name)
        assert info.shape == tuple(STATE[name].shape) and values.dtype == STATE[name].dtype
        assert torch.equal(values, STATE[name].detach().flatten())
    assert torch.equal(tensor(source, "tied", 3, 9), WEIGHT.flatten()[3:9])


def test_shards_with_an_index(tmp_path: Path) -> None:
    torch.save({"a": WEIGHT}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": WEIGHT}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_source(tmp_path).tensors) == ["a", "b"]
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"pytorch_model-00002-of-00002\.bin"):
        open_source(tmp_path)


class Evil:
    """Leaves a file where its code runs."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    calls = [
        Evil(os.system, f"touch {mark}"),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(open, str(mark), "w"),
        Evil(torch.load, str(mark)),
        Evil(getattr, "", "join"),
    ]
    for evil in calls:
        with pytest.raises(InputError, match="nothing was run"):
            open_source(saved(tmp_path, {"a": WEIGHT, "b": evil}))
    assert not mark.exists()


class Foreign:
    pass


def test_a_foreign_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Foreign"):
        TorchFile(saved(tmp_path, {"a": Foreign()}))


PICKLES = {
    "empty": b"",
    "cut": pickle.dumps({"a": [1, 2, 3]}, 2)[:-3],
    "huge memo": b"\x80\x02Kr\xff\xff\xff\x7f.",
    "huge string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fabc.",
    "empty stack": b"\x80\x020.",
    "call of a number": b"\x80\x02K\x01(tR.",
    "unknown storage": b"\x80\x02U\x03abcQ.",
    "extension": b"\x80\x02\x82\x01.",
    "set attributes of a class": b"\x80\x02ctorch\ndevice\n}U\x01aK\x01s\x86b.",
    "tensor of a number": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01K\x00)tR.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_one_line(tmp_path: Path, name: str) -> None:
    path = repack(saved(tmp_path, STATE), PICKLES[name])
    with pytest.raises(InputError, match=r"pytorch_model\.bin") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (30, (6,), (1,)),
        (0, (36,), (1,)),
        (-1, (2,), (1,)),
        (0, (-2, -2), (1, 1)),
        (0, (1 << 40, 1 << 30), (1 << 30, 1)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path, offset: int, size: Any, stride: Any) -> None:
    class Outside:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (
                WEIGHT.untyped_storage(),
                offset,
                size,
                stride,
                False,
                OrderedDict(),
            )

    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.persistent_id = lambda value: (  # type: ignore[method-assign]
        ("storage", torch.FloatStorage, "0", "cpu", 35) if isinstance(value, torch.UntypedStorage) else None
    )
    pickler.dump({"a": Outside()})
    path = repack(saved(tmp_path, {"a": WEIGHT}), buffer.getvalue())
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        open_source(path)


def test_what_cannot_be_read_in_place_is_refused_with_advice(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: saved(tmp_path, STATE, _use_new_zipfile_serialization=False), "save it again"),
        (lambda: saved(tmp_path, {"a": WEIGHT.t()}), "contiguous"),
        (lambda: saved(tmp_path, {"a": torch.randn(2, dtype=torch.complex64)}), "ComplexFloatStorage"),
        (lambda: saved(tmp_path, [WEIGHT]), "state dict"),
        (lambda: saved(tmp_path, {"model": {"a": WEIGHT}}), "model"),
        (lambda: saved(tmp_path, {}), "empty"),
        (lambda: repack(saved(tmp_path, STATE), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda: repack(saved(tmp_path, STATE), without="data/0"), "absent"),
        (lambda: repack(saved(tmp_path, STATE), without="data.pkl"), "data.pkl"),
    ]
    for make, message in cases:
        path = make()
        with pytest.raises(InputError, match=message):
            open_source(path)


@given(st.data())
@several
def test_a_truncated_or_changed_file_reads_in_bounds_or_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(saved(tmp_path, STATE).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.bin"
    path.write_bytes(content)
    try:
        source = open_source(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    for name, info in source.tensors.items():
        assert source.read(name, 0, info.num_elements).size == info.num_elements


@given(st.binary(max_size=60))
@several
def test_a_random_pickle_does_no_harm(tmp_path: Path, pickled: bytes) -> None:
    path = repack(saved(tmp_path, {"a": torch.ones(2)}), b"\x80\x02" + pickled)
    try:
        TorchFile(path)
    except InputError as error:
        assert "\n" not in str(error)


def test_plain_values_and_tensors_with_attributes_are_kept(tmp_path: Path) -> None:
    marked = torch.randn(4)
    marked.note = "kept by DeepSpeed"  # type: ignore[attr-defined]
    saved_content = {
        "n": 3,
        "x": [1.5, None, ("a", True)],
        "names": {"a", "b"},
        "size": torch.Size([2, 3]),
        "marked": marked,
    }
    content = TorchFile(saved(tmp_path, saved_content)).content
    assert (
        content["n"] == 3
        and content["names"] == {"a", "b"}
        and content["x"] == [1.5, None, ("a", True)]
        and content["size"] == (2, 3)
    )
    assert isinstance(content["marked"], ShapedTensor)
    assert content["marked"].stored.read(0, 4).tolist() == marked.tolist()
