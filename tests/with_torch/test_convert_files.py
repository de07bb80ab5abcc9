"""Published files as they lie on a disk: every layout is read, every damaged or dangerous one is refused."""

import dataclasses
import json
import os
import pickle

import pytest
import safetensors.torch
import torch

from bench import synthetic_checkpoint
from convert import conversion
from convert.readers import read_weights
from tests.with_torch.official import (
    CONFIG,
    EXPECTED_TRANSFORMER,
    EXPECTED_VAE,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    assert_equal,
    flat_spelling,
    map_infinity,
    map_text_encoder,
    map_vae,
)
from toprovar_jax.checkpoint import Columns
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest


def save_shards(folder, tensors, index_name):
    safe = "safetensors" in index_name
    items = list(tensors.items())
    owners = {}
    for number in range(3):
        shard = dict(items[number::3])
        name = f"model-{number + 1:05d}-of-00003.{'safetensors' if safe else 'bin'}"
        safetensors.torch.save_file(shard, folder / name) if safe else torch.save(shard, folder / name)
        owners |= dict.fromkeys(shard, name)
    (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def write_pth(folder):
    torch.save(TRANSFORMER, folder / "model.pth")
    return folder / "model.pth"


def write_old_pth(folder):
    torch.save(TRANSFORMER, folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def write_fine_tuning(folder):
    averaged = {name: torch.zeros_like(x) for name, x in TRANSFORMER.items()}
    trainer = {"gpt_fsdp": TRANSFORMER, "gpt_ema_fsdp": averaged, "config": {"lr": 1e-4}}
    torch.save({"epoch": 3, "trainer": trainer, "args": {"pn": "1M"}}, folder / "ar-ckpt-1.pth")
    return folder / "ar-ckpt-1.pth"


def write_safetensors(folder):
    safetensors.torch.save_file(TRANSFORMER, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_folder(folder):
    write_safetensors(folder)
    return folder


def write_safetensors_shards(folder):
    wrong = {name: torch.zeros_like(x) for name, x in TRANSFORMER.items()}
    save_shards(folder, wrong, "pytorch_model.bin.index.json")  # the published loader prefers safetensors
    save_shards(folder, TRANSFORMER, "model.safetensors.index.json")
    return folder


def write_pickle_shards(folder):
    save_shards(folder, TRANSFORMER, "pytorch_model.bin.index.json")
    return folder


@pytest.mark.parametrize(
    "write",
    [
        write_pth,
        write_old_pth,
        write_fine_tuning,
        write_safetensors,
        write_folder,
        write_safetensors_shards,
        write_pickle_shards,
    ],
)
def test_every_layout_of_a_transformer_is_read(tmp_path, write):
    found = read_weights(write(tmp_path))
    assert_equal(map_infinity(found), EXPECTED_TRANSFORMER)
    assert all(path.is_file() for path in found.files)


@pytest.mark.parametrize("spell", [dict, flat_spelling])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"vae": x, "discriminator": {}}])
def test_every_layout_of_a_vae_is_read(tmp_path, spell, wrap):
    torch.save(wrap(spell(VAE)), tmp_path / "vae.pth")
    assert_equal(map_vae(read_weights(tmp_path / "vae.pth")), EXPECTED_VAE)


def test_tensors_stay_in_their_file_until_they_are_used(tmp_path):
    text_encoder = tmp_path / "text_encoder.safetensors"
    safetensors.torch.save_file(TEXT_ENCODER, text_encoder)
    for path, read in [
        (write_pth(tmp_path), map_infinity),
        (write_safetensors(tmp_path), map_infinity),
        (text_encoder, map_text_encoder),
    ]:
        parameters = read(read_weights(path)).values()
        arrays = [array for x in parameters for array in (x.arrays if isinstance(x, Columns) else [x])]
        assert not any(array.flags.owndata for array in arrays)
        with open("/proc/self/maps") as maps:
            assert str(path) in maps.read()


