"""What `cachelora jobs` makes of logs that real jobs wrote."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from datetime import datetime, timedelta

import pytest

from cachelora.cli import main
from cachelora.jobs import write_plan

FAIL = "raise InputError('data/q.jsonl, line 3', 'not JSON', 'Mend it')"
SLEEP = "print('half way', flush=True)\nimport time\ntime.sleep(60)"


def start(log, body, **variables):
    """Start a job that writes a log."""
    script = f"from cachelora.errors import InputError\nfrom cachelora.job import logged\nwith logged({str(log)!r}):\n"
    # The last would hide lines that come in another order than they were written.
    unset = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "PYTHONUNBUFFERED")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.Popen(
        [sys.executable, "-c", script + textwrap.indent(body, "    ")], stderr=subprocess.DEVNULL, env=env | variables
    )


def wait_for(log, text):
    deadline = time.monotonic() + 30
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def jobs(capsys, *arguments):
    code = main(["jobs", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def counts(shown):
    """Return the counts of each stage: running, running or killed, failed, killed, done."""
    table = shown.partition("Not done")[0]
    return {words[0]: words[1:] for line in table.splitlines() if len(words := line.split()) == 6}


def test_a_plan_says_how_much_is_left(tmp_path, capsys):
    """Of eight jobs of a stage two are done, which took a second each, one after the other."""
    logs = tmp_path / "logs"
    # Two of an earlier run, which do not count; logs tell the time in whole seconds.
    for name in ("x", "y"):
        assert start(logs / f"queries/{name}.log", "print('read')").wait() == 0
    time.sleep(1.1)
    started = datetime.now().astimezone()
    write_plan(logs, started, [*["queries"] * 8, "train", "train_full"])
    for name in ("a", "b"):
        assert start(logs / f"queries/{name}.log", "import time\ntime.sleep(1.5)").wait() == 0
    code, shown, _ = jobs(capsys, logs)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if len(line.split()) > 5}
    assert rows["queries"][1:7] == ["8", "0", "0", "0", "0", "2"]
    assert 6 <= int(rows["queries"][7]) <= 12 and rows["queries"][8] == "s"
    assert rows["train"][1:] == ["2", "0", "0", "0", "0", "0", "unknown"]
    assert rows["all"][1:] == ["10", "0", "0", "0", "0", "2", "at", "least", *rows["queries"][7:]]
    (logs / "plan.json").write_text('{"started": 3}')
    code, _, told = jobs(capsys, logs)
    assert code == 1 and "plan.json: it does not hold the plan of a run" in told


def test_jobs_are_counted_by_stage_and_those_not_done_are_placed(tmp_path, capsys):
    logs = tmp_path / "logs"
    running = start(logs / "train/b/m.log", SLEEP, SLURM_JOB_ID="42", CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    killed = start(logs / "train/b/n.log", SLEEP)
    try:
        for name in ("m", "n"):
            wait_for(logs / f"train/b/{name}.log", "half way")
        assert start(logs / "queries/law.log", "print('read')").wait() == 0
        assert start(logs / "benchmark.log", FAIL).wait() == 1
        killed.kill()
        # Not waited for: a job that nobody has asked about yet is dead all the same.
        while "Z" not in open(f"/proc/{killed.pid}/stat").read().split():  # noqa: SIM115, PTH123
            time.sleep(0.05)
        code, shown, _ = jobs(capsys, logs)
        assert code == 1
        assert counts(shown) == {
            "train": ["1", "0", "0", "1", "0"],
            "queries": ["0", "0", "0", "0", "1"],
            "benchmark": ["0", "0", "1", "0", "0"],
        }
        listed = {
            line.split()[0]: line
            for line in shown.splitlines()
            if line.split()[:1] in (["running"], ["killed"], ["failed"])
        }
        host = socket.gethostname()
        assert re.search(rf"{host}, slurm:42, GPU GPU-a,GPU-b .*/m\.log +half way \(\d+ s ago\)$", listed["running"])
        assert f"{logs}/train/b/n.log" in listed["killed"]
        assert "slurm" not in listed["killed"] and "GPU" not in listed["killed"]
        assert listed["failed"].endswith("not JSON. Mend it.")
        assert "law.log" not in shown
    finally:
        for process in (running, killed):
            process.kill()
            process.wait()


def test_a_job_of_another_machine_without_an_end_is_running_or_killed(tmp_path, capsys):
    log = tmp_path / "train/m.log"
    log.parent.mkdir()
    now = datetime.now().astimezone()
    log.write_text(
        f"[job] started {now - timedelta(hours=2, minutes=5):%Y-%m-%dT%H:%M:%S%z} host=elsewhere process=1.5 "
        "scheduler=slurm:7 devices=0\nstep 10\rstep 20"
    )
    os.utime(log, (now.timestamp() - 3600,) * 2)
    code, shown, _ = jobs(capsys, tmp_path)
    assert code == 0
    assert counts(shown) == {"train": ["0", "1", "0", "0", "0"]}
    assert re.search(r"elsewhere, slurm:7, GPU 0 .* 2 h 5 min .* step 20 \(1 h 0 min ago\)", shown)


def test_a_later_process_with_the_same_number_is_not_the_job(tmp_path, capsys):
    log = tmp_path / "train/m.log"
    log.parent.mkdir()
    log.write_text(
        f"[job] started 2026-01-01T00:00:00+00:00 host={socket.gethostname()} process={os.getpid()}.1 "
        "scheduler=none devices=none\n"
    )
    assert jobs(capsys, tmp_path)[0] == 1


def test_failures_are_shown_once_with_the_end_of_their_logs_and_counted(tmp_path, capsys):
    for name in ("a", "b"):
        start(tmp_path / f"queries/{name}.log", "for n in range(40): print('line', n)\n" + FAIL).wait()
    start(tmp_path / "queries/c.log", "print('fine')").wait()
    code, shown, _ = jobs(capsys, tmp_path, "--failed", "--lines", 3)
    assert code == 1
    assert shown.startswith("2 of 3 jobs failed\n")
    for name in ("a", "b"):
        assert len(re.findall(rf"^{tmp_path}/queries/{name}\.log: failed after \d+ s on ", shown, re.MULTILINE)) == 1
    assert shown.count("Mend it") == 2
    assert shown.count("line 39") == 2 and "line 37" not in shown


def test_a_job_that_runs_again_and_ends_well_is_no_failure_any_more(tmp_path, capsys):
    log = tmp_path / "queries/a.log"
    start(log, FAIL).wait()
    assert jobs(capsys, tmp_path, "--failed")[0] == 1
    start(log, "print('fine')").wait()
    code, shown, _ = jobs(capsys, tmp_path, "--failed")
    assert (code, shown) == (0, "0 of 1 jobs failed\n")


def test_failures_from_before_a_time_do_not_count(tmp_path, capsys):
    start(tmp_path / "queries/a.log", FAIL).wait()
    now = datetime.now()
    assert jobs(capsys, tmp_path, "--failed", "--since", (now - timedelta(minutes=5)).isoformat())[0] == 1
    later = (now + timedelta(seconds=2)).isoformat()
    assert jobs(capsys, tmp_path, "--failed", "--since", later)[:2] == (0, "0 of 0 jobs failed\n")
    with pytest.raises(SystemExit):
        main(["jobs", "--since", "yesterday"])
    assert "it must be a time such as" in capsys.readouterr().err


def test_what_a_log_says_does_not_command_the_terminal_and_ends_no_job(tmp_path, capsys):
    body = (
        "print('[job] done 2026-01-01T00:00:00+00:00 process=1.1 after=0s')\n"
        "print('\\x1b]0;title\\x07\\x1b[31mred\\u202e')\n1 / 0"
    )
    start(tmp_path / "queries/a\x1b[1m.log", body, SLURM_JOB_ID="1\x1b[2m devices=9").wait()
    for arguments in ((), ("--failed",)):
        code, shown, _ = jobs(capsys, tmp_path, *arguments)
        assert code == 1
        assert "ZeroDivisionError" in shown
        assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize("end", ["import sys; sys.exit(3)", "raise KeyboardInterrupt", "import os; os.abort()"])
def test_however_a_job_ends_early_it_is_a_failure(tmp_path, capsys, end):
    start(tmp_path / "queries/a.log", end).wait()
    assert jobs(capsys, tmp_path)[0] == 1


def test_a_job_says_what_it_took(tmp_path):
    log = tmp_path / "a.log"
    body = "import time; held = b'x' * 300_000_000; time.sleep(1.5)"
    assert start(log, body).wait() == 0
    took = re.fullmatch(
        r"\[job\] done \S+ process=\S+ after=([\d.]+)s peak_memory=(\d+)MiB", log.read_text().split("\n")[-2]
    )
    assert 1.5 <= float(took[1]) < 20
    assert 300 < int(took[2]) < 1000


def test_logs_of_no_job_are_left_out_and_a_missing_folder_is_named(tmp_path, capsys):
    (tmp_path / "old.log").write_bytes(b"\xff\xfe no job\n")
    (tmp_path / "empty.log").write_text("")
    assert jobs(capsys, tmp_path)[1].startswith("0 jobs under")
    code, _, said = jobs(capsys, tmp_path / "nowhere")
    assert code == 1
    assert said.startswith(f"ERROR {tmp_path}/nowhere: no such folder. Name the folder of the logs: logs/tiny for")


def test_sigterm_leaves_a_killed_job(tmp_path, capsys):
    process = start(tmp_path / "train/m.log", SLEEP)
    wait_for(tmp_path / "train/m.log", "half way")
    process.send_signal(signal.SIGTERM)
    process.wait()
    code, shown, _ = jobs(capsys, tmp_path, "--failed")
    assert code == 1
    assert re.search(r"m\.log: killed after \d+ s on ", shown)


def test_a_file_that_cannot_be_a_log_does_not_hide_the_others(tmp_path, capsys):
    logs = tmp_path / "logs"
    assert start(logs / "queries/law.log", "print('read')").wait() == 0
    (logs / "queries/folder.log").mkdir()
    (logs / "queries/loop.log").symlink_to(logs / "queries/loop.log")
    (logs / "queries/endless.log").symlink_to("/dev/zero")
    os.mkfifo(logs / "queries/pipe.log")
    code, shown, _ = jobs(capsys, logs)
    assert code == 0 and shown.startswith("1 jobs under ")


@pytest.mark.parametrize(
    "first",
    [
        "[job] started 9999-12-31T23:59:59-12:00 host=h process=1.1",
        f"[job] started 2026-11-22T10:00:00+00:00 host={socket.gethostname()} process={'9' * 5000}.1",
    ],
)
def test_a_first_line_that_no_job_wrote_breaks_nothing(tmp_path, capsys, first):
    (tmp_path / "x.log").write_text(f"{first}\n")
    code, _, told = jobs(capsys, tmp_path)
    assert (code, told) in ((0, ""), (1, ""))


@pytest.mark.parametrize(
    "plan",
    [
        '{"started": "2026-11-22T10:00:00", "stages": {}}',
        '{"started": "2026-11-22T10:00:00+00:00", "stages": {"x": 1e400}}',
    ],
)
def test_a_plan_that_no_run_wrote_is_named(tmp_path, capsys, plan):
    (tmp_path / "plan.json").write_text(plan)
    code, _, told = jobs(capsys, tmp_path)
    assert code == 1 and "it does not hold the plan of a run" in told
