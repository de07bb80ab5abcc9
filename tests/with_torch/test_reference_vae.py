"""The PyTorch reference tokenizer reproduces every stored array of the official one."""

import pytest
import torch

from convert.reference import bsq_vae
from convert.reference.bsq_vae import BSQVAE
from convert.reference.sampling import bits_to_codes, resize
from tests.reference import golden
from toprovar_jax.config import VAE_STRIDE_8, VAE_STRIDE_16, VAEConfig
from toprovar_jax.schedule import Grid


@pytest.fixture(scope="module")
def stored():
    return golden.vae_golden()


def build(state):
    vae = BSQVAE(golden.VAE_CONFIG)
    vae.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    return vae


def without_level(name):
    """The second published spelling: no extra `.conv` or `.norm` before the last part."""
    parts = name.split(".")
    if parts[-2] in ("conv", "norm"):
        del parts[-2]
    return ".".join(parts)


def test_every_stored_array(stored):
    vae = build(stored.state)
    final = golden.VAE_SCHEDULE[-1]
    summed = sum(resize(bits_to_codes(torch.from_numpy(bits[:, 0])), final) for bits in stored.decoder_bits)
    results = {"dec.summed": summed[:, :, None], "dec.image": vae.decode(summed)}
    activations = {}
    for name, module in {
        "conv_in": vae.decoder.conv_in,
        "mid.block_2": vae.decoder.mid.block_2,
        "up.2": vae.decoder.up[2].block[-1],
        "up.2.upsample": vae.decoder.up[2].upsample,
    }.items():
        module.register_forward_hook(lambda *args, key=f"dec.act.{name}": activations.update({key: args[-1]}))
    with torch.no_grad():
        results["dec.raw_before_clamp"] = vae.decoder(summed)
    results |= activations

    features = vae.encode(torch.from_numpy(stored.image))
    codes = bsq_vae.quantize(features, golden.VAE_SCHEDULE)
    results |= {"enc.h": features, "enc.z": codes.code_map, "enc.recon": vae.decode(codes.code_map)}
    results |= {f"enc.bits{index}.bits": bits[:, None] for index, bits in enumerate(codes.bits)}
    results |= {f"enc.var_input{i}": feature[:, :, None] for i, feature in enumerate(codes.next_features)}

    packed = torch.from_numpy(stored.patchify_features)
    for name, arguments in {
        "bsc.noflip": (features, golden.VAE_SCHEDULE, False),
        "bsc.patchify": (packed, golden.VAE_PATCHIFY_SCHEDULE, True),
    }.items():
        inputs, labels = bsq_vae.self_correction(*arguments)
        results[f"{name}.x_BLC_wo_prefix"] = inputs
        results |= {f"{name}.gt{index}.bits": bits for index, bits in enumerate(labels)}
    golden.assert_matches(stored.expected, {name: value.numpy() for name, value in results.items()})


def test_flipped_bits_change_what_follows_but_not_their_own_labels(stored):
    features = torch.from_numpy(stored.expected["enc.h"])
    flips = [torch.zeros(1, *grid, 16, dtype=torch.bool) for grid in golden.VAE_SCHEDULE]
    flips[1][:] = True
    plain_inputs, plain_labels = bsq_vae.self_correction(features, golden.VAE_SCHEDULE, False)
    inputs, labels = bsq_vae.self_correction(features, golden.VAE_SCHEDULE, False, flips)
    first = golden.VAE_SCHEDULE[1].size
    assert torch.equal(inputs[:, :first], plain_inputs[:, :first])
    assert not torch.equal(inputs[:, first:], plain_inputs[:, first:])
    assert torch.equal(labels[1], plain_labels[1])
    assert not torch.equal(labels[2], plain_labels[2])


def test_both_published_spellings_give_the_same_weights(stored):
    short = {without_level(name): value for name, value in stored.state.items()}
    assert short.keys() != stored.state.keys()
    loaded, expected = build(short).state_dict(), build(stored.state).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kept", [".conv.", ""])
def test_missing_tensor_is_refused_in_both_spellings(stored, kept):
    state = dict(stored.state) if kept else {without_level(name): value for name, value in stored.state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("decoder.conv_out")}
    with pytest.raises(RuntimeError, match=r"Missing key.*decoder\.conv_out\.conv\.weight"):
        build(state)


@pytest.mark.parametrize(
    ("multipliers", "code_dim", "entries", "encoder_millions", "decoder_millions"),
    [(VAE_STRIDE_16, 32, 270, 45.0, 65.1), (VAE_STRIDE_8, 14, 226, 33.1, 48.5)],
)
def test_published_sizes(multipliers, code_dim, entries, encoder_millions, decoder_millions):
    with torch.device("meta"):
        vae = BSQVAE(VAEConfig(code_dim=code_dim, channel_multipliers=multipliers))
    assert len(vae.state_dict()) == entries
    for module, millions in ((vae.encoder, encoder_millions), (vae.decoder, decoder_millions)):
        assert round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1) == millions


def test_norm_has_24_groups_where_32_do_not_divide():
    config = VAEConfig(code_dim=4, base_channels=48, channel_multipliers=(1, 2), num_residual_blocks=1)
    vae = BSQVAE(config)
    assert vae.encoder.down[0].block[0].norm1.norm.num_groups == 24
    assert vae.decoder.mid.block_1.norm1.norm.num_groups == 32
    assert vae.decode(torch.zeros(1, 4, *Grid(2, 3))).shape == (1, 3, 4, 6)
