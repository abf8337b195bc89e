rule sweep:
    input:
        metrics=expand(
            "<results>/models/{{base}}/{model}/metrics.json", model=settings.trials
        ),
    output:
        table="<results>/sweep/{base}.csv",
        report="<results>/sweep/{base}.md",
        # To be laid over the configuration with --configfile.
        choice="<results>/sweep/{base}.yaml",
    log:
        "<logs>/sweep/{base}.log",
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=memory(4096),
        runtime=minutes(30),
        disk_mb=disk(1000),
    params:
        trials=settings.trial_changes,
        recipe=section("train"),
        code=stage_code("sweep"),
    message:
        "Comparing the trials on {wildcards.base}."
    script:
        "../scripts/sweep.py"
