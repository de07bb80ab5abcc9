"""The command: every mistake in one line before any work, and a profile that the next run finds."""

import pytest

from tests import tiny
from toprovar_jax import calibrate, checkpoint, command_line
from toprovar_jax.pruning.profile import Profile, load_profile


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path / "model", tiny.CONFIG, tiny.parameters(), dtype="float32")
    return tmp_path / "model"


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Runs the command in this process; its exit code, 0 where it ends by itself, and what it printed."""
    monkeypatch.setattr(command_line, "use_compilation_cache", lambda: None)

    def run(*arguments):
        code = 0
        try:
            command_line.run(
                calibrate.main, ["calibrate", *(str(part) for part in arguments)], flag_values=calibrate.FLAGS
            )
        except SystemExit as stopped:
            code = stopped.code
        calibrate.FLAGS.unparse_flags()
        captured = capsys.readouterr()
        return code, captured.err or captured.out

    return run


def test_mistakes_end_in_one_line(run_here, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for arguments, message in (
        ([], "no prompts: pass --prompts FILE with one prompt per line"),
        (["--prompts", "none.txt"], "cannot read the prompts of none.txt as UTF-8 text: "),
        (["--prompts", empty], f"{empty} holds no prompt: write one per line"),
        (["--prompts", prompts, "--target", "fast"], "unknown target 'fast': choose speedup=N above 1, or ssim=N"),
        (["--prompts", prompts, "--checkpoint", "nowhere"], "no checkpoint folder at nowhere: make one with"),
        (["--prompts", prompts, "--num_images", "0"], "flag --num_images=0"),
    ):
        code, error = run_here("--checkpoint", folder, *arguments)
        assert code == 2
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


def test_the_profile_is_written_beside_the_checkpoint(run_here, folder, tmp_path, monkeypatch):
    asked = []

    def find(pipe, prompts, target, **settings):
        asked.append((prompts, str(target), settings))
        return Profile(
            layer_scores=(0.0, 1.0),
            tau=0.4,
            crossing="above",
            prunable_scales=2,
            usual_scales=2,
            checkpoint=pipe.checkpoint_digest,
            calibration={"ssim": 0.9, "speedup": 2.5},
        )

    monkeypatch.setattr(calibrate, "calibrate", find)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--target", "ssim=0.9", "--seed", "4", "--num_images", "6")
    code, printed = run_here("--checkpoint", folder, *arguments)
    assert code == 0
    assert printed == (f"reached ssim 0.9000 at 2.50x fewer operations\nwrote {folder}/toprovar_profile.json\n")
    assert asked == [(["a cat", "a dog"], "ssim=0.9", {"num_pictures": 6, "batch_size": 8, "seed": 4})]
    assert load_profile(folder).checkpoint == checkpoint.load_manifest(folder).digest

    new = tmp_path / "new" / "folder"
    for _ in range(2):  # a folder that is made, then one that is there
        code, printed = run_here("--checkpoint", folder, *arguments, "--output_dir", new)
        assert code == 0
        assert printed.endswith(f"wrote {new}/toprovar_profile.json\n")
