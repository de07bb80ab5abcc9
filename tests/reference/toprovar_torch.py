"""ToProVAR in plain eager PyTorch: explicit attention matrices, boolean masks, no plans and nothing static.

Written from docs/spec/toprovar.md on top of the plain Infinity of `convert.reference`, without a look at the JAX
side. It answers per scale, layer and token what is kept, and what comes out. Two rules are this project's own: the
number of kept tokens is handed in as a function of the expected number, and every region of the grid keeps some.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from convert.reference import rope, sampling
from convert.reference.infinity import Block, Infinity, KeyValue, Rotation, Text, layer_norm
from toprovar_jax.schedule import Grid, tokenizer_schedule


@dataclasses.dataclass(frozen=True)
class Settings:
    """The method's settings in the notation of the specification; scales count from 0.

    Attributes:
      scores: R of every layer; 0 keeps it dense.
      tau: threshold for rho.
      pruned_above: whether rho >= tau lets pruning start (Eq. 3) or rho <= tau (Eq. 13).
      first_start: first scale that pruning may start at.
      fixed_start: the scale that pruning starts at whatever rho says; None where rho decides.
      dropped: last scales that do not run once pruning has started.
      conditional: scales before those that run without the unconditional rows once pruning has started.
      token_scales: last scales that may run on some tokens.
      alpha_min: of Eq. 6.
      alpha_max: of Eq. 6.
      normalization: "sum", "mean" or "rank".
      source: "same_layers" or "all_layers" of the last dense scale, or the "layer_before" at the same scale.
      skip_tokens: whether pruned layers lose all tokens instead of some.
      drop_scales: whether all scales are dropped once pruning has started.
      count: (grid, expected number of kept tokens) -> number of kept tokens.
    """

    scores: tuple[float, ...]
    tau: float
    pruned_above: bool
    first_start: int
    fixed_start: int | None
    dropped: int
    conditional: int
    token_scales: int
    alpha_min: float
    alpha_max: float
    normalization: str
    source: str
    skip_tokens: bool
    drop_scales: bool
    count: Callable[[Grid, float], int]


@dataclasses.dataclass
class PrunedScale:
    """What happened at a scale that ran."""

    rho: Tensor  # [batch], of the map averaged over layers; NaN once work is saved
    kept: dict[int, Tensor]  # layer that ran on some tokens -> [batch, tokens], which ones
    scores: dict[int, Tensor]  # the same layers -> [batch, tokens], what they were chosen by
    counts: dict[int, int]  # layer that did not run on all tokens -> how many it kept
    logits_raw: Tensor
    bits: Tensor
    code_map: Tensor


def entropy_of(weights: Tensor) -> Tensor:
    """Eq. 2 with 0 ln 0 = 0, for weights [..., keys]."""
    return -torch.where(weights > 0, weights * weights.clamp(min=1e-45).log(), 0.0).sum(-1)


def focused_share(entropy: Tensor) -> Tensor:
    """Eq. 3 of [batch, tokens]; a map without any difference has no focused token."""
    below = entropy.double() < entropy.double().mean(-1, keepdim=True)
    flat = entropy.amax(-1, keepdim=True) == entropy.amin(-1, keepdim=True)
    return (below & ~flat).float().mean(-1)


def relative(entropy: Tensor, normalization: str) -> Tensor:
    """Hhat of Eq. 5 for one image's [tokens]."""
    if normalization == "rank":
        order = sorted(range(len(entropy)), key=lambda token: (entropy[token].item(), token))
        ranks = torch.zeros(len(entropy))
        for rank, token in enumerate(order):
            ranks[token] = rank / max(1, len(entropy) - 1)
        return ranks
    if entropy.sum() == 0:
        return torch.zeros_like(entropy)
    return entropy / (entropy.sum() if normalization == "sum" else entropy.mean())


def region_of(grid: Grid, row: int, column: int, per_side: int) -> tuple[int, int]:
    """The region of a cell: up to `per_side` bands of rows and of columns, of nearly equal width."""
    rows, columns = min(grid.height, per_side), min(grid.width, per_side)
    return row * rows // grid.height, column * columns // grid.width


def choose(scores: Tensor, grid: Grid, count: int) -> Tensor:
    """Mask [tokens] of the `count` tokens of lowest score, after each region has had its own lowest."""
    per_side = 4 if count >= 32 else 2 if count >= 8 else 1
    order = sorted(range(grid.size), key=lambda token: (scores[token].item(), token))
    members: dict[tuple[int, int], list[int]] = {}
    for token in order:
        members.setdefault(region_of(grid, *divmod(token, grid.width), per_side), []).append(token)
    kept = torch.zeros(grid.size, dtype=torch.bool)
    for tokens in members.values():
        kept[tokens[: max(1, math.floor(len(tokens) * count / grid.size / 4))]] = True
    for token in order:
        if kept.sum() == count:
            break
        kept[token] = True
    return kept


