rule filter:
    input:
        base=weights_of(settings.filter_base_model),
        queries="<results>/queries/{domain}.parquet",
        augmented="<results>/augmented/{domain}.parquet",
    output:
        table=non_empty("<results>/filtered/{domain}.parquet"),
    log:
        "<logs>/filter/{domain}.log",
    benchmark:
        "<results>/timing/filter/{domain}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=memory(4096, 150),
        runtime=minutes(120, 5),
        disk_mb=disk(2000),
    params:
        settings=section("filter"),
        base=settings.base_models[settings.filter_base_model].model_dump(mode="json"),
        code=stage_code("filter"),
    message:
        "Filtering what was written for {wildcards.domain}."
    script:
        "../scripts/filter.py"
