"""All benchmarks by name."""

from openbagel.evals import clips, geneval, pictures, understanding
from openbagel.evals.base import Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        geneval.GENEVAL,
        geneval.GENEVAL_REWRITTEN,
        pictures.WISE,
        pictures.GEDIT_EN,
        pictures.GEDIT_CN,
        pictures.IMGEDIT,
        pictures.KRIS,
        pictures.RISE,
        pictures.INTELLIGENT,
        *understanding.SUITES,
        clips.VIDEO_QA,
        clips.NEXT_FRAMES,
    )
}
