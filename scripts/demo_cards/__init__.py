"""Makes the four cards that `arrowmoe demo` ships: data by our own templates, training, scores.

`python -m scripts.demo_cards.train --out DIR` does everything again, offline, on two cores.
"""

import os

# Both are read when torch and huggingface_hub are first imported, so they must be set before.
# Spinning workers make a loaded machine several times slower; a hub look-up offline costs a minute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
