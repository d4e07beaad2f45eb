"""The verbs of the command line: `openbagel generate` and all others.

Every verb is a frozen dataclass: its fields are its arguments, its docstring is its help, its `run` does the
work and returns an exit code other than 0 if it has one.
"""

from openbagel.verbs.models import Convert, Doctor, Download, Info
from openbagel.verbs.scores import Eval, EvalCurve, EvalReport
from openbagel.verbs.serving import Serve, Ui
from openbagel.verbs.training import DataConvert, DataDoctor, DataExample, Train, TrainPlot
from openbagel.verbs.use import Ask, Demo, Edit, Generate, Video

VERBS: dict[str, type] = {
    verb.__name__.lower(): verb
    for verb in (Generate, Ask, Edit, Video, Serve, Ui, Info, Download, Doctor, Demo, Eval, Train, Convert)
}
VERBS |= {
    "eval report": EvalReport,
    "eval curve": EvalCurve,
    "train plot": TrainPlot,
    "data doctor": DataDoctor,
    "data convert": DataConvert,
    "data example": DataExample,
}
