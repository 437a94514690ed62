"""What LiteLLM's Router asks for a deployment when a model group uses gorgo."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from litellm.integrations.custom_logger import CustomLogger

from gorgo_plugin.decision import Prompt
from gorgo_plugin.errors import NoCandidates, PromptError
from gorgo_plugin.litellm_strategy import patch
from gorgo_plugin.litellm_strategy.calls import Call, read_call
from gorgo_plugin.litellm_strategy.deployments import Deployment, Seat, deployment_id
from gorgo_plugin.litellm_strategy.ledger import Ledger, LiteLLMAttempt, Request
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.threads import LatePrompt

if TYPE_CHECKING:
    from gorgo_plugin.litellm_strategy.adapter import Adapter


class Selector(CustomLogger):  # type: ignore[misc]  # LiteLLM may list it among its callbacks, and expects one of these
    """Chooses deployments for the model groups of one `routing_strategy_args`.

    Nothing in here fails a request: whatever goes wrong, LiteLLM's own simple-shuffle chooses.

    Attributes:
        args: the settings as configured.
        runtime: put in by the adapter once the settings are good; None before, and when they are not.
        seats: the deployments it may choose from, by id.
    """

    def __init__(self, adapter: Adapter, ledger: Ledger, args: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.adapter = adapter
        self.ledger = ledger
        self.args: Mapping[str, Any] = args if args is not None else {}
        self.runtime: Runtime | None = None
        self.seats: Mapping[str, Seat] = {}
        self.rng = random.Random()  # decides only how many requests go to deployments without a price

    async def async_get_available_deployments(
        self,
        model_group: str,
        healthy_deployments: Sequence[Deployment],
        messages: Any = None,
        input: Any = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Deployment:
        """The deployment for an async call."""
        choice = _Choice(self, model_group, healthy_deployments, request_kwargs, is_async=True)
        try:
            runtime = choice.begin()
            if runtime is not None and (call := choice.read(messages, input)) is not None:
                choice.keep(call, await runtime.prepare(choice.body(call), call.endpoint, choice.model))
            return choice.made()
        except Exception as error:  # noqa: BLE001 (counted and logged; a client must not meet an error of ours)
            return choice.left_to_litellm(_reason(error), error)

    def get_available_deployments(
        self,
        model_group: str,
        healthy_deployments: Sequence[Deployment],
        messages: Any = None,
        input: Any = None,
        request_kwargs: dict[str, Any] | None = None,
    ) -> Deployment:
        """The deployment for a sync call."""
        choice = _Choice(self, model_group, healthy_deployments, request_kwargs, is_async=False)
        try:
            runtime = choice.begin()
            if runtime is not None and (call := choice.read(messages, input)) is not None:
                choice.keep(call, runtime.prepare_sync(choice.body(call), call.endpoint, choice.model))
            return choice.made()
        except Exception as error:  # noqa: BLE001 (as above)
            return choice.left_to_litellm(_reason(error), error)


class _Choice:
    """One selection, step by step: `begin`, `read`, `keep` what was prepared in between, `made`."""

    def __init__(
        self,
        selector: Selector,
        model_group: str,
        deployments: Sequence[Deployment],
        kwargs: dict[str, Any] | None,
        is_async: bool,
    ) -> None:
        self._selector = selector
        self._async = is_async
        self._deployments = deployments
        self._kwargs = kwargs if kwargs is not None else {}
        self._group = model_group
        self._request: Request | None = None
        self._runtime: Runtime | None = None
        self._chosen: Deployment | None = None
        self._call: Call | None = None
        self._prompt: Prompt | None = None
        self._priced: dict[str, list[Deployment]] = {}  # by replica: one may serve several groups called by one name
        self._unpriced: list[Deployment] = []
        self.model = model_group

    def begin(self) -> Runtime | None:
        """Find the request and the candidates; None when the choice needs no prompt."""
        selector = self._selector
        if selector.runtime is None:
            selector.adapter.lend(selector)
        selector.adapter.follow(selector, self._deployments)
        self._runtime = runtime = selector.runtime
        self._request = selector.ledger.begin(self._kwargs)
        if runtime is None or runtime.settings.mode == "off":
            self.left_to_litellm("no-settings" if runtime is None else "off")
            return None
        runtime.ensure_started()
        self._look_at_candidates()
        if self._goes_unpriced():
            self._take(self._shuffled(self._untried(self._unpriced) or self._unpriced))
            return None
        return runtime

    def read(self, messages: Any, given_input: Any) -> Call | None:
        """The call, when its prompt has yet to be prepared."""
        assert self._request is not None
        self._call = call = read_call(messages, given_input, self._kwargs)
        if call is None:
            self.left_to_litellm("no-prompt")
            return None
        prompt = self._request.prompts.get((call.endpoint, self.model))
        self._prompt = prompt.latest() if isinstance(prompt, LatePrompt) else prompt
        return call if self._prompt is None else None

    def body(self, call: Call) -> Mapping[str, Any]:
        """The body to prepare; `stream` says whether its first token will be seen."""
        return {**call.body, "stream": self._async and call.stream and not call.unseen}

    def keep(self, call: Call, prompt: Prompt) -> None:
        """Take the prepared prompt; a retry will not have to prepare it again."""
        assert self._request is not None
        self._prompt = self._request.prompts[call.endpoint, self.model] = prompt

    def made(self) -> Deployment:
        """The choice."""
        if self._chosen is None:
            self._decide()
        assert self._chosen is not None
        return self._chosen

    def left_to_litellm(self, reason: str, error: Exception | None = None) -> Deployment:
        """LiteLLM's own simple-shuffle chooses."""
        if self._request is not None:
            self._request.fail("disconnect")  # nothing is open here, unless the error came after the choice
            self._request.attempt = None
        if self._runtime is not None:
            self._runtime.metrics.fell_back(reason)
        if error is not None:
            self._selector.adapter.note_error(reason, error)
        return self._take(self._shuffled(self._deployments))

    def _look_at_candidates(self) -> None:
        models = set()
        for deployment in self._deployments:
            seat = self._selector.seats.get(deployment_id(deployment))
            if seat is not None:
                models.add(seat.model)
            if seat is None or seat.replica is None:
                self._unpriced.append(deployment)
            else:
                self._priced.setdefault(seat.replica, []).append(deployment)
        # Under a routing group's name, or a wildcard, a deployment may serve another model than its group is named.
        if len(models) == 1 and "*" not in (model := models.pop()):
            self.model = model

    def _goes_unpriced(self) -> bool:
        """Whether this request goes to a deployment without a price: they get their share at random."""
        if self._shadow:
            return False  # simple-shuffle chooses among all
        priced = [deployment for same in self._priced.values() for deployment in same]
        fresh = self._untried(self._unpriced), self._untried(priced)
        unpriced, priced = fresh if any(fresh) else (self._unpriced, priced)
        return self._selector.rng.random() * (len(unpriced) + len(priced)) < len(unpriced)

    def _untried(self, deployments: list[Deployment]) -> list[Deployment]:
        assert self._request is not None
        tried = self._request.tried
        return [one for one in deployments if deployment_id(one) not in tried] if tried else deployments

    @property
    def _shadow(self) -> bool:
        return self._runtime is not None and self._runtime.settings.mode == "shadow"

    def _decide(self) -> None:
        runtime, request, call, prompt = self._runtime, self._request, self._call, self._prompt
        assert runtime is not None
        assert request is not None
        assert call is not None
        assert prompt is not None
        router, candidates = runtime.router, list(self._priced)
        started = time.perf_counter()
        if self._shadow:
            wanted = router.explain(prompt, candidates)
            runtime.metrics.decided(wanted, prompt.model, time.perf_counter() - started)
            chosen = self._shuffled(self._deployments)
            replica = self._selector.seats[deployment_id(chosen)].replica
            if replica is not None:  # what becomes of it there teaches all the same
                decision = router.route(prompt, [replica], request_id=request.request_id)
                request.attempt = LiteLLMAttempt(runtime, decision, prompt, call.unseen)
            self._take(chosen)
            return
        decision = router.route(prompt, candidates, request_id=request.request_id)
        runtime.metrics.decided(decision, prompt.model, time.perf_counter() - started)
        chosen = self._shuffled(self._priced[decision.replica])
        request.attempt = LiteLLMAttempt(runtime, decision, prompt, call.unseen)
        self._take(chosen)

    def _shuffled(self, deployments: Sequence[Deployment]) -> Deployment:
        if len(deployments) == 1:
            return deployments[0]
        return patch.simple_shuffle(self._selector.adapter.router, self._group, deployments, self._kwargs)

    def _take(self, deployment: Deployment) -> Deployment:
        self._chosen = deployment
        if self._request is not None:
            self._request.tried.add(deployment_id(deployment))
        return deployment


def _reason(error: Exception) -> str:
    """Why LiteLLM chose, as a metric counts it."""
    if isinstance(error, PromptError):
        return "prompt-error"
    return "no-candidates" if isinstance(error, NoCandidates) else "error"
