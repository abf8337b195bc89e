"""Leases on GPUs by real processes, with an nvidia-smi that lists devices which there are not."""

import os
import random
import re
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT

from cachelora.errors import EngineError
from cachelora.gpus import lease, usable_devices

UUIDS = ["GPU-aa11-0", "GPU-aa22-1", "GPU-bb33-2"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with three GPUs, none hidden, and a folder for its locks."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    list_devices(tmp_path, "".join(f"{index}, {uuid}\n" for index, uuid in enumerate(UUIDS)))
    return tmp_path


def list_devices(machine, text, code=0):
    """Let nvidia-smi print a text."""
    path = machine / "bin/nvidia-smi"
    path.parent.mkdir(exist_ok=True)
    (machine / "listed").write_text(text)
    path.write_text(
        '#!/bin/sh\n[ "$1 $2" = "--query-gpu=index,uuid --format=csv,noheader" ] || exit 2\n'
        f"cat '{machine}/listed'\nexit {code}\n"
    )
    path.chmod(0o755)


def hold(machine, number, body, **variables):
    """Start a process that runs code under a lease, in which `held` are its devices."""
    script = (
        "import logging, os, subprocess, sys, time\nfrom cachelora.gpus import lease\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')\n"
        f"with lease({number}, {str(machine / 'locks')!r}) as held:\n" + textwrap.indent(body, "    ")
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | variables,
    )  # fmt: skip


UNTIL_TOLD = "print(*held, flush=True)\nsys.stdin.readline()"


def devices_of(process):
    return process.stdout.readline().split()


@pytest.mark.parametrize(
    ("visible", "usable"),
    [
        (None, UUIDS),
        ("0,2", [UUIDS[0], UUIDS[2]]),
        ("2, 0", [UUIDS[2], UUIDS[0]]),
        ("1,1", [UUIDS[1]]),
        ("GPU-bb33-2", [UUIDS[2]]),
        ("GPU-b,GPU-aa1", [UUIDS[2], UUIDS[0]]),
        ("MIG-GPU-aa11-0/1/0,MIG-77", ["MIG-GPU-aa11-0/1/0", "MIG-77"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,0", [UUIDS[1]]),
    ],
)
def test_cuda_visible_devices_narrows_what_may_be_used(machine, monkeypatch, visible, usable):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_devices() == usable
    with lease(len(usable), machine / "locks") as held:
        assert held == usable
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(usable)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("3", "CUDA_VISIBLE_DEVICES: '3' is no device. Use some of 0 (GPU-aa11-0), 1"),
        ("GPU-aa", "'GPU-aa' is more than one device"),
        ("GPU-cc", "'GPU-cc' is no device"),
        ("aa11", "'aa11' is no device"),
        ("G", "'G' is more than one device"),
    ],
)
def test_a_device_that_there_is_not_is_named(machine, monkeypatch, visible, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(EngineError) as raised, lease(1, machine / "locks"):
        pass
    assert message in str(raised.value)


def test_a_scheduler_that_numbers_from_0_does_not_make_two_devices_one(machine):
    """Two jobs of a scheduler, each of which sees its own device as number 0."""
    list_devices(machine, f"0, {UUIDS[0]}\n")
    first = hold(machine, 1, UNTIL_TOLD, CUDA_VISIBLE_DEVICES="0")
    assert devices_of(first) == UUIDS[:1]
    list_devices(machine, f"0, {UUIDS[1]}\n")
    second = hold(machine, 1, UNTIL_TOLD, CUDA_VISIBLE_DEVICES="0")
    assert devices_of(second) == UUIDS[1:2]
    for process in (first, second):
        process.communicate("\n")


def test_children_see_what_was_leased_and_no_more(machine):
    said, _ = hold(machine, 2, "subprocess.run(['sh', '-c', 'echo $CUDA_VISIBLE_DEVICES'])").communicate()
    assert said == f"{UUIDS[0]},{UUIDS[1]}\n"


def test_no_gpu_and_no_driver_lease_nothing_and_change_nothing(machine, monkeypatch, caplog):
    list_devices(machine, "NVIDIA-SMI has failed\n", code=9)
    with lease(2, machine / "locks") as held:
        assert held == [] and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "NVIDIA-SMI has failed" in caplog.text
    monkeypatch.setenv("PATH", str(machine / "nowhere"))
    with lease(2, machine / "locks") as held:
        assert held == [] and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not (machine / "locks").exists()


def test_a_job_that_asks_for_none_sees_none(machine):
    with lease(0, machine / "locks") as held:
        assert (held, os.environ["CUDA_VISIBLE_DEVICES"]) == ([], "")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_more_than_there_are_is_an_error_that_says_what_to_do(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(EngineError) as raised, lease(3, machine / "locks"):
        pass
    assert str(raised.value) == "GPUs: 3 are asked for, 2 may be used (CUDA_VISIBLE_DEVICES: 0,1). Ask for fewer."


def test_who_waits_says_once_for_whom_and_goes_on_when_the_other_is_killed(machine):
    holder = hold(machine, 2, UNTIL_TOLD)
    assert devices_of(holder) == UUIDS[:2]
    waiting = hold(machine, 2, UNTIL_TOLD)
    line = waiting.stderr.readline()
    assert line.startswith(f"waiting for 2 of 3 GPUs: {UUIDS[0]} is held by process {holder.pid} of ")
    assert UUIDS[2] not in line
    # It must not hold the free one while it waits.
    last = hold(machine, 1, UNTIL_TOLD)
    assert devices_of(last) == UUIDS[2:]
    last.communicate("\n")
    time.sleep(2.5)
    holder.kill()
    holder.wait()
    assert devices_of(waiting) == UUIDS[:2]
    _, said = waiting.communicate("\n")
    assert said.splitlines() == [f"leased {UUIDS[0]},{UUIDS[1]}"]


def test_an_error_under_the_lease_ends_it(machine):
    with pytest.raises(ZeroDivisionError), lease(3, machine / "locks"):
        1 / 0  # noqa: B018
    with lease(3, machine / "locks") as held:
        assert held == UUIDS


def test_no_two_processes_ever_hold_one_device(machine):
    """Twelve processes with random wishes, some of which kill -9 themselves; whoever finds a device shared says so."""
    draw = random.Random(13)
    (machine / "marks").mkdir()
    # A mark of a process that was killed stays; one of a process that lives is an offence.
    body = (
        f"marks = [{str(machine / 'marks')!r} + '/' + device for device in held]\n"
        "for mark in marks:\n"
        "    owner = open(mark).read() if os.path.exists(mark) else ''\n"
        "    if owner and os.path.exists('/proc/' + owner) and 'Z' not in open(f'/proc/{owner}/stat').read().split():\n"
        "        print('SHARED', mark, owner, flush=True)\n"
        "    open(mark, 'w').write(str(os.getpid()))\n"
        "print(*held, flush=True)\n"
        "time.sleep(SECONDS)\n"
        "for mark in marks:\n"
        "    if open(mark).read() != str(os.getpid()):\n"
        "        print('SHARED', mark, flush=True)\n"
        "if KILLED:\n"
        "    os.kill(os.getpid(), 9)\n"
        "for mark in marks:\n"
        "    os.remove(mark)\n"
    )
    wishes = [(draw.randint(1, 3), draw.uniform(0.05, 0.6), draw.random() < 0.3) for _ in range(12)]
    assert {killed for *_, killed in wishes} == {True, False}
    assert {number for number, *_ in wishes} == {1, 2, 3}
    processes = [
        hold(machine, number, body.replace("SECONDS", str(seconds)).replace("KILLED", str(killed)))
        for number, seconds, killed in wishes
    ]
    for process, (number, _, killed) in zip(processes, wishes, strict=True):
        said, log = process.communicate(timeout=120)
        assert process.returncode == (-9 if killed else 0), log
        assert "SHARED" not in said
        assert len(said.split()) == number


def test_a_lock_of_another_user_can_be_taken_and_a_trap_cannot(machine):
    (machine / "victim").write_text("untouched")
    locks = machine / "locks"
    with lease(1, locks):
        pass
    assert locks.stat().st_mode & 0o7777 == 0o1777
    assert (locks / UUIDS[0]).stat().st_mode & 0o777 == 0o666
    (locks / UUIDS[0]).unlink()
    (locks / UUIDS[0]).symlink_to(machine / "victim")
    with pytest.raises(EngineError, match="no GPU can be locked"), lease(1, locks):
        pass
    assert (machine / "victim").read_text() == "untouched"


def test_a_lease_after_cuda_was_used_is_refused(machine):
    script = (
        "import sys, types\nfrom cachelora.gpus import lease\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))\n"
        f"with lease(1, {str(machine / 'locks')!r}):\n    print('held')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "held" not in result.stdout
    assert "before CUDA is used" in result.stderr


def test_what_the_stages_import_does_not_ask_cuda_for_its_devices():
    """CUDA reads CUDA_VISIBLE_DEVICES when it is first asked, so a lease after that would be in vain."""
    imports = ""
    for stage in ("train", "augment", "judge"):
        text = (ROOT / f"workflow/scripts/{stage}.py").read_text()
        imports += re.sub(r"^if TYPE_CHECKING.*", "", text, flags=re.MULTILINE | re.DOTALL)
    asked = (
        "import torch\ndef asked(*_):\n    raise SystemExit('CUDA was asked')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'init', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, asked)\n"
    )
    script = asked + imports + "import cachelora.judge.cross_encoder\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_driver_that_cannot_be_asked_leases_nothing(machine, monkeypatch, caplog):
    (machine / "bin/nvidia-smi").chmod(0o644)
    monkeypatch.setenv("PATH", str(machine / "bin"))
    with lease(1, machine / "locks") as held:
        assert held == []
    assert "no GPU is leased" in caplog.text


def test_what_is_no_text_is_no_device(machine):
    list_devices(machine, "")
    (machine / "listed").write_bytes(b"\xff\xfe\n")
    with lease(1, machine / "locks") as held:
        assert held == []


def test_a_device_that_is_listed_twice_is_one(machine):
    list_devices(machine, f"0, {UUIDS[0]}\n1, {UUIDS[0]}\n")
    with pytest.raises(EngineError, match="2 are asked for, 1 may be used"), lease(2, machine / "locks"):
        pass


def test_locks_that_cannot_be_made_are_an_error_that_names_the_folder(machine):
    (machine / "locks").mkdir()
    for uuid in UUIDS:
        (machine / "locks" / uuid).mkdir()
    with (
        pytest.raises(EngineError, match=r"locks: no GPU can be locked \(.*Is a directory"),
        lease(1, machine / "locks"),
    ):
        pass
