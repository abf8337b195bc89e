"""The checked configuration, and what the rules ask of it."""

from collections import Counter
from datetime import datetime
from pathlib import Path

from snakemake.exceptions import WorkflowError

from cachelora.cli import main as cachelora
from cachelora.code import code_digest
from cachelora.config import parse as parse_config
from cachelora.errors import CacheloraError, InputError
from cachelora.files import find_file
from cachelora.jobs import PLAN, write_plan
from cachelora.objectstore import check_inputs
from cachelora.testset import lock_key, read_lock


def set_file(name):
    """Return the file of a set that lies on this machine, as an input; none for one that must be fetched."""
    found = find_file(settings.sets[name].source, settings.mirror)
    return [] if found is None else local(str(found))


def local_file(path):
    """Return a model file as an input if the config names one, none for packages and hubs.

    A job reads it by the path in the config, so that a storage plugin must not put it elsewhere.
    """
    return [] if path.startswith(("package:", "hub:")) else local(path)


try:
    settings = parse_config(config)
    lock = read_lock(settings.testset.lock) if settings.testset.lock else {}
    # Said now, not when the first job needs it; the jobs, which read this again, may run where not every file is.
    if workflow.is_main_process:
        provider = workflow.storage_settings.default_storage_provider
        sources = {
            f"domains.{domain}.{key}": path
            for domain, domain_settings in settings.domains.items()
            for key in ("queries", "recording", "verdicts", "test")
            if (path := getattr(domain_settings, key)) is not None
        }
        if provider is None:
            for where, path in sources.items():
                if not Path(path).is_file():
                    raise InputError(
                        where,
                        f"no such file: {path}",
                        "Put it there, or correct the path",
                    )
        elif provider == "s3":
            check_inputs(
                workflow.storage_settings.default_storage_prefix,
                sources,
                workflow.storage_registry.default_storage_provider.settings,
            )
        for name, labelled in settings.sets.items():
            if "://" not in labelled.source and not set_file(name):
                raise InputError(
                    f"sets.{name}.source",
                    f"no such file: {labelled.source}",
                    "Put it there, correct the path, or name the folder that it lies in as `mirror`",
                )
        for name, adapter in settings.adapters.items():
            weights = Path(adapter.source, "adapter_model.safetensors")
            if local_file(adapter.source) and not weights.is_file():
                raise InputError(
                    f"adapters.{name}.source",
                    f"no adapter_model.safetensors in {adapter.source}",
                    "Name the folder of an adapter",
                )
        for name in settings.used_engines:
            model = getattr(settings.engines[name], "model", None)
            if settings.engines[name].type in ("llamacpp", "vllm"):
                if local_file(model) and not Path(model).exists():
                    raise InputError(
                        f"engines.{name}.model",
                        f"no such file: {model}",
                        "Put the model there, or correct the path",
                    )
        judge = settings.judge and settings.judge.cross_encoder
        if (
            judge
            and local_file(judge)
            and not Path(judge, "model.safetensors").is_file()
        ):
            raise InputError(
                "judge.cross_encoder",
                f"no model.safetensors in {judge}",
                "Name the folder of a cross-encoder",
            )
        for base, source in settings.base_models.items():
            weights = Path(source.source, "model.safetensors")
            if local_file(source.source) and not weights.is_file():
                raise InputError(
                    f"base_models.{base}.source",
                    f"no model.safetensors in {source.source}",
                    "Name the folder of a sentence-transformers model",
                )
except CacheloraError as error:
    raise WorkflowError(str(error)) from None

run_started = datetime.now().astimezone()


def logs_folder():
    """Find where this machine has the logs; with a storage plugin, that is where their copies lie."""
    named = workflow.pathvars.apply("<logs>")
    logs = [Path(log) for job in workflow.dag.jobs for log in job.log]
    return next(
        (folder for log in logs for folder in log.parents if folder.match(named)),
        Path(named),
    )


def note_plan():
    """Write down how many jobs of each stage the run has, for those who watch it."""
    jobs = Counter(job.rule.name for job in workflow.dag.needrun_jobs() if job.rule.log)
    # In the order of the workflow.
    rules = [name for rule in workflow.rules for name in [rule.name] * jobs[rule.name]]
    try:
        write_plan(logs_folder(), run_started, rules)
    except OSError as error:
        print(f"{logs_folder()}: `cachelora jobs` will not know the plan ({error})")


def drop_log_copies():
    """Remove the copies of logs that are in a storage; Snakemake removes those of inputs and outputs only."""
    logs = [log for job in workflow.dag.jobs for log in job.log if log.is_storage]
    if not logs:
        return
    Path(logs_folder(), PLAN).unlink(missing_ok=True)
    for log in logs:
        if not log.should_keep_local:
            Path(log).unlink(missing_ok=True)


