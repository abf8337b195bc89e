import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cachelora.code import code_digest


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A library of three modules and a script that uses two of them."""
    import cachelora.code

    root = tmp_path / "cachelora"
    (root / "part" / "prompts").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "used.py").write_text('"""Doc."""\n\nfrom cachelora.part import deep\n\n\ndef f():\n    return deep()\n')
    (root / "unused.py").write_text("x = 1\n")
    (root / "part" / "__init__.py").write_text("def deep():\n    return 1  # one\n")
    (root / "part" / "prompts" / "p.txt").write_text("Write.")
    (tmp_path / "script.py").write_text("from cachelora.used import f\nf()\n")
    monkeypatch.setattr(cachelora.code, "_PACKAGE", root)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "old", "new", "changes"),
    [
        ("cachelora/used.py", "return deep()", "return deep() + 1", True),
        ("cachelora/part/__init__.py", "return 1", "return 2", True),
        ("cachelora/part/prompts/p.txt", "Write", "Say", True),
        ("script.py", "f()\n", "f()\nf()\n", True),
        ("cachelora/unused.py", "1", "2", False),
        ("cachelora/used.py", '"""Doc."""', '"""Other words."""', False),
        ("cachelora/part/__init__.py", "# one", "# uno", False),
        ("cachelora/used.py", "return deep()", "return (\n        deep()\n    )", False),
        ("script.py", "f()\n", "\n\nf()  # call\n", False),
    ],
)
def test_digest_follows_what_the_code_does(package, path, old, new, changes):
    before = code_digest(package / "script.py")
    text = (package / path).read_text()
    assert old in text
    (package / path).write_text(text.replace(old, new, 1))
    assert (code_digest(package / "script.py") != before) == changes


def run_job(tmp_path, body):
    script = tmp_path / "job.py"
    script.write_text(
        "from cachelora.errors import InputError\nfrom cachelora.job import logged\n"
        f"with logged({str(tmp_path / 'logs/job.log')!r}):\n" + textwrap.indent(body, "    ")
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=os.environ)
    return result, (tmp_path / "logs/job.log").read_text()


def test_a_job_logs_what_it_says_and_what_its_libraries_print(tmp_path):
    result, log = run_job(
        tmp_path, "import logging, os\nlogging.info('hello')\nprint('printed')\nos.system('echo from C')"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert all(text in log for text in ("INFO root: hello", "printed", "from C"))


def test_a_mendable_error_is_one_line_without_a_traceback(tmp_path):
    result, log = run_job(tmp_path, "raise InputError('data/q.jsonl, line 3', 'not JSON', 'Mend it')")
    assert result.returncode == 1
    assert result.stderr == "ERROR data/q.jsonl, line 3: not JSON. Mend it.\n"
    assert "not JSON. Mend it." in log
    assert "Traceback" not in log


def test_any_other_error_leaves_its_traceback_in_the_log(tmp_path):
    result, log = run_job(tmp_path, "1 / 0")
    assert result.returncode == 1
    assert result.stderr.startswith("ERROR ZeroDivisionError: division by zero")
    assert result.stderr.count("\n") == 1
    assert "Traceback" in log


def test_a_job_ends_with_the_snakemake_that_started_it(tmp_path):
    """A process called snakemake is killed; the job that it started through a shell must not go on."""
    (tmp_path / "job.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom cachelora.job import logged\n"
        f"with logged({str(tmp_path / 'job.log')!r}):\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n"
    )
    starter = tmp_path / "snakemake"
    starter.write_text(
        f"import subprocess\nsubprocess.run({f'true; {sys.executable} {tmp_path}/job.py; true'!r}, shell=True)\n"
    )
    process = subprocess.Popen([sys.executable, starter])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = Path("/proc") / (tmp_path / "pid").read_text()
    process.kill()
    process.wait()
    while job.exists() and "Z" not in (job / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the job goes on without its snakemake"
        time.sleep(0.1)


def test_a_job_whose_snakemake_ended_before_it_began_does_not_begin(tmp_path):
    """As after a kill -9 while the script still imports: what it would look for is gone."""
    script = tmp_path / ".snakemake/scripts/tmp.train.py"
    script.parent.mkdir(parents=True)
    done = tmp_path / "done"
    script.write_text(
        "import os, time\nfrom pathlib import Path\nstarter = os.getppid()\n"
        "while os.getppid() == starter:\n    time.sleep(0.05)\n"
        "from cachelora.job import logged\n"
        f"with logged({str(tmp_path / 'job.log')!r}):\n    Path({str(done)!r}).touch()\n"
    )
    starter = tmp_path / "starter"
    starter.write_text(
        f"import subprocess, time\nsubprocess.Popen([{sys.executable!r}, {str(script)!r}])\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, starter], stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.kill()
    assert "The Snakemake that started this job has ended" in process.communicate(timeout=60)[1]
    assert not done.exists()
