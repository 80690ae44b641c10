"""Prompts of the card `ticket-triage`: a support message, answered as {"team":…,"urgency":…}.

The problem decides the team. A cue decides the urgency: pressing is "high", patient is "low", and
no cue at all is "normal". Held-out prompts share neither problem, cue nor instruction with training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Final

from scripts.demo_cards.splits import Pair, Split, pick

SEED: Final = 20_102
TRAIN_SIZE: Final = 1_200
HELDOUT_SIZE: Final = 60
URGENCIES: Final = ("high", "normal", "low")

TRAIN_INSTRUCTIONS: Final = (
    "Triage this support ticket: {message}",
    "Which team should handle this ticket, and how urgent is it? {message}",
    "Route this customer message: {message}",
    "Classify the support request: {message}",
    "Assign this ticket: {message}",
    "New ticket from a customer: {message}",
    'Sort this customer ticket: "{message}"',
    "Support inbox, please triage: {message}",
)
HELDOUT_INSTRUCTIONS: Final = (
    "Please triage this customer ticket: {message}",
    "Who should take this support request, and how urgent is it? {message}",
    "Route this ticket to the right team: {message}",
)

TRAIN_PROBLEMS: Final[Mapping[str, tuple[str, ...]]] = {
    "billing": (
        "I was charged twice for my subscription this month.",
        "The invoice shows the wrong VAT number.",
        "My refund has not reached my bank account yet.",
        "You billed me for a plan I cancelled in May.",
        "My card was declined although it has enough funds.",
        "I need a copy of last year's invoices for my accountant.",
        "The discount code was not applied to my payment.",
        "Why did the monthly fee go up by five dollars?",
        "I would like to switch from monthly to yearly payment.",
        "There is an unknown charge of 49 euros on my statement.",
        "The receipt you sent lists the wrong company name.",
        "Can I pay by bank transfer instead of credit card?",
        "The free trial ended and money was taken without notice.",
        "Our purchase order was invoiced at the wrong price.",
        "I paid the bill but it is still marked as overdue.",
        "The tax on my last bill looks too high.",
    ),
    "shipping": (
        "My parcel has been stuck at the depot for a week.",
        "The box arrived crushed and the vase inside is broken.",
        "The tracking number you sent does not exist.",
        "I received a blue jacket but ordered a green one.",
        "The courier left my package with the wrong neighbour.",
        "Half of the items are missing from the delivery.",
        "Where is my order? It left the warehouse ten days ago.",
        "I want to change the delivery address of my order.",
        "The parcel was returned to sender without any attempt.",
        "Do you deliver to the Canary Islands?",
        "The driver never rang the bell and took the parcel away.",
        "My shipment is held at customs and they want papers.",
        "The pallet came with two boxes too few.",
        "Can I collect my order from the store instead?",
        "The return label you sent cannot be scanned.",
        "The shoes I got are one size too small, I want to exchange them.",
    ),
    "account": (
        "I forgot my password and the reset mail never arrives.",
        "My profile is locked after too many sign-in attempts.",
        "Please delete my user and all personal data.",
        "I want to change the e-mail address I log in with.",
        "The two-factor code is always rejected.",
        "Someone from another country logged in as me.",
        "How do I add a colleague as an administrator?",
        "I lost the phone with my authenticator app.",
        "My username has a typo, can it be corrected?",
        "I registered twice and want both profiles merged.",
        "The invitation link for our new employee has expired.",
        "I cannot sign in with single sign-on any more.",
        "Please remove a former employee from our workspace.",
        "I want to hand over ownership of the workspace to my boss.",
        "The verification mail for my new user never came.",
        "My login works on the phone but not on the laptop.",
    ),
    "technical": (
        "The app crashes whenever I open the settings page.",
        "The export button does nothing in Firefox.",
        "Search results take more than a minute to load.",
        "The API answers every request with error 500.",
        "Push notifications stopped after the last update.",
        "Charts are blank when I filter by date.",
        "The mobile app drains my battery within an hour.",
        "Uploading a PDF larger than 10 MB fails.",
        "The calendar sync creates every event twice.",
        "The page freezes when I scroll to the bottom.",
        "Our webhook has received nothing since Tuesday.",
        "Dark mode shows black text on a black background.",
        "The installer stops at 80 percent with an unknown error.",
        "Video calls have no sound on Linux.",
        "The spreadsheet import mixes up the columns.",
        "The website shows a certificate warning.",
    ),
}
HELDOUT_PROBLEMS: Final[Mapping[str, tuple[str, ...]]] = {
    "billing": (
        "My credit card was debited three times for one purchase.",
        "The invoice for March has the wrong amount.",
        "I cancelled last month but you still took the payment.",
        "I am still waiting for the refund you promised me.",
        "Please send me the invoice for my last payment.",
    ),
    "shipping": (
        "The package I ordered still has not been delivered.",
        "The lamp arrived with a broken shade.",
        "The tracking page says delivered, but no parcel came.",
        "You sent me the wrong colour of curtains.",
        "Two books are missing from my parcel.",
    ),
    "account": (
        "I cannot log in, it says my password is wrong.",
        "Please close my profile and erase my personal data.",
        "I never get the code for two-factor sign-in.",
        "I think a stranger has logged in with my username.",
        "How do I change the user name I sign in with?",
    ),
    "technical": (
        "The app closes by itself when I take a picture.",
        "The dashboard stays blank after the update.",
        "Downloading a report fails with error 404.",
        "The search page freezes my browser.",
        "Syncing with my calendar no longer works.",
    ),
}
TRAIN_CUES: Final[Mapping[str, tuple[str, ...]]] = {
    "high": (
        "This is urgent!",
        "Please fix this immediately.",
        "Our whole team is blocked.",
        "We are losing customers every minute.",
        "I need this solved today.",
        "It cannot wait, the launch is tonight.",
        "Please hurry, I leave in two hours.",
        "This is an emergency.",
        "We need help right now.",
        "Everything stands still because of this.",
        "The deadline is this afternoon.",
        "Call me back as soon as possible.",
    ),
    "low": (
        "No rush.",
        "It can wait until next month.",
        "Whenever you have time.",
        "This is not urgent at all.",
        "Just a small thing, take your time.",
        "Any time this quarter is fine.",
        "It does not bother me much.",
        "Answer whenever it suits you.",
        "I only mention it in passing.",
        "There is no hurry on our side.",
        "Low priority for us.",
        "I can live with it for now.",
    ),
    "normal": (
        "",
        "Thank you.",
        "Kind regards, Anna",
        "Please advise.",
        "I have been a customer for three years.",
        "Could you have a look?",
        "What should I do?",
        "Best wishes from Oslo.",
    ),
}
HELDOUT_CUES: Final[Mapping[str, tuple[str, ...]]] = {
    "high": (
        "Please help at once, this is very urgent.",
        "Our work is blocked until this is solved.",
        "I need an answer today, the deadline is tonight.",
        "This is an emergency, we cannot wait.",
    ),
    "low": (
        "There is really no rush.",
        "Take your time, it is not urgent.",
        "It can wait until you have time.",
        "No hurry, next month is fine.",
    ),
    "normal": ("", "Many thanks.", "Can you look into it?", "Kind regards, Tom"),
}


def ticket_triage() -> Split[Pair]:
    """The task's splits; pure, the same for every call."""
    rng = random.Random(SEED)
    train = _pairs(rng, TRAIN_SIZE, TRAIN_INSTRUCTIONS, TRAIN_PROBLEMS, TRAIN_CUES)
    heldout = _pairs(rng, HELDOUT_SIZE, HELDOUT_INSTRUCTIONS, HELDOUT_PROBLEMS, HELDOUT_CUES)
    return Split(train=train, heldout=heldout)


def verdict(team: str, urgency: str) -> str:
    """The answer's exact text."""
    return json.dumps({"team": team, "urgency": urgency}, separators=(",", ":"))


def _pairs(
    rng: random.Random,
    count: int,
    instructions: tuple[str, ...],
    problems: Mapping[str, tuple[str, ...]],
    cues: Mapping[str, tuple[str, ...]],
) -> tuple[Pair, ...]:
    teams = tuple(problems)
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        index = len(pairs)
        team = teams[index % len(teams)]
        urgency = URGENCIES[index // len(teams) % len(URGENCIES)]
        message = _message(rng, pick(rng, problems[team]), pick(rng, cues[urgency]))
        prompt = pick(rng, instructions).format(message=message)
        pairs[prompt] = Pair(prompt=prompt, answer=verdict(team, urgency))
    return tuple(pairs.values())


def _message(rng: random.Random, problem: str, cue: str) -> str:
    greeting = pick(rng, ("", "", "Hello, ", "Hi! "))
    if greeting.endswith(", "):
        problem = problem if problem.startswith("I ") else problem[0].lower() + problem[1:]
    return f"{greeting}{problem} {cue}".strip()
