rule augment_recorded:
    message:
        "Replaying the recorded augmentation of {wildcards.domain}, shard {wildcards.shard}."
    input:
        queries="<results>/queries/{domain}.parquet",
        recording=lambda wildcards: settings.domains[wildcards.domain].recording,
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
    log:
        "<logs>/augment/{domain}/{shard}.log",
    wildcard_constraints:
        domain=alternatives(domains_with("recorded")),
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        settings=section("augment"),
        engine=lambda wildcards: settings.engine_of(wildcards.domain).model_dump(mode="json"),
        max_reject_share=settings.queries.max_reject_share,
        code=stage_code("augment"),
    conda:
        "../../envs/report.yaml"
    script:
        "../scripts/augment.py"


rule augment_llamacpp:
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, with llama.cpp."
    input:
        queries="<results>/queries/{domain}.parquet",
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
    log:
        "<logs>/augment/{domain}/{shard}.log",
    benchmark:
        "<results>/timing/augment/{domain}/{shard}.tsv"
    wildcard_constraints:
        domain=alternatives(domains_with("llamacpp")),
    threads: 8
    resources:
        mem_mb=8000,
        runtime=480,
        gpu=1,
        gpu_manufacturer="nvidia",
    params:
        settings=section("augment"),
        engine=lambda wildcards: settings.engine_of(wildcards.domain).model_dump(mode="json"),
        field=lambda wildcards: settings.domains[wildcards.domain].field or wildcards.domain,
        seed=settings.seed,
        # Not an output: what the LLM has written must survive a failed or killed job.
        journal="<results>/state/augment",
        code=stage_code("augment"),
    conda:
        "../../envs/augment-llamacpp.yaml"
    script:
        "../scripts/augment.py"


rule augment_gather:
    message:
        "Gathering the shards of {wildcards.domain}."
    input:
        shards=expand("<results>/augmented/{{domain}}/{shard}.parquet", shard=range(settings.augment.shards)),
    output:
        table=ensure("<results>/augmented/{domain}.parquet", non_empty=True),
    log:
        "<logs>/augment/{domain}.log",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        code=stage_code("augment_gather"),
    conda:
        "../../envs/report.yaml"
    script:
        "../scripts/augment_gather.py"
