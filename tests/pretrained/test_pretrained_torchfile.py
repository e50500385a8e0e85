"""Reading .pth files without PyTorch: every dtype and layout, and nothing but tensors."""

from __future__ import annotations

import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files as files

from vpm_jax.errors import UserError
from vpm_jax.pretrained.torchfile import read

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    values = {np.dtype(d).name: random.normal(0, 9, (3, 4, 2)).astype(d) for d in DTYPES}
    return values | {"scalar": np.array(5), "empty": np.zeros((0, 3), np.float32), "last": np.arange(6.0).reshape(2, 3)}


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, x in expected.items():
        assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(found[key], x)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
def test_every_dtype_and_layout(tmp_path, legacy, wrap):
    assert_same(read(files.save(tmp_path / "a.pth", arrays(), legacy, wrap)), arrays())


def test_tensors_may_share_a_storage(tmp_path):
    memory = np.arange(24, dtype=np.float32)
    stored = files.storage("FloatStorage", "0", 24)
    values = {
        "slice": files.tensor(stored, 5, (2, 3), (8, 1)),
        "transposed": files.tensor(stored, 0, (4, 6), (1, 4)),
        "repeated": files.tensor(stored, 23, (2, 2), (0, 0)),
    }
    path = files.write_zip(tmp_path / "a.pth", files.dictionary(values), {"0": memory.tobytes()})
    expected = {
        "slice": np.array([[5, 6, 7], [13, 14, 15]], np.float32),
        "transposed": memory.reshape(6, 4).T,
        "repeated": np.full((2, 2), 23, np.float32),
    }
    found = read(path)
    assert_same(found, expected)
    assert found["slice"].base is not None and not found["slice"].flags.writeable


def test_what_torch_save_writes(tmp_path):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(weight).sum().backward()
    optimizer.step()
    state = model.state_dict() | {
        "channels_last": weight.contiguous(memory_format=torch.channels_last),
        "view": weight[1:, :, 1],
        "half": weight.half(),
        "bfloat16": weight.bfloat16(),
        "double": weight.double(),
        "parameter": torch.nn.Parameter(weight),
    }
    checkpoint = {"state_dict": state, "optimizer": optimizer.state_dict(), "best": np.float64(0.5), "epoch": 3}
    for legacy in (False, True):
        torch.save(checkpoint, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        found = read(tmp_path / "a.pth")
        assert list(found) == list(state)
        for key, x in state.items():
            assert found[key].dtype.name == str(x.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[key].astype(np.float64), x.detach().double().numpy())


# ---- Nothing is executed ----


def attack(kind: str) -> bytes:
    """Instructions that run a command, where a pickle is loaded as usual."""
    command = files.text("touch " + os.environ["ATTACKED"])
    system = files.name("os", "system")
    return {
        "call": files.call(system, command),
        "in the state dict": files.dictionary({"a": files.call(system, command)}, ordered=True),
        "nested import": files.call(files.name("builtins", "getattr"), files.name("os", "system"), command),
        "stack global": files.text("os") + files.text("system") + b"\x93" + files.items(command) + b"R",
        "inst": b"(" + command + b"ios\nsystem\n",
        "object": b"(" + system + command + b"o",
        "extension": b"\x82\x01",
        "torch.load again": files.call(files.name("torch.storage", "_load_from_bytes"), b"C\x01a"),
        "whole model": files.name("torchvision.models.resnet", "ResNet") + b")\x81",
        "state of a function": files.name("torch._utils", "_rebuild_tensor_v2") + files.dictionary({"a": b"N"}) + b"b",
        "call of a tensor": files.call(files.tensor(files.storage("FloatStorage", "0", 1), 0, (1,), (1,)), command),
    }[kind]


ATTACKS = "call|in the state dict|nested import|stack global|inst|object|extension|torch.load again|whole model|"
ATTACKS += "state of a function|call of a tensor"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ATTACKS.split("|"))
def test_pickled_code_is_not_run(tmp_path, monkeypatch, kind, legacy):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    if legacy:
        path = files.write_legacy(tmp_path / "a.pth", attack(kind), {}, {})
    else:
        path = files.write_zip(tmp_path / "a.pth", attack(kind), {"0": bytes(4)})
    with pytest.raises(UserError) as error:
        read(path)
    assert not (tmp_path / "attacked").exists()
    message = str(error.value)
    assert message.startswith(f"{path} ") and "\n" not in message and len(message) < 400
    assert "save only the weights, with torch.save(model.state_dict()" in message
    if kind in ("call", "in the state dict", "stack global"):
        assert "asks for 'os.system', which weights do not need; none of it was run" in message


