"""The tiny preset with queries, results and logs in a real S3 object store, and what breaks on the way there."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, copy_workflow

if "TEST_S3" not in os.environ:
    pytest.skip("minutes of a real object store: make test-s3", allow_module_level=True)

NEEDED = ("boto3", "snakemake_storage_plugin_s3")
missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
if not Path(sys.executable).with_name("weed").is_file():
    missing.append("weed")
if missing:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

from seaweedfs import KEY_ID, READER, SECRET, client, object_store  # noqa: E402

from cachelora.manifest import verify  # noqa: E402

BUCKET = "queries-and-results"
TINY = ("--configfile", "config/presets/tiny.yaml")
DEPLOYED = "results/tiny/deploy/minilm-l6/joint"
QUERIES = "results/tiny/queries/medical.parquet"
CHECKPOINT = "results/tiny/state/train/minilm-l6/law"


def on_s3(prefix):
    return (*TINY, "--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}/{prefix}")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The address of an object store with a bucket that holds nothing."""
    with object_store(tmp_path_factory.mktemp("seaweedfs") / "store") as url, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "SNAKEMAKE_STORAGE_S3_"))]:
            patch.delenv(name)
        # No credentials of the person who tests.
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", url)
        patch.setenv("SNAKEMAKE_STORAGE_S3_ACCESS_KEY", KEY_ID)
        patch.setenv("SNAKEMAKE_STORAGE_S3_SECRET_KEY", SECRET)
        client(url).create_bucket(Bucket=BUCKET)
        yield url


def upload_data(url, prefix):
    for path in sorted((ROOT / "data").rglob("*")):
        if path.is_file():
            client(url).upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(ROOT)}")


def keys(url, prefix):
    """List the objects under a prefix, by their names without it."""
    pages = client(url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    return {found["Key"].removeprefix(f"{prefix}/") for page in pages for found in page.get("Contents", [])}


def content(url, prefix, key):
    return client(url).get_object(Bucket=BUCKET, Key=f"{prefix}/{key}")["Body"].read()


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A copy of the workflow from which the tiny preset has run, under the prefix `tiny`."""
    workflow = copy_workflow(tmp_path_factory.mktemp("tiny"))
    upload_data(store, "tiny")
    result = workflow.run(*on_s3("tiny"))
    assert result.returncode == 0, result.stdout
    (workflow.folder / "said.txt").write_text(result.stdout)
    return workflow


@contextmanager
def stalling(url, pattern):
    """Pass everything on to the store, but hold back the rest of each upload whose request line matches.

    Gives the address to use instead, and an event that is set when an upload is held back.
    """
    host, port = url.removeprefix("http://").split(":")
    held, closing = threading.Event(), threading.Event()

    def pass_on(source, target, watched):
        with source, target:
            while chunk := receive(source):
                line = re.search(rb"^PUT (\S+)", chunk) if watched else None
                if line and re.search(pattern, line[1].decode()):
                    held.set()
                    closing.wait()
                    return
                with suppress(OSError):
                    target.sendall(chunk)

    def receive(source):
        try:
            return source.recv(65_536)
        except OSError:
            return b""

    def serve():
        while not closing.is_set():
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            called = socket.create_connection((host, int(port)))
            for ends in ((caller, called, True), (called, caller, False)):
                threading.Thread(target=pass_on, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", held
        closing.set()


def kill_when(workflow, arguments, happens, env):
    """Start a run, and kill Snakemake with SIGKILL once something has happened."""
    command, environment = workflow.command(*arguments)
    with (
        (workflow.folder / "killed.txt").open("w") as said,
        subprocess.Popen(
            command, cwd=workflow.folder, env=environment | env, stdout=said, stderr=subprocess.STDOUT
        ) as process,
    ):
        deadline = time.monotonic() + 300
        while not happens():
            assert process.poll() is None and time.monotonic() < deadline, (workflow.folder / "killed.txt").read_text()
            time.sleep(0.05)
        process.kill()
    # Jobs end by themselves when the Snakemake that started them is gone.
    time.sleep(3)
    assert workflow.run("--unlock", *arguments).returncode == 0


def test_everything_is_in_the_bucket_and_nothing_of_it_here(finished, store):
    made = keys(store, "tiny")
    assert {"results/tiny/benchmark.md", "results/tiny/benchmark.html", f"{DEPLOYED}/model.safetensors"} <= made
    assert {"results/tiny/models/minilm-l6/law/adapter_model.safetensors", "logs/tiny/train/minilm-l6/law.log"} <= made
    # The shards were temporary.
    assert not [key for key in made if re.search(r"augmented/\w+/\d+\.(parquet|jsonl)$", key)]
    assert b"merge-svd" in content(store, "tiny", "results/tiny/benchmark.csv")
    assert not [path for path in (finished.folder / "results").rglob("*") if path.is_file()]
    assert not [path for path in (finished.folder / ".snakemake/storage").rglob("*") if path.is_file()]
    assert not (finished.folder / "logs").exists()
    assert not (finished.folder / "s3:").exists()


def test_what_is_in_the_bucket_is_whole(finished, store, tmp_path):
    for key in keys(store, "tiny"):
        if key.startswith(("results/tiny/deploy", "results/tiny/models")):
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / key).write_bytes(content(store, "tiny", key))
    for folder in [tmp_path / DEPLOYED, *(tmp_path / "results/tiny/models/minilm-l6").iterdir()]:
        assert verify(folder)["files"]


def test_a_second_run_has_nothing_to_do_also_from_another_machine(finished, tmp_path):
    assert finished.planned(*on_s3("tiny")) == set()
    # Newer there than in the first run's folder is the file of published margins, so that the table is written again.
    elsewhere = copy_workflow(tmp_path)
    os.utime(elsewhere.folder / "config/published.yaml", (0, 0))
    assert elsewhere.planned(*on_s3("tiny")) == set()


def test_the_secret_is_written_nowhere(finished, store):
    secret = SECRET.encode()
    assert not [path for path in finished.folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert KEY_ID not in (finished.folder / "said.txt").read_text()
    assert not [key for key in keys(store, "tiny") if secret in content(store, "tiny", key)]


@contextmanager
def silent_server():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def refusal(workflow, prefix="tiny", **env):
    """Return what a run says that cannot start, which must come soon and be no traceback."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(f"SNAKEMAKE_STORAGE_S3_{name}", value) if value else patch.delenv(
                f"SNAKEMAKE_STORAGE_S3_{name}"
            )
        started = time.monotonic()
        result = workflow.run(*on_s3(prefix))
    assert result.returncode != 0 and time.monotonic() - started < 60
    assert "Traceback" not in result.stdout and SECRET not in result.stdout
    return result.stdout


