"""What the original of `cw_linf` does, recorded in cw_linf.json: success and distance per image.

The original is CarliniLInfMethod of adversarial-robustness-toolbox, one image at a time,
in an environment of its own:

    pip install --no-deps adversarial-robustness-toolbox==1.20.1
    pip install scikit-learn six tqdm
    python tests/record_cw_linf.py
"""
import json
from pathlib import Path

import torch
from torch import nn

from weat_nb.data import load_dataset, to_float

RECORD = Path(__file__).with_name('cw_linf.json')
SETTINGS = dict(paper=dict(max_iter=10, initial_const=1., largest_const=1.1),
                longer=dict(max_iter=25, initial_const=1., largest_const=1.1, decrease_factor=.7))


def subject():
    "Random convolutions under a ridge regression, which a seed fixes, and the first 40 test images"
    gen = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 24, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 8 * 8, 10))
    net.requires_grad_(False)
    net[0].weight.copy_(torch.randn(net[0].weight.shape, generator=gen) / 5)
    net[0].bias.copy_(torch.rand(24, generator=gen) / 5)
    train, test = load_dataset('fashion_mini', 'train'), load_dataset('fashion_mini', 'test')
    features = net[:3](to_float(train.images[:3000])).double()
    answers = torch.eye(10, dtype=torch.float64)[train.labels[:3000]]
    ridge = torch.linalg.solve(
        features.T @ features + 30 * torch.eye(features.shape[1]), features.T @ answers)
    net[3].weight.copy_(30 * ridge.T)
    net[3].bias.zero_()
    return net.eval(), to_float(test.images[:40]), test.labels[:40]


def record():
    from art.attacks.evasion import CarliniLInfMethod
    from art.estimators.classification import PyTorchClassifier
    import art
    net, x, y = subject()
    classifier = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type='cpu')
    runs = {}
    for name, settings in SETTINGS.items():
        x_adv = torch.from_numpy(
            CarliniLInfMethod(classifier, **settings, verbose=False).generate(x.numpy(), y.numpy()))
        runs[name] = dict(
            misclassified=(net(x_adv).argmax(1) != y).int().tolist(),
            distance=[round(d, 6) for d in (x_adv - x).abs().flatten(1).amax(1).tolist()])
    about = (f'CarliniLInfMethod of adversarial-robustness-toolbox {art.__version__}, untargeted, '
             'on the subject of record_cw_linf.py')
    logits = [[round(v, 4) for v in row] for row in net(x[:3]).tolist()]
    RECORD.write_text(json.dumps(dict(
        about=about, settings=SETTINGS, natural=(net(x).argmax(1) != y).int().tolist(),
        logits=logits, runs=runs)) + '\n')


if __name__ == '__main__': record()
