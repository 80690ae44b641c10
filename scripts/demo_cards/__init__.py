"""Makes the four cards that `arrowmoe demo` ships: data by our own templates, training, scores.

`python -m scripts.demo_cards.train --out DIR` does everything again, offline, on two cores.
"""

import os

from arrowmoe.threads import wait_politely

# Both are read when torch and huggingface_hub are first imported, so they must be set before; a look-up offline costs a
# minute.
wait_politely()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
