"""Makes the four cards that `arrowmoe demo` ships: data by our own templates, training, scores.

`python -m scripts.demo_cards.train --out DIR` does everything again, offline, on two cores.
"""

import os

from arrowmoe.threads import set_threads

# Both are read when torch and huggingface_hub are first imported, so they must be set before; a look-up offline costs a
# minute.
set_threads()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
