"""Write ImageNet weights of a MobileNetV1 x0.5, whose batch norm is folded into its convolutions, for a student.

    python docs/comparisons/mobilenet_weights.py mobilenet_imagenet/

A student trains with batch norm, so each batch norm is given the mean and the variance that its convolution has on the
training images of ``cub100_84``, and the scale and shift that undo them. The network then computes what the folded one
computes, except for ReLU instead of ReLU6, and for the padding of convolutions with a stride: TensorFlow pads an image
of even size at its end only. The kernels are mirrored, which makes that end the left side; at the top it stays wrong.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from torch import nn

from refilled.data import load_task
from refilled.models import create_model, save_model

_IMAGES = 512

folder = Path(os.environ["REFILLED_DATA"]) / "teachers"
folded, _ = runpy.run_path(str(folder / "tf_mobilenet.py"))["load_mobilenet"]("mobilenetv1_050_imagenet")
task = load_task("cub100_84")
student = create_model("mobilenet_0.5", 1, image_size=task.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)
every = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:_IMAGES]
images = student.normalize(task.train.pixels[every])

convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
own = [module for module in student.modules() if isinstance(module, nn.Conv2d)]
with torch.no_grad():
    for source, conv, norm in zip(convolutions, own, norms, strict=True):
        conv.weight.copy_(source.weight.flip(3))
        images = conv(images)
        norm.running_mean.copy_(images.mean((0, 2, 3)))
        norm.running_var.copy_(images.var((0, 2, 3)))
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(source.bias + norm.running_mean)
        images = norm.eval()(images).relu()
save_model(student, Path(sys.argv[1]))
