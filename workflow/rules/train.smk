rule train:
    input:
        base=base_weights,
        triplets=get_triplets,
    output:
        expand("<results>/models/{{base}}/{{model}}/{file}", file=MODEL_FILES),
    log:
        "<logs>/train/{base}/{model}.log",
    benchmark:
        "<results>/timing/train/{base}/{model}.tsv"
    wildcard_constraints:
        model=alternatives([*settings.adapter_domains, "joint"]),
    conda:
        "../../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=8000,
        runtime=240,
        gpu=1,
        gpu_manufacturer="nvidia",
    params:
        settings=section("train"),
        base=base_model,
        seed=settings.seed,
        code=stage_code("train"),
    message:
        "Training the adapter {wildcards.model} on {wildcards.base} (progress: {log})."
    script:
        "../scripts/train.py"
