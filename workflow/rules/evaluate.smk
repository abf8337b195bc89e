rule evaluate_base:
    input:
        base=base_weights,
        testsets=get_testsets(),
        sets=get_sets(),
    output:
        scores=non_empty("<results>/evaluation/{base}/base.parquet"),
        curves="<results>/evaluation/{base}/base.curves.parquet",
        metrics="<results>/evaluation/{base}/base.json",
    log:
        "<logs>/evaluate/{base}/base.log",
    benchmark:
        "<results>/timing/evaluate/{base}/base.tsv"
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096, 60),
        runtime=minutes(60, 5),
        disk_mb=disk(2000),
    params:
        settings=section("evaluate"),
        base=base_model,
        model="base",
        seed=settings.seed,
        code=stage_code("evaluate"),
    message:
        "Evaluating the base model {wildcards.base}."
    script:
        "../scripts/evaluate.py"


rule evaluate:
    input:
        base=base_weights,
        testsets=get_testsets(),
        sets=get_sets(),
        adapter=get_model_files,
        base_scores="<results>/evaluation/{base}/base.parquet",
    output:
        scores=non_empty("<results>/evaluation/{base}/{model}.parquet"),
        curves="<results>/evaluation/{base}/{model}.curves.parquet",
        metrics="<results>/evaluation/{base}/{model}.json",
    log:
        "<logs>/evaluate/{base}/{model}.log",
    benchmark:
        "<results>/timing/evaluate/{base}/{model}.tsv"
    wildcard_constraints:
        model=alternatives([*settings.trained_models, *settings.merges]),
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096, 60),
        runtime=minutes(60, 5),
        disk_mb=disk(2000),
    params:
        settings=section("evaluate"),
        base=base_model,
        model="{model}",
        seed=settings.seed,
        code=stage_code("evaluate"),
    message:
        "Evaluating {wildcards.model} on {wildcards.base}."
    script:
        "../scripts/evaluate.py"


use rule evaluate as evaluate_hybrid with:
    input:
        base=base_weights,
        testsets=get_testsets(),
        sets=get_sets(),
        adapter=expand("<results>/models/{{base}}/{{model}}/{file}", file=HYBRID_FILES),
        models=get_hybrid_models,
        base_scores="<results>/evaluation/{base}/base.parquet",
    wildcard_constraints:
        model=alternatives(settings.hybrids),
    params:
        settings=section("evaluate"),
        base=base_model,
        model="{model}",
        hybrid=hybrid,
        models=hybrid_models,
        seed=settings.seed,
        code=stage_code("evaluate"),
    message:
        "Evaluating the hybrid {wildcards.model} on {wildcards.base}."


use rule evaluate as evaluate_foreign with:
    input:
        base=base_weights,
        testsets=get_testsets(),
        sets=get_sets(),
        adapter=get_foreign_adapter,
        base_scores="<results>/evaluation/{base}/base.parquet",
    wildcard_constraints:
        model=alternatives(settings.adapters),
    params:
        settings=section("evaluate"),
        base=base_model,
        model="{model}",
        foreign=lambda wildcards: settings.adapters[wildcards.model].source,
        seed=settings.seed,
        code=stage_code("evaluate"),
    message:
        "Evaluating the adapter {wildcards.model}, trained elsewhere, on {wildcards.base}."
