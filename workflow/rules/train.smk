rule train:
    input:
        base=base_weights,
        triplets=get_triplets,
        start=get_start,
    output:
        model=expand("<results>/models/{{base}}/{{model}}/{file}", file=MODEL_FILES),
        log="<results>/training/{base}/{model}.csv",
        figure="<results>/training/{base}/{model}.svg",
    log:
        "<logs>/train/{base}/{model}.log",
    benchmark:
        "<results>/timing/train/{base}/{model}.tsv"
    wildcard_constraints:
        model=alternatives(trained_in_full(False)),
    conda:
        "../../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=memory(16384, 10),
        runtime=minutes(240, 5),
        disk_mb=disk(5000),
        gpu=lambda wildcards: trained[wildcards.model].train.processes,
        gpu_manufacturer="nvidia",
        gpu_memory_mb=8192,
    params:
        settings=lambda wildcards: trained[wildcards.model].train.model_dump(
            mode="json"
        ),
        base=base_model,
        seed=lambda wildcards: trained[wildcards.model].seed,
        replayed=lambda wildcards: trained[wildcards.model].replayed,
        # Not an output: what is trained must survive a failed or killed job.
        state=training_state,
        code=stage_code("train"),
    message:
        "Training the adapter {wildcards.model} on {wildcards.base} (progress: {log})."
    script:
        "../scripts/train.py"


use rule train as train_full with:
    output:
        model=expand(
            "<results>/models/{{base}}/{{model}}/{file}", file=FULL_MODEL_FILES
        ),
        log="<results>/training/{base}/{model}.csv",
        figure="<results>/training/{base}/{model}.svg",
    wildcard_constraints:
        model=alternatives(trained_in_full(True)),
    message:
        "Training all weights of {wildcards.base} as {wildcards.model} (progress: {log})."
