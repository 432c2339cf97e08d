"""Where automatic profiles are kept, and what tells them apart."""

import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tangram.errors import ProfileError
from tangram.profile import ModelIdentity
from tangram.profile.cache import (
    cache_folder,
    cached_profile_path,
    locked,
    snapshot_folder,
    weights_digest,
)
from tangram.profile.store import replace_file

MODEL = ModelIdentity("Org/Model", 2, 2, 4, 16, 64, 100, "ab" * 32)
KEY = dict(
    scorer_name="key_diff", scorer_parameters={}, chunk_size_tokens=256, window_size_tokens=32,
    n_sink_tokens=4, page_group_size=2,
)  # fmt: skip


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TANGRAM_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a/profiles")
    monkeypatch.delenv("TANGRAM_CACHE_DIR")
    assert cache_folder() == Path("/b/tangram/profiles")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/tangram/profiles"


def test_everything_that_a_profile_depends_on_tells_it_apart(monkeypatch):
    monkeypatch.setenv("TANGRAM_CACHE_DIR", "/a")
    path = cached_profile_path(MODEL, "w", **KEY)
    assert path == cached_profile_path(MODEL, "w", **KEY)
    assert path.name.startswith("Org_Model-2x2x16-key_diff-C256-W32-S4-H2-")
    others = [
        cached_profile_path(replace(MODEL, config_sha256="cd" * 32), "w", **KEY),
        cached_profile_path(MODEL, "other weights", **KEY),
        cached_profile_path(MODEL, "w", **KEY, recipe=("--samples", "9")),
        *(
            cached_profile_path(MODEL, "w", **{**KEY, name: value})
            for name, value in {
                "scorer_name": "tova", "scorer_parameters": {"x": 1}, "chunk_size_tokens": 128,
                "window_size_tokens": 16, "n_sink_tokens": 0, "page_group_size": 1,
            }.items()
        ),
    ]  # fmt: skip
    assert len({path, *others}) == 1 + len(others)


def write_weights(folder, value=0.0, name="model.safetensors"):
    folder.mkdir(parents=True)
    array = np.zeros((300, 300), np.float32)
    array[-1, -1] = value
    save_file({"w": array}, folder / name)
    (folder / "config.json").write_text("{}")
    return weights_digest(folder)


def test_fine_tunes_of_one_architecture_differ(tmp_path):
    first = write_weights(tmp_path / "a")
    assert first == write_weights(tmp_path / "b")
    assert first != write_weights(tmp_path / "c", value=1.0)
    assert first != write_weights(tmp_path / "d", name="other.safetensors")


def test_a_snapshot_is_told_by_its_commit_and_nothing_else_is(tmp_path):
    commit, plain = "0a1b2c3d" * 5, write_weights(tmp_path / "a")
    assert write_weights(tmp_path / "models--org--m/snapshots" / commit) == commit
    for other in (f"m/snapshots/{commit}", "models--org--m/snapshots/step-100", "snapshots/last"):
        assert write_weights(tmp_path / other) == plain


@pytest.mark.parametrize("changed", ["layers.07.q", "layers.00.norm", "layers.63.v"])
def test_a_merged_adapter_changes_the_digest(tmp_path, changed):
    """Few bytes of large files are read: small tensors among them were passed over."""
    rng = np.random.default_rng(0)
    shapes = {"up": (400, 100), "q": (40, 40), "v": (40, 40), "norm": (40,)}
    weights = {
        f"layers.{layer:02}.{name}": rng.normal(size=shape).astype(np.float32)
        for layer in range(64)
        for name, shape in shapes.items()
    }
    for name, change in (("base", 0.0), ("merged", 1e-3)):
        (tmp_path / name).mkdir()
        arrays = weights | {changed: weights[changed] + np.float32(change)}
        save_file(arrays, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(tmp_path / "base") != weights_digest(tmp_path / "merged")


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"w": {"data_offsets": "x"}}', b'{"w": 1}'])
def test_damaged_weights_have_a_digest_too(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert len(weights_digest(tmp_path)) == 64


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="no weights"):
        weights_digest(tmp_path)
    with pytest.raises(ProfileError, match="cannot be read"):
        weights_digest(tmp_path / "missing")


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    assert snapshot_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ProfileError, match="neither a folder nor a model"):
        snapshot_folder(str(tmp_path / "no/such/model"))


def test_the_lock_lets_one_in_and_tells_the_other_that_it_waits(tmp_path):
    path = tmp_path / "new" / "p.profile"
    order, waiting = [], threading.Event()

    def second():
        with locked(path, waiting.set):
            order.append("second")

    with locked(path, lambda: pytest.fail("nobody else is there")):
        other = threading.Thread(target=second)
        other.start()
        assert waiting.wait(10)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_nothing_is_left_of_a_lock_and_one_at_a_time_holds_it(tmp_path):
    """Whoever waited for a lock whose file is gone would share it with who comes next."""
    path, inside, most = tmp_path / "p.profile", [], []

    def hold(number):
        for _ in range(20):
            with locked(path):
                inside.append(number)
                time.sleep(0.001)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 80
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_not_waited_for_where_that_is_refused(tmp_path):
    def refuse():
        raise RuntimeError("taken")

    path = tmp_path / "p.profile"
    with locked(path):
        with pytest.raises(RuntimeError, match="taken"), locked(path, refuse):
            pytest.fail("two hold it")
        with pytest.raises(RuntimeError, match="taken"), locked(path, refuse):
            pytest.fail("the one that was refused took the lock away")


HOLD = """
import sys, time
from pathlib import Path
from tangram.profile.cache import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    path = tmp_path / "p.profile"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    with locked(path, lambda: pytest.fail("nobody else is there")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_names_what_moves_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="TANGRAM_CACHE_DIR"), locked(tmp_path / "file/p"):
        pass
    with (
        pytest.raises(ProfileError, match="another folder with --out"),
        locked(tmp_path / "file/p", named_by="--out"),
    ):
        pass


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("whole")
    for target in (other, tmp_path / "not there"):
        link = tmp_path / "p.profile.lock"
        link.symlink_to(target)
        with pytest.raises(ProfileError, match="lock is a link.*remove it"):
            with locked(tmp_path / "p.profile"):
                pytest.fail("held through a link")
        link.unlink()
    assert other.read_text() == "whole" and not (tmp_path / "not there").exists()


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.profile.lock")
    with pytest.raises(ProfileError, match="cannot be written to"), locked(tmp_path / "p.profile"):
        pytest.fail("held on a pipe")
    reader = os.open(tmp_path / "p.profile.lock", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ProfileError, match="no plain file"), locked(tmp_path / "p.profile"):
            pytest.fail("held on a pipe that somebody reads")
    finally:
        os.close(reader)


def test_a_profile_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """After a power cut the cached profile was there, and empty."""
    done, sync, rename = [], os.fsync, os.replace

    def synced(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        done.append("folder" if is_folder else os.fstat(handle).st_size)
        sync(handle)

    def renamed(*paths):
        done.append("name")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    replace_file(tmp_path / "p.profile", b"12345")
    assert done == [5, "name", "folder"]
    assert (tmp_path / "p.profile").read_bytes() == b"12345"
