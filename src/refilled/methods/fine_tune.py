"""Fine-tuning: the teacher's own network learns the new classes.

References:
    Yosinski et al., How Transferable Are Features in Deep Neural Networks?, NeurIPS 2014.
"""

from torch import nn

from refilled.outputs import ModelShape
from refilled.stages import FineTuning, Stage, Term


def fine_tune(student: None, teacher: ModelShape) -> FineTuning:
    """Train all of a copy of the teacher, with a fresh classifier, by cross-entropy; the student is as large.

    Rates that suit fresh weights soon undo what was learned on other classes. The ReFilled paper takes 1e-4 for
    50 epochs (supplement 2.1): ``--preset fine_tune``.
    """
    return FineTuning([Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})])
