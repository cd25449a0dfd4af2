"""The proof that a server can be trained on: a few tokens, asked and read as samples are.

For servers that are not the vendor's, whose answers depend on how they were started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hotload.clients.inference.attempt import body_bytes, send_once
from hotload.clients.inference.transport import HttpTransport
from hotload.errors import ProtocolError, ServiceRefusedError, ServiceUnavailableError
from hotload.options import Sampling
from hotload.rollout.completions_api import Answer, Logprobs
from hotload.rollout.engines.kind import PromptForm, ServerKind
from hotload.rollout.failures import Action, Cause, Failure
from hotload.rollout.request import first_request
from hotload.rollout.trajectory import Problem

TOKENS = 4
PROBLEMS = {
    PromptForm.IDS: Problem("proof", prompt=(1, 2)),
    PromptForm.TEXT: Problem("proof", prompt="1, 2,"),
    PromptForm.CHAT: Problem("proof", messages=({"role": "user", "content": "1, 2,"},)),
}
LEAST_CERTAIN_LOGPROB = -0.1


class Proof:
    """Asks one server.

    Args:
        remedy: advises on a status, on no answer, or, with 200, on an answer that lacks something.
    """

    def __init__(
        self,
        transport: HttpTransport,
        kind: ServerKind,
        model: str,
        remedy: Callable[[int | None], str],
    ) -> None:
        self._transport, self._kind, self._model = transport, kind, model
        self._remedy = remedy

    async def prove(self, sampling: Sampling) -> None:
        """Ask for tokens with their ids and with log-probabilities of the distribution that
        `sampling` samples from.

        Raises:
            ServiceRefusedError: no sample could be trained on; says what to switch on.
            ServiceUnavailableError: no answer, or one that may be better later.
        """
        kind = self._kind
        form = next((form for form in PromptForm if form in kind.endpoints), None)
        if form is None:
            raise self._refused(f"{kind.name} cannot be trained on")
        if sampling.include_routing_matrix and not kind.tells_routes:
            raise self._refused(f"routes of experts are not read of {kind.name}")
        logprobs = kind.endpoints[form].reading.logprobs
        if not logprobs.are_sampled(sampling):
            raise self._refused(f"log-probabilities of {kind.name} are {logprobs.value}")
        await self._sample(form, sampling)
        if kind.certain is not None and not Logprobs.RAW.are_sampled(sampling):
            certain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **kind.certain}
            told = await self._sample(form, sampling.model_copy(update=certain))
            if min(told, default=0.0) < LEAST_CERTAIN_LOGPROB:
                found = f"{min(told):.2f} for a token that was certain"
                raise self._refused(f"log-probabilities are not of what was sampled: {found}")

    async def _sample(self, form: PromptForm, sampling: Sampling) -> Sequence[float]:
        """Sample once; returns the log-probabilities.

        Raises:
            ServiceRefusedError, ServiceUnavailableError: as `prove`.
        """
        few = sampling.model_copy(update={"max_completion_tokens": TOKENS, "stop": ()})
        problem, endpoint = PROBLEMS[form], self._kind.endpoints[form]
        request = first_request(problem, 0, sampling=few, identity="", policy_version=0)
        prompt = problem.prompt if isinstance(problem.prompt, tuple) else None
        answer = Answer(few, prompt, endpoint.reading)
        body = body_bytes(endpoint.body(request, self._model))
        try:
            failure = await send_once(self._transport, self._kind, request, body, answer)
        except ProtocolError as error:
            raise self._refused(error.detail) from None
        if failure is not None:
            raise self._error_of(failure)
        return answer.sampling_logprobs

    def _error_of(self, failure: Failure) -> ServiceRefusedError | ServiceUnavailableError:
        status = failure.status_code
        may_pass = failure.action in (Action.RETRY, Action.WAIT_FOR_SWAP)
        if may_pass and failure.cause is not Cause.MALFORMED:
            advice = self._remedy(None if status == 200 else status)
            return ServiceUnavailableError("rollouts", status, failure.detail, advice)
        return self._refused(failure.detail, 200 if status is None else status)

    def _refused(self, detail: str, status_code: int = 200) -> ServiceRefusedError:
        told = None if status_code == 200 else status_code
        return ServiceRefusedError("rollouts", told, detail, self._remedy(status_code))