def test_a_run_that_cannot_start_says_so_at_once(store, workflow):
    where = re.escape(f"s3://{BUCKET} at {store}: ")
    said = refusal(workflow, SECRET_KEY="wrong")
    assert re.search(where + r"it refuses with SignatureDoesNotMatch .* Correct SNAKEMAKE_STORAGE_S3_ACCESS_KEY", said)
    assert re.search(where + "it refuses with InvalidAccessKeyId", refusal(workflow, ACCESS_KEY="wrong"))
    said = refusal(workflow, ACCESS_KEY=None, SECRET_KEY=None)
    assert re.search(where + r"no credentials .* Set SNAKEMAKE_STORAGE_S3_ACCESS_KEY", said)
    said = refusal(workflow, ENDPOINT_URL="http://127.0.0.1:9")
    assert re.search(r"at http://127\.0\.0\.1:9: it does not answer .* Start it, or correct the address", said)
    with silent_server() as url:
        assert f"at {url}: it does not answer (Read timeout" in refusal(workflow, ENDPOINT_URL=url)


def test_a_key_that_may_not_write_ends_the_first_job(store, workflow, monkeypatch):
    upload_data(store, "read-only")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ACCESS_KEY", READER)
    result = workflow.run(*on_s3("read-only"), "--", QUERIES)
    assert result.returncode != 0
    assert f"Failed to store output in storage s3://{BUCKET}/read-only/{QUERIES}" in result.stdout
    assert "AccessDenied" in result.stdout and "Finished jobid" not in result.stdout


