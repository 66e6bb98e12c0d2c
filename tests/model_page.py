"""The page that says what comet does with every MoE class of transformers.

    make models        # writes benchmarks/results/models.md for the installed transformers

A section for each version of transformers; that of the installed one is made anew, the others are
kept. `e2e/test_hf_families.py` runs every family and holds the outcomes to what the page says.
"""

from __future__ import annotations

import re
from pathlib import Path

from zoo import hf_families

PAGE = Path(__file__).parents[1] / "benchmarks" / "results" / "models.md"

# What is left as it is, and the reason that comet gives.
REFUSED = {
    ("Inkling2Experts", "grouped_mm"): "unknown_activation",
    ("Inkling2Experts", "batched_mm"): "unknown_activation",
    ("MuseSparkExperts", "grouped_mm"): "not_equivalent",
}
WHY = {
    "Inkling2Experts": "soft caps in its SwiGLU",
    "MuseSparkExperts": (
        "a norm over each expert's row, behind its GEMMs; in batched_mm these rows are in the "
        "order of their tokens, and all in front of the norm is rewritten"
    ),
}
# Models with experts of their own, outside the interface that transformers has for them: those that
# are rewritten, and those that are not.
OWN_REWRITTEN = {
    "llama4": "all experts on all tokens, in one bmm; rewritten to run the chosen ones",
}
OWN_EXPERTS = {
    "aria": "rows of an expert in a Python loop over counts",
    "dbrx": "a Python loop over the experts that are hit",
    "doge": "matrices of single columns, looked up for each token",
    "jetmoe": "a matrix product for each expert, of splits read on the host",
    "longcat_flash": "a Python loop over the experts that are hit",
    "nllb_moe": "a Python loop over the experts that are hit",
    "step3p7": "a Python loop over the experts that are hit",
    "switch_transformers": "a Python loop over the experts that are hit",
    "vitpose_backbone": "all experts on all tokens, chosen by the data set",
}
_INTRODUCTION = """# MoE models of transformers

Made by `make models`, and kept current by `tests/e2e/test_hf_families.py`, which finds every class
of experts in the sources of the installed transformers, compiles one of each family (classes of the
same code) in small sizes with `fullgraph=True` on CPU, and compares output and all gradients with
eager and with float32. *yes*: found, rewritten forward and backward, all values equal. Else the
reason of the refusal: such a layer is left as it was, and computes the same too.
"""


def section(version: str) -> str:
    """Return the section of the installed transformers."""
    families = hf_families.families()
    num_classes = sum(len(family.classes) for family in families)
    rows = ["| classes | grouped_mm | batched_mm | |", "|---|---|---|---|"]
    for family in families:
        outcomes = (
            REFUSED.get((family.name, implementation), "yes")
            for implementation in ("grouped_mm", "batched_mm")
        )
        cells = (", ".join(family.classes), *outcomes, WHY.get(family.name, ""))
        rows.append(f"| {' | '.join(cells)} |")
    own = hf_families.own_experts()
    rewritten = [f"- {name}: {OWN_REWRITTEN[name]}" for name in own if name in OWN_REWRITTEN]
    left = [f"- {name}: {OWN_EXPERTS[name]}" for name in own if name not in OWN_REWRITTEN]
    return "\n".join(
        (
            f"## transformers {version}",
            "",
            f"{num_classes} classes in {len(families)} families.",
            "",
            *rows,
            "",
            "With experts of their own, rewritten forward and backward:",
            "",
            *rewritten,
            "",
            "With experts of their own; none of them is rewritten yet:",
            "",
            *left,
            "",
        )
    )


def page(version: str, before: str) -> str:
    """Return the page with this version's section, those of others as they are in `before`."""
    kept = dict(re.findall(r"^(## transformers (?:\S+)$)(.*?)(?=^## |\Z)", before, re.M | re.S))
    parts = {head: (head + body).strip() + "\n" for head, body in kept.items()}
    parts[f"## transformers {version}"] = section(version)
    return "\n".join([_INTRODUCTION, *(parts[head] for head in sorted(parts, reverse=True))])


def main() -> None:
    """Write the page."""
    import transformers

    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page(transformers.__version__, before))


if __name__ == "__main__":
    main()
