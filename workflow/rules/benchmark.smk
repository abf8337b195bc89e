rule benchmark:
    input:
        evaluations=expand(
            "<results>/evaluation/{base}/{model}.json",
            base=settings.base_models,
            model=get_models(),
        ),
        published="config/published.yaml",
    output:
        csv=ensure("<results>/benchmark.csv", non_empty=True),
        markdown=ensure("<results>/benchmark.md", non_empty=True),
    log:
        "<logs>/benchmark.log",
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        settings=section("evaluate"),
        repeats=settings.repeats,
        code=stage_code("benchmark"),
    message:
        "Writing the benchmark table."
    script:
        "../scripts/benchmark.py"
