"A layer that changes its weights in eval(), for the tests of several doors"
import torch
from torch import nn


class Merged(nn.Linear):
    "An update of low rank that eval() adds to the weight and train() takes off, as loralib has it"
    def __init__(self, inputs, classes):
        super().__init__(inputs, classes)
        self.a, self.b = (nn.Parameter(torch.randn(2, inputs)),
                          nn.Parameter(torch.randn(classes, 2)))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged: self.weight.data += (-1 if mode else 1)*self.b@self.a
        self.merged = not mode
        return self

    def forward(self, x): return super().forward(x) + (0 if self.merged else x@self.a.T@self.b.T)
