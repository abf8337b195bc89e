import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from cachelora.cli import main
from cachelora.errors import DamagedError
from cachelora.manifest import check_safetensors, verify, write_manifest


@pytest.fixture
def folder(tmp_path):
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}\r\n")
    source = tmp_path.parent / "input.txt"
    source.write_text("x")
    write_manifest(tmp_path, {"rank": 8}, [source], time.monotonic())
    return tmp_path


def test_a_sealed_folder_says_what_made_it(folder):
    manifest = verify(folder)
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    assert manifest["config"] == {"rank": 8}
    assert list(manifest["inputs"].values()) == ["2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"]
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["peak_memory_mb"] > 0


def test_what_is_about_to_be_read_must_be_listed(folder):
    verify(folder, ["model.safetensors"])
    with pytest.raises(DamagedError, match=r"it does not list adapter_model\.safetensors"):
        verify(folder, ["adapter_model.safetensors"])


def test_what_a_killed_job_left_is_not_sealed(folder):
    (folder / ".model.safetensors.x1").write_text("half")
    write_manifest(folder, {}, [], time.monotonic())
    assert set(verify(folder)["files"]) == {"model.safetensors", "config.json"}


def test_line_end_conversion_is_named_as_such(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(
        DamagedError, match=rf"promises {len(content)} bytes, the file holds {len(content) - 5}.*line ends"
    ):
        verify(folder)


def change_value(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def name_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../input.txt"] = manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_value, "SHA-256"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json: it holds 2 bytes, the manifest says 4"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
        (lambda f: (f / "manifest.json").unlink(), "not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "no manifest"),
        (lambda f: (f / "manifest.json").write_text('{"files": {}}'), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "no manifest"),
        (name_outside, "outside its folder"),
    ],
)
def test_damage_is_found(folder, capsys, damage, message):
    assert main(["verify", str(folder)]) == 0
    damage(folder)
    with pytest.raises(DamagedError, match=message):
        verify(folder)
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("ERROR ")


def test_every_folder_is_checked_also_after_a_damaged_one(folder, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none"), str(folder)]) == 1
    assert f"{folder}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 64, (5).to_bytes(8, "little") + b"{}   ", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    if content.endswith(b"{}   "):
        check_safetensors(tmp_path / "x.safetensors")
        return
    with pytest.raises(DamagedError, match="header cannot be read"):
        check_safetensors(tmp_path / "x.safetensors")