# Always a folder of the machine, or of a file system that is mounted there.
STATE = Path(workflow.pathvars.apply("<state>"))
MODEL_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "metrics.json",
    "manifest.json",
)
FULL_MODEL_FILES = ("model.safetensors", "metrics.json", "manifest.json")
HYBRID_FILES = (
    "detector.safetensors",
    "detector.json",
    "metrics.json",
    "manifest.json",
)

trained = settings.trained_models | settings.trials


def non_empty(path):
    """Return an output that must not be an empty file.

    With a storage plugin this goes unchecked: Snakemake 9.27.1 asks the store for the size before it uploads the file.
    """
    if workflow.storage_settings.default_storage_provider is not None:
        return path
    return ensure(path, non_empty=True)


def alternatives(names):
    """Return a pattern that matches these names and nothing else, even if there are none."""
    return "|".join(names) or "(?!)"


def domains_with(engine_type):
    """List the domains whose engine is of a type."""
    return [
        name
        for name in settings.domains
        if settings.engine_of(name).type == engine_type
    ]


def llm_file(engine):
    """Return the file or folder of an LLM that runs in the job, as an input; none for those that lie elsewhere."""
    return local_file(engine.model) if engine.type in ("llamacpp", "vllm") else []


def llm_params(engine):
    """Return what decides on an LLM's replies, and how it is reached."""
    return engine.model_dump(mode="json", exclude={"slots", "concurrency", "price"})


def at_once(wildcards):
    """Return how many queries are in flight. A resource, not a param: it does not change the replies."""
    return settings.engine_of(wildcards.domain).at_once


def domain_words(wildcards):
    """Return what the prompts of a domain are made of."""
    return settings.prompt_of(wildcards.domain)


def journal_of(stage):
    """Return a function that names the folder of the LLM's replies to a stage.

    As a function of the output it is no reason to run a job again. It does not come from the output's path: with a
    storage plugin, that is in a folder that Snakemake may empty.
    """
    return lambda wildcards, output: str(STATE / stage)


def domains_judged_by(judge_type):
    """List the domains whose texts are judged by a judge of a type."""
    return settings.domains if settings.judge_type == judge_type else []


def judge_engine():
    """Return the settings of the judge's engine, None without one."""
    named = settings.judge and settings.judge.engine
    return settings.engines[named] if named else None


def get_cross_encoder(wildcards):
    """Return the weights of a cross-encoder that lies in a local folder, as an input."""
    source = settings.judge.cross_encoder
    return local_file(source) and local(str(Path(source, "model.safetensors")))


def get_verdicts(wildcards):
    """Return the verdicts on a domain's texts, none without a judge."""
    return "<results>/judged/{domain}.parquet" if settings.judge else []


def section(name):
    """Return one part of the configuration with its defaults, as params hold it; None for one that is left out."""
    part = getattr(settings, name)
    return part and part.model_dump(mode="json")


def weights_of(base):
    """Return the weights of a base model that lies in a local folder, as an input."""
    source = settings.base_models[base].source
    return local_file(source) and local(str(Path(source, "model.safetensors")))


def base_weights(wildcards):
    """Return the weights of the base model that the wildcard names, as an input."""
    return weights_of(wildcards.base)


def base_model(wildcards):
    """Return the settings of a base model."""
    return settings.base_models[wildcards.base].model_dump(mode="json")


def stage_code(stage):
    """Return a digest of what a stage runs: its script and the library modules behind it."""
    return code_digest(workflow.source_path(f"../scripts/{stage}.py"))


def frozen(testset):
    """Return what the lock says of a test file, None if it is not frozen."""
    entry = lock.get(lock_key(testset))
    return entry and entry.model_dump()


def get_testsets():
    """List the test sets of all domains."""
    return expand("<results>/testset/{domain}.parquet", domain=settings.domains)


def get_sets():
    """List the test sets that belong to no domain."""
    return expand("<results>/sets/{set}.parquet", set=settings.sets)


def get_testsets_before(wildcards):
    """List the test sets of which no text may stand in a domain's triplets: its own, and those that were there."""
    domains = dict.fromkeys([*settings.before(wildcards.domain), wildcards.domain])
    return expand("<results>/testset/{domain}.parquet", domain=domains)


def get_triplets_before(wildcards):
    """List the triplets of which no text may stand in the test set of a domain that was added."""
    if not settings.domains[wildcards.domain].added:
        return []
    return expand(
        "<results>/triplets/{domain}.parquet", domain=settings.before(wildcards.domain)
    )


