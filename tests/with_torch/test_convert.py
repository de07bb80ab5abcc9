"""Published tensors -> our parameters: every one finds its place, every misfit is named."""

import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

from bench import synthetic_checkpoint
from convert import architecture, conversion, names
from convert.reference import bsq_vae, infinity
from tests.reference import golden
from tests.reference.parameters import infinity_parameters, vae_parameters
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
    weights,
)
from toprovar_jax import checkpoint
from toprovar_jax.config import (
    ARCHITECTURES,
    VAE_STRIDE_8,
    VAE_STRIDE_16,
    CheckpointConfig,
    ConfigError,
    T5Config,
    VAEConfig,
)
from toprovar_jax.errors import InputError

# The tables against the specification, through the reference modules that are written from it.


def meta_tensors(module, config):
    with torch.device("meta"):
        return dict(module(config).state_dict())


def assert_bijection(table, tensors, shapes):
    """Every needed tensor has its official name and shape, every path of ours is filled, none twice."""
    needed = {
        name: tuple(x.shape) for name, x in tensors.items() if not name.endswith(("zero_k_bias", "lfq.mask"))
    }
    assert {name: entry.shape for name, entry in table.items()} == needed
    filled = Counter()
    for entry in table.values():
        filled[entry.path] += math.prod(entry.shape)
    assert filled == {path: math.prod(shape) for path, shape in shapes.items()}


def shapes_of(config, component):
    skeleton = checkpoint.skeleton(config, component, "float32")
    return {path: leaf.shape for path, leaf in checkpoint.flatten(skeleton).items()}


