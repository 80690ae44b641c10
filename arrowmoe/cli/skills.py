"""`arrowmoe skills`: the cards of this home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arrowmoe
from arrowmoe import control
from arrowmoe.cli.app import App, app_of, given, group
from arrowmoe.cli.describing import MAX_STATISTICS_BYTES, MIN_PROMPTS, Budget, MinPrompts, show_described
from arrowmoe.cli.evolving import evidence
from arrowmoe.cli.output import short, size
from arrowmoe.cli.skills_extract import extract
from arrowmoe.cli.skills_merge import merge
from arrowmoe.cli.skills_ps import ps
from arrowmoe.cli.skills_push import push
from arrowmoe.cli.skills_quantise import quantise
from arrowmoe.cli.skills_sync import found_here, sync
from registry.errors import ArrowMoEError

if TYPE_CHECKING:
    from registry.store import Registry

app = group()

Ref = Annotated[
    str, typer.Argument(metavar="CARD", help="Name, NAME@VERSION, or the first 8 or more digits of a digest.")
]


@app.callback()
def _skills() -> None:
    """Import, list, share and check cards."""


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_FILE", help="A PEFT adapter, or a .lora.arrow file.")],
    name: Annotated[str | None, typer.Option(help="Name; the directory's, unless given.")] = None,
    version: Annotated[str | None, typer.Option(help="Version; 1, unless given.")] = None,
    description: Annotated[str | None, typer.Option(help="What the card is good at; routing reads it.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="A subject; may be repeated.")] = None,
    example: Annotated[list[str] | None, typer.Option(help="A prompt that it is for; may be repeated.")] = None,
    examples: Annotated[Path | None, typer.Option(help="File with one such prompt a line.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag, kept here only; may be repeated.")] = None,
    sign: Annotated[bool, typer.Option("--sign", help="Publish the card in a file as this node's own.")] = False,
) -> None:
    """Make a card of a PEFT adapter and keep it, or keep the card in a file."""
    invocation = app_of(context)
    prompts = [*(example or []), *(_lines(examples) if examples else [])]
    about = given(name=name, version=version, description=description, domains=domain, examples=prompts)
    with invocation.registry() as registry:
        if source.is_dir():
            entry = registry.publish(arrowmoe.LoRACard.from_peft(source, **about), tags=tag or [])
        elif not source.exists():
            raise ArrowMoEError(f"no such file or directory: {source}")
        elif about or sign:
            card = arrowmoe.LoRAFormat.load(source, memory_map=False, verify=True).describe(**about)
            entry = registry.publish(card, tags=tag or [])
        else:
            entry = registry.import_file(source, tags=tag or [])
    found = arrowmoe.views.card(entry)
    text = f"{entry.name}@{entry.version} {short(entry.digest)} (rank {entry.rank}, {size(entry.nbytes)})"
    invocation.out.result(found, lambda: invocation.out.line(f"imported {text}"), quiet=[entry.digest])
    if entry.publisher is None:
        again = (
            f"`arrowmoe skills rm {entry.name}@{entry.version}` and import it with `--sign`: that publishes it as yours"
        )
        invocation.out.warning(f"nobody signed {entry.name}, so peers quarantine it", again)


@app.command("ls")
def ls(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="Only cards of this name.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Only cards for this base model, architecture or fingerprint.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only cards with this tag.")] = None,
) -> None:
    """List cards; those in quarantine are marked."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        entries = registry.list(name=name, base=base, tag=tag, quarantined=True)
        cards = [arrowmoe.views.card(entry) for entry in entries]
    asked = name or base or tag
    empty = "no card is like that" if asked else "no cards; `arrowmoe skills import` or `skills sync` brings some"
    _show_cards(invocation, cards, empty)


@app.command()
def search(context: typer.Context, text: Annotated[str, typer.Argument(help="Words to look for.")]) -> None:
    """List cards with these words in name, description, domains, examples or tags."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        cards = [arrowmoe.views.card(entry) for entry in registry.search(text)]
    _show_cards(invocation, cards, "no card has these words")


@app.command()
def show(context: typer.Context, ref: Ref) -> None:
    """Show one card's description."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        entry = registry.entry(ref, quarantined=True)
        path, gate = None, None
        if entry.quarantined is None:
            path, gate = str(registry.path_of(entry.digest)), _gate(invocation, registry, entry.digest)
    found = arrowmoe.views.card(entry) | {"path": path, "gate": gate}
    invocation.out.result(found, lambda: _show_card(invocation, found), quiet=[found["digest"]])


