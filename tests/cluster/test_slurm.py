"""A real Slurm on this machine, the shipped profile, and what goes wrong on clusters: `make test-slurm`.

Of the profile only the polling is changed, which would otherwise look for the first time after 40 seconds.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_workflow

if "TEST_SLURM" not in os.environ:
    pytest.skip("ten minutes, and a Slurm that only root can start: make test-slurm", allow_module_level=True)

SLURM = (
    "--workflow-profile", "profiles/slurm", "--latency-wait", "10",
    "--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1",
)  # fmt: skip
# Fewer domains than the preset has: every job costs seconds of Slurm.
TINY = ("--configfile", "config/presets/tiny.yaml", "config/one-domain.yaml")


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests/cluster/slurm.sh"
    subprocess.run([script, "up", folder], check=True)
    yield folder
    subprocess.run([script, "down", folder], check=True)


class Cluster:
    """A copy of the workflow, and the runs of it on Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workflow = copy_workflow(folder)
        (folder / "config/one-domain.yaml").write_text("domains: {law: null}\n")
        # More threads than cores, as the nodes pretend to have, must not wait for one another in busy loops.
        self.env = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_WAIT_POLICY": "PASSIVE"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [self.workflow.python, "-m", "snakemake", *SLURM, *arguments]
        with (self.folder / "run.log").open("a") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # What a shell starts in the background ignores it, and so would this.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def run(self, *arguments: str) -> None:
        assert self.start(*arguments).wait(timeout=1200) == 0, self.said

    @property
    def said(self) -> str:
        return (self.folder / "run.log").read_text()

    @property
    def run_ids(self) -> list[str]:
        """What the runs called themselves; their Slurm jobs have these names."""
        return re.findall(r"SLURM run ID: (\S+)", self.said)

    def jobs(self) -> list[dict[str, str]]:
        """Return what Slurm knows of the jobs of all runs in this folder."""
        shown = subprocess.run(
            ["scontrol", "show", "job", "-d", "--oneliner"], capture_output=True, text=True, check=True
        )
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.stdout.splitlines()]
        return [job for job in jobs if job.get("JobName") in self.run_ids]

    def rule_of(self, job: dict[str, str]) -> str:
        return re.match(r"rule_(\w+?)(?:_wildcards_.*)?$", job["Comment"])[1]

    def wait_for(self, process: subprocess.Popen, pattern: str) -> None:
        deadline = time.monotonic() + 600
        while not any(self.folder.glob(pattern)):
            assert process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("undisturbed"))
    cluster.run(*TINY)
    return cluster


def on_the_gpu(job):
    return job["Partition"] == "gpu" and job["NodeList"] == "gpu1" and job["TresPerJob"] == "gres:gpu:1"


def on_no_gpu(job):
    return job["Partition"] == "cpu" and job["NodeList"].startswith("cpu") and "TresPerJob" not in job


def test_training_is_on_the_gpu_and_everything_else_is_not(undisturbed):
    jobs = undisturbed.jobs()
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    placed = {
        name: [job for job in jobs if undisturbed.rule_of(job) == name] for name in map(undisturbed.rule_of, jobs)
    }
    # Slurm alone has none of those that run where Snakemake does.
    assert {"queries", "augment_recorded", "triplets", "train", "merge", "evaluate", "replay", "deploy"} <= set(placed)
    assert {"benchmark", "report"}.isdisjoint(placed)
    assert all(on_the_gpu(job) for job in placed.pop("train"))
    assert all(on_no_gpu(job) for name in placed for job in placed[name])
    assert (undisturbed.folder / "results/tiny/benchmark.html").is_file()


def test_an_llm_is_on_the_gpu(cluster):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make test-slurm")
    cluster.run("--configfile", "config/presets/llamacpp.yaml", "--", "results/llamacpp/augmented/medical.parquet")
    jobs = cluster.jobs()
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    asked = [job for job in jobs if cluster.rule_of(job) == "augment_llamacpp"]
    assert len(asked) == 1 and all(on_the_gpu(job) for job in asked)
    assert all(on_no_gpu(job) for job in jobs if job not in asked)


def test_a_job_that_ran_out_of_memory_gets_more(cluster):
    """The first attempt has less than Python alone takes; how it grows is as in workflow/rules/resources.smk."""
    target = "results/tiny/queries/medical.parquet"
    cluster.run(*TINY, "--set-resources", "queries:mem_mb=64 * 8 ** (attempt - 1)", "--", target)
    jobs = [job for job in cluster.jobs() if cluster.rule_of(job) == "queries"]
    # Without cgroups Slurm has no state of its own for it; the job's log says it.
    assert [job["JobState"] for job in jobs] == ["FAILED", "COMPLETED"], jobs
    assert (
        "exceeded memory limit"
        in (cluster.folder / f"logs/slurm/rule_queries/medical/{jobs[0]['JobId']}.log").read_text()
    )
    assert [re.search(r"mem=(\d+)M", job["TRES"])[1] for job in jobs] == ["64", "512"]
    assert (cluster.folder / target).is_file()


def test_a_run_that_is_killed_three_times_on_a_cluster_that_loses_a_node(undisturbed, cluster):
    """It ends with the table of an undisturbed run, and no job is left behind."""
    node = ["scontrol", "update", "nodename=cpu1"]
    process = cluster.start(*TINY)
    cluster.wait_for(process, "results/tiny/queries/*.parquet")
    subprocess.run([*node, "state=drain", "reason=test"], check=True)
    drained = time.time()
    try:
        cluster.wait_for(process, "results/tiny/triplets/*.parquet")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) != 0
        assert not waiting_or_running(cluster)

        process = cluster.start(*TINY)
        cluster.wait_for(process, "results/tiny/state/train/*/*/*")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) != 0
        assert not waiting_or_running(cluster)

        process = cluster.start(*TINY)
        cluster.wait_for(process, "results/tiny/models/*/*/manifest.json")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The jobs live on. What docs/clusters.md says to do:
        subprocess.run(["scancel", "--name", cluster.run_ids[-1]], check=True)
        cluster.run(*TINY, "--unlock")
        cluster.run(*TINY)
    finally:
        subprocess.run([*node, "state=resume"], check=True)
    started = {
        job["NodeList"]
        for job in cluster.jobs()
        if time.mktime(time.strptime(job["StartTime"], "%Y-%m-%dT%H:%M:%S")) > drained + 1
    }
    assert started == {"cpu2", "gpu1"}
    table = "results/tiny/benchmark.csv"
    assert (cluster.folder / table).read_bytes() == (undisturbed.folder / table).read_bytes()
    assert not waiting_or_running(cluster)
    # Nothing that was finished is made again.
    result = cluster.workflow.run("-n", *TINY)
    assert "Nothing to be done" in result.stdout, result.stdout


def waiting_or_running(cluster):
    """List the jobs that Slurm still has, once it had time to end those that were cancelled."""
    for _ in range(30):
        left = [job for job in cluster.jobs() if job["JobState"] in ("PENDING", "RUNNING", "COMPLETING")]
        if not left:
            break
        time.sleep(1)
    return left