# ---- Damage ----


def broken(kind: str) -> tuple[bytes, dict[str, bytes], str]:
    """(instructions, storages, what the message says)"""
    stored = files.storage("FloatStorage", "0", 6)
    good = files.tensor(stored, 0, (2, 3), (3, 1))
    data = {"0": bytes(24)}
    match kind:
        case "past its storage":
            return files.dictionary({"a": files.tensor(stored, 1, (2, 3), (3, 1))}), data, "ends past its storage of 6"
        case "negative stride":
            return files.dictionary({"a": files.tensor(stored, 5, (3,), (-1,))}), data, "an impossible shape"
        case "a storage of two sizes":
            larger = files.tensor(files.storage("FloatStorage", "0", 6000), 5000, (2,), (1,))
            return files.dictionary({"a": good, "b": larger}), data, "the storage of b has two sizes or dtypes"
        case "short storage":
            return files.dictionary({"a": good}), {"0": bytes(20)}, "a has 20 bytes of 24"
        case "no storage":
            return files.dictionary({"a": good}), {}, "is damaged or truncated"
        case "no state dict":
            return files.dictionary({"epoch": files.number(3)}), {}, "holds no state dict (epoch)"
        case "a number":
            return files.number(3), {}, "holds no state dict (int)"
        case "entries beside tensors":
            return files.dictionary({"a": good, "b": files.number(3)}), data, "1 entries beside its tensors (b)"
    raise AssertionError(kind)


BROKEN = "past its storage|negative stride|a storage of two sizes|short storage|no storage|no state dict|a number"


@pytest.mark.parametrize("kind", [*BROKEN.split("|"), "entries beside tensors"])
def test_what_does_not_fit_is_named(tmp_path, kind):
    value, storages, expected = broken(kind)
    with pytest.raises(UserError) as error:
        read(files.write_zip(tmp_path / "a.pth", value, storages))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_compressed_zip_is_refused(tmp_path):
    value, storages = files.state_dict({"a": np.zeros(1_000_000, np.float32)})
    with pytest.raises(UserError, match="is a compressed zip"):
        read(files.write_zip(tmp_path / "a.pth", value, storages, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"<html>not found</html>", bytes(4096)])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth is "):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, legacy):
    whole = files.save(tmp_path / "a.pth", arrays(), legacy).read_bytes()
    for cut in np.linspace(0, len(whole) - 1, 60).astype(int):
        (tmp_path / "b.pth").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"^[^\n]*b\.pth is (damaged|not in torch\.save)[^\n]*$"):
            read(tmp_path / "b.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_flipped_byte_gives_tensors_or_one_sentence(tmp_path, legacy):
    """Every byte of the legacy file's pickles, and a sample of the zip."""
    whole = files.save(tmp_path / "a.pth", {"a": np.zeros((2, 3), np.float32), "b": np.ones(2)}, legacy).read_bytes()
    random = np.random.default_rng(0)
    for at in range(0, len(whole), 1 if legacy else 3):
        changed = bytearray(whole)
        changed[at] ^= random.integers(1, 256)
        (tmp_path / "b.pth").write_bytes(changed)
        try:
            found = read(tmp_path / "b.pth")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            for x in found.values():
                float(np.asarray(x, np.float64).sum())  # every element can be touched
