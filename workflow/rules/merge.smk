rule merge:
    input:
        base=base_weights,
        adapters=expand(
            "<results>/models/{{base}}/{domain}/{file}",
            domain=settings.adapter_domains,
            file=MODEL_FILES,
        ),
        triplets=expand(
            "<results>/triplets/{domain}.parquet", domain=settings.adapter_domains
        ),
    output:
        expand("<results>/models/{{base}}/{{model}}/{file}", file=MODEL_FILES),
    log:
        "<logs>/merge/{base}/{model}.log",
    wildcard_constraints:
        model=alternatives(settings.merges),
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=lambda wildcards: settings.merges[wildcards.model].model_dump(
            mode="json"
        ),
        validation_groups=settings.train.validation_groups,
        base=base_model,
        code=stage_code("merge"),
    message:
        "Merging the domains' adapters on {wildcards.base} into {wildcards.model}."
    script:
        "../scripts/merge.py"