@pytest.mark.parametrize(("name", "entries"), [("infinity_2b", 694), ("infinity_8b", 862)])
def test_the_transformer_table_is_a_bijection_onto_the_released_files(name, entries):
    transformer = ARCHITECTURES[name]
    vae = VAEConfig(code_dim=transformer.code_dim)
    tensors = meta_tensors(infinity.Infinity, transformer)
    assert len(tensors) == entries
    found = weights(tensors, name)
    table = conversion.official_names(found, "transformer", transformer)
    assert_bijection(table, tensors, shapes_of(CheckpointConfig(transformer, vae), "transformer"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architecture_of_every_release_is_read_off_its_tensors(name):
    transformer = ARCHITECTURES[name]
    found = weights(meta_tensors(infinity.Infinity, transformer), name)
    architecture.check_kind(found, "transformer", "--transformer")
    read = architecture.infinity_config(
        found, VAEConfig(code_dim=transformer.code_dim), rope_mode=2, level_embedding_per_chunk=False
    )
    assert read == transformer


@pytest.mark.parametrize(
    ("code_dim", "multipliers", "entries"), [(32, VAE_STRIDE_16, 270), (14, VAE_STRIDE_8, 226)]
)
def test_the_vae_table_is_a_bijection_onto_both_spellings(code_dim, multipliers, entries):
    config = CheckpointConfig(
        dataclasses.replace(CONFIG.transformer, code_dim=code_dim),
        VAEConfig(code_dim=code_dim, channel_multipliers=multipliers),
    )
    nested = meta_tensors(bsq_vae.BSQVAE, config.vae)
    assert len(nested) == entries
    shapes = shapes_of(config, "vae")
    for tensors in (nested, flat_spelling(nested)):
        found = weights(tensors, "vae.pth")
        architecture.check_kind(found, "VAE", "--vae")
        assert architecture.vae_config(found) == config.vae
        assert_bijection(conversion.official_names(found, "vae", config.vae), tensors, shapes)
    assert "decoder.up.1.block.0.nin_shortcut.conv.weight" in nested
    assert "decoder.up.1.block.0.nin_shortcut.weight" in flat_spelling(nested)


def test_the_t5_table_is_a_bijection_onto_the_transformers_module():
    settings = transformers.T5Config(
        d_model=2048,
        d_ff=5120,
        d_kv=64,
        num_heads=32,
        num_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        tensors = dict(transformers.T5EncoderModel(settings).state_dict())
    tensors.pop("encoder.embed_tokens.weight", None)
    found = weights(tensors, "no/such/folder")
    assert architecture.t5_config(found) == T5Config()
    config = CheckpointConfig(ARCHITECTURES["infinity_2b"], VAEConfig(code_dim=32), T5Config())
    table = conversion.official_names(found, "text_encoder", config.text_encoder)
    assert_bijection(table, tensors, shapes_of(config, "text_encoder"))


def test_the_state_of_the_official_modules_is_accepted(tmp_path):
    """The golden states were saved by the published code itself."""
    config, state = golden.load_state()
    found = weights({name: torch.from_numpy(x) for name, x in state.items()}, tmp_path)
    vae = dataclasses.replace(golden.VAE_CONFIG, code_dim=config.code_dim)
    assert architecture.infinity_config(found, vae, rope_mode=2, level_embedding_per_chunk=False) == config
    mapped = conversion.map_parameters(found, "transformer", config)
    assert_equal(checkpoint.flatten(mapped), checkpoint.flatten(infinity_parameters(config, "float32", state)))

    vae_state = golden.vae_golden().state
    assert_equal(
        map_vae(weights({name: torch.from_numpy(x) for name, x in vae_state.items()}, tmp_path)),
        checkpoint.flatten(vae_parameters(golden.VAE_CONFIG, "float32", vae_state)),
    )


# Values.


def test_values_are_those_of_an_independent_mapping(tmp_path):
    assert_equal(map_infinity(weights(TRANSFORMER, tmp_path)), EXPECTED_TRANSFORMER)
    assert_equal(map_vae(weights(VAE, tmp_path)), EXPECTED_VAE)


def test_text_encoder_values(tmp_path):
    found = weights(TEXT_ENCODER, tmp_path)
    mapped = map_text_encoder(found)
    attention, mlp = "encoder.block.1.layer.0.SelfAttention", "encoder.block.1.layer.1.DenseReluDense"
    for path, columns in [
        ("blocks/1/attention/query_key_value/kernel", [f"{attention}.{name}.weight" for name in "qkv"]),
        ("blocks/1/attention/output/kernel", [f"{attention}.o.weight"]),
        ("blocks/1/mlp/gate_up/kernel", [f"{mlp}.wi_0.weight", f"{mlp}.wi_1.weight"]),
        ("blocks/1/mlp/down/kernel", [f"{mlp}.wo.weight"]),
    ]:
        expected = np.concatenate([TEXT_ENCODER[name].numpy().T for name in columns], axis=1)
        np.testing.assert_array_equal(mapped[path], expected, err_msg=path)
    for path, name in [
        ("token_embedding", "shared.weight"),
        ("relative_attention_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("final_norm/scale", "encoder.final_layer_norm.weight"),
        ("blocks/1/attention_norm/scale", "encoder.block.1.layer.0.layer_norm.weight"),
        ("blocks/1/mlp_norm/scale", "encoder.block.1.layer.1.layer_norm.weight"),
    ]:
        np.testing.assert_array_equal(mapped[path], TEXT_ENCODER[name].numpy(), err_msg=path)


def test_blocks_may_be_a_plain_list(tmp_path):
    config = dataclasses.replace(CONFIG.transformer, num_chunks=1)
    tensors = synthetic_checkpoint.transformer_tensors(config)
    assert "blocks.3.sa.q_bias" in tensors
    found = weights(tensors, tmp_path)
    assert architecture.infinity_config(found, CONFIG.vae, rope_mode=2, level_embedding_per_chunk=False) == config
    expected = infinity_parameters(config, "float32", {name: x.numpy() for name, x in tensors.items()})
    assert_equal(map_infinity(found), checkpoint.flatten(expected))


def test_patchify_is_read_off_the_widths(tmp_path):
    config = dataclasses.replace(CONFIG.transformer, patchify=True)
    found = weights(synthetic_checkpoint.transformer_tensors(config), tmp_path)
    assert architecture.infinity_config(found, CONFIG.vae, rope_mode=2, level_embedding_per_chunk=False) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types_keep_their_values(tmp_path, dtype):
    tensors = {name: x.to(dtype) for name, x in TRANSFORMER.items()}
    expected = infinity_parameters(
        CONFIG.transformer, "float32", {n: x.float().numpy() for n, x in tensors.items()}
    )
    mapped = {path: x.astype(np.float32) for path, x in map_infinity(weights(tensors, tmp_path)).items()}
    assert_equal(mapped, checkpoint.flatten(expected))


def test_unused_buffers_are_ignored(tmp_path):
    unused = {
        "lvl_1L": torch.zeros(1, 4, dtype=torch.int64),
        "attn_bias_for_masking": torch.zeros(1, 1, 4, 4),
        "Infinity_visible_kvlen": torch.zeros(3),
        "Infinity_invisible_qlen": torch.zeros(3),
    }
    assert_equal(map_infinity(weights(TRANSFORMER | unused, tmp_path)), EXPECTED_TRANSFORMER)
    without_zeros = {name: x for name, x in TRANSFORMER.items() if not name.endswith("zero_k_bias")}
    assert_equal(map_infinity(weights(without_zeros, tmp_path)), EXPECTED_TRANSFORMER)


def test_a_longer_table_of_unconditional_features_is_cut(tmp_path):
    longer = torch.randn(600, 128)
    mapped = map_infinity(weights(TRANSFORMER | {"cfg_uncond": longer}, tmp_path))
    np.testing.assert_array_equal(mapped["unconditional_features"], longer[:512].numpy())


def test_the_embedding_of_t5_may_have_either_name(tmp_path):
    shared = TEXT_ENCODER["shared.weight"]
    alias = "encoder.embed_tokens.weight"
    renamed = {name: x for name, x in TEXT_ENCODER.items() if name != "shared.weight"} | {alias: shared}
    for tensors in (TEXT_ENCODER | {alias: shared.clone()}, renamed):
        found = weights(tensors, tmp_path)
        assert architecture.t5_config(found).vocab_size == synthetic_checkpoint.VOCABULARY
        mapped = map_text_encoder(found)
        np.testing.assert_array_equal(mapped["token_embedding"], shared.numpy())
    with pytest.raises(
        InputError, match=r"different tensors under shared\.weight and encoder.embed_tokens.weight"
    ):
        map_text_encoder(weights(TEXT_ENCODER | {alias: shared + 1}, tmp_path))


def test_settings_of_t5_come_from_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"relative_attention_max_distance": 64}))
    assert architecture.t5_config(weights(TEXT_ENCODER, tmp_path)) == CONFIG.text_encoder
    (tmp_path / "config.json").write_text(json.dumps({"feed_forward_proj": "relu"}))
    with pytest.raises(InputError, match="no T5 with gated GELU: pass flan-t5-xl"):
        architecture.t5_config(weights(TEXT_ENCODER, tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not readable JSON: download it again"):
        architecture.t5_config(weights(TEXT_ENCODER, tmp_path))


# What does not fit.


def test_every_misfit_is_named(tmp_path):
    tensors = dict(TRANSFORMER)
    for name in ("head.bias", "block_chunks.1.module.0.ffn.fc2.weight"):
        del tensors[name]
    tensors |= {"norm0_ve.weight": torch.zeros(3), "block_chunks.0.module.0.ca_gamma": torch.zeros(3)}
    tensors["pos_start"] = torch.zeros(1, 1, 31)
    tensors["block_chunks.0.module.1.sa.scale_mul_1H11"] = torch.zeros(1, 5, 1, 1)
    tensors["lvl_embed.weight"] = torch.zeros(15, 32, dtype=torch.int64)
    with pytest.raises(InputError) as caught:
        map_infinity(weights(tensors, tmp_path / "model.pth"))
    assert str(caught.value) == (
        f"{tmp_path / 'model.pth'} does not fit as a transformer ("
        "2 missing: block_chunks.1.module.0.ffn.fc2.weight, head.bias; "
        "2 unexpected: block_chunks.0.module.0.ca_gamma, norm0_ve.weight; "
        "2 of wrong shape: block_chunks.0.module.1.sa.scale_mul_1H11 [1, 5, 1, 1] instead of [1, 4, 1, 1], "
        "pos_start [1, 1, 31] instead of [1, 1, 32]; "
        "1 of wrong type: lvl_embed.weight torch.int64): "
        "download it again, or pass the file of a supported model"
    )


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        ("transformer", r"cfg_uncond|text_norm.*|text_proj_for_(sos\.ca\.mat_kv|ca\.0)\.weight"),
        ("transformer", r"lvl_embed\.weight"),
        ("transformer", r".*\.scale_mul_1H11"),
        ("transformer", r".*\.ffn\..*"),
        ("transformer", r"(word_embed|head)\..*"),
        ("transformer", r"block_chunks\..*"),
        ("VAE", r".*\.(conv_in|conv_out)\..*"),
        ("VAE", r"encoder\..*"),
        ("VAE", r"(encoder\.down|decoder\.up)\.2\.block\..*"),
        ("text encoder", r".*\.relative_attention_bias\.weight"),
        ("text encoder", r"shared\.weight"),
        ("text encoder", r".*\.SelfAttention\.[qkvo]\.weight"),
        ("text encoder", r".*\.DenseReluDense\..*"),
    ],
)
def test_all_missing_tensors_are_named_where_a_number_cannot_be_read(tmp_path, model, pattern):
    """All tensors of one kind are gone, so that nothing tells how large they are."""
    tensors, read = {
        "transformer": (TRANSFORMER, map_infinity),
        "VAE": (VAE, map_vae),
        "text encoder": (TEXT_ENCODER, map_text_encoder),
    }[model]
    unused = (".zero_k_bias", ".mask", "decoder.final_layer_norm.weight", "lm_head.weight")
    missing = sorted(name for name in tensors if re.fullmatch(pattern, name))
    remaining = {name: x for name, x in tensors.items() if name not in missing}
    needed = [name for name in missing if model == "VAE" or not name.endswith(unused)]
    if pattern == r"block_chunks\..*":  # how many blocks there were is unknown: the first one is named
        needed = sorted(
            name.replace("block_chunks.0.module.0", "blocks.0")
            for name in needed
            if name.startswith("block_chunks.0.module.0.")
        )
    with pytest.raises(InputError) as caught:
        read(weights(remaining, tmp_path / "model.pth"))
    assert str(caught.value) == (
        f"{tmp_path / 'model.pth'} does not fit as a {model} ({len(needed)} missing: {', '.join(needed)}): "
        "download it again, or pass the file of a supported model"
    )


def test_sizes_that_no_model_has(tmp_path):
    def refuse(read, tensors, message):
        with pytest.raises(InputError, match=message):
            read(weights(tensors, tmp_path))

    first = {"encoder.conv_in.conv.weight": torch.zeros(0, 3, 3, 3), "encoder.conv_in.conv.bias": torch.zeros(0)}
    refuse(
        map_vae, VAE | first, "tensors of size 0 where the channels of the first convolution should be: download"
    )
    first = {"encoder.conv_in.conv.weight": torch.zeros(24, 3, 3, 3), "encoder.conv_in.conv.bias": torch.zeros(24)}
    refuse(map_vae, VAE | first, r"levels of \[32, 64, 64\] channels, no multiples of 24: download it again")
    odd = {name: x[: len(x) // 2] for name, x in VAE.items()}
    refuse(
        map_vae,
        odd,
        r"levels of \[16, 32, 32\] channels, which form neither 32 nor 24 groups to normalise: download it again",
    )
    heads = {name: torch.zeros(1, 5, 1, 1) for name in TRANSFORMER if name.endswith("scale_mul_1H11")}
    refuse(
        map_infinity,
        TRANSFORMER | heads,
        r"tensors of no possible transformer \(embed_dim 32 must be divisible by num_heads 5\): download it again",
    )
    position_bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    refuse(
        map_text_encoder, TEXT_ENCODER | {position_bias: torch.zeros(16, 0)}, "size 0 where the number of heads"
    )


def test_values_that_cannot_be_used_are_named(tmp_path):
    tensors = {name: x.clone() for name, x in TRANSFORMER.items()}
    tensors["head.bias"][2] = float("nan")
    tensors["block_chunks.1.module.1.ffn.fc1.weight"][3, 4] = float("inf")
    tensors["block_chunks.0.module.0.sa.zero_k_bias"][0] = 1e-3
    with pytest.raises(InputError) as caught:
        map_infinity(weights(tensors, tmp_path / "model.pth"))
    for part in (
        "2 not finite: ",
        "head.bias",
        "block_chunks.1.module.1.ffn.fc1.weight",
        "1 not zero: block_chunks.0.module.0.sa.zero_k_bias",
        "these weights cannot be used, download them again",
    ):
        assert part in str(caught.value)


def test_files_given_to_the_wrong_flag_are_recognised(tmp_path):
    kinds = {"transformer": TRANSFORMER, "VAE": VAE, "text encoder": TEXT_ENCODER}
    for actual, tensors in kinds.items():
        found = weights(tensors, tmp_path / "file")
        for wanted in kinds:
            if wanted == actual:
                architecture.check_kind(found, wanted, "--flag")
            else:
                with pytest.raises(InputError, match=f"--flag .*file holds a {actual}, not a {wanted}: were two"):
                    architecture.check_kind(found, wanted, "--flag")
    with pytest.raises(InputError, match="does not hold a VAE in the published layout: pass its own file"):
        architecture.check_kind(weights({"weight": torch.zeros(1)}, tmp_path), "VAE", "--vae")


def test_models_that_were_not_trained_together(tmp_path):
    with pytest.raises(
        InputError, match=r"codes have 5 bits but the tokens of .* have 6, not as many nor four times"
    ):
        architecture.infinity_config(
            weights(TRANSFORMER, tmp_path),
            dataclasses.replace(CONFIG.vae, code_dim=5),
            rope_mode=2,
            level_embedding_per_chunk=False,
        )
    with pytest.raises(ConfigError, match="text encoder gives 64 channels but the transformer expects 128"):
        dataclasses.replace(CONFIG, text_encoder=dataclasses.replace(CONFIG.text_encoder, embed_dim=64))


def test_ignore_lists_are_patterns():
    assert names.is_ignored("decoder.block.0.layer.0.SelfAttention.q.weight", names.T5_UNUSED.ignored)
    assert not names.is_ignored("encoder.block.0.layer.0.SelfAttention.q.weight", names.T5_UNUSED.ignored)
    assert names.is_ignored("block_chunks.0.module.0.sa.zero_k_bias", names.INFINITY_UNUSED.zero)
