rule evaluate_base:
    input:
        base=base_weights,
        testsets=get_testsets(),
    output:
        scores=ensure("<results>/evaluation/{base}/base.parquet", non_empty=True),
        metrics="<results>/evaluation/{base}/base.json",
    log:
        "<logs>/evaluate/{base}/base.log",
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
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
        adapter=get_model_files,
        base_scores="<results>/evaluation/{base}/base.parquet",
    output:
        scores=ensure("<results>/evaluation/{base}/{model}.parquet", non_empty=True),
        metrics="<results>/evaluation/{base}/{model}.json",
    log:
        "<logs>/evaluate/{base}/{model}.log",
    wildcard_constraints:
        model=alternatives([*settings.trained_models, *settings.merges]),
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
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
