"""What augmenting a log will take, from a handful of its queries."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from cachelora.augment.engine import make_engine
from cachelora.augment.journal import Journal
from cachelora.augment.prompt import TASKS, AugmentPrompts
from cachelora.augment.reply import check_reply
from cachelora.augment.shard import shard_queries
from cachelora.config import Config, LiveEngine, RecordedEngine
from cachelora.errors import ConfigError
from cachelora.queries import group_queries, read_queries, split_groups

_log = logging.getLogger(__name__)

_LEAST_FOR_AN_INTERVAL = 8


@dataclass(frozen=True)
class Estimate:
    """What the rest of a domain's log will take.

    Attributes
    ----------
    domain, engine, model : str
        Whose log, and what it is asked of.
    queries, finished : int
        Canonical queries of the log, and those of them in the journal, the sample included.
    sample : int
        How many were asked to find this out.
    ends : dict of str to int
        How they ended.
    prompt_tokens, reply_tokens : float
        Tokens of the rest; NaN where the server does not count them.
    error : float
        Half the width of the 95 % interval of the reply tokens of the rest, as a share of them; NaN for a sample of
        fewer than 8.
    seconds : float
        Time for the rest at the sample's rate.
    money : float
        Price of the rest, in ``currency``.
    currency : str
        The currency.
    """

    domain: str
    engine: str
    model: str
    queries: int
    finished: int
    sample: int
    ends: dict[str, int]
    prompt_tokens: float
    reply_tokens: float
    error: float
    seconds: float
    money: float
    currency: str

    @property
    def rest(self) -> int:
        """Queries that are still to be asked."""
        return self.queries - self.finished

    @property
    def calls(self) -> int:
        """Calls of the LLM for the rest."""
        return self.rest * len(TASKS)


def estimate(config: Config, domain: str, sample: int, threads: int) -> Estimate:
    """Ask a handful of a domain's queries, and say what the rest will take.

    Their replies go into the journal, so that the run does not ask them again.

    Parameters
    ----------
    config : Config
        The configuration.
    domain : str
        A domain with a live engine.
    sample : int
        How many queries to ask, drawn by hash.
    threads : int
        CPU threads, for an LLM that runs on them.

    Returns
    -------
    Estimate
        The estimate; of nothing, where the journal holds all.

    Raises
    ------
    ConfigError
        If the domain is unknown, or its engine is not a live one.
    EngineError
        If the engine cannot be started or gives up.
    InputError
        If the log cannot be read.
    """
    settings = _live_engine(config, domain)
    queries = _canonical(config, domain)
    prompts = AugmentPrompts(
        config.prompt_of(domain), config.augment.paraphrases, config.augment.negatives, config.augment.max_chars
    )
    engine = make_engine(settings, prompts, config.seed, threads)
    journal = Journal(Path(config.state_folder) / "augment", engine.identity, f"{domain}-estimate")
    with journal.writer(alone=True) as writer:
        finished = journal.finished(dict(queries))
        missing = [query for query in queries if query[0] not in finished]
        chosen = sorted(missing)[:sample]
        texts, ends, tokens = dict(chosen), {"complete": 0, "partial": 0, "failed": 0}, []
        if chosen:
            engine.start()
        start = time.monotonic()
        kept = 0
        for raw in engine.replies(chosen):
            if raw.failure is None:
                writer.add(raw)
                kept += 1
            reply = check_reply(raw, texts[raw.query_id], config.augment.max_chars)
            ends[reply.end(config.augment.paraphrases, config.augment.negatives)] += 1
            tokens.append((raw.prompt_tokens, raw.reply_tokens))
            _log.info("%s: %d/%d asked, %.0f s", domain, len(tokens), len(chosen), time.monotonic() - start)
        seconds = time.monotonic() - start
    rest = len(missing) - kept
    used = np.array(tokens, dtype=float).reshape(-1, 2)
    if len(used) and not used.any():
        used[:] = math.nan
    prompt_tokens, reply_tokens = used.mean(axis=0) * rest if len(used) else (0.0, 0.0)
    rest_seconds = seconds / len(used) * rest if len(used) else 0.0
    price = settings.price
    return Estimate(
        domain=domain,
        engine=engine.version,
        model=engine.model,
        queries=len(queries),
        finished=len(queries) - rest,
        sample=len(chosen),
        ends=ends,
        prompt_tokens=float(prompt_tokens),
        reply_tokens=float(reply_tokens),
        error=_relative_error(used[:, 1]),
        seconds=rest_seconds,
        money=(prompt_tokens * price.prompt + reply_tokens * price.reply) / 1e6 + rest_seconds / 3600 * price.hour,
        currency=price.currency,
    )


def estimates_table(estimates: list[Estimate]) -> str:
    """Show estimates.

    Parameters
    ----------
    estimates : list of Estimate
        One a domain.

    Returns
    -------
    str
        A table, and what to know about it.
    """
    rows = [
        {
            "domain": one.domain,
            "engine": one.engine,
            "model": one.model,
            "asked now": f"{one.sample} ({', '.join(f'{n} {end}' for end, n in one.ends.items() if n) or '-'})",
            "queries left": f"{one.rest:,} of {one.queries:,}",
            "calls": f"{one.calls:,}",
            "prompt tokens": _number(one.prompt_tokens),
            "reply tokens": _number(one.reply_tokens),
            "+-": "-" if math.isnan(one.error) else f"{one.error:.0%}",
            "time": _duration(one.seconds),
            "price": f"{_number(one.money, 2)} {one.currency}" if one.money else "-",
        }
        for one in estimates
    ]
    return (
        f"{tabulate(rows, headers='keys', disable_numparse=True)}\n\n"
        "+-: 95 % interval of the reply tokens. time: at the rate of these queries; with fewer of them than the\n"
        "engine takes at once, the run will be faster. price: by the engine's `price`. The replies are in the journal\n"
        "and will not be asked for again.\n"
    )


def _live_engine(config: Config, domain: str) -> LiveEngine:
    """Return the settings of a domain's engine; refuse a domain without a live one."""
    if domain not in config.domains:
        raise ConfigError(f"--domain {domain}", "no such domain", f"Use one of {', '.join(config.domains)}")
    settings = config.engine_of(domain)
    if isinstance(settings, RecordedEngine):
        raise ConfigError(
            f"domains.{domain}", "its augmentation is recorded, which costs nothing", "Set its `engine` to a live one"
        )
    return settings


def _canonical(config: Config, domain: str) -> list[tuple[str, str]]:
    """Read the queries that the workflow will ask for: digest and text."""
    source = config.domains[domain].queries
    queries, _ = read_queries(source, config.queries)
    hold_out = config.domains[domain].test is None
    table: pd.DataFrame = split_groups(group_queries(queries), config.queries, config.seed, hold_out, source)
    return shard_queries(table, 0, 1)


def _relative_error(tokens: np.ndarray) -> float:
    """Return half the width of the 95 % interval of a mean, as a share of it."""
    if len(tokens) < _LEAST_FOR_AN_INTERVAL or not tokens.mean() > 0:
        return math.nan
    from scipy.stats import t

    half = t.ppf(0.975, len(tokens) - 1) * tokens.std(ddof=1) / math.sqrt(len(tokens))
    return float(half / tokens.mean())


def _number(value: float, digits: int = 0) -> str:
    """Say a number for reading."""
    return "not said by the server" if math.isnan(value) else f"{value:,.{digits}f}"


def _duration(seconds: float) -> str:
    """Say a time for reading."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
