rule augment_recorded:
    input:
        queries="<results>/queries/{domain}.parquet",
        recording=lambda wildcards: settings.domains[wildcards.domain].recording,
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
    log:
        "<logs>/augment/{domain}/{shard}.log",
    wildcard_constraints:
        domain=alternatives(domains_with("recorded")),
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=section("augment"),
        engine={"type": "recorded"},
        max_reject_share=settings.queries.max_reject_share,
        code=stage_code("augment"),
    message:
        "Replaying the recorded augmentation of {wildcards.domain}, shard {wildcards.shard}."
    script:
        "../scripts/augment.py"


rule augment_llamacpp:
    input:
        queries="<results>/queries/{domain}.parquet",
        model=lambda wildcards: local_file(settings.engine_of(wildcards.domain).model),
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
    log:
        "<logs>/augment/{domain}/{shard}.log",
    benchmark:
        "<results>/timing/augment/{domain}/{shard}.tsv"
    wildcard_constraints:
        domain=alternatives(domains_with("llamacpp")),
    conda:
        "../../envs/augment-llamacpp.yaml"
    threads: 8
    resources:
        mem_mb=8000,
        runtime=480,
        gpu=1,
        gpu_manufacturer="nvidia",
        # Queries in flight. A resource, not a param: it does not change the replies.
        llm_slots=lambda wildcards: settings.engine_of(wildcards.domain).slots,
    params:
        settings=section("augment"),
        engine=lambda wildcards: settings.engine_of(wildcards.domain).model_dump(
            mode="json", exclude={"slots"}
        ),
        field=lambda wildcards: settings.domains[wildcards.domain].field
        or wildcards.domain,
        seed=settings.seed,
        # Not an output: what the LLM has written must survive a failed or killed job.
        journal=lambda wildcards, output: str(
            Path(output.table).parents[2] / "state/augment"
        ),
        code=stage_code("augment"),
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, with llama.cpp (progress: {log})."
    script:
        "../scripts/augment.py"


rule augment_openai:
    input:
        queries="<results>/queries/{domain}.parquet",
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
    log:
        "<logs>/augment/{domain}/{shard}.log",
    benchmark:
        "<results>/timing/augment/{domain}/{shard}.tsv"
    wildcard_constraints:
        domain=alternatives(domains_with("openai")),
    conda:
        "../../envs/augment-openai.yaml"
    # The server has the GPU, where there is one.
    threads: 1
    resources:
        mem_mb=2000,
        runtime=480,
        # Queries in flight. A resource, not a param: it does not change the replies.
        llm_slots=lambda wildcards: settings.engine_of(wildcards.domain).concurrency,
    params:
        settings=section("augment"),
        engine=lambda wildcards: settings.engine_of(wildcards.domain).model_dump(
            mode="json", exclude={"concurrency"}
        ),
        field=lambda wildcards: settings.domains[wildcards.domain].field
        or wildcards.domain,
        seed=settings.seed,
        # Not an output: what the LLM has written must survive a failed or killed job.
        journal=lambda wildcards, output: str(
            Path(output.table).parents[2] / "state/augment"
        ),
        code=stage_code("augment"),
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, by a server (progress: {log})."
    script:
        "../scripts/augment.py"


rule augment_gather:
    input:
        shards=expand(
            "<results>/augmented/{{domain}}/{shard}.parquet",
            shard=range(settings.augment.shards),
        ),
    output:
        table=ensure("<results>/augmented/{domain}.parquet", non_empty=True),
    log:
        "<logs>/augment/{domain}.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        code=stage_code("augment_gather"),
    message:
        "Gathering the shards of {wildcards.domain}."
    script:
        "../scripts/augment_gather.py"
