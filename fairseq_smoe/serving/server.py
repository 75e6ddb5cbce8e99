"""A server: its parts, and how it starts and ends."""

from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.serving.jobs import JobQueue
from fairseq_smoe.serving.languages import Languages
from fairseq_smoe.serving.limits import Keys, Limits, RateLimit
from fairseq_smoe.serving.metrics import Metrics
from fairseq_smoe.serving.service import TranslationService
from fairseq_smoe.serving.workers import Workers


@dataclass
class Server:
    """What the application needs; see the classes of the attributes."""

    limits: Limits
    languages: Languages
    service: TranslationService
    workers: Workers
    metrics: Metrics
    keys: Keys
    rate: RateLimit
    queue: JobQueue

    def stop(self):
        """Finish what was begun, and end all processes."""
        self.queue.close()
        self.workers.stop()


def make_server(args):
    """The server that the options of ``python -m fairseq_smoe serve`` ask for. Its processes run.

    Raises:
        OptionError: the model cannot be loaded, or an option is wrong.
    """
    for flag, value in (
        *(("--workers", args.workers), ("--beam", args.beam), ("--threads", args.threads)),
        *(("--batch-tokens", args.batch_tokens), ("--queue-tokens", args.queue_tokens)),
        *(("--max-body", args.max_body), ("--max-texts", args.max_texts)),
        *(("--max-characters", args.max_characters), ("--timeout", args.timeout)),
    ):
        if value <= 0:
            raise OptionError(f"{flag} {value}: expected more than 0")
    for flag, value in (("--wait", args.wait), ("--requests-per-minute", args.requests_per_minute)):
        if value < 0:
            raise OptionError(f"{flag} {value}: expected 0 or more")
    limits = Limits(args.max_body, args.max_texts, args.max_characters, args.beam - 1, args.timeout)
    keys = Keys(args.keys)
    queue = JobQueue(args.queue_tokens, args.batch_tokens, args.wait / 1000)
    load = dict(path=_paths(args.model), data=args.data, device=args.device)
    load |= dict(threads=args.threads, dtype=args.dtype)
    options = dict(beam=args.beam, lenpen=args.lenpen, max_tokens=args.batch_tokens)
    workers = Workers(queue, load, options, args.workers)
    facts = workers.start()
    service = TranslationService(queue, token_counter(facts.spm), limits)
    return Server(
        limits,
        Languages(facts.languages, facts.directions),
        service,
        workers,
        Metrics(queue, workers),
        keys,
        RateLimit(args.requests_per_minute),
        queue,
    )


def token_counter(spm):
    """``count(text)`` of the tokens that a model makes of a line."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    return lambda line: len(processor.encode(line)) + 2  # language token and end


def _paths(models):
    return [str(Path(model)) for model in models]
