"""What the repository holds: small enough to clone anywhere, weights included."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST_FILE = 15 * 2**20
ALL_FILES = 52 * 2**20


def test_tracked_files_stay_small_one_by_one_and_together():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if (ROOT / name).is_file()}
    assert len(sizes) > 100
    assert [name for name, size in sizes.items() if size > LARGEST_FILE] == []
    assert sum(sizes.values()) < ALL_FILES
