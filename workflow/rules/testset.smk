rule testset_from_file:
    input:
        triplets=lambda wildcards: settings.domains[wildcards.domain].test,
        trained_on=get_triplets_before,
    output:
        table=non_empty("<results>/testset/{domain}.parquet"),
        pairs=non_empty("<results>/testset/{domain}.pairs.parquet"),
        rejects="<results>/testset/{domain}.rejects.jsonl",
    log:
        "<logs>/testset/{domain}.log",
    wildcard_constraints:
        domain=alternatives(
            name for name, domain in settings.domains.items() if domain.test
        ),
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        max_reject_share=settings.queries.max_reject_share,
        frozen=lambda wildcards: frozen(settings.domains[wildcards.domain].test),
        settings=section("testset"),
        near_copy=settings.triplets.near_copy,
        seed=settings.seed,
        code=stage_code("testset"),
    message:
        "Reading the test set of {wildcards.domain}."
    script:
        "../scripts/testset.py"


rule testset_from_split:
    input:
        queries="<results>/queries/{domain}.parquet",
        filtered="<results>/filtered/{domain}.parquet",
        trained_on=get_triplets_before,
    output:
        table=non_empty("<results>/testset/{domain}.parquet"),
        pairs=non_empty("<results>/testset/{domain}.pairs.parquet"),
        rejects="<results>/testset/{domain}.rejects.jsonl",
    log:
        "<logs>/testset/{domain}.log",
    wildcard_constraints:
        domain=alternatives(
            name for name, domain in settings.domains.items() if not domain.test
        ),
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        source=lambda wildcards: settings.domains[wildcards.domain].queries,
        settings=section("testset"),
        near_copy=settings.triplets.near_copy,
        seed=settings.seed,
        code=stage_code("testset"),
    message:
        "Holding out the test set of {wildcards.domain} from its own queries."
    script:
        "../scripts/testset.py"
