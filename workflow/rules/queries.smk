rule queries:
    input:
        source=lambda wildcards: settings.domains[wildcards.domain].queries,
    output:
        table=non_empty("<results>/queries/{domain}.parquet"),
        rejects="<results>/queries/{domain}.rejects.jsonl",
    log:
        "<logs>/queries/{domain}.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("queries"),
        seed=settings.seed,
        hold_out_test=lambda wildcards: settings.domains[wildcards.domain].test is None,
        code=stage_code("queries"),
    message:
        "Reading, grouping and splitting the queries of {wildcards.domain}."
    script:
        "../scripts/queries.py"
