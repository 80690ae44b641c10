"""Texts of the card `review-verdict`: product reviews whose neighbours should share the verdict.

Wordings come as opposite twins that differ in a few words, so topic and wording both mislead a
plain sentence encoder. Held-out reviews share neither product nor wording with training; the
reference set speaks of the held-out products in training wordings, every verdict for each.
"""

from __future__ import annotations

import random
from typing import Final

from scripts.demo_cards.splits import Labelled, Split

SEED: Final = 20_103
LABELS: Final = ("recommended", "not recommended")
REFERENCES_PER_PRODUCT: Final = 4
HELDOUT_PER_PRODUCT: Final = 3

TRAIN_PRODUCTS: Final = [
    "kettle",
    "laptop",
    "tent",
    "backpack",
    "toaster",
    "jacket",
    "printer",
    "bicycle",
    "mattress",
    "blender",
    "lamp",
    "camera",
    "headset",
    "keyboard",
    "suitcase",
    "drill",
    "sofa",
    "vacuum",
    "umbrella",
    "watch",
    "stroller",
    "microwave",
    "monitor",
    "scooter",
    "pillow",
    "grill",
    "router",
    "razor",
    "guitar",
    "saw",
    "phone",
    "heater",
    "desk",
    "shoe",
    "mixer",
    "speaker",
]
HELDOUT_PRODUCTS: Final = [
    "dishwasher",
    "tablet",
    "raincoat",
    "projector",
    "hammock",
    "freezer",
    "violin",
    "helmet",
    "bookshelf",
    "thermos",
    "lawnmower",
    "telescope",
]

# (recommended, not recommended)
TRAIN_WORDINGS: Final = (
    ("I would buy this {x} again.", "I would never buy this {x} again."),
    ("The {x} does all it promises.", "The {x} does none of what it promises."),
    ("After a year the {x} still works like new.", "After a week the {x} no longer worked."),
    ("This {x} is worth every cent.", "This {x} is not worth a cent."),
    ("My neighbours now all want the same {x}.", "I warned my neighbours about this {x}."),
    ("The {x} survived three falls unharmed.", "The {x} did not survive its first fall."),
    ("I am glad that I kept the {x}.", "I am glad that I could return the {x}."),
    ("Setting up the {x} took two minutes.", "Setting up the {x} took a whole weekend."),
    ("The {x} is quieter than I expected.", "The {x} is far louder than I expected."),
    ("Best {x} I have had so far.", "Worst {x} I have had so far."),
    ("The maker replaced a part of my {x} free of charge.", "The maker ignored all mails about my {x}."),
    ("Hard to find a fault with this {x}.", "Hard to find anything good in this {x}."),
    ("The {x} feels solid and well made.", "The {x} feels flimsy and badly made."),
    ("I cannot imagine life without this {x}.", "I can live very well without this {x}."),
    ("This {x} was a bargain.", "This {x} was a waste of money."),
    ("The {x} made our days easier.", "The {x} made our days harder."),
    ("I use the {x} every day with pleasure.", "The {x} gathers dust in the cellar."),
    ("The {x} looks even better than in the picture.", "The {x} looks nothing like the picture."),
    ("Five stars for the {x}.", "One star for the {x}, only because zero is impossible."),
    ("It is a joy to use this {x}.", "It is a pain to use this {x}."),
    ("The {x} came well packed and complete.", "The {x} came scratched and incomplete."),
    ("Nothing on the {x} has worn out yet.", "Something new breaks on the {x} every month."),
    ("My old {x} cannot compare to this one.", "My old {x} was better than this one."),
    ("I ordered a second {x} for my sister.", "I sent the {x} back the same day."),
    ("The manual of the {x} is clear and short.", "The manual of the {x} is confusing and wrong."),
    ("The {x} exceeded my hopes.", "The {x} fell short of my hopes."),
    ("You get a lot of {x} for little money.", "You get very little {x} for a lot of money."),
    ("The {x} never lets me down.", "The {x} keeps letting me down."),
    ("Even my grandmother manages the {x} at once.", "Even an engineer cannot manage the {x}."),
    ("Thumbs up for this {x}.", "Hands off this {x}."),
    ("The reviews praising the {x} are right.", "I do not understand who praises this {x}."),
    ("The {x} is comfortable from the first minute.", "The {x} hurts after a few minutes."),
    ("The support team solved my question on the {x} kindly.", "The support team hung up when I asked about the {x}."),
    ("Great {x}, fast and reliable.", "Poor {x}, slow and unreliable."),
    ("I love this {x}.", "I regret buying this {x}."),
    ("The {x} is cleaned in no time.", "The {x} is impossible to clean."),
    ("A clever design makes this {x} special.", "A design flaw makes this {x} useless."),
    ("The {x} smells of nothing and feels fine.", "The {x} smells awful even after weeks."),
    ("This {x} has earned its place in our home.", "This {x} went straight into the bin."),
    ("The cheap price hides a really good {x}.", "The shiny box hides a really bad {x}."),
)
HELDOUT_WORDINGS: Final = (
    ("I can only recommend the {x}.", "I can only advise against the {x}."),
    ("I am delighted with my {x}.", "I am disappointed with my {x}."),
    ("The {x} has run for years without trouble.", "The {x} gave me trouble from day one."),
    ("I would choose the same {x} tomorrow.", "I would not choose this {x} a second time."),
    ("Money well spent on this {x}.", "Money thrown away on this {x}."),
    ("The {x} is excellent value.", "The {x} is a rip-off."),
    ("The {x} is sturdy and nicely finished.", "The {x} fell apart in my hands."),
    ("A friend envies me for this {x}.", "I had to apologise for giving this {x} as a present."),
    ("The {x} keeps its word.", "The {x} breaks its promises."),
    ("Everyone in the family is happy with the {x}.", "Everyone in the family complains about the {x}."),
    ("The {x} is simple to handle.", "The {x} is a nightmare to handle."),
    ("I smile whenever I use the {x}.", "I swear whenever I use the {x}."),
)


def review_verdict() -> Split[Labelled]:
    """The task's splits; pure, the same for every call."""
    rng = random.Random(SEED)
    train = [
        Labelled(text=wording.format(x=product), label=label)
        for product in TRAIN_PRODUCTS
        for twins in TRAIN_WORDINGS
        for label, wording in zip(LABELS, twins, strict=True)
    ]
    rng.shuffle(train)
    reference = _per_product(rng, TRAIN_WORDINGS, REFERENCES_PER_PRODUCT)
    heldout = _per_product(rng, HELDOUT_WORDINGS, HELDOUT_PER_PRODUCT)
    return Split(train=tuple(train), heldout=heldout, reference=reference)


def _per_product(rng: random.Random, wordings: tuple[tuple[str, str], ...], count: int) -> tuple[Labelled, ...]:
    """For every held-out product, `count` wordings of each verdict."""
    return tuple(
        Labelled(text=twins[side].format(x=product), label=label)
        for product in HELDOUT_PRODUCTS
        for side, label in enumerate(LABELS)
        for twins in rng.sample(wordings, count)
    )
