rule triplets:
    input:
        queries="<results>/queries/{domain}.parquet",
        filtered="<results>/filtered/{domain}.parquet",
        verdicts=get_verdicts,
        testsets=get_testsets_before,
    output:
        table=non_empty("<results>/triplets/{domain}.parquet"),
        markdown="<results>/triplets/{domain}.md",
        html="<results>/triplets/{domain}.html",
        funnel="<results>/triplets/{domain}.json",
    log:
        "<logs>/triplets/{domain}.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096, 60),
        runtime=minutes(60, 2),
        disk_mb=disk(2000),
    params:
        settings=section("triplets"),
        source=lambda wildcards: settings.domains[wildcards.domain].queries,
        code=stage_code("triplets"),
    message:
        "Grouping the triplets of {wildcards.domain}."
    script:
        "../scripts/triplets.py"
