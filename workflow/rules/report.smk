rule report:
    input:
        **rules.benchmark.input,
        scores=for_compared("<results>/evaluation/{base}/{model}.parquet"),
        curves=for_compared("<results>/evaluation/{base}/{model}.curves.parquet"),
        testsets=get_testsets(),
        sets=get_sets(),
        funnels=expand("<results>/triplets/{domain}.json", domain=settings.domains),
        trainings=expand(
            "<results>/training/{base}/{model}.csv",
            base=settings.base_models,
            model=settings.trained_models,
        ),
        manifests=expand(
            "<results>/models/{base}/{model}/manifest.json",
            base=settings.base_models,
            model=settings.trained_models,
        ),
        timings=get_timed(),
    output:
        html=report(
            "<results>/benchmark.html",
            caption="../report/benchmark.rst",
            category="Benchmark",
            labels={"page": "the whole report"},
        ),
        kinds=report(
            expand("<results>/figures/{base}/kinds.svg", base=settings.base_models),
            caption="../report/kinds.rst",
            category="Figures",
            labels={"figure": "margin and AP by kind"},
        ),
        precision=report(
            expand(
                "<results>/figures/{base}/precision.svg", base=settings.base_models
            ),
            caption="../report/precision.rst",
            category="Figures",
            labels={"figure": "precision against cache-hit ratio"},
        ),
        similarities=report(
            expand(
                "<results>/figures/{base}/similarities.svg", base=settings.base_models
            ),
            caption="../report/similarities.rst",
            category="Figures",
            labels={"figure": "similarities before and after"},
        ),
        trainings=report(
            expand(
                "<results>/figures/{base}/trainings.svg", base=settings.base_models
            ),
            caption="../report/trainings.rst",
            category="Figures",
            labels={"figure": "training curves"},
        ),
        frontier=report(
            expand("<results>/figures/{base}/frontier.svg", base=settings.base_models),
            caption="../report/frontier.rst",
            category="Figures",
            labels={"figure": "calls saved against false hits"},
        ),
        replay=report(
            expand("<results>/figures/{base}/replay.svg", base=settings.base_models),
            caption="../report/replay.rst",
            category="Figures",
            labels={"figure": "replay"},
        ),
    log:
        "<logs>/report.log",
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("evaluate"),
        threshold_confidence=settings.thresholds.confidence,
        deployed=settings.deploy.model,
        repeats=settings.repeats,
        bases=list(settings.base_models),
        config=settings.model_dump(mode="json"),
        code=stage_code("report"),
    message:
        "Writing the report."
    script:
        "../scripts/report.py"
