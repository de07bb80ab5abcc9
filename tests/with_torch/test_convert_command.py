"""`python -m convert` as a user runs it: success, one-line failures, and being killed."""

import dataclasses
import hashlib
import os
import random
import shutil
import signal

import pytest
import torch

from bench import synthetic_checkpoint
from tests.with_torch import commands
from toprovar_jax import checkpoint
from toprovar_jax.config import CheckpointConfig, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest

CONFIG = CheckpointConfig(
    transformer=InfinityConfig(
        depth=2, embed_dim=64, num_heads=2, mlp_dim=128, code_dim=8, num_chunks=2, text_channels=128
    ),
    vae=VAEConfig(code_dim=8, base_channels=32, channel_multipliers=(1, 2), num_residual_blocks=1),
    text_encoder=T5Config(
        vocab_size=synthetic_checkpoint.VOCABULARY,
        embed_dim=128,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        mlp_dim=64,
    ),
)
NARROW_VAE = dataclasses.replace(CONFIG.vae, code_dim=4)


@pytest.fixture(scope="module")
def command():
    with commands.start() as running:
        yield running


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "tiny"
    synthetic_checkpoint.write(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def converted(official, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny"
    outcome = command.run("convert", *inputs(official), "--text_encoder", official / "text_encoder", "--out", out)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    assert outcome.stdout.startswith(f"wrote {out}: depth 2, width 64, 2 heads, 8 bits per code, float32, ")
    return out


def inputs(official):
    return ["--transformer", official / "transformer.pth", "--vae", official / "vae.pth"]


def load_all(folder):
    """Loads and verifies everything; returns the digest."""
    manifest = load_manifest(folder)
    for component in ("transformer", "vae", *(("text_encoder",) if manifest.config.text_encoder else ())):
        checkpoint.load_parameters(folder, component)
    checkpoint.load_tokenizer(folder)
    return manifest.digest


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_conversion_records_its_sources_and_settings(official, converted):
    load_all(converted)
    manifest = load_manifest(converted)
    assert manifest.config == CONFIG
    sources = {record.name: record.sha256 for record in manifest.sources}
    assert sources == {path.name: digest for path, (digest, _) in hashes(official).items()}


def test_settings_that_tensors_do_not_tell(official, command, tmp_path):
    outcome = command.run(
        *("convert", *inputs(official), "--out", tmp_path / "out", "--dtype", "bfloat16", "--rope_mode", "1"),
        *("--level_embedding_per_chunk", "--pixels", "0.06M", "--guidance_scale", "2.5", "--temperature", "0.9"),
    )
    assert outcome.code == 0, outcome.stderr
    manifest = load_manifest(tmp_path / "out")
    assert manifest.dtype == "bfloat16"
    assert manifest.config.text_encoder is None
    assert manifest.config.transformer.rope_mode == 1
    assert manifest.config.transformer.level_embedding_per_chunk
    defaults = manifest.config.defaults
    assert (defaults.pixels, defaults.guidance_scale, defaults.temperature) == ("0.06M", 2.5, 0.9)
    check = command.run("convert", "check", "--checkpoint", tmp_path / "out", *inputs(official))
    assert check.code == 0, check.stdout + check.stderr


def test_check_passes_on_the_files_of_the_checkpoint(official, converted, command):
    outcome = command.run("convert", "check", "--checkpoint", converted, *inputs(official))
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert outcome.stderr == ""
    assert outcome.stdout.startswith("passed: worst error ")
    assert ", wrong bits 0 of 168" in outcome.stdout


def test_check_fails_on_a_transposed_square_matrix(official, converted, command, tmp_path):
    tensors = torch.load(official / "transformer.pth")
    name = "block_chunks.1.module.0.ca.proj.weight"
    torch.save(tensors | {name: tensors[name].t().contiguous()}, tmp_path / "transposed.pth")
    outcome = command.run(
        "convert",
        "check",
        *("--checkpoint", converted, "--transformer", tmp_path / "transposed.pth", "--vae", official / "vae.pth"),
    )
    assert outcome.code == 1
    assert outcome.stdout.startswith("FAILED: worst error ")
    assert ", wrong bits 0 of" not in outcome.stdout


def assert_refused(outcome, message):
    assert outcome.code == 2, outcome.stdout + outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
    assert outcome.stdout == ""


def test_inputs_that_cannot_be_converted(official, converted, command, tmp_path):
    transformer, vae = official / "transformer.pth", official / "vae.pth"
    out = tmp_path / "parent" / "out"

    def write(name, change):
        tensors = torch.load(transformer)
        change(tensors)
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(transformer.read_bytes()[:-1000])
    proof = tmp_path / "executed"
    code = tmp_path / "code.pth"
    torch.save({"word_embed.weight": _Code(f"touch {proof}")}, code)
    nan = write("nan.pth", lambda tensors: tensors["head.bias"].__setitem__(3, float("nan")))
    biased = "block_chunks.1.module.0.ca.zero_k_bias"
    not_zero = write("not_zero.pth", lambda tensors: tensors[biased].__setitem__(0, 0.5))
    no_scales = write("no_scales.pth", lambda tensors: tensors.pop("lvl_embed.weight"))
    vae_tensors = torch.load(vae)["vae"]
    first = "encoder.conv_in.conv.weight"
    torch.save({"vae": vae_tensors | {first: torch.zeros(0, 3, 3, 3)}}, hollow := tmp_path / "hollow.pth")
    infinite = vae_tensors["decoder.conv_in.conv.bias"] + float("inf")
    torch.save({"vae": vae_tensors | {"decoder.conv_in.conv.bias": infinite}}, unbounded := tmp_path / "inf.pth")
    lacking = write("lacking.pth", lambda tensors: tensors.pop("head.bias"))
    narrow = tmp_path / "narrow.pth"
    torch.save({"vae": synthetic_checkpoint.vae_tensors(NARROW_VAE)}, narrow)
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["--transformer", tmp_path / "none.pth", "--vae", vae, "--out", out], "no such file or folder"),
        (
            ["--transformer", vae, "--vae", transformer, "--out", out],
            "holds a VAE, not a transformer: were two files",
        ),
        (
            ["--transformer", transformer, "--vae", narrow, "--out", out],
            "the VAE's codes have 4 bits but the tokens",
        ),
        (
            ["--transformer", truncated, "--vae", vae, "--out", out],
            "is not a complete PyTorch file: download it again",
        ),
        (["--transformer", code, "--vae", vae, "--out", out], "contains code (posix.system), which is never run"),
        (["--transformer", nan, "--vae", vae, "--out", out], "1 not finite: head.bias"),
        (["--transformer", lacking, "--vae", vae, "--out", out], "1 missing: head.bias"),
        (["--transformer", transformer, "--vae", vae, "--out", converted], "exists already"),
        (["--transformer", transformer, "--vae", vae, "--out", official, "--overwrite"], "no manifest.json"),
        (["--transformer", transformer, "--vae", vae, "--out", tmp_path / "file" / "out"], "cannot write"),
        (
            ["--transformer", no_scales, "--vae", vae, "--out", out],
            "as a transformer (1 missing: lvl_embed.weight)",
        ),
        (["--transformer", not_zero, "--vae", vae, "--out", out], f"1 not zero: {biased}"),
        (["--transformer", transformer, "--vae", hollow, "--out", out], "tensors of size 0 where the channels of"),
        (
            ["--transformer", transformer, "--vae", vae],
            "missing --out: for example python -m convert --transformer infinity_2b_reg.pth --vae infinity_vae_",
        ),
        ([], "missing --transformer, --vae, --out: for example python -m convert --transformer infinity_2b_reg"),
        (
            ["check", "--vae", vae],
            "missing --checkpoint, --transformer: for example python -m convert check --checkpoint infinity-2b",
        ),
        (["--transformer", transformer, "--vae", vae, "--out", out, "--fast"], "Unknown command line flag 'fast'"),
        (["--transformer", transformer, "--vae", vae, "--out", out, "--dtype", "float16"], "float16"),
        (
            ["chekc", "--transformer", transformer, "--vae", vae, "--out", out],
            "unknown command 'chekc': did you mean check?",
        ),
        (["check", "--checkpoint", official, "--transformer", transformer, "--vae", vae], "is no checkpoint"),
        (
            ["check", "--checkpoint", converted, "--transformer", transformer, "--vae", narrow],
            "of another architec",
        ),
        (
            ["check", "--checkpoint", converted, "--transformer", nan, "--vae", vae],
            f"{nan} has impossible values (1 not finite: head.bias): these weights cannot be used, download them",
        ),
        (
            ["check", "--checkpoint", converted, "--transformer", not_zero, "--vae", vae],
            f"{not_zero} has impossible values (1 not zero: {biased}): these weights cannot be used",
        ),
        (
            ["check", "--checkpoint", converted, "--transformer", transformer, "--vae", unbounded],
            "has impossible values (1 not finite: decoder.conv_in.conv.bias)",
        ),
        (
            ["check", "--checkpoint", converted, "--transformer", vae, "--vae", vae],
            "holds a VAE, not a transformer",
        ),
    ]:
        assert_refused(command.run("convert", *arguments), message)
    assert not proof.exists()
    assert not out.parent.exists()
    load_all(converted)


