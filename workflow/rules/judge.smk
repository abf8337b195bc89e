rule judge_recorded:
    input:
        queries="<results>/queries/{domain}.parquet",
        filtered="<results>/filtered/{domain}.parquet",
        verdicts=lambda wildcards: settings.domains[wildcards.domain].verdicts,
    output:
        table=temp("<results>/judged/{domain}/{shard}.parquet"),
        recording=temp("<results>/judged/{domain}/{shard}.jsonl"),
    log:
        "<logs>/judge/{domain}/{shard}.log",
    wildcard_constraints:
        domain=alternatives(domains_judged_by("recorded")),
        shard=r"\d+",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("judge"),
        shards=settings.augment.shards,
        engine={"type": "recorded"},
        max_reject_share=settings.queries.max_reject_share,
        code=stage_code("judge"),
    message:
        "Replaying the recorded verdicts on {wildcards.domain}, shard {wildcards.shard}."
    script:
        "../scripts/judge.py"


use rule judge_recorded as judge_cross_encoder with:
    input:
        queries="<results>/queries/{domain}.parquet",
        filtered="<results>/filtered/{domain}.parquet",
        model=get_cross_encoder,
    wildcard_constraints:
        domain=alternatives(domains_judged_by("cross_encoder")),
        shard=r"\d+",
    conda:
        "../../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=memory(16384, 2),
        runtime=minutes(240),
        disk_mb=disk(5000),
        gpu=1,
        gpu_manufacturer="nvidia",
        gpu_memory_mb=8192,
    params:
        settings=section("judge"),
        shards=settings.augment.shards,
        engine={"type": "cross_encoder"},
        code=stage_code("judge"),
    message:
        "Judging the texts of {wildcards.domain}, shard {wildcards.shard}, with a cross-encoder."


use rule judge_recorded as judge_llamacpp with:
    input:
        queries="<results>/queries/{domain}.parquet",
        filtered="<results>/filtered/{domain}.parquet",
        model=lambda wildcards: llm_file(judge_engine()),
    wildcard_constraints:
        domain=alternatives(domains_judged_by("llamacpp")),
        shard=r"\d+",
    conda:
        "../../envs/augment-llamacpp.yaml"
    threads: 8
    resources:
        mem_mb=memory(16384, 2),
        runtime=minutes(480),
        disk_mb=disk(5000),
        gpu=1,
        gpu_manufacturer="nvidia",
        gpu_memory_mb=8192,
        llm_slots=lambda wildcards: judge_engine().at_once,
    params:
        settings=section("judge"),
        shards=settings.augment.shards,
        engine=lambda wildcards: llm_params(judge_engine()),
        prompt=domain_words,
        seed=settings.seed,
        # Not an output: what the LLM has said must survive a failed or killed job.
        journal=journal_of("judge"),
        code=stage_code("judge"),
    message:
        "Judging the texts of {wildcards.domain}, shard {wildcards.shard}, with llama.cpp (progress: {log})."


use rule judge_llamacpp as judge_vllm with:
    wildcard_constraints:
        domain=alternatives(domains_judged_by("vllm")),
        shard=r"\d+",
    conda:
        "../../envs/augment-vllm.yaml"
    resources:
        mem_mb=memory(32768, 2),
        runtime=minutes(480),
        disk_mb=disk(40000),
        gpu=lambda wildcards: judge_engine().gpus,
        gpu_manufacturer="nvidia",
        gpu_memory_mb=24576,
        llm_slots=0,
    message:
        "Judging the texts of {wildcards.domain}, shard {wildcards.shard}, with vLLM (progress: {log})."


use rule judge_llamacpp as judge_openai with:
    wildcard_constraints:
        domain=alternatives(domains_judged_by("openai")),
        shard=r"\d+",
    conda:
        "../../envs/augment-openai.yaml"
    # The server has the GPU, where there is one.
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(480),
        disk_mb=disk(1000),
        llm_slots=lambda wildcards: judge_engine().at_once,
    message:
        "Judging the texts of {wildcards.domain}, shard {wildcards.shard}, by a server (progress: {log})."


use rule judge_openai as judge_ollama with:
    wildcard_constraints:
        domain=alternatives(domains_judged_by("ollama")),
        shard=r"\d+",
    conda:
        "../../envs/augment-ollama.yaml"
    message:
        "Judging the texts of {wildcards.domain}, shard {wildcards.shard}, by Ollama (progress: {log})."


use rule augment_gather as judge_gather with:
    input:
        shards=expand(
            "<results>/judged/{{domain}}/{shard}.parquet",
            shard=range(settings.augment.shards),
        ),
        recordings=expand(
            "<results>/judged/{{domain}}/{shard}.jsonl",
            shard=range(settings.augment.shards),
        ),
    output:
        table="<results>/judged/{domain}.parquet",
        recording="<results>/judged/{domain}.jsonl",
    log:
        "<logs>/judge/{domain}.log",
    params:
        what="judged",
        code=stage_code("gather"),
    message:
        "Gathering the verdicts on {wildcards.domain}."
