"""AutoAttack that searches in TF32, on a CPU, which has no such arithmetic: the images, weights and
gradients of every convolution and matrix product are rounded to ten bits of mantissa, and sums are
float32's. Writes the record and, beside it, the outcomes of the images:

    python experiments/emulated_tf32.py cifar10-adv-resnet2b 2/255 200 record.json"""
import sys

import torch

from weat_nb import evaluate
from weat_nb.checks import check_number
from weat_nb.data import load_dataset
from weat_nb.pretrained import load_model

SOURCE = ('TF32 emulated on a CPU: images, weights and gradients of every product rounded to 10 '
          'bits of mantissa')


def rounded(x):
    "To the nearest number of ten bits of mantissa"
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Forward(torch.autograd.Function):
    "Rounds values, and leaves their gradient as it is"
    @staticmethod
    def forward(ctx, x): return rounded(x)

    @staticmethod
    def backward(ctx, gradient): return gradient


class Backward(torch.autograd.Function):
    "Leaves values as they are, and rounds their gradient"
    @staticmethod
    def forward(ctx, x): return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient): return rounded(gradient)


def emulate(make):
    "`search_copy` whose products are those of TF32"
    def search_copy(*args):
        copy = make(*args)
        for m in copy.model.modules():
            if not isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)): continue
            m.weight.data = rounded(m.weight.data)
            m.register_forward_pre_hook(lambda _, args: (Forward.apply(args[0]),))
            m.register_forward_hook(lambda _, args, out: Backward.apply(out))
        return copy
    return search_copy


if __name__ == '__main__':
    name, eps, images, file = sys.argv[1:]
    evaluate.search_copy = emulate(evaluate.search_copy)
    evaluate.check_arithmetic = lambda name, precision, device: precision # a CPU, all the same
    model, about, dataset = load_model(name)
    found = evaluate.evaluate(model, load_dataset(dataset, 'test'), 'autoattack', search='tf32',
                              num_images=int(images), eps=check_number('eps', eps),
                              about={**about, 'source': SOURCE}, show=False)
    print(found.save(file))