class _Image:
    """The state of a run: what every layer remembers of earlier scales."""

    def __init__(self, depth: int):
        self.cache: list[list[KeyValue] | None] = [None] * depth  # per layer and row: [heads, keys, head_dim]
        self.updates: list[Tensor] = []  # per layer, at the last scale of all tokens, [rows, tokens, channels]
        self.maps: list[Tensor] = []  # per layer, at the same scale, [batch, tokens]
        self.grid = Grid(1, 1)


def _run_block(
    block: Block,
    x: Tensor,
    text: Text,
    rotation: Rotation,
    cache: list[KeyValue] | None,
    mask: Tensor,
) -> tuple[Tensor, list[KeyValue], Tensor]:
    """A block on the tokens of `mask` [batch, tokens] only; both halves of guidance share it.

    Returns the new stream (unchanged elsewhere), the cache with those tokens, and the entropy [rows, tokens], NaN
    elsewhere.
    """
    gate1, gate2, scale1, scale2, shift1, shift2 = (block.ada_gss + text.modulation).unbind(2)
    new_x, entropies, new_cache = x.clone(), torch.full(x.shape[:2], math.nan), []
    for row in range(len(x)):
        chosen = mask[row % len(mask)]
        z = x[row, chosen]
        attention = block.sa
        bias = torch.cat([attention.q_bias, attention.zero_k_bias, attention.v_bias])
        projected = functional.linear(
            layer_norm(z) * (1 + scale1[row]) + shift1[row], attention.mat_qkv.weight, bias
        )
        query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
        scale = attention.scale_mul_1H11[0].clamp(max=math.log(100)).exp()
        cosine, sine = (table[chosen] for table in rotation)
        query = rope.rotate((functional.normalize(query, dim=-1) * scale)[None], cosine, sine)[0]
        key = rope.rotate(functional.normalize(key, dim=-1)[None], cosine, sine)[0]
        if cache is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip(cache[row], (key, value), strict=True))
        new_cache.append((key, value))
        weights = (query @ key.transpose(1, 2)).softmax(-1)
        entropies[row, chosen] = entropy_of(weights).mean(0)
        z = z + gate1[row] * attention.proj((weights @ value).transpose(0, 1).flatten(1))
        z = z + block.ca(block.ca_norm(z)[None], text.context[row : row + 1])[0]
        z = z + gate2[row] * block.ffn(layer_norm(z) * (1 + scale2[row]) + shift2[row])
        new_x[row, chosen] = z
    return new_x, new_cache, entropies


