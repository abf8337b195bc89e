# Queries of a domain in, a LoRA adapter and a benchmark table out. One rule file a stage; docs/architecture.md.
from snakemake.utils import min_version

min_version("9.19")


configfile: "config/domains.yaml"


# What must survive a failed job: the replies of LLMs, the checkpoints of trainings.
pathvars:
    state="<results>/state",


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/queries.smk"
include: "workflow/rules/augment.smk"
include: "workflow/rules/testset.smk"
include: "workflow/rules/sets.smk"
include: "workflow/rules/filter.smk"
include: "workflow/rules/judge.smk"
include: "workflow/rules/triplets.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/hybrid.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/thresholds.smk"
include: "workflow/rules/replay.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/deploy.smk"


# Jobs of one machine share its GPU; jobs on different nodes of a cluster do not.
resource_scopes:
    gpu="local",


localrules:
    all,


onstart:
    note_plan()


onsuccess:
    drop_log_copies()


# Each failed job of this run once, with the end of its log.
onerror:
    cachelora(
        ["jobs", str(logs_folder()), "--failed", "--since", run_started.isoformat()]
    )


rule all:
    default_target: True
    input:
        get_final_output(),
    message:
        "Everything: the benchmark table and the model to deploy, or the table of a sweep."
