"""Fine-tuning: the teacher's own network learns the new classes.

References:
    Yosinski et al., How Transferable Are Features in Deep Neural Networks?, NeurIPS 2014.
"""

from torch import nn

from refilled.outputs import ModelShape
from refilled.stages import FineTuning, Stage, Term


def fine_tune(student: None, teacher: ModelShape) -> FineTuning:
    """Train a copy of the teacher and a fresh classifier by cross-entropy; the student has the teacher's size.

    Learning rates for fresh weights soon destroy the learned embedding. The ReFilled paper uses 1e-4 for 50 epochs
    (supplement 2.1), as ``--preset fine_tune`` does.
    """
    return FineTuning([Stage("classifier", {"ce": Term(nn.CrossEntropyLoss())})])