class PrunedInfinity:
    """The plain model with ToProVAR in its loop."""

    def __init__(self, model: Infinity, settings: Settings):
        self.model = model
        self.settings = settings
        self.pruned_layers = [layer for layer, score in enumerate(settings.scores) if score > 0]

    def _groups(self, counts: dict[int, int]) -> list[list[int]]:
        """Pruned layers that follow each other and keep as many tokens share these.

        A group ends where the level embedding is added again.
        """
        groups: list[list[int]] = []
        for layer, count in counts.items():
            last = groups[-1][-1] if groups else -2
            if last == layer - 1 and counts[last] == count and not self.model._repeats_level_embedding(layer):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups

    def _resized(self, state: _Image, layer: int, grid: Grid) -> Tensor:
        """A layer's map at the last scale of all tokens on another grid, [batch, tokens]."""
        return sampling.resize(state.maps[layer].view(-1, 1, *state.grid), grid).flatten(1)

    def _expected(self, state: _Image, layer: int, grid: Grid, scale: int, num_scales: int) -> float:
        """sum_i P_keep(i) of Eq. 6, averaged over images."""
        settings, maps = self.settings, self._resized(state, layer, grid)
        total = 0.0
        for image in maps:
            q = (
                (scale + 1)
                / num_scales
                * settings.scores[layer]
                * relative(image, settings.normalization).double()
            )
            prune = settings.alpha_min + (settings.alpha_max - settings.alpha_min) * q
            total += (1 - prune.clamp(0, 1)).sum().item()
        return total / len(maps)

    def _counts(self, state: _Image, grid: Grid, scale: int, num_scales: int) -> dict[int, int]:
        """Layers that keep fewer tokens than all, and how many."""
        counts = {}
        for layer in self.pruned_layers:
            expected = 0.0
            if not self.settings.skip_tokens:
                expected = self._expected(state, layer, grid, scale, num_scales)
            counts[layer] = self.settings.count(grid, expected) if expected > 0 else 0
        return {layer: count for layer, count in counts.items() if count < grid.size}

    def _scores(
        self, group: list[int], state: _Image, grid: Grid, entropies: dict[int, Tensor], pruned: Collection[int]
    ) -> Tensor:
        """What a group's tokens are chosen by, [batch, tokens]."""
        if self.settings.source == "layer_before":
            return entropies[max(layer for layer in range(group[0]) if layer not in pruned)]
        layers = group if self.settings.source == "same_layers" else range(len(state.maps))
        maps = [self._resized(state, layer, grid) for layer in layers]
        return torch.stack([torch.stack([relative(row, "mean") for row in part]) for part in maps]).mean(0)

    @torch.no_grad()
    def generate(
        self,
        text_features: Sequence[Tensor],
        *,
        schedule: Sequence[Grid],
        rope_grid: Grid,
        guidance_scale: float,
        temperature: float,
        top_p: float,
        draws: Sequence[Tensor],
        forced_bits: Sequence[Tensor],
    ) -> tuple[int | None, dict[int, PrunedScale]]:
        """Runs the loop with given draws, feeding given bits forward.

        Returns the scale that pruning started at, or None, and what happened at every scale that ran.
        """
        model, settings = self.model, self.settings
        config, batch, num_scales = model.config, len(text_features), len(schedule)
        guided = guidance_scale != 1
        rows = [*text_features, *(model.cfg_uncond[: len(text)] for text in text_features if guided)]
        text = model.encode_text(rows)
        code_grids = tokenizer_schedule(tuple(schedule), config.patchify)
        code_map = torch.zeros(batch, config.code_dim, *code_grids[-1])
        state = _Image(config.depth)
        crossed = torch.zeros(batch, dtype=torch.bool)
        start, saves_work, thinned = settings.fixed_start, False, False
        records: dict[int, PrunedScale] = {}
        for scale, grid in enumerate(schedule):
            pruning = start is not None and scale >= start
            left = num_scales - scale
            if pruning and (left <= settings.dropped or settings.drop_scales):
                continue
            conditional_only = pruning and left <= settings.dropped + settings.conditional
            if guided and conditional_only:
                guided = False
                text = model.encode_text(rows[:batch])
                state.cache = [None if layer is None else layer[:batch] for layer in state.cache]
                state.updates = [update[:batch] for update in state.updates]
            latent = sampling.resize(code_map, code_grids[scale])
            x = model.first_input(text) if scale == 0 else model.embed_latent(latent).repeat(1 + guided, 1, 1)
            thinning = pruning and left <= settings.token_scales
            counts = self._counts(state, grid, scale, num_scales) if thinning else {}
            saves_work |= conditional_only or bool(counts)
            thinned |= bool(counts)
            record, x = self._run_layers(state, x, text, scale, grid, rope_grid, batch, counts, thinned)
            if saves_work:
                record.rho[:] = math.nan
            record.logits_raw = model.logits(x, text.condition)
            logits = record.logits_raw / temperature
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = guidance_scale * conditional + (1 - guidance_scale) * unconditional
            probabilities = sampling.filtered_probabilities(logits.reshape(batch, -1, 2), 0, top_p)
            drawn = sampling.draw(probabilities, draws[scale].view_as(probabilities))
            record.bits = model._to_code_grid(drawn, grid)
            codes = sampling.bits_to_codes(forced_bits[scale].view_as(record.bits))
            code_map = code_map + sampling.resize(codes, code_grids[-1])
            record.code_map = code_map
            records[scale] = record
            if start is None and scale + 1 >= settings.first_start:
                reached = record.rho >= settings.tau if settings.pruned_above else record.rho <= settings.tau
                crossed |= reached
                if crossed.all() and scale + 1 < num_scales:
                    start = scale + 1
        return start, records

    def _run_layers(
        self,
        state: _Image,
        x: Tensor,
        text: Text,
        scale: int,
        grid: Grid,
        rope_grid: Grid,
        batch: int,
        counts: dict[int, int],
        thinned: bool,
    ) -> tuple[PrunedScale, Tensor]:
        model = self.model
        level, rotation = model.lvl_embed.weight[scale], model._rotation(grid, rope_grid)
        everything = torch.ones(batch, grid.size, dtype=torch.bool)
        group_of = {group[0]: group for group in self._groups(counts)}
        masks: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}
        updates, entropies = [], {}
        for layer, block in enumerate(model.all_blocks()):
            if layer == 0 or model._repeats_level_embedding(layer):
                x = x + level
            if (group := group_of.get(layer)) is not None and counts[layer]:
                chosen_by = self._scores(group, state, grid, entropies, counts)
                mask = torch.stack([choose(row, grid, counts[layer]) for row in chosen_by])
                masks |= dict.fromkeys(group, mask)
                scores |= dict.fromkeys(group, chosen_by)
            before = x
            mask = masks.get(layer, everything if layer not in counts else ~everything)
            if mask.any():
                x, state.cache[layer], entropy = _run_block(block, x, text, rotation, state.cache[layer], mask)
                entropies[layer] = entropy.unflatten(0, (-1, batch)).mean(0)
            if not mask.all():
                saved = state.updates[layer].unflatten(1, state.grid).permute(0, 3, 1, 2)
                filler = sampling.area_resize(saved, grid).flatten(2).transpose(1, 2)
                x = torch.where(mask.repeat(len(x) // batch, 1)[..., None], x, before + filler)
            updates.append(x - before)
        rho = torch.full((batch,), math.nan)
        if not thinned:
            state.updates, state.grid, state.maps = updates, grid, list(entropies.values())
            rho = focused_share(torch.stack(state.maps).mean(0))
        empty = torch.empty(0)
        return PrunedScale(rho, masks, scores, counts, empty, empty, empty), x
