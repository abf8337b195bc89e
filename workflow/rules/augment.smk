rule augment_recorded:
    input:
        queries="<results>/queries/{domain}.parquet",
        recording=lambda wildcards: settings.domains[wildcards.domain].recording,
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
        recording=temp("<results>/augmented/{domain}/{shard}.jsonl"),
        summary="<results>/augmented/{domain}/{shard}.json",
    log:
        "<logs>/augment/{domain}/{shard}.log",
    wildcard_constraints:
        domain=alternatives(domains_with("recorded")),
        shard=r"\d+",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        settings=section("augment"),
        engine={"type": "recorded"},
        max_reject_share=settings.queries.max_reject_share,
        code=stage_code("augment"),
    message:
        "Replaying the recorded augmentation of {wildcards.domain}, shard {wildcards.shard}."
    script:
        "../scripts/augment.py"


rule augment_llamacpp:
    input:
        queries="<results>/queries/{domain}.parquet",
        model=lambda wildcards: llm_file(settings.engine_of(wildcards.domain)),
    output:
        table=temp("<results>/augmented/{domain}/{shard}.parquet"),
        recording=temp("<results>/augmented/{domain}/{shard}.jsonl"),
        summary="<results>/augmented/{domain}/{shard}.json",
    log:
        "<logs>/augment/{domain}/{shard}.log",
    benchmark:
        "<results>/timing/augment/{domain}/{shard}.tsv"
    wildcard_constraints:
        domain=alternatives(domains_with("llamacpp")),
        shard=r"\d+",
    # What an LLM cannot do is known before anything is trained.
    priority: 1
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
        llm_slots=at_once,
    params:
        settings=section("augment"),
        engine=lambda wildcards: llm_params(settings.engine_of(wildcards.domain)),
        prompt=domain_words,
        seed=settings.seed,
        # Not an output: what the LLM has written must survive a failed or killed job.
        journal=journal_of("augment"),
        code=stage_code("augment"),
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, with llama.cpp (progress: {log})."
    script:
        "../scripts/augment.py"


use rule augment_llamacpp as augment_vllm with:
    wildcard_constraints:
        domain=alternatives(domains_with("vllm")),
        shard=r"\d+",
    conda:
        "../../envs/augment-vllm.yaml"
    resources:
        mem_mb=memory(32768, 2),
        runtime=minutes(480),
        disk_mb=disk(40000),
        gpu=lambda wildcards: settings.engine_of(wildcards.domain).gpus,
        gpu_manufacturer="nvidia",
        gpu_memory_mb=24576,
        llm_slots=0,
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, with vLLM (progress: {log})."


use rule augment_llamacpp as augment_openai with:
    wildcard_constraints:
        domain=alternatives(domains_with("openai")),
        shard=r"\d+",
    conda:
        "../../envs/augment-openai.yaml"
    # The server has the GPU, where there is one.
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(480),
        disk_mb=disk(1000),
        llm_slots=at_once,
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, by a server (progress: {log})."


use rule augment_openai as augment_ollama with:
    wildcard_constraints:
        domain=alternatives(domains_with("ollama")),
        shard=r"\d+",
    conda:
        "../../envs/augment-ollama.yaml"
    message:
        "Augmenting {wildcards.domain}, shard {wildcards.shard}, by Ollama (progress: {log})."


rule augment_gather:
    input:
        shards=expand(
            "<results>/augmented/{{domain}}/{shard}.parquet",
            shard=range(settings.augment.shards),
        ),
        recordings=expand(
            "<results>/augmented/{{domain}}/{shard}.jsonl",
            shard=range(settings.augment.shards),
        ),
    output:
        table=non_empty("<results>/augmented/{domain}.parquet"),
        recording="<results>/augmented/{domain}.jsonl",
    log:
        "<logs>/augment/{domain}.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        mem_mb=memory(2048, 15),
        runtime=minutes(30, 1),
        disk_mb=disk(1000),
    params:
        what="augmented",
        code=stage_code("gather"),
    message:
        "Gathering the shards of {wildcards.domain}."
    script:
        "../scripts/gather.py"
