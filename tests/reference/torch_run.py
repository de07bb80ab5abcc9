"""Runs the PyTorch reference on a case of `tests.reference.golden`; results are named as in the golden files."""

import numpy as np
import torch

from convert.reference.infinity import Infinity
from tests.reference.golden import Arrays, Run
from toprovar_jax.config import InfinityConfig


def tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    """Arrays as tensors."""
    return [torch.from_numpy(array) for array in arrays]


def build(config: InfinityConfig, state: Arrays) -> Infinity:
    """The reference with an official state dict."""
    model = Infinity(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    return model.eval()


def run_reference(run: Run, forced_bits: list[np.ndarray] | None = None) -> Arrays:
    """Every array of a run that a golden file may hold, under its key."""
    model = build(run.config, run.state)
    texts = tensors(run.text_features)
    negative = None if run.negative_text_features is None else tensors(run.negative_text_features)
    records = model.generate(
        texts,
        schedule=run.schedule,
        rope_grid=run.rope_grid,
        guidance_scale=run.guidance_scale,
        temperature=run.temperature,
        top_k=run.top_k,
        top_p=run.top_p,
        negative_text_features=negative,
        guidance_layer=run.guidance_layer,
        draws=None if run.draws is None else tensors(run.draws),
        forced_bits=None if forced_bits is None else tensors(forced_bits),
    )
    rows = list(texts)
    if any(scale != 1 for scale in run.guidance_scale):
        rows += negative or [model.cfg_uncond[: len(text)] for text in texts]
    with torch.no_grad():
        text = model.encode_text(rows)
    results = {
        "text.normed": torch.cat(text.normed),
        "text.cond_BD": text.condition,
        "text.ca_kv": torch.cat(text.context),
        "text.ada_lin_out": text.modulation,
        "final_summed_codes": records[-1].code_map,
    }
    for index, record in enumerate(records):
        results |= {
            f"s{index}.{name}": value
            for name, value in {
                "block0_in": record.block_input,
                **{f"block{layer}_out": output for layer, output in enumerate(record.block_outputs)},
                "logits_raw": record.logits_raw,
                "logits_final": record.logits,
                "probs": record.probabilities.flatten(0, 1),
                "bits": record.bits[:, None],
                "codes": record.codes[:, :, None],
                "summed_codes_after": record.code_map[:, :, None],
                "next_latent": None if record.next_latent is None else record.next_latent[:, :, None],
            }.items()
            if value is not None
        }
    return {name: value.numpy() for name, value in results.items()}
