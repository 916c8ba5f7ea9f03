"""Knowledge distillation and variational information distillation together.

References:
    Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019 (their KD + VID-I).
"""

from refilled.methods.kd import kd
from refilled.methods.vid import vid
from refilled.outputs import ModelShape
from refilled.stages import Stage


def kd_vid(
    student: ModelShape,
    teacher: ModelShape,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    vid_weight: float = 1.0,
) -> list[Stage]:
    """Match softened logits and predict feature maps; needs a teacher of the same classes (Ahn et al., CVPR 2019).

    The paper does not publish its weights. The defaults are those of the code commonly used for comparisons.

    Args:
        student: The student, with feature maps.
        teacher: The teacher, of the same classes and with feature maps.
        temperature: T of distillation.
        ce_weight: Weight of cross-entropy.
        kd_weight: Weight of distillation.
        vid_weight: Factor of the VID loss.
    """
    (distillation,) = kd(student, teacher, temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight)
    (prediction,) = vid(student, teacher, weight=vid_weight)
    return [Stage("classifier", {**prediction.terms, **distillation.terms})]  # cross-entropy has the weight of kd