def test_credentials_and_address_of_the_aws_client_are_taken_too(store, workflow, monkeypatch):
    upload_data(store, "aws")
    for name in ("ENDPOINT_URL", "ACCESS_KEY", "SECRET_KEY"):
        monkeypatch.delenv(f"SNAKEMAKE_STORAGE_S3_{name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = workflow.run("-n", *on_s3("aws")).stdout
    assert f"s3://{BUCKET} at {store}: it refuses with SignatureDoesNotMatch" in said
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert workflow.planned(*on_s3("aws"), "--", QUERIES)


def test_missing_inputs_are_named_before_anything_runs(store, workflow):
    said = refusal(workflow, prefix="nothing")
    path = "data/medical/queries.jsonl"
    address = f"s3://{BUCKET}/nothing/{path}"
    assert (
        f"domains.medical.queries: no such object: {address} (and 8 more of 9 inputs). Put it there (aws s3 cp" in said
    )
    workflow.edit("config/presets/tiny.yaml", lambda text: text.replace("domains:", "domains:\n  general: null"))
    upload_data(store, "fewer")
    client(store).delete_object(Bucket=BUCKET, Key=f"fewer/{path}")
    assert f"no such object: s3://{BUCKET}/fewer/{path}. Put it there" in refusal(workflow, prefix="fewer")


def test_a_missing_bucket_is_named(store, workflow):
    result = workflow.run(*TINY, "--default-storage-provider", "s3", "--default-storage-prefix", "s3://no-such-bucket")
    assert result.returncode != 0
    assert f"s3://no-such-bucket at {store}: no such bucket. Make it" in result.stdout


def test_a_job_killed_before_its_upload_is_done_again(store, workflow):
    upload_data(store, "killed")
    arguments = (*on_s3("killed"), "--", QUERIES)
    with stalling(store, "/results/tiny/queries/medical") as (url, held):
        kill_when(workflow, arguments, held.is_set, {"SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": url})
    assert not any("results" in key for key in keys(store, "killed"))
    assert workflow.planned(*arguments) == {"Reading, grouping and splitting the queries of medical."}
    result = workflow.run(*arguments)
    assert result.returncode == 0, result.stdout
    assert QUERIES in keys(store, "killed")


# The next two change what lies under the prefix, so they come last.


def test_an_upload_killed_in_the_middle_is_never_trusted(finished, store, tmp_path):
    """Of a folder, in a part of its largest file: some of its objects are there, that one is not."""
    shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True)
    workflow = type(finished)(tmp_path / "copy")
    whole = {key for key in keys(store, "tiny") if key.startswith(DEPLOYED)}
    weights = f"{DEPLOYED}/model.safetensors"
    arguments = (*on_s3("tiny"), "--forcerun", "deploy", "--")
    with stalling(store, r"/model\.safetensors\?.*partNumber=([3-9]|\d\d)") as (url, held):
        kill_when(workflow, (*arguments, DEPLOYED), held.is_set, {"SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": url})
    left = {key for key in keys(store, "tiny") if key.startswith(DEPLOYED)}
    assert weights not in left and f"{DEPLOYED}.manifest.json" not in left
    uploads = client(store).list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [f"tiny/{weights}"]
    # In which order the files of the folder are uploaded is the file system's choice: as if this one had come before.
    client(store).put_object(Bucket=BUCKET, Key=f"tiny/{DEPLOYED}/config.json", Body=b"{}")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = copy_workflow(tmp_path / "elsewhere")
    merging = "Merging joint into minilm-l6, for use without peft."
    for other in (workflow, elsewhere):
        assert merging in other.planned(*on_s3("tiny"))
    result = elsewhere.run(*on_s3("tiny"))
    assert result.returncode == 0, result.stdout
    assert {key for key in keys(store, "tiny") if key.startswith(DEPLOYED)} == whole
    assert content(store, "tiny", f"{DEPLOYED}/config.json") != b"{}"


def test_a_killed_training_goes_on_from_its_checkpoint_on_the_same_machine(finished, store, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "copy", symlinks=True)
    workflow = type(finished)(tmp_path / "copy")
    # Other settings, so that this is no training of the finished run; nothing before it runs again.
    arguments = (*on_s3("tiny"), "--config", 'train={"epochs": 12}', "--rerun-triggers", "params", "--")
    target = "results/tiny/models/minilm-l6/law/adapter_model.safetensors"
    state = workflow.folder / CHECKPOINT
    kill_when(workflow, (*arguments, target), lambda: any(state.glob("*/checkpoint-*/whole.json")), {})
    assert target not in keys(store, "tiny")
    result = workflow.run(*arguments, target)
    assert result.returncode == 0, result.stdout
    assert b"going on from checkpoint-" in content(store, "tiny", "logs/tiny/train/minilm-l6/law.log")
    assert not state.exists()
