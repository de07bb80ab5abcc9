"""Pictures of a run: what they show, pixel by pixel, of numbers worked out here."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from toprovar_jax.errors import InputError
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policies import resolve_policy
from toprovar_jax.pruning.policy import Dense
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.visualization.canvas import heat
from toprovar_jax.visualization.folder import FIGURES, write_trace
from toprovar_jax.visualization.maps import grey_over
from toprovar_jax.visualization.measurements import picture_trace

TAU = 0.45
POLICIES = {
    "fastvar": resolve_policy("fastvar"),
    "skipvar": resolve_policy("skipvar"),
    "toprovar": ToProVAR(
        Profile(
            layer_scores=(0.0, 1.0),
            tau=TAU,
            crossing="above",
            prunable_scales=3,
            usual_scales=2,
            alpha_min=0.5,
            alpha_max=0.5,
        )
    ),
}


@pytest.fixture(scope="module", params=POLICIES)
def run(request, tmp_path_factory):
    """Of every policy: its name, the output of a call for two pictures, and the folders written of them."""
    policy = POLICIES[request.param]
    pipe = tiny.pipeline()
    output = pipe(("a red cat", "a dog"), seed=23, scale_schedule=tiny.SIX_SCALES, policy=policy, trace=True)
    folder = tmp_path_factory.mktemp(request.param)
    folders = [write_trace(picture_trace(output, policy, i), folder / str(i)) for i in range(2)]
    return request.param, output, folders


def full_entropies(output, index):
    """By scale from 1 on, [layers, tokens] of layers that ran on all tokens: the mean of the guidance halves."""
    maps = {}
    for scale, traced in zip(output.plan.executed_scales, output.trace.scales, strict=True):
        full = np.array(output.plan.scales[scale].kept_tokens) == tiny.SIX_SCALES[scale].size
        # A picture's rows are as far apart as the batch is large.
        maps[scale] = traced.entropy[full, index::2].mean(axis=1)
    del maps[0]
    return maps


def rho(entropy):
    mean = entropy.mean(axis=0)
    return np.mean(mean < mean.mean())


def pruned_scales(plan):
    scales = enumerate(zip(plan.schedule, plan.scales, strict=True))
    return [scale for scale, (grid, entry) in scales if set(entry.kept_tokens) != {grid.size}]


def kept_in_layer_1(output, index, scale):
    """Which tokens of a pruned scale ran, as a grid; of self-attention in the conditional row."""
    grid = tiny.SIX_SCALES[scale]
    kept = np.zeros(grid.size, bool)
    if output.plan.scales[scale].runs:
        ((_, choices),) = output.trace.scales[output.plan.executed_scales.index(scale)].kept.items()
        kept[choices[index][0]] = True
    return kept.reshape(grid)


def cell_centres(grid, left, top, side):
    rows, columns = ((np.arange(cells) + 0.5) * side / cells for cells in grid)
    return np.ix_((top + rows).astype(int), (left + columns).astype(int))


def close_to(pixels, color):
    return np.abs(pixels - color).sum(axis=-1) < 30


def pixels(folder, name):
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


def test_every_policy_gets_all_files(run):
    _, output, folders = run
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {*FIGURES, "plan.txt", "plan.json"}
        assert Plan.from_text((folder / "plan.json").read_text()) == output.plan
        assert (folder / "plan.txt").read_text() == output.plan.table() + "\n"
        assert pixels(folder, "focused_shares.png").shape == (44 + 320 + 64, 72 + 640 + 16, 3)
        # Two layers of 64 pixels, gaps of 4, and two rows of text above and one below.
        assert pixels(folder, "entropy_by_layer.png").shape[0] == 16 + 52 + 2 * 68 + 16 + 44 + 16
    assert (folders[0] / "entropy_by_scale.png").read_bytes() != (folders[1] / "entropy_by_scale.png").read_bytes()


def test_tokens_are_grey_where_they_did_not_run_and_only_there(run):
    name, output, folders = run
    pruned = pruned_scales(output.plan)
    assert pruned == {"fastvar": [2, 3, 4, 5], "toprovar": [4, 5]}.get(name, pruned)
    for index, folder in enumerate(folders):
        sheet = pixels(folder, "pruned_tokens.png")
        assert sheet.shape[1] >= 16 + (len(pruned) + 1) * (256 + 12)
        for place, scale in enumerate(pruned, start=1):
            grid = tiny.SIX_SCALES[scale]
            shown = sheet[cell_centres(grid, 16 + place * (256 + 12), 16, 256)]
            picture = sheet[cell_centres(grid, 16, 16, 256)]
            kept = kept_in_layer_1(output, index, scale)
            np.testing.assert_array_equal(shown[kept], picture[kept])
            assert (np.ptp(shown[~kept], axis=-1) == 0).all()
            assert (shown != picture).any(axis=-1)[~kept].all()


def test_entropy_maps_have_the_colours_of_the_mean_over_full_layers(run):
    _, output, folders = run
    for index, folder in enumerate(folders):
        sheet = pixels(folder, "entropy_by_scale.png")
        means = {}
        for scale, entropy in full_entropies(output, index).items():
            counts = [output.plan.scales[ran].kept_tokens for ran in output.plan.executed_scales if ran <= scale]
            full = np.array(counts[-1]) == tiny.SIX_SCALES[scale].size
            means[scale] = (entropy / np.log(np.sum(counts, axis=0))[full, None]).mean(axis=0)
        values = np.concatenate(list(means.values()))
        low, high = np.floor(20 * values.min()) / 20, np.ceil(20 * values.max()) / 20
        for place, (scale, mean) in enumerate(means.items(), start=1):
            grid = tiny.SIX_SCALES[scale]
            shown = sheet[cell_centres(grid, 16 + place * (192 + 12), 16, 192)]
            expected = heat(((mean - low) / (high - low)).reshape(grid)).astype(int)
            np.testing.assert_allclose(shown, expected, atol=1)


def test_rho_stands_at_its_height_and_the_start_scale_in_its_column(run):
    name, output, folders = run
    starts = []
    for index, folder in enumerate(folders):
        frame = pixels(folder, "focused_shares.png")[44 : 44 + 320, 72 : 72 + 640]
        shares = {scale: rho(entropy) for scale, entropy in full_entropies(output, index).items()}
        values = [*shares.values(), *([TAU] if name == "toprovar" else [])]
        low, high = np.floor(10 * min(values) - 0.2) / 10, np.ceil(10 * max(values) + 0.2) / 10
        blue = close_to(frame, (0x26, 0x6F, 0x84))
        for scale, share in shares.items():
            rows = np.flatnonzero(blue[:, round((scale + 0.5) * 640 / 6)])
            assert (rows[0] + rows[-1]) / 2 == pytest.approx((high - share) / (high - low) * 320, abs=1.5)
        red = close_to(frame, (0xC0, 0x39, 0x2B))
        columns = np.flatnonzero(red.mean(axis=0) > 0.8)
        rows = np.flatnonzero(red.mean(axis=1) > 0.4)
        if name != "toprovar":
            assert columns.size == rows.size == 0
            continue
        # Looked at are the scales from the one before the first that may be pruned.
        start = next(scale for scale in (2, 3, 4) if shares[scale] >= TAU)
        assert columns.mean() == pytest.approx((start + 0.5) * 640 / 6, abs=1.5)
        assert rows.mean() == pytest.approx((high - TAU) / (high - low) * 320, abs=1.5)
        starts.append(start)
    if name == "toprovar":
        assert starts == [3, 2]
        assert pruned_scales(output.plan)[0] == 4  # the batch waits for the later one


def test_layer_scores_are_bars_of_the_pictures_own_maps(run):
    name, output, folders = run
    pruned = pruned_scales(output.plan)
    scale = min([*pruned, 6]) - 1
    for index, folder in enumerate(folders):
        maps = full_entropies(output, index)[scale].reshape(2, *tiny.SIX_SCALES[scale])
        expected = np.zeros(2)  # where a map has one row, and so no second singular value
        if scale > 1:
            singular = np.linalg.svd(maps, compute_uv=False)
            excess = singular[:, 0] / singular[:, 1] - 1
            expected = np.exp(-np.log(2) / np.median(excess) * excess)
        frame = pixels(folder, "layer_scores.png")[44 : 44 + 320, 72 : 72 + 640]
        for layer, score in enumerate(expected):
            bar = frame[:, 320 * layer + 160]
            color = (0x26, 0x6F, 0x84) if name != "skipvar" and layer == 1 else (0xB9, 0xC7, 0xCC)
            assert close_to(bar, color).mean() == pytest.approx(score, abs=0.02)
        marks = close_to(frame, (0xC0, 0x39, 0x2B)).mean(axis=1) > 0.3
        assert marks.any() == (name == "toprovar")


def test_partly_pruned_tokens_fade_in_between_and_cells_follow_the_pixels():
    picture = Image.new("RGB", (7, 5), (250, 10, 40))
    share = np.array([[0, 0.5, 1], [1, 0, 0]])
    faded = np.asarray(grey_over(picture, share)).astype(int)
    np.testing.assert_array_equal(faded[0, :2], [(250, 10, 40)] * 2)
    full = faded[0, 5]
    assert np.ptp(full) == 0
    np.testing.assert_allclose(faded[0, 3], (np.array((250, 10, 40)) + full) / 2, atol=1)
    np.testing.assert_array_equal(
        np.ptp(faded, axis=-1) == 0, (share[[0, 0, 1, 1, 1]] == 1)[:, [0, 0, 1, 1, 1, 2, 2]]
    )


def test_the_colours_grow_lighter_in_even_steps():
    colors = heat(np.linspace(0, 1, 21)[None])[0] / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16
    steps = np.diff(lightness)
    assert steps.min() > 2.5
    assert steps.max() < 6
    np.testing.assert_array_equal(heat(np.array([[-1, 2, np.nan]])), [[(16, 18, 58), (246, 230, 148), (190,) * 3]])


def test_runs_that_were_not_traced_are_refused(run):
    _, output, _ = run
    for changes in ({"trace": None}, {"images": np.asarray(output.images)}):
        with pytest.raises(InputError, match=re.escape("call the pipeline with trace=True and output_type='pil'")):
            picture_trace(dataclasses.replace(output, **changes), Dense(), 0)


def test_an_earlier_trace_is_replaced_and_nothing_else_is(run, tmp_path):
    _, output, _ = run
    trace = picture_trace(output, Dense(), 0)
    (tmp_path / "trace").mkdir()
    for _ in range(2):
        write_trace(trace, tmp_path / "trace")
        assert json.loads((tmp_path / "trace" / "plan.json").read_text()) == output.plan.to_json()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(InputError, match=r"notes holds other files and no plan\.txt: choose another folder"):
        write_trace(trace, tmp_path / "notes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "trace"]