class _Code:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_named_and_never_run(tmp_path):
    proof = tmp_path / "executed"
    torch.save(TRANSFORMER | {"extra": _Code(proof)}, tmp_path / "zip.pth")
    torch.save({"extra": _Code(proof)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("zip.pth", "old.pth"):
        with pytest.raises(
            InputError, match=r"contains code \(posix\.mkdir\), which is never run: save plain tensors"
        ):
            read_weights(tmp_path / name)
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(_Code(proof), file)
    with pytest.raises(InputError, match="is not a file of plain PyTorch weights"):
        read_weights(tmp_path / "plain.pth")
    assert not proof.exists()


def test_files_that_cannot_be_read(tmp_path):
    pth, safe = write_pth(tmp_path).read_bytes(), write_safetensors(tmp_path).read_bytes()
    for name, content, message in [
        ("half.pth", pth[: len(pth) // 2], "is not a complete PyTorch file: download it again"),
        ("empty.pth", b"", "is not a complete PyTorch file"),
        ("page.pth", b"<html>not found</html>", "is not a file of plain PyTorch weights"),
        ("half.safetensors", safe[: len(safe) // 2], "is not a complete safetensors file: download it again"),
        ("empty.safetensors", b"", "is not a complete safetensors file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / name)
    for content, message in [
        ([TRANSFORMER["head.bias"]], "holds no named tensors: pass a file of weights"),
        ({}, "holds no named tensors"),
        (
            {"head.bias": TRANSFORMER["head.bias"], "step": 3, "lr": 0.1},
            "entries that are no plain tensors: step, lr",
        ),
        ({"head.weight": torch.eye(3).to_sparse()}, "entries that are no plain tensors: head.weight"),
    ]:
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path / "other.pth")
    with pytest.raises(InputError, match="no such file or folder"):
        read_weights(tmp_path / "none.pth")


def test_folders_that_cannot_be_read(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(
        InputError, match=r"holds none of model\.safetensors\.index\.json, .*: pass the folder with"
    ):
        read_weights(tmp_path)
    save_shards(tmp_path, TRANSFORMER, index.name)
    intact = json.loads(index.read_text())
    (tmp_path.parent / "outside.safetensors").write_bytes(b"")
    for weight_map, message in [
        ({"head.bias": "gone.safetensors"}, "lacks shards that its index names, download gone.safetensors"),
        ({"head.bias": "../outside.safetensors"}, "names files outside its folder: ../outside.safetensors"),
        (
            intact["weight_map"] | {"more": "model-00001-of-00003.safetensors"},
            "lack tensors that the index .*: more",
        ),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            read_weights(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is not a readable index of shards: download it again"):
            read_weights(tmp_path)


@pytest.mark.parametrize(("patchify", "settings"), [(False, (4.0, 0.5)), (True, (3.0, 1.0))])
def test_settings_of_the_release_travel_in_the_checkpoint(tmp_path, patchify, settings):
    """The files tell 2B from 8B by what one token holds."""
    transformer = dataclasses.replace(CONFIG.transformer, patchify=patchify)
    config = dataclasses.replace(CONFIG, transformer=transformer)
    synthetic_checkpoint.write(tmp_path / "tiny", config)
    inputs = {"transformer": tmp_path / "tiny" / "transformer.pth", "vae": tmp_path / "tiny" / "vae.pth"}
    conversion.convert(**inputs, out=tmp_path / "out")
    converted = load_manifest(tmp_path / "out").config
    assert converted.transformer.patchify == patchify
    assert (converted.defaults.guidance_scale, converted.defaults.temperature) == settings
    assert converted.defaults.pixels == "1M"


def test_text_encoder_folders_that_cannot_be_used(tmp_path):
    folder = tmp_path / "tiny" / "text_encoder"
    synthetic_checkpoint.write(tmp_path / "tiny", CONFIG)
    inputs = {"transformer": tmp_path / "tiny" / "transformer.pth", "vae": tmp_path / "tiny" / "vae.pth"}

    def refuse(message, text_encoder=folder):
        with pytest.raises(InputError, match=message):
            conversion.convert(**inputs, text_encoder=text_encoder, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse("is no folder: pass the folder of flan-t5-xl", folder / "model.safetensors")
    intact = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    refuse(r"tokenizer\.json is not a readable tokenizer: download it again")
    (folder / "tokenizer.json").unlink()
    refuse(r"has no tokenizer\.json: download it into the folder too")
    (folder / "tokenizer.json").write_text(intact)
    few = synthetic_checkpoint.text_encoder_tensors(dataclasses.replace(CONFIG.text_encoder, vocab_size=50))
    safetensors.torch.save_file(few, folder / "model.safetensors")
    refuse(r"has ids up to \d+ but the text encoder knows 50: they must match")
