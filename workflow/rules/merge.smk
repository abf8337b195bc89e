rule merge:
    input:
        base=base_weights,
        adapters=get_merged_adapters,
        triplets=expand("<results>/triplets/{domain}.parquet", domain=settings.domains),
    output:
        expand("<results>/models/{{base}}/{{model}}/{file}", file=MODEL_FILES),
    log:
        "<logs>/merge/{base}/{model}.log",
    benchmark:
        "<results>/timing/merge/{base}/{model}.tsv"
    wildcard_constraints:
        model=alternatives(settings.merges),
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=memory(4096, 5),
        runtime=minutes(60, 1),
        disk_mb=disk(2000),
    params:
        settings=lambda wildcards: settings.merges[wildcards.model].model_dump(
            mode="json"
        ),
        validation_groups=settings.train.validation_groups,
        precision=settings.train.precision,
        most_lost=settings.train.most_lost_similarity,
        seed=settings.seed,
        base=base_model,
        code=stage_code("merge"),
    message:
        "Merging adapters on {wildcards.base} into {wildcards.model}."
    script:
        "../scripts/merge.py"
