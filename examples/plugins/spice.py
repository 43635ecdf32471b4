"""SPICE as a plug-in of `engine score` (Anderson et al. 2016). NOT TESTED: this project has never run it with SPICE.

    engine score ... --metrics spice --plugin "spice=python examples/plugins/spice.py"

SPICE needs more than `pip install pycocoevalcap` provides. Its first run downloads Stanford CoreNLP 3.6 (about 400 MB)
into the folder of pycocoevalcap, and its jar is known to need Java 8 as `java` on the path and 8 GB of memory. This
project does not download anything, so only the exchange with `engine score` is tested, with a stand-in for SPICE. Run
it in a separate environment: `pip install pycocoevalcap`, then pass that environment's python to --plugin.

The contract is documented in engine/scoring/plugin.py. Texts are not preprocessed, neither here nor by `engine score`.
The score of an image is its F1. If it is not a number, `engine score` names the image and reports SPICE as unavailable.
"""

import contextlib
import json
import sys
from importlib.metadata import version


def main():
    """Read the header and the items from stdin; print a signature and one score per item."""
    sys.stdin.readline()  # the header, which is not needed here
    items = [json.loads(line) for line in sys.stdin]
    with contextlib.redirect_stdout(sys.stderr):  # SPICE prints its progress, but stdout is reserved for the scores
        from pycocoevalcap.spice.spice import Spice

        references = {i: item["references"] for i, item in enumerate(items)}
        candidates = {i: [item["candidate"]] for i, item in enumerate(items)}
        _, scores = Spice().compute_score(references, candidates)
    print(json.dumps({"signature": f"spice:F1|text:raw|pycocoevalcap:{version('pycocoevalcap')}"}))
    for item, score in zip(items, scores, strict=True):
        print(json.dumps({"id": item["id"], "score": float(score["All"]["f"])}))


if __name__ == "__main__":
    main()
