"""A request: features → router → gates → (fetch what is not here yet) → engine → answer with attribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from arrowmoe.arguments import Adapter
from arrowmoe.engine import ArrowEngine
from arrowmoe.errors import RoutingError
from arrowmoe.generation import Generation
from arrowmoe.routing.gates import Gates
from arrowmoe.routing.policy import Opinion, Policy
from arrowmoe.routing.router import LoRARouter
from registry.card import LoRACard

Fetch = Callable[[str], LoRACard]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What was answered and what made it: `adapters` name → weight (empty: the bare base model), `gates` why.

    `fetched` names the virtual candidates whose weights were fetched from a peer to answer.
    """

    text: str
    adapters: Mapping[str, float]
    gates: Gates
    generation: Generation
    fetched: tuple[str, ...] = field(default=())


def ask(
    prompt: str,
    *,
    engine: ArrowEngine,
    router: LoRARouter | None = None,
    adapter: Adapter = "auto",
    fetch: Fetch | None = None,
    policy: Policy | None = None,
    opinion: Opinion | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Answer:
    """Answer one prompt, as a chat message where the model has a chat template.

    `fetch` brings the verified card of a virtual candidate by digest; without it only cards at hand are chosen.
    `policy` replaces the router's own, `opinion` is an agent's say on which card to use.
    """
    routed = adapter == "auto" and router is not None
    if opinion is not None and not routed:
        raise RoutingError("expected an opinion only where a router decides", hint="leave out adapter, or the opinion")
    gates = (
        route(prompt, engine=engine, router=router, may_fetch=fetch is not None, policy=policy, opinion=opinion)
        if routed
        else None
    )
    fetched = _fetch_missing(gates, router, engine, fetch) if gates and router and fetch else ()
    resolved = engine.resolve(gates if gates is not None else adapter, [prompt])
    message = [{"role": "user", "content": prompt}] if engine.base.tokenizer.chat_template else prompt
    generation = engine.generate(
        [message],
        adapter=resolved,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )[0]
    return Answer(
        text=generation.text,
        adapters=generation.adapters,
        gates=resolved,
        generation=generation,
        fetched=fetched,
    )


def route(
    prompt: str,
    *,
    engine: ArrowEngine,
    router: LoRARouter | None,
    may_fetch: bool = True,
    policy: Policy | None = None,
    opinion: Opinion | None = None,
) -> Gates | None:
    """Gates for `prompt` over the cards made for the engine's base; None leaves routing to the engine's own router."""
    if router is None:
        return None
    mask = router.for_base(engine.name)
    if not may_fetch:
        mask = {digest for digest in mask if not router.is_virtual(digest)}
    opinions = () if opinion is None else (opinion,)
    return router.route(router.features([prompt]), mask=mask, policy=policy, opinions=opinions)


def _fetch_missing(gates: Gates, router: LoRARouter, engine: ArrowEngine, fetch: Fetch) -> tuple[str, ...]:
    """Fetch and load what was chosen and is with a peer only; names of what came."""
    virtual = [digest for digest in gates.adapters if router.is_virtual(digest)]
    return tuple(engine.hold(fetch(digest)).name for digest in virtual)
