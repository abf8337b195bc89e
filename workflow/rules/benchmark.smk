rule benchmark:
    message:
        "Writing the benchmark table."
    input:
        evaluations=expand(
            "<results>/evaluation/{base}/{model}.json", base=settings.base_models, model=get_models()
        ),
        published=workflow.source_path("../../config/published.yaml"),
    output:
        csv=ensure("<results>/benchmark.csv", non_empty=True),
        markdown=ensure("<results>/benchmark.md", non_empty=True),
    log:
        "<logs>/benchmark.log",
    localrule: True
    params:
        settings=section("evaluate"),
        code=stage_code("benchmark"),
    conda:
        "../../envs/report.yaml"
    script:
        "../scripts/benchmark.py"