@app.command()
def describe(
    context: typer.Context,
    ref: Ref,
    examples: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts that it is for, one a line or JSON rows; else its own examples."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Other such prompts, which p-values go by; else EXAMPLES, by turns."),
    ] = None,
    min_prompts: MinPrompts = MIN_PROMPTS,
    budget: Budget = MAX_STATISTICS_BYTES,
    no_stats: Annotated[bool, typer.Option("--no-stats", help="Take the statistics out.")] = False,
    description: Annotated[str | None, typer.Option(help="What the card is good at, if that changes.")] = None,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Keep the new version in this home, or only tell of it.")
    ] = True,
) -> None:
    """Give a card's next version statistics of prompts, by which routers know it; the prompts stay here."""
    if no_stats and (examples or calibration):
        raise typer.BadParameter("--no-stats takes no --examples and no --calibration")
    invocation = app_of(context)
    commands = arrowmoe.router_commands
    with invocation.registry() as registry, invocation.out.progress("describing") as advance:
        bench = commands.Workbench(registry, invocation.settings, advance)
        if no_stats:
            told = commands.undescribe(bench, ref, description=description, publish=publish)
        else:
            how = commands.Description(
                examples=examples,
                calibration=calibration,
                description=description,
                min_prompts=min_prompts,
                budget_bytes=budget,
            )
            told = commands.describe(bench, ref, how, publish=publish)
    if told["others"]:
        invocation.out.note(f"{told['others']} rows are of other cards and were left out")
    invocation.out.result(told, lambda: show_described(invocation.out, told), quiet=[told["digest"] or ""])


