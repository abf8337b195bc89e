rule benchmark:
    input:
        evaluations=for_models("<results>/evaluation/{base}/{model}.json"),
        thresholds=for_compared("<results>/thresholds/{base}/{model}.parquet"),
        replays=for_compared("<results>/replay/{base}/{model}.json"),
        published=local("config/published.yaml"),
    output:
        csv=non_empty("<results>/benchmark.csv"),
        parquet="<results>/benchmark.parquet",
        markdown=non_empty("<results>/benchmark.md"),
    log:
        "<logs>/benchmark.log",
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("evaluate"),
        threshold_confidence=settings.thresholds.confidence,
        deployed=settings.deploy.model,
        repeats=settings.repeats,
        code=stage_code("benchmark"),
    message:
        "Writing the benchmark table."
    script:
        "../scripts/benchmark.py"
