"""RadEval's metrics of radiology texts as plug-ins of `engine score` (RadEval 2.2, arXiv 2509.18030).

    engine score ... --metrics radgraph --plugin "radgraph=ENV/bin/python examples/plugins/rad_eval.py radgraph"

RadEval needs packages that conflict with ours (transformers 5), so it runs in its own environment:
`python -m venv ENV; ENV/bin/pip install radeval`. The arguments are a metric of RadEval and, if it returns several
values, the one to use: `rad_eval.py rouge rougeL`, `rad_eval.py radgraph radgraph_partial`. The name of this file is
not radeval.py, which Python would import instead of the package.

RUN HERE with radeval 2.2.1: `bleu` and `rouge`, the only two that download nothing. NOT RUN HERE: `radgraph` (RadGraph
F1), `ratescore` and all others. They fetch models from the Hugging Face Hub at their first use, and this project
downloads nothing; only the exchange with `engine score` is tested for them, with a stand-in for RadEval.

The contract is documented in engine/scoring/plugin.py. Texts are not preprocessed, neither here nor by `engine score`.
With several references, an image gets the best score of them.
"""

import contextlib
import json
import sys
from importlib.metadata import version

DEFAULTS = {"radgraph": "radgraph_simple", "rouge": "rouge1"}
"""Value of a metric that returns several."""


def main():
    """Read the header and the items from stdin; print a signature and one score per item."""
    if len(sys.argv) not in (2, 3):
        sys.exit("rad_eval.py: give a metric of RadEval and, if it returns several values, the one to use")
    metric = sys.argv[1]
    sys.stdin.readline()  # the header, which is not needed here
    items = [json.loads(line) for line in sys.stdin]
    pairs = [(i, reference) for i, item in enumerate(items) for reference in item["references"]]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for the scores
        from radeval.radeval import RadEval

        evaluator = RadEval(metrics=[metric], per_sample=True, show_progress=False)
        results = evaluator(refs=[text for _, text in pairs], hyps=[items[i]["candidate"] for i, _ in pairs])
    value = sys.argv[2] if len(sys.argv) == 3 else DEFAULTS.get(metric, metric)
    if value not in results:
        sys.exit(f"rad_eval.py: {metric} has no value {value}, only {', '.join(results)}: give one of them")
    scores = {}
    for (i, _), score in zip(pairs, results[value], strict=True):
        scores[i] = max(float(score), scores.get(i, float("-inf")))
    print(json.dumps({"signature": f"radeval:{metric}/{value}|text:raw|radeval:{version('radeval')}"}))
    for i, score in scores.items():
        print(json.dumps({"id": items[i]["id"], "score": score}))


if __name__ == "__main__":
    main()