@app.command()
def export(context: typer.Context, ref: Ref, directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write a card as a PEFT adapter directory."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        digest = registry.entry(ref).digest
        path = registry.export(digest, directory)
    done = {"digest": digest, "path": str(path)}
    invocation.out.result(done, lambda: invocation.out.line(f"wrote {path}"), quiet=[path])


@app.command()
def rm(
    context: typer.Context,
    ref: Ref,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a card from this home: for good, if this node published it; else it is hidden here."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        entry = registry.entry(ref, quarantined=True)
        label = f"{entry.name}@{entry.version} {short(entry.digest)}"
        invocation.confirm(f"remove {label}", yes=yes)
        found = arrowmoe.views.card(registry.remove(entry.digest))
        own = entry.publisher == registry.identity.id
    invocation.out.result(found, lambda: invocation.out.line(f"removed {label}"), quiet=[entry.digest])
    if not own:
        invocation.out.note(f"it is hidden here; `arrowmoe skills unhide {short(entry.digest)}` lets it come back")


@app.command()
def unhide(context: typer.Context, ref: Ref) -> None:
    """Let a card that was removed here only come back with the next sync."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        card = registry.unhide(ref)
    found = {"digest": card.digest, "name": card.name, "version": card.version}
    text = f"{card.name}@{card.version} {short(card.digest)} may come back"
    invocation.out.result(found, lambda: invocation.out.line(text), quiet=[card.digest])


@app.command()
def admit(context: typer.Context, ref: Ref) -> None:
    """Let a card out of quarantine: from now on it is routed to and passed on."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        before = registry.entry(ref, quarantined=True)
        found = arrowmoe.views.card(registry.release(before.digest))
    label = f"{before.name}@{before.version} {short(before.digest)}"
    text = f"{label} was not in quarantine" if before.quarantined is None else f"admitted {label}"
    invocation.out.result(found, lambda: invocation.out.line(text), quiet=[before.digest])


@app.command()
def verify(
    context: typer.Context,
    ref: Annotated[str | None, typer.Argument(metavar="[CARD]")] = None,
    heal: Annotated[bool, typer.Option("--heal", help="Fetch damaged cards anew from peers that have them.")] = False,
) -> None:
    """Read every byte of a card, or of all; exit code 1 if any is damaged."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        reports = [arrowmoe.views.verified(report) for report in registry.verify(ref)]
        damaged = [one for one in reports if not one["ok"] and one["name"] is not None]
        if heal and damaged:
            restore = _restorer(invocation, registry)
            for one in damaged:
                one["not_healed"] = restore(one["digest"])["error"]
                one["ok"] = one["not_healed"] is None
    rows = [(f"{one['name'] or '?'}@{one['version'] or '?'}", short(one["digest"]), _state(one)) for one in reports]
    invocation.out.result(
        reports,
        lambda: invocation.out.table(("card", "digest", "state"), rows, "no cards"),
        quiet=[one["digest"] for one in reports if not one["ok"]],
    )
    if not all(one["ok"] for one in reports):
        raise typer.Exit(1)


def _restorer(invocation: App, registry: Registry) -> Callable[[str], Any]:
    """Mends the card with a digest: the running node does it, else this command."""
    record = invocation.node()
    if record is not None:
        return lambda digest: control.call(record, "restore", {"digest": digest})
    restore = arrowmoe.healing.restorer(registry, invocation.settings, found_here(invocation, registry))
    return lambda digest: restore({"digest": digest}, lambda done: None)


def _state(one: dict[str, Any]) -> str:
    if one["reason"] is None:
        return "ok"
    if "not_healed" not in one:
        return str(one["reason"])
    return f"{one['reason']}; " + ("healed" if one["ok"] else f"not healed: {one['not_healed']}")


@app.command()
def label(
    context: typer.Context,
    ref: Ref,
    name: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The label that shall mean the card here.")],
) -> None:
    """Give a card one more name and version in this home; the card stays as it is."""
    invocation = app_of(context)
    new_name, at, version = name.partition("@")
    with invocation.registry() as registry:
        digest = registry.entry(ref).digest
        label = f"{new_name}@{version if at else registry.next_version(new_name)}"
        before = [entry for entry in registry.list() if label in entry.labels and entry.digest != digest]
        registry.label(digest, *label.split("@", 1))
        found = arrowmoe.views.card(registry.entry(digest))
    for entry in before:
        invocation.out.note(f"{label} no longer means {short(entry.digest)}")
    invocation.out.result(found, lambda: invocation.out.line(" ".join(found["labels"])), quiet=found["labels"])


@app.command()
def tag(
    context: typer.Context,
    ref: Ref,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...")],
    remove: Annotated[bool, typer.Option("--remove", help="Take them off instead.")] = False,
) -> None:
    """Put tags on a card, in this home only."""
    invocation = app_of(context)
    with invocation.registry() as registry:
        digest = registry.entry(ref).digest
        (registry.untag if remove else registry.tag)(digest, *tags)
        found = arrowmoe.views.card(registry.entry(digest))
    invocation.out.result(found, lambda: invocation.out.line(" ".join(found["tags"]) or "no tags"), quiet=found["tags"])


app.command()(extract)
app.command()(sync)
app.command()(push)
app.command()(merge)
app.command()(quantise)
app.command()(ps)


def _show_cards(invocation: App, cards: list[dict[str, Any]], empty: str) -> None:
    rows = [
        (
            _called(card),
            short(card["digest"]),
            card["base_name"] or "?",
            card["rank"],
            size(card["nbytes"]),
            card["origin"]["address"] if card["origin"] else "here",
            card["description"].partition("\n")[0],
        )
        for card in cards
    ]
    columns = ("card", "digest", "base", "rank>", "size>", "from", "description")
    invocation.out.result(
        cards, lambda: invocation.out.table(columns, rows, empty), quiet=[card["digest"] for card in cards]
    )


def _called(card: dict[str, Any]) -> str:
    """What the card goes by in this home: its own name, unless that label was moved to another card."""
    own = f"{card['name']}@{card['version']}"
    if card["quarantined"] is not None:
        return f"{own} (quarantine)"
    return own if own in card["labels"] else next(iter(card["labels"]), f"{own} (no label)")


def _show_card(invocation: App, card: dict[str, Any]) -> None:
    origin = card["origin"]
    invocation.out.fields(
        [
            ("card", f"{card['name']}@{card['version']}"),
            ("digest", card["digest"]),
            ("labels", " ".join(card["labels"])),
            *([("quarantine", card["quarantined"])] if card["quarantined"] else ()),
            ("description", card["description"]),
            ("domains", ", ".join(card["domains"])),
            ("examples", " | ".join(card["examples"])),
            ("base", card["base_name"]),
            ("fingerprint", card["fingerprint"]),
            ("rank", card["rank"]),
            ("size", size(card["nbytes"])),
            ("publisher", card["publisher"]),
            ("created", card["created"]),
            ("added", card["added_at"]),
            ("from", f"{origin['address']} ({origin['peer_id']})" if origin else "here"),
            ("tags", " ".join(card["tags"])),
            ("file", card["path"]),
            *(evidence(card["gate"]) if card["gate"] else ()),
        ]
    )


def _gate(invocation: App, registry: Registry, digest: str) -> dict[str, Any] | None:
    """The gate's evidence, in short, on a card that a night has grown; None for any other."""
    try:
        evaluation = registry.get(digest).manifest.evaluation
    except ArrowMoEError as error:
        invocation.out.note(f"its file cannot be read, see `arrowmoe skills verify`: {error}")
        return None
    short: dict[str, Any] | None = arrowmoe.views.gate(evaluation.get("gate"))
    return short


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArrowMoEError(f"the file of examples cannot be read: {error}") from error
