"""From the texts of a request to their translations."""

import asyncio
import time
from collections import defaultdict

from fairseq_smoe.inference.results import SIDES, Capacity
from fairseq_smoe.serving.jobs import Job, QueueFull, Sentence
from fairseq_smoe.serving.requests import CLIENT_GONE, RequestError
from fairseq_smoe.serving.workers import WorkerDied


class TranslationService:
    """Cuts texts into lines, lets workers translate them, and puts them together again.

    Args:
        queue: :class:`~fairseq_smoe.serving.jobs.JobQueue`
        count_tokens: number of tokens of a line.
        limits: :class:`~fairseq_smoe.serving.limits.Limits`
    """

    def __init__(self, queue, count_tokens, limits):
        self._queue, self._count, self._limits = queue, count_tokens, limits
        self._means = defaultdict(lambda: [0, 0.0, 0.0])  # direction: sentences, sums of passes

    async def translate(self, request, gone):
        """The body of the answer.

        Args:
            request: :class:`~fairseq_smoe.serving.requests.TranslationRequest`
            gone: a coroutine function that returns when the client has gone.

        Raises:
            RequestError: the queue is full, time is up, or a worker has died.
        """
        deadline = time.monotonic() + self._limits.timeout
        lines = [text.splitlines() or [""] for text in request.texts]
        jobs = [self._job(line, request, deadline) for own in lines for line in own]
        try:
            self._queue.put(jobs)
        except QueueFull:
            raise RequestError(
                503, "too much waits to be translated", {"Retry-After": "1"}
            ) from None
        translated = iter(await self._results(jobs, gone))
        return self._answer(request, [[next(translated) for _ in own] for own in lines])

    def _job(self, line, request, deadline):
        sentence = Sentence(
            line, request.source, request.target, 1 + request.alternatives, request.with_capacity
        )
        return Job(sentence, self._count(line), deadline)

    async def _results(self, jobs, gone):
        futures = [asyncio.wrap_future(job.future) for job in jobs]
        everything = asyncio.gather(*futures)
        watching = asyncio.create_task(gone())
        try:
            await asyncio.wait(
                {everything, watching},
                timeout=self._limits.timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if everything.done():
                return everything.result()
            if watching.done():
                raise RequestError(CLIENT_GONE, "the client has gone")
            raise TimeoutError
        except TimeoutError:
            message = f"not translated within {self._limits.timeout:g} seconds"
            raise RequestError(503, message, {"Retry-After": "5"}) from None
        except WorkerDied:
            message = "the process that translates has died; try again"
            raise RequestError(503, message, {"Retry-After": "5"}) from None
        except RuntimeError as error:
            raise RequestError(500, f"could not be translated ({error})") from None
        finally:
            watching.cancel()
            everything.cancel()
            for job in jobs:
                job.future.cancel()

    def _answer(self, request, translated):
        texts = [_joined(own, 0) for own in translated]
        others = [
            [_joined(own, i) for i in range(1, 1 + request.alternatives)] for own in translated
        ]
        answer = {"translatedText": texts if request.is_list else texts[0]}
        if request.alternatives:
            answer["alternatives"] = others if request.is_list else others[0]
        if request.with_capacity:
            direction = request.source, request.target
            own = [
                capacity
                for lines in translated
                for line in lines
                for capacity in line.capacity or ()
            ]
            answer["capacity"] = [self._capacity(direction, each) for each in own]
            answer["directionCapacity"] = self._mean(direction)
        return answer

    def _capacity(self, direction, capacity):
        """The passes of a sentence, and its place in the mean of its direction."""
        sides = dict(zip(SIDES, (capacity.source, capacity.target)))
        means = {side: Capacity.mean(tokens) for side, tokens in sides.items()}
        sums = self._means[direction]
        sums[0] += 1
        for i, side in enumerate(SIDES, start=1):
            sums[i] += means[side]
        return {
            side: {
                "mean": round(means[side], 3),
                "layers": capacity.layers[side],
                "tokens": [
                    {"piece": t.piece, "passes": t.passes, "experts": t.experts} for t in tokens
                ],
            }
            for side, tokens in sides.items()
        }

    def _mean(self, direction):
        sentences, *sums = self._means[direction]
        means = {side: round(s / sentences, 3) for side, s in zip(SIDES, sums)} if sentences else {}
        return {"sentences": sentences, **means}


def _joined(lines, number):
    return "\n".join(line.hypotheses[number].text for line in lines)
