"""Every job in a process of its own, as on a cluster; a real Slurm is in tests/cluster."""

import pandas as pd
import pytest

pytest.importorskip("snakemake_executor_plugin_cluster_generic", reason="not installed: requirements/test.txt")

# What stands for the cluster: it starts the job's script and says by which number it goes.
SUBMIT = '#!/bin/sh\nnohup sh "$1" > "$1.said" 2>&1 < /dev/null &\necho $!\n'


def test_jobs_that_are_started_elsewhere_have_what_they_need(workflow):
    submit = workflow.folder / "submit.sh"
    submit.write_text(SUBMIT)
    submit.chmod(0o755)
    target = "results/tiny/triplets/medical.parquet"
    remote = ("--executor", "cluster-generic", "--cluster-generic-submit-cmd", str(submit), "--jobs", "4")
    result = workflow.run("--configfile", "config/presets/tiny.yaml", *remote, "--", target)
    assert result.returncode == 0, result.stdout
    assert "Submitted job" in result.stdout
    triplets = pd.read_parquet(workflow.folder / target)
    assert set(triplets["split"]) >= {"train", "validation"}
    assert (workflow.folder / "logs/tiny/triplets/medical.log").stat().st_size
