rule sets:
    input:
        source=lambda wildcards: set_file(wildcards.set),
    output:
        table=non_empty("<results>/sets/{set}.parquet"),
    log:
        "<logs>/sets/{set}.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(60, 1),
        disk_mb=disk(2000),
    params:
        settings=lambda wildcards: settings.sets[wildcards.set].model_dump(
            include={"source", "sha256"}
        ),
        code=stage_code("sets"),
    message:
        "Reading the test set {wildcards.set}."
    script:
        "../scripts/sets.py"