class _Code:
    """A pickle that runs a shell command when it is read."""

    def __init__(self, shell_command):
        self.shell_command = shell_command

    def __reduce__(self):
        return os.system, (self.shell_command,)


def test_inputs_stay_as_they_are(official, command, tmp_path):
    before = hashes(official)
    command.run("convert", *inputs(official), "--out", tmp_path / "out")
    assert hashes(official) == before


def test_a_killed_conversion_leaves_nothing_that_loads(official, command, tmp_path):
    out = tmp_path / "out"
    arguments = ["convert", *inputs(official), "--text_encoder", official / "text_encoder", "--out", out]
    moments = random.Random(0)
    duration = command.run(*arguments).seconds
    shutil.rmtree(out)
    num_killed = 0
    for _ in range(100):
        outcome = command.run(*arguments, signal_after=moments.uniform(0, duration))
        if outcome.code == -signal.SIGKILL and not out.exists():
            num_killed += 1
        else:  # it was done before the signal
            load_all(out)
            shutil.rmtree(out)
            duration = min(duration, outcome.seconds)
        for leftover in tmp_path.iterdir():
            with pytest.raises(InputError):
                load_all(leftover)
        if num_killed == 10:
            break
    assert num_killed == 10
    assert command.run(*arguments).code == 0
    load_all(out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_replacement_leaves_the_old_checkpoint_or_the_new(official, command, tmp_path):
    arguments = ["convert", *inputs(official), "--overwrite", "--out", tmp_path / "out"]
    duration = min(command.run(*arguments).seconds for _ in range(2))
    moments = random.Random(1)
    for _ in range(3):
        old = load_all(tmp_path / "out")
        outcome = command.run(*arguments, signal_after=moments.uniform(0.5, 1) * duration)
        assert load_all(tmp_path / "out") != old or outcome.code == -signal.SIGKILL
    assert command.run(*arguments).code == 0
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_conversion_cleans_up(official, command, tmp_path):
    out = tmp_path / "out"
    arguments = ["convert", *inputs(official), "--out", out]
    begun = tmp_path / ".out.partial" / "transformer"
    outcome = command.run(*arguments, signal_once=begun, signal_number=signal.SIGINT)
    assert outcome.code == 130, outcome.stderr
    # What was cut short may complain before and after: threads of the writer, coroutines that never ran.
    assert "error: interrupted" in outcome.stderr.splitlines()
    assert os.listdir(tmp_path) == []
