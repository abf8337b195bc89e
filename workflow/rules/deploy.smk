rule deploy:
    input:
        base=base_weights,
        adapter=expand("<results>/models/{{base}}/{{model}}/{file}", file=MODEL_FILES),
        testsets=get_testsets(),
    output:
        # A folder: which files a model consists of depends on the base model.
        folder=directory("<results>/deploy/{base}/{model}"),
        # Uploaded after the folder. In an object store half a folder exists, too: without this file it is made again.
        manifest="<results>/deploy/{base}/{model}.manifest.json",
    log:
        "<logs>/deploy/{base}/{model}.log",
    wildcard_constraints:
        model=settings.deploy.model,
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096, 5),
        runtime=minutes(60, 1),
        disk_mb=disk(3000),
    params:
        base=base_model,
        batch_tokens=settings.evaluate.batch_tokens,
        code=stage_code("deploy"),
    message:
        "Merging {wildcards.model} into {wildcards.base}, for use without peft."
    script:
        "../scripts/deploy.py"