def trained_in_full(full):
    """List the trained models that are full fine-tunes, or those that are adapters."""
    return [name for name, model in trained.items() if model.train.full == full]


def get_triplets(wildcards):
    """List the triplets that a model is trained on."""
    return expand(
        "<results>/triplets/{domain}.parquet",
        domain=trained[wildcards.model].all_domains,
    )


def get_start(wildcards):
    """List the files of the adapter that a training goes on from, none for a fresh one."""
    start = trained[wildcards.model].start
    if start is None:
        return []
    return expand(
        "<results>/models/{{base}}/{start}/{file}", start=start, file=MODEL_FILES
    )


def training_state(wildcards, output):
    """Name the folder of a training's checkpoints; see journal_of."""
    return str(STATE / "train" / wildcards.base / wildcards.model)


def get_model_files(wildcards):
    """List the files of a trained or merged model, its weights first."""
    full = wildcards.model in trained_in_full(True)
    return expand(
        "<results>/models/{{base}}/{{model}}/{file}",
        file=FULL_MODEL_FILES if full else MODEL_FILES,
    )


def get_replayed_model(wildcards):
    """List the files of the model that is replayed, none for the base model."""
    return [] if wildcards.model == "base" else get_model_files(wildcards)


def get_merged_adapters(wildcards):
    """List the files of the adapters that a merge takes."""
    return expand(
        "<results>/models/{{base}}/{model}/{file}",
        model=settings.merged_models[wildcards.model],
        file=MODEL_FILES,
    )


def hybrid(wildcards):
    """Return the settings of a hybrid."""
    return settings.hybrids[wildcards.model].model_dump(mode="json")


def hybrid_models(wildcards):
    """Return the model of each domain that has one of its own."""
    return settings.hybrid_models[wildcards.model]


def get_hybrid_models(wildcards):
    """List the files of the models that a hybrid chooses from, the base model's aside."""
    names = {
        *settings.hybrid_models[wildcards.model].values(),
        settings.hybrids[wildcards.model].otherwise,
    }
    full = trained_in_full(True)
    return [
        f"<results>/models/{wildcards.base}/{name}/{file}"
        for name in sorted(names - {"base"})
        for file in (FULL_MODEL_FILES if name in full else MODEL_FILES)
    ]


def get_models():
    """List the models of the table, the base model first."""
    return [
        "base",
        *settings.trained_models,
        *settings.merges,
        *settings.hybrids,
        *settings.adapters,
    ]


def for_models(pattern):
    """List a file for each base model and model of the table; an adapter trained elsewhere fits one base model only."""
    return [
        pattern.format(base=base, model=model)
        for base in settings.base_models
        for model in get_models()
        if settings.adapter_bases.get(model, base) == base
    ]


def get_foreign_adapter(wildcards):
    """List the files of an adapter that was trained elsewhere and lies in a local folder, as inputs."""
    source = settings.adapters[wildcards.model].source
    names = ("adapter_model.safetensors", "adapter_config.json", "manifest.json")
    files = (Path(source, name) for name in names)
    return local_file(source) and [local(str(file)) for file in files if file.is_file()]


def for_compared(pattern):
    """List a file of the base models and of what is deployed on them: those that thresholds and replay are for."""
    return expand(
        pattern, base=settings.base_models, model=["base", settings.deploy.model]
    )


def get_timed():
    """List the times of the jobs that take long."""
    return [
        *expand("<results>/timing/filter/{domain}.tsv", domain=settings.domains),
        *(
            f"<results>/timing/{stage}/{base}/{model}.tsv"
            for base in settings.base_models
            for stage, models in (
                ("train", settings.trained_models),
                ("merge", settings.merges),
            )
            for model in models
        ),
        *for_models("<results>/timing/evaluate/{base}/{model}.tsv"),
    ]


def get_deployed():
    """List the deployed model's folder for each base model, and what says that it is whole."""
    return expand(
        "<results>/deploy/{base}/{model}{end}",
        base=settings.base_models,
        model=settings.deploy.model,
        end=["", ".manifest.json"],
    )


def get_final_output():
    """List what the whole workflow is for. A sweep stops before the test sets: they are not for choosing."""
    if settings.sweep:
        return expand("<results>/sweep/{base}.md", base=settings.base_models)
    return [
        "<results>/benchmark.csv",
        "<results>/benchmark.md",
        "<results>/benchmark.html",
        *get_deployed(),
    ]


wildcard_constraints:
    domain=alternatives(settings.domains),
    base=alternatives(settings.base_models),
    model=alternatives([*get_models(), *settings.trials]),
    set=alternatives(settings.sets),
    shard="[0-9]+",
