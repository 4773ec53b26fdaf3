"""The parameters of 05_claims."""

from __future__ import annotations

from sdcomp.study.parameter_rules.common import COMMON, COUNT, TOLERANCE, Rule, Study, one_of, there


def _is_folder(path: str) -> bool:
    return (found := there(path)) is not None and found.is_dir()


STUDY = Study(
    {
        **COMMON,
        "reports": Rule(_is_folder, "an existing folder, such as reports"),
        "score": one_of("prompt accuracy", "CLIP score"),
        "tolerance": TOLERANCE,
        "n_images": COUNT,
    }
)
