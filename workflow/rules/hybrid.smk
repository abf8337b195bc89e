rule hybrid:
    input:
        base=base_weights,
        queries=expand("<results>/queries/{domain}.parquet", domain=settings.domains),
        triplets=expand("<results>/triplets/{domain}.parquet", domain=settings.domains),
    output:
        expand("<results>/models/{{base}}/{{model}}/{file}", file=HYBRID_FILES),
    log:
        "<logs>/hybrid/{base}/{model}.log",
    wildcard_constraints:
        model=alternatives(settings.hybrids),
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=memory(4096, 60),
        runtime=minutes(60, 5),
        disk_mb=disk(2000),
    params:
        settings=hybrid,
        models=hybrid_models,
        base=base_model,
        batch_tokens=settings.evaluate.batch_tokens,
        code=stage_code("hybrid"),
    message:
        "Fitting the domain detector of {wildcards.model} on {wildcards.base}."
    script:
        "../scripts/hybrid.py"
