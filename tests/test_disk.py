"""The room on a disk, asked before anything is written."""

from __future__ import annotations

import os

import pytest

from parallel.checkpoint.disk import check_disk, free_bytes
from parallel.errors import CheckpointError


def test_free_bytes_of_a_path_that_will_be_made_are_those_of_the_nearest_directory(tmp_path):
    status = os.statvfs(tmp_path)
    found = free_bytes(tmp_path / "not" / "yet")
    # Others write to this disk meanwhile.
    assert found == pytest.approx(status.f_bavail * status.f_frsize, rel=0.5)


def test_output_that_fits_is_let_pass_and_one_that_does_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("parallel.checkpoint.disk.free_bytes", lambda _: 2_000_000_000)
    check_disk(tmp_path / "out", 2_000_000_000)
    with pytest.raises(CheckpointError, match=r"needs 2\.500 GB.* has 2\.000 GB free") as refused:
        check_disk(tmp_path / "out", 2_500_000_000)
    assert str(tmp_path / "out") in str(refused.value)


def test_parent_that_is_a_file_is_no_crash(tmp_path):
    (tmp_path / "file").write_text("x")
    assert free_bytes(tmp_path / "file" / "out") > 0
