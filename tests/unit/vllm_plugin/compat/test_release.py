"""What is reported of a release that differs, on small packages."""

import pytest

from tangram.vllm_plugin.compat import release
from tangram.vllm_plugin.compat.reviewed import reviewed
from tests.unit.vllm_plugin.compat.packages import NEW, OLD, pack, write

REPORT = """\
vLLM 0.33.0 against 0.32.0, in what is relied on:

Places that moved (1)
  vllm.v1.core.kv_cache_utils:get_kv_cache_configs is defined in vllm.v1.core.kv_cache_planning \
and takes groups

Signatures that differ (1)
  vllm.v1.core.sched.scheduler:Scheduler.__init__: takes *, log_stats=False

Calls that are no longer made (1)
  vllm.v1.core.sched.scheduler:Scheduler.schedule does not use peek_request (planning a step)

New members of classes that are subclassed (4)
  vllm.v1.attention.backend:AttentionBackend.supports_kv_cache_update_bypass
  vllm.v1.attention.backend:AttentionImpl.set_interleaved_v_cache
  vllm.v1.kv_cache_interface:KVCacheSpec.is_draft
  vllm.v1.kv_cache_interface:SlidingWindowSpec.num_retained_tokens

Members that these classes lost (1)
  vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_request_with_output

Bodies that changed (1)
  vllm.v1.core.sched.scheduler:Scheduler.schedule
"""


@pytest.fixture
def old(tmp_path):
    return write(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path):
    return write(tmp_path / "new", NEW)


def test_new_members_a_moved_function_and_all_else_is_named(old, new, capsys):
    assert release.main([str(new), "--against", str(old)]) == 1
    assert capsys.readouterr().out == REPORT


def test_a_wheel_is_read_as_a_folder_is(old, new, tmp_path, capsys):
    wheels = [pack(folder, tmp_path / f"{folder.name}.whl") for folder in (new, old)]
    assert release.main([str(wheels[0]), "--against", str(wheels[1])]) == 1
    assert capsys.readouterr().out == REPORT


def test_the_same_files_differ_in_nothing(old, capsys):
    assert release.main([str(old / "vllm"), "--against", str(old)]) == 0
    assert capsys.readouterr().out == (
        "vLLM 0.32.0 against 0.32.0, in what is relied on: no difference\n"
    )


def test_a_parameter_that_is_relied_on_is_told_as_such(old, tmp_path, capsys):
    backend = OLD["v1/attention/backend.py"].replace("cls, spec", "cls, layer")
    other = write(tmp_path / "other", OLD | {"v1/attention/backend.py": backend})
    assert release.main([str(other), "--against", str(old)]) == 1
    assert "\n".join(capsys.readouterr().out.splitlines()[2:5]) == (
        "Signatures that differ (2)\n"
        "  vllm.v1.attention.backend:AttentionBackend.customize_spec: takes layer, took spec\n"
        "  vllm.v1.attention.backend:AttentionBackend.customize_spec does not take spec, which is "
        "relied on (spec of a layer)"
    )


def test_a_class_that_is_gone_is_told_once(old, tmp_path, capsys):
    other = write(tmp_path / "other", OLD | {"v1/attention/backend.py": ""})
    assert release.main([str(other), "--against", str(old)]) == 1
    told = capsys.readouterr().out
    assert (
        "Places that are gone (2)\n"
        "  vllm.v1.attention.backend:AttentionBackend\n"
        "  vllm.v1.attention.backend:AttentionImpl\n"
    ) in told
    assert "  vllm.v1.attention.backend:AttentionBackend, the whole class\n" in told
    assert "customize_spec" not in told


@pytest.mark.parametrize(
    ("version", "nearest"),
    [("0.31.1", "0.32"), ("0.32.3", "0.32"), ("0.34.0rc1", "0.33"), ("1.0", "0.33")],
)
def test_a_release_is_compared_with_the_nearest_that_was_reviewed(version, nearest):
    assert release.nearest(version) is reviewed()[nearest]


def test_a_reviewed_release_is_called_by_its_number(old, capsys):
    assert release.main([str(old), "--against", "0.33"]) == 1
    assert "vLLM 0.32.0 against 0.33.0" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"no wheel", {"other.py": ""}])
def test_what_holds_no_vllm_is_refused(content, tmp_path, capsys):
    path = tmp_path / "given"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content)
    assert release.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{path}: expected a wheel of vLLM" in err and len(err.splitlines()) == 1


def test_what_is_renewed_is_what_is_compared_with_afterwards(old, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tangram.vllm_plugin.compat.reviewed.FOLDER", tmp_path)
    assert release.main([str(old), "--renew"]) == 0
    reviewed.cache_clear()
    monkeypatch.setattr("tangram.vllm_plugin.compat.reviewed.SUPPORTED_RELEASES", ("0.32",))
    try:
        assert release.main([str(old)]) == 0
    finally:
        reviewed.cache_clear()
    assert "no difference" in capsys.readouterr().out
