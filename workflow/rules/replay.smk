rule replay:
    input:
        base=base_weights,
        adapter=get_replayed_model,
        pairs=expand(
            "<results>/testset/{domain}.pairs.parquet", domain=settings.domains
        ),
        thresholds="<results>/thresholds/{base}/{model}.parquet",
    output:
        table=non_empty("<results>/replay/{base}/{model}.parquet"),
        summary="<results>/replay/{base}/{model}.json",
    log:
        "<logs>/replay/{base}/{model}.log",
    wildcard_constraints:
        model=alternatives(["base", settings.deploy.model]),
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096, 60),
        runtime=minutes(60, 5),
        disk_mb=disk(2000),
    params:
        settings=section("replay"),
        evaluate=section("evaluate"),
        base=base_model,
        seed=settings.seed,
        code=stage_code("replay"),
    message:
        "Sending a stream of queries through a cache with {wildcards.model} on {wildcards.base}."
    script:
        "../scripts/replay.py"
