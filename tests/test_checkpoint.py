"""Checkpoint folders: what is saved is loaded, and every damage is noticed."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax import checkpoint
from toprovar_jax.checkpoint import COMPONENTS
from toprovar_jax.config import CheckpointConfig, GenerationDefaults, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import CheckpointError, FileRecord, Manifest, load_manifest

CONFIG = CheckpointConfig(
    transformer=InfinityConfig(
        depth=2, embed_dim=16, num_heads=2, mlp_dim=32, code_dim=4, text_channels=128, text_max_length=8
    ),
    vae=VAEConfig(code_dim=4, base_channels=32, channel_multipliers=(1, 2), num_residual_blocks=1),
    text_encoder=T5Config(vocab_size=32, embed_dim=128, num_layers=1, num_heads=2, head_dim=8, mlp_dim=16),
    defaults=GenerationDefaults(guidance_scale=3.0, pixels="0.06M"),
    knows="red cats",
)
WITHOUT_TEXT = dataclasses.replace(CONFIG, text_encoder=None)
TOKENIZER = '{"not read here": "é"}'
SOURCE = FileRecord("model.pth", 12, "34" * 32)


def random_parameters(config, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    components = COMPONENTS if config.text_encoder is not None else COMPONENTS[:2]
    return {
        component: jax.tree.map(
            lambda leaf: random.standard_normal(leaf.shape, dtype=np.float32),
            checkpoint.skeleton(config, component, dtype),
        )
        for component in components
    }


PARAMETERS = random_parameters(CONFIG)


def load_all(folder, dtype=None):
    """Everything that a pipeline reads of a checkpoint."""
    manifest = load_manifest(folder)
    components = COMPONENTS if manifest.config.text_encoder is not None else COMPONENTS[:2]
    parameters = {component: checkpoint.load_parameters(folder, component, dtype) for component in components}
    return manifest, parameters, checkpoint.load_tokenizer(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "original"
    checkpoint.save(folder, CONFIG, PARAMETERS, dtype="float32", tokenizer=TOKENIZER, sources=[SOURCE])
    return folder


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def assert_loads(folder, dtype, expected, stored="float32"):
    for component in expected:
        skeleton = checkpoint.skeleton(CONFIG, component, dtype)
        stored_as = checkpoint.flatten(checkpoint.skeleton(CONFIG, component, stored))
        loaded = checkpoint.load_parameters(folder, component, dtype)
        assert jax.tree.structure(loaded) == jax.tree.structure(skeleton)
        leaves, wanted = checkpoint.flatten(loaded), checkpoint.flatten(expected[component])
        for path, leaf in checkpoint.flatten(skeleton).items():
            assert isinstance(leaves[path], jax.Array)
            assert leaves[path].dtype == leaf.dtype, path
            rounded = jnp.asarray(wanted[path]).astype(stored_as[path].dtype).astype(leaf.dtype)
            np.testing.assert_array_equal(np.asarray(leaves[path]), np.asarray(rounded), err_msg=path)


def test_what_is_saved_is_loaded(original):
    manifest = load_manifest(original)
    assert manifest.config == CONFIG
    assert manifest.dtype == "float32"
    assert manifest.sources == (SOURCE,)
    assert manifest.writer.startswith("toprovar-jax ")
    assert len(manifest.digest) == 64
    assert checkpoint.load_tokenizer(original) == TOKENIZER
    assert_loads(original, "float32", PARAMETERS)
    default = checkpoint.load_parameters(original, "vae")
    assert {leaf.dtype for leaf in jax.tree.leaves(default)} == {jnp.dtype("float32")}


def test_loading_casts_to_the_precision_policy(original):
    assert_loads(original, "bfloat16", PARAMETERS)


def test_bfloat16_is_stored_by_the_precision_policy(original, tmp_path):
    checkpoint.save(tmp_path / "out", CONFIG, PARAMETERS, dtype=jnp.bfloat16)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dtype == "bfloat16"
    assert_loads(tmp_path / "out", "bfloat16", PARAMETERS, stored="bfloat16")
    assert_loads(tmp_path / "out", "float32", PARAMETERS, stored="bfloat16")
    mixed = {
        leaf.dtype.name for leaf in jax.tree.leaves(checkpoint.load_parameters(tmp_path / "out", "transformer"))
    }
    assert mixed == {"float32", "bfloat16"}
    assert sum(f.size for f in manifest.files) < 0.8 * sum(f.size for f in load_manifest(original).files)


def test_jax_arrays_views_and_columns_can_be_saved(tmp_path):
    parameters = {
        "vae": jax.tree.map(jnp.asarray, PARAMETERS["vae"]),
        "transformer": jax.tree.map(lambda x: np.asfortranarray(x)[...], PARAMETERS["transformer"]),
        "text_encoder": jax.tree.map(
            lambda x: checkpoint.Columns([x[..., :1], x[..., 1:2].astype(np.float64), x[..., 2:]]),
            PARAMETERS["text_encoder"],
        ),
    }
    for dtype in ("float32", "bfloat16"):
        manifest = checkpoint.save(tmp_path / dtype, CONFIG, parameters, dtype=dtype)
        assert manifest == load_manifest(tmp_path / dtype)
        assert checkpoint.load_tokenizer(tmp_path / dtype) is None
        assert_loads(tmp_path / dtype, "float32", PARAMETERS, stored=dtype)


def test_data_are_cut_into_files_that_a_repository_takes(tmp_path):
    transformer = dataclasses.replace(CONFIG.transformer, embed_dim=256, mlp_dim=2048, depth=4)
    config = dataclasses.replace(WITHOUT_TEXT, transformer=transformer)
    manifest = checkpoint.save(tmp_path / "out", config, random_parameters(config), dtype="float32")
    sizes = [file.size for file in manifest.files]
    assert sum(sizes) > 20 * 2**20
    assert max(sizes) < 15 * 2**20


def test_paths_name_list_items_by_number():
    tree = {"blocks": {0: {"kernel": 1}, 10: {"kernel": 2}}, "scale": 3}
    assert checkpoint.flatten(tree) == {"blocks/0/kernel": 1, "blocks/10/kernel": 2, "scale": 3}
    assert checkpoint.unflatten(checkpoint.flatten(tree)) == tree


def test_damage_to_any_file_is_noticed(copy):
    random = np.random.default_rng(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert {path.relative_to(copy).parts[0] for path in files} == {
        "manifest.json",
        "tokenizer.json",
        "transformer",
        "vae",
        "text_encoder",
    }
    for path in files:
        intact = path.read_bytes()
        position = int(random.integers(len(intact)))
        flipped = bytearray(intact)
        flipped[position] ^= 1 << int(random.integers(8))
        for damaged in (bytes(flipped), intact[:position], intact + b"\n"):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"is damaged \(.*\): convert or copy it again"):
                load_all(copy)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"missing .*{path.name}|has no manifest.json"):
            load_all(copy)
        path.write_bytes(intact)
    load_all(copy)


def test_any_changed_byte_of_the_manifest_is_noticed(original):
    text = (original / "manifest.json").read_text()
    assert Manifest.from_text(text).to_text() == text
    for position in range(0, len(text), 3):
        changed = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        with pytest.raises(ValueError, match=r"."):
            Manifest.from_text(changed)


def test_a_manifest_with_a_matching_digest_but_other_text_is_refused(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(json.dumps(json.loads(text)))
    with pytest.raises(CheckpointError, match=r"manifest\.json is not as it was written"):
        load_manifest(copy)


def test_extra_files_are_refused(copy):
    (copy / "transformer" / "d" / "more").write_text("")
    with pytest.raises(CheckpointError, match="no part of it: remove transformer/d/more"):
        load_manifest(copy)


def test_what_is_no_checkpoint_says_so(tmp_path, original):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(original, tmp_path / ".out.partial")
    for name, message in [
        ("nowhere", "no checkpoint folder at .*nowhere: make one with `python -m convert`"),
        ("file", "no checkpoint folder at .*file"),
        ("empty", "is no checkpoint, it has no manifest.json"),
        (".out.partial", "is an unfinished checkpoint: run the conversion again"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_all(tmp_path / name)


def test_other_format_versions_are_refused(copy):
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2 but this version reads 1: convert again"):
        load_manifest(copy)


def test_parameters_of_other_shapes_are_refused(copy):
    manifest = load_manifest(copy)
    for change in ({"mlp_dim": 64}, {"depth": 3}, {"depth": 1}):
        transformer = dataclasses.replace(CONFIG.transformer, **change)
        other = dataclasses.replace(manifest, config=dataclasses.replace(CONFIG, transformer=transformer))
        (copy / "manifest.json").write_text(other.to_text())
        with pytest.raises(CheckpointError, match=r"transformer holds other parameters than .*: convert again"):
            checkpoint.load_parameters(copy, "transformer")


def test_files_that_cannot_be_opened_say_so(copy, monkeypatch):
    def refuse(path, _):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(FileRecord, "of", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: Permission denied; copy it again"):
        checkpoint.load_tokenizer(copy)


def test_a_missing_component_says_how_to_get_it(tmp_path):
    checkpoint.save(tmp_path / "out", WITHOUT_TEXT, random_parameters(WITHOUT_TEXT), dtype="float32")
    with pytest.raises(CheckpointError, match="no text encoder: convert again with --text_encoder"):
        checkpoint.load_parameters(tmp_path / "out", "text_encoder")


@pytest.mark.parametrize("dtype", ["float16", "bf16"])
def test_unknown_dtypes_are_refused(original, dtype):
    with pytest.raises(CheckpointError, match=f"unknown dtype {dtype}: choose float32, bfloat16 or float8_e4m3fn"):
        checkpoint.load_parameters(original, "vae", dtype)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite, got nan"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
    ],
)
def test_defaults_that_no_call_would_accept_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GenerationDefaults(**settings)


def test_parameters_that_do_not_fit_are_listed(tmp_path):
    parameters = random_parameters(WITHOUT_TEXT)
    leaves = checkpoint.flatten(parameters["transformer"])
    leaves["head/kernel"] = leaves["head/kernel"].T
    del leaves["blocks/1/modulation"]
    leaves["extra"] = np.zeros(1, np.float32)
    parameters["transformer"] = checkpoint.unflatten(leaves)
    with pytest.raises(
        CheckpointError, match=r"transformer parameters .*: blocks/1/modulation, extra, head/kernel"
    ):
        checkpoint.save(tmp_path / "out", WITHOUT_TEXT, parameters, dtype="float32")
    with pytest.raises(CheckpointError, match="parameters of transformer, vae, text_encoder are needed"):
        checkpoint.save(tmp_path / "out", CONFIG, random_parameters(WITHOUT_TEXT), dtype="float32")
    assert os.listdir(tmp_path) == []


def test_existing_folders_are_replaced_on_request_only(copy):
    old = load_manifest(copy)
    other = random_parameters(CONFIG, seed=1)
    with pytest.raises(InputError, match="exists already: choose another folder or pass --overwrite"):
        checkpoint.save(copy, CONFIG, other, dtype="float32")
    assert load_manifest(copy) == old
    new = checkpoint.save(copy, CONFIG, other, dtype="float32", overwrite=True)
    assert load_manifest(copy) == new != old
    assert_loads(copy, "float32", other)
    assert os.listdir(copy.parent) == [copy.name]


def test_a_failure_while_writing_keeps_the_old_checkpoint(copy, monkeypatch):
    old = load_all(copy)[0]
    write_component = checkpoint._write_component

    def fail_at_the_vae(folder, *args):
        if folder.name == "vae":
            raise OSError("disk on fire")
        write_component(folder, *args)

    monkeypatch.setattr(checkpoint, "_write_component", fail_at_the_vae)
    with pytest.raises(OSError, match="disk on fire"):
        checkpoint.save(copy, CONFIG, PARAMETERS, dtype="float32", overwrite=True)
    assert load_all(copy)[0] == old
    assert os.listdir(copy.parent) == [copy.name]


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(CheckpointError, match=r"needs up to 0\.\d GB but only 0\.0 GB are free: make room"):
        checkpoint.save(tmp_path / "out", CONFIG, PARAMETERS, dtype="float32")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_does_not_tell_where_it_was_written(original):
    told = str(original.parent).encode()
    files = [path for path in original.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path.name for path in files if told in path.read_bytes()] == []
