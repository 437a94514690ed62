"""Use the router as a library: three replicas, one conversation, and why each turn goes where it goes.

Run it with `python examples/route_by_hand.py`; it needs no network and no gateway.
"""

from gorgo_plugin import Router, Settings

settings = Settings.model_validate(
    {
        "replicas": [
            {"name": "us-east-1", "region": "us-east", "url": "http://10.0.0.1:8000"},
            {"name": "eu-central-1", "region": "eu-central", "url": "http://10.1.0.1:8000"},
            {"name": "ap-northeast-1", "region": "ap-northeast", "url": "http://10.2.0.1:8000"},
        ]
    }
)
router = Router(settings)
for name, rtt_s in (("us-east-1", 0.037), ("eu-central-1", 0.279), ("ap-northeast-1", 0.456)):
    router.observe_rtt(name, rtt_s)  # a gateway measures this

handbook = "Answer from this handbook. " + "Section: how to return a parcel, step by step. " * 900


def ask(question: str, stream: bool = True) -> int:
    """Route one question about the handbook, print why it goes where it goes, and return the flight."""
    body = {
        "messages": [{"role": "system", "content": handbook}, {"role": "user", "content": question}],
        "stream": stream,
    }
    decision = router.route(router.prepare(body, "/v1/chat/completions"))
    print(f"\n{question}\n-> {decision.replica} ({decision.reason})")
    for name in decision.ranked:
        cost = decision.costs[name]
        print(
            f"   {name:15} network {cost.network_ms:6.0f}  queue {cost.queue_ms:6.0f}  prefill {cost.prefill_ms:6.0f}"
            f"  total {cost.total_ms:6.0f} ms   {cost.cached_tokens:6} of the prompt's tokens cached"
        )
    return decision.flight_id


first = ask("Where do I return a parcel?")
ask(
    "Who pays for it?"
)  # the first is still being prefilled: its queue has a price, but the handbook will be cached there
router.first_token(first)
router.usage(first, prompt_tokens=11_775, cached_tokens=0)  # as the engine reports in its last chunk
router.finish(first)
ask("How long does it take?")  # cached by now, and the queue is empty
