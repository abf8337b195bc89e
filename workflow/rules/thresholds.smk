rule thresholds:
    input:
        scores="<results>/evaluation/{base}/{model}.parquet",
        pairs=expand(
            "<results>/testset/{domain}.pairs.parquet", domain=settings.domains
        ),
    output:
        table=non_empty("<results>/thresholds/{base}/{model}.parquet"),
    log:
        "<logs>/thresholds/{base}/{model}.log",
    wildcard_constraints:
        model=alternatives(get_models()),
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("thresholds"),
        code=stage_code("thresholds"),
    message:
        "Choosing thresholds for {wildcards.model} on {wildcards.base}."
    script:
        "../scripts/thresholds.py"
