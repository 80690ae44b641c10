"""Prompts of the card `iso-dates`: a date in free form inside a sentence, answered as ISO 8601.

Held-out prompts share neither sentence, instruction nor calendar day with the training prompts.
Only unambiguous forms are written (never 03/04/2021).
"""

from __future__ import annotations

import datetime as dt
import random
from typing import Final

from scripts.demo_cards.splits import Pair, Split, pick

SEED: Final = 20_101
TRAIN_SIZE: Final = 1_200
HELDOUT_SIZE: Final = 60
FIRST_YEAR: Final = 1950
LAST_YEAR: Final = 2035
# Every fifth calendar day belongs to the held-out set (a seventh would hold out one weekday).
HELDOUT_MODULUS: Final = 5

MONTHS: Final = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
SHORT_MONTHS: Final = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sept", "Oct", "Nov", "Dec"]
WEEKDAYS: Final = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

FORMS: Final = (
    "{month} {ordinal}, {year}",
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "the {ordinal} of {month} {year}",
    "{ordinal} {month} {year}",
    "{short} {day}, {year}",
    "{day} {short} {year}",
    "{day}-{short}-{year}",
    "{weekday}, {month} {day}, {year}",
    "{weekday} the {ordinal} of {month}, {year}",
)

TRAIN_INSTRUCTIONS: Final = (
    "Write the date in this sentence as ISO 8601: {sentence}",
    "Convert the date to ISO format: {sentence}",
    "What is the ISO date here? {sentence}",
    "Normalise the date: {sentence}",
    "Turn the date in this note into ISO 8601: {sentence}",
    "Which date is meant, in ISO format? {sentence}",
    "{sentence} Give me that date in ISO format.",
    "{sentence} What date is that in ISO 8601?",
    "Extract the date: {sentence}",
    "Reformat the date for a database: {sentence}",
)
HELDOUT_INSTRUCTIONS: Final = (
    "Please rewrite this date in ISO 8601 form: {sentence}",
    "I need the ISO date from this: {sentence}",
    "{sentence} How is that date written in ISO format?",
    "Standardise the date in this text: {sentence}",
)

TRAIN_SENTENCES: Final = (
    "The rent is due on {date}.",
    "Our lease ends on {date}.",
    "She was born on {date}.",
    "The warranty runs out on {date}.",
    "The ship left the harbour on {date}.",
    "Order 4471 was placed on {date}.",
    "The contract was signed on {date} in Lisbon.",
    "We moved into the new office on {date}.",
    "The bridge was opened to traffic on {date}.",
    "My passport expires on {date}.",
    "The concert takes place on {date} at 8 pm.",
    "The committee met on {date} to discuss the budget.",
    "His last day at work was {date}.",
    "The exam is scheduled for {date}.",
    "The package arrived on {date}, two days late.",
    "Version 3 was released on {date}.",
    "The museum closes for repairs on {date}.",
    "They got married on {date} by the sea.",
    "The library book must be back by {date}.",
    "Flight 218 departs on {date}.",
    "The patent was filed on {date}.",
    "I last changed the oil on {date}.",
    "Registration opens on {date} for all 60 students.",
    "The photo was taken on {date} near the lake.",
    "The court ruled on {date} that the sale was valid.",
    "The subscription renews on {date}.",
    "Both teams played in the rain on {date}.",
    "The old mill burned down on {date}.",
    "Our next meeting is on {date} in room 12.",
    "The satellite was launched on {date}.",
)
HELDOUT_SENTENCES: Final = (
    "The invoice is due on {date}.",
    "The vaccine was given on {date} by Dr Weber.",
    "Applications close on {date}.",
    "The treaty came into force on {date}.",
    "Her train ticket is valid until {date}.",
    "The bakery first opened its doors on {date}.",
    "Ticket 902 was closed on {date}.",
    "The storm reached the coast on {date}.",
    "The roof was last inspected on {date}.",
    "My grandfather retired on {date} after 41 years.",
)


def iso_dates() -> Split[Pair]:
    """The task's splits; pure, the same for every call."""
    rng = random.Random(SEED)
    train = _pairs(rng, TRAIN_SIZE, TRAIN_INSTRUCTIONS, TRAIN_SENTENCES, heldout=False)
    heldout = _pairs(rng, HELDOUT_SIZE, HELDOUT_INSTRUCTIONS, HELDOUT_SENTENCES, heldout=True)
    return Split(train=train, heldout=heldout)


def spell(day: dt.date, form: str) -> str:
    """A day written in one of `FORMS`."""
    return form.format(
        month=MONTHS[day.month - 1],
        short=SHORT_MONTHS[day.month - 1],
        weekday=WEEKDAYS[day.weekday()],
        day=day.day,
        ordinal=f"{day.day}{_suffix(day.day)}",
        year=day.year,
    )


def is_heldout(day: dt.date) -> bool:
    """Whether a calendar day belongs to the held-out prompts."""
    return day.toordinal() % HELDOUT_MODULUS == 0


def _pairs(
    rng: random.Random,
    count: int,
    instructions: tuple[str, ...],
    sentences: tuple[str, ...],
    *,
    heldout: bool,
) -> tuple[Pair, ...]:
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        index = len(pairs)
        day = _day(rng, month=index % 12 + 1, heldout=heldout)
        date = spell(day, FORMS[(index + index // 12) % len(FORMS)])
        sentence = pick(rng, sentences).format(date=date)
        prompt = pick(rng, instructions).format(sentence=sentence)
        pairs[prompt] = Pair(prompt=prompt, answer=day.isoformat())
    return tuple(pairs.values())


def _day(rng: random.Random, *, month: int, heldout: bool) -> dt.date:
    while True:
        day = dt.date(rng.randint(FIRST_YEAR, LAST_YEAR), month, 1)
        day += dt.timedelta(days=rng.randrange(31))
        if day.month == month and is_heldout(day) == heldout:
            return day


def _suffix(number: int) -> str:
    if number in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
