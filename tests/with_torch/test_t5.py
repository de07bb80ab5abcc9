"""The text encoder against transformers' T5EncoderModel on random small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers.models.t5.modeling_t5 import T5Attention

from toprovar_jax.config import T5Config
from toprovar_jax.models.skeleton import abstract_parameters, bind
from toprovar_jax.models.t5 import T5Encoder, relative_position_buckets

CONFIGS = [
    T5Config(vocab_size=97, embed_dim=32, num_layers=3, num_heads=4, head_dim=8, mlp_dim=48),
    # Inner width unlike the embedding's, few buckets that saturate early, a visible norm epsilon.
    T5Config(
        vocab_size=50,
        embed_dim=24,
        num_layers=2,
        num_heads=2,
        head_dim=16,
        mlp_dim=40,
        num_buckets=8,
        max_distance=20,
        norm_epsilon=1e-2,
    ),
]
OURS_TO_OFFICIAL = {
    "attention_norm": ["0.layer_norm"],
    "attention/query_key_value": [f"0.SelfAttention.{name}" for name in "qkv"],
    "attention/output": ["0.SelfAttention.o"],
    "mlp_norm": ["1.layer_norm"],
    "mlp/gate_up": ["1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"],
    "mlp/down": ["1.DenseReluDense.wo"],
}


def _official_names(path):
    """Of the tensors that lie side by side in one of our parameters."""
    match path:
        case ("token_embedding",):
            return ["shared.weight"]
        case ("relative_attention_bias",):
            return ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        case ("final_norm", _):
            return ["encoder.final_layer_norm.weight"]
        case ("blocks", index, *names, _):
            return [f"encoder.block.{index}.layer.{name}.weight" for name in OURS_TO_OFFICIAL["/".join(names)]]


def _official(config, seed):
    """transformers' model with random weights, each larger than its initialisation so that every part matters."""
    torch.manual_seed(seed)
    model = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.embed_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.norm_epsilon,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.normal_(1.0, 0.2)
            elif "relative" in name or "shared" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(parameters, tokens, mask, *, config, dtype="float32"):
    return bind(T5Encoder, config, dtype, parameters)(tokens, mask)


def _convert(model, config, dtype="float32"):
    official = {name: value.numpy() for name, value in model.state_dict().items()}
    official.pop("encoder.embed_tokens.weight")

    def fill(path, leaf):
        values = [official.pop(name) for name in _official_names(path)]
        value = np.concatenate(values).T if path[-1] == "kernel" else values[0]
        assert value.shape == leaf.shape
        return jnp.asarray(value, leaf.dtype)

    skeleton = flatten_dict(abstract_parameters(T5Encoder, config, dtype))
    parameters = unflatten_dict({path: fill(path, leaf) for path, leaf in skeleton.items()})
    assert not official
    return parameters


def _batch(config, length, lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), length))
    return tokens, np.arange(length) < np.array(lengths)[:, None]


def _official_features(model, tokens, mask):
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask).long())
    return output.last_hidden_state.numpy()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("length", "lengths"), [(1, [1]), (9, [9, 4, 1]), (150, [150, 33])])
def test_equals_transformers(config, length, lengths):
    model = _official(config, seed=length)
    tokens, mask = _batch(config, length, lengths)
    expected = _official_features(model, tokens, mask)
    features = _encode(_convert(model, config), tokens, mask, config=config)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_position_buckets_equal_transformers_at_every_distance(num_buckets, max_distance):
    distance = torch.arange(600) - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(distance, num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(relative_position_buckets(600, num_buckets, max_distance), expected)


def test_padding_changes_nothing():
    config = CONFIGS[0]
    parameters = _convert(_official(config, seed=0), config)
    tokens, mask = _batch(config, 16, [11])
    padded = _encode(parameters, tokens, mask, config=config)
    alone = _encode(parameters, tokens[:, :11], mask[:, :11], config=config)
    np.testing.assert_allclose(padded[:, :11], alone, atol=1e-5)


def test_bfloat16_stays_near_float32_and_keeps_norms_and_residuals_in_float32():
    config = CONFIGS[0]
    model = _official(config, seed=3)
    parameters = _convert(model, config, "bfloat16")
    for path, leaf in flatten_dict(parameters).items():
        assert leaf.dtype == (jnp.float32 if path[-1] == "scale" else jnp.bfloat16), path
    tokens, mask = _batch(config, 24, [24, 10])
    features = _encode(parameters, tokens, mask, config=config, dtype="bfloat16")
    assert features.dtype == jnp.float32
    # Features have unit scale; weights and activations round at 8 bits through three blocks.
    difference = np.abs(features - _official_features(model, tokens, mask))[mask]
    assert 0 < difference.mean() < 0.02
    assert difference.max() < 0.2


def test_fresh_queries_are_small_because_logits_are_not_scaled():
    config = T5Config(vocab_size=8, embed_dim=64, num_layers=1, num_heads=4, head_dim=16, mlp_dim=8)
    kernel = T5Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)).blocks[0].attention.query_key_value.kernel[...]
    deviations = kernel.reshape(64, 3, 64).std(axis=(0, 2))
    np.testing.assert_allclose(deviations, np.array([16**-0.5, 1, 1]) * 64**-0.5, rtol=0.05)


def test_flan_t5_xl_has_the_published_size_and_names():
    leaves = flatten_dict(abstract_parameters(T5Encoder, T5Config(), "bfloat16"))
    with torch.device("meta"):
        official = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=32128,
                d_model=2048,
                d_ff=5120,
                num_layers=24,
                num_heads=32,
                feed_forward_proj="gated-gelu",
            )
        ).state_dict()
    official.pop("encoder.embed_tokens.weight")
    assert sorted(name for path in leaves for name in _official_names(path)) == sorted(official)
    for path, leaf in leaves.items():
        first, *others = (tuple(official[name].shape) for name in _official_names(path))
        assert all(shape == first for shape in others), path
        shape = (len(others) + 1) * first[0], *first[1:]
        assert leaf.shape == (shape[::-1] if path[-1] == "kernel" else shape), path
    assert round(sum(leaf.size for leaf in leaves.values()) / 1e9, 2) == 1.22
