"""What a person sees of a run that fails."""

import re

from cachelora.cli import main

TABLES = [f"results/queries/{domain}.parquet" for domain in ("medical", "law", "programming")]


def break_queries(workflow, *domains):
    for domain in domains:
        (workflow.folder / f"data/{domain}/queries.jsonl").write_text("{oops\n")


def told(result):
    """Return what the end of a failed run says: how many jobs of how many, and the log and the reason of each."""
    assert result.returncode != 0
    _, start, end = result.stdout.partition("Exiting because a job execution failed")
    assert start, result.stdout
    counts = re.findall(r"^(\d+) of (\d+) jobs failed$", end, re.MULTILINE)
    failures = re.findall(
        r"^(\S+\.log): (\w+) after \d+ s on \S+\n    .*(data/\S+, line 1: not JSON)", end, re.MULTILINE
    )
    assert end.count("not JSON") == len(failures)
    return counts, sorted(failures)


def failure(domain):
    return (f"logs/queries/{domain}.log", "failed", f"data/{domain}/queries.jsonl, line 1: not JSON")


def test_the_end_of_a_failed_run_shows_each_failure_of_this_run_once(workflow, capsys, monkeypatch):
    originals = {path: path.read_text() for path in workflow.folder.glob("data/*/queries.jsonl")}
    break_queries(workflow, "medical", "law")
    counts, failures = told(workflow.run("--keep-going", "--", *TABLES))
    assert counts == [("2", "3")]
    assert failures == [failure("law"), failure("medical")]
    # Of a run that asks for one of them only, the other's failure is an earlier run's.
    counts, failures = told(workflow.run("--", TABLES[1]))
    assert (counts, failures) == ([("1", "1")], [failure("law")])
    for path, text in originals.items():
        path.write_text(text)
    result = workflow.run("--", *TABLES)
    assert result.returncode == 0, result.stdout
    assert "jobs failed" not in result.stdout
    monkeypatch.chdir(workflow.folder)
    assert main(["jobs"]) == 0
    shown = capsys.readouterr().out
    # The plan of the last run: what failed before, for the third was done.
    assert shown.startswith("2 jobs under logs\n")
    assert re.search(r"^ +queries +2 +0 +0 +0 +0 +2$", shown, re.MULTILINE)


def test_failures_are_looked_for_where_the_config_puts_the_logs(workflow):
    (workflow.folder / "elsewhere.yaml").write_text("pathvars: {logs: other/logs}\n")
    break_queries(workflow, "law")
    result = workflow.run("--configfile", "elsewhere.yaml", "--", TABLES[1])
    assert "other/logs/queries/law.log: failed after" in result.stdout
